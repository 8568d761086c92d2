"""A thread for calls that may block for as long as they like."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Calls functions in a thread, in the order in which they were asked for, never two at a time.

    The thread is a daemon and none of asyncio's executor: neither ``asyncio.run`` nor Python's exit
    waits for a call that hangs, in a pipe that nobody reads or on a mount that is gone. There is a
    thread only while there is something to call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._running = False

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call it and return what it returns.

        When this is cancelled, a call that has begun goes on, and one that has not is dropped.
        """
        return await asyncio.wrap_future(self.submit(function, *arguments))

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Have it called after all that was asked for before."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                future.set_exception(error)

        with self._lock:
            self._calls.append(call)
            if not self._running:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._running = True
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._running = False
                    return
                call = self._calls.popleft()
            call()
