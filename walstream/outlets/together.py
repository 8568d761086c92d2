"""Tasks that deliver: run together, told to end together, and cancelled by nobody else.

A handler, or a library that it uses, may cancel the task that calls it, or swallow a cancellation
of ours. The two are told apart by who has told the task to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final
from weakref import WeakSet

from walstream.errors import HandlerFailed

_CANCEL_SECONDS: Final = 2.0
"""How long a handler gets to end when it is cancelled."""

_told_to_end: Final[WeakSet[asyncio.Task[None]]] = WeakSet()
"""Tasks that `run_together` has cancelled: any other cancellation is a handler's own."""


async def run_together(
    coroutines: Iterable[Coroutine[Any, Any, None]],
    *,
    on_failure: Callable[[], None],
    drain_seconds: float,
) -> None:
    """Run until all have returned, or one has failed and the others have finished.

    Args:
        coroutines: what to run.
        on_failure: called when one fails while others still run: they shall finish.
        drain_seconds: how long they may take for that.

    Raises:
        Exception: what one of them raised.
    """
    tasks = [asyncio.create_task(_watched(coroutine)) for coroutine in coroutines]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            on_failure()
            await asyncio.wait(pending, timeout=drain_seconds)
    finally:
        _told_to_end.update(tasks)
        for task in tasks:
            task.cancel()
        # One that swallows its cancellation for ever is left behind: `Outlet.is_busy`.
        await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


async def _watched(coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        await coroutine
    except asyncio.CancelledError:
        if is_told_to_end():
            raise
        raise HandlerFailed(
            "a task that delivers was cancelled from outside",
            hint="a handler, or a library that it uses, cancels the task that has called it when"
            " the call is over",
        ) from None


def is_told_to_end() -> bool:
    """Whether `run_together` has cancelled the current task, whatever a handler made of that."""
    return asyncio.current_task() in _told_to_end


async def settle_cancellation() -> None:
    """Pass a cancellation of ours on; one that the handler has made itself is over now.

    Raises:
        asyncio.CancelledError: the task is to end, whatever the handler made of that.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    if task not in _told_to_end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # what the handler has left for the next await
    if task in _told_to_end:
        raise asyncio.CancelledError
    while task.uncancel():
        pass
