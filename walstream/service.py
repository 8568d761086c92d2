"""A stream under a supervisor: signals, reloads, and what systemd is told.

SIGINT or SIGTERM finishes what is in hand, a second one exits at once. SIGHUP reads the
configuration again and lets sinks reopen their files.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import structlog

from walstream import logs, systemd
from walstream.config import Config
from walstream.daemon import Daemon
from walstream.errors import WalstreamError
from walstream.summary import Summary
from walstream.systemd import Notifier

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.service")

CONFIRM_SECONDS = 10.0
"""What a stop may take beyond draining: the last position is confirmed, sinks are closed."""

T = TypeVar("T")


class Stoppable(Protocol):
    """Work that goes on until it is told to stop."""

    def stop(self) -> None:
        """Finish what is in hand."""

    @property
    def is_busy(self) -> bool:
        """Whether a handler's function still runs although the work has ended."""


async def run_until_signal(
    stoppable: Stoppable,
    run: Callable[[], Coroutine[Any, Any, T]],
    *,
    on_stopping: Callable[[], None] = lambda: None,
) -> T:
    """Run until it ends or is told to by a signal; the second signal exits at once.

    Args:
        stoppable: is told to stop.
        run: does the work.
        on_stopping: called at the first signal, before that.
    """
    loop = asyncio.get_running_loop()
    signalled = False

    def on_signal(number: signal.Signals) -> None:
        nonlocal signalled
        if signalled:
            os._exit(128 + number)
        signalled = True
        log.info("stopping", signal=number.name)
        on_stopping()
        stoppable.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return await run()


async def serve(daemon: Daemon, load: Callable[[], Config]) -> Summary:
    """Run a daemon as a service.

    Args:
        daemon: to be run.
        load: reads the configuration again.

    Raises:
        WalstreamError: what ended the stream.
    """
    return await _Service(daemon, load).run()


class _Service:
    def __init__(self, daemon: Daemon, load: Callable[[], Config]) -> None:
        self._daemon = daemon
        self._load = load
        self._notifier = Notifier.from_environment()
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self) -> Summary:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        telling = asyncio.create_task(systemd.keep_telling(self._notifier, self._daemon.vitals))
        try:
            return await run_until_signal(
                self._daemon, self._daemon.run, on_stopping=self._tell_stopping
            )
        finally:
            for task in (telling, *self._reloads):
                task.cancel()
            self._notifier.close()

    def _tell_stopping(self) -> None:
        self._notifier.stopping(self._daemon.drain_seconds + CONFIRM_SECONDS)

    def _on_hangup(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            config = await self._daemon.reload(self._load)
        except WalstreamError as error:
            # Without the trace: it is the operator's file that is wrong, and all goes on.
            log.error("reload_refused", error=error.message, hint=error.hint)  # noqa: TRY400
        else:
            logs.configure(config.log.level, config.log.format)
            log.info("reloaded", routes=len(config.routes), sinks=len(config.sinks))
        finally:
            await self._daemon.reopen_sinks()
            self._notifier.reloaded()
