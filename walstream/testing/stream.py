"""``HandlerStream``: the handlers of an application on a slot of a test's database."""

from __future__ import annotations

import asyncio
import copy
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any, Final, Protocol, Self, TextIO, cast

import structlog

from walstream import config as configuration
from walstream import logs
from walstream.app import Walstream
from walstream.changes import Change
from walstream.config import ENV_PREFIX, Config
from walstream.destinations import Handler
from walstream.lsn import Lsn
from walstream.summary import Summary
from walstream.testing.databases import Database, async_wait_until
from walstream.testing.life import Crash, Life
from walstream.testing.slot import RewindableSlot

DRAIN_SECONDS: Final = 30.0
"""How long `HandlerStream.drain` waits unless it is told otherwise."""


class DrainTimedOut(TimeoutError):
    """Not everything was taken in time; the message says which handler holds what."""


class NotCrashed(AssertionError):
    """A crash was armed, and the handlers were not called often enough for it."""


class HandlerStream:
    """Handlers that run in the test's own process, on a slot of their own.

    ::

        stream = walstream_stream(app)
        walstream_database.execute("INSERT INTO orders VALUES (1)")
        await stream.drain()

    The slot is made at once: what is committed afterwards comes. `drain` runs the handlers until
    everything that is committed by now is taken. To have them run beside the test, use the stream
    as a context: ``async with stream: ...``; `drain` then waits for them.

    A handler that raises is not called again, unless the configuration or its route says so: what
    it raised is the cause of the HandlerFailed that `drain` raises. ``WALSTREAM_...`` variables of
    the environment do not count.
    """

    def __init__(
        self, database: Database | str, app: Walstream | None = None, **config: Any
    ) -> None:
        """Make a slot for handlers.

        Args:
            database: where, or a connection string; the role must be allowed to replicate.
            app: whose handlers run, as they are attached by now; the application itself is left as
                it is. Without one there is `app`, to attach handlers to.
            **config: sections of the configuration, such as ``handlers={"attempts": 3}``. Database
                and slot are the test's in any case.

        Raises:
            ConfigError: the configuration is wrong.
            psycopg.Error: the slot cannot be made.
        """
        self.app = Walstream() if app is None else _copy(app)
        self.changes: list[Change] = []
        """What `record` keeps, in the order of the calls; what comes again is there again."""
        self._own = Database(database) if isinstance(database, str) else None
        self._database = self._own or cast("Database", database)
        self.slot = f"walstream_test_{secrets.token_hex(4)}"
        folder = mkdtemp(prefix="walstream-test-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.config = _configure(self._database.dsn, self.slot, Path(folder), config)
        self._slot = self._make_slot()
        self._recorders: list[Handler] = []
        self._crash = Crash()
        self._life: Life | None = None
        self._began_at: Lsn | None = None
        self._called: set[str] = set()

    async def drain(self, timeout_seconds: float = DRAIN_SECONDS) -> Summary:
        """Return when everything that was committed by now is taken.

        Returns:
            What has been done since the handlers were started. After a crash, what was done until
            then: `crashed` tells.

        Raises:
            WalstreamError: what ended the stream; of HandlerFailed, ``__cause__`` is what the
                handler raised.
            DrainTimedOut: some handler still holds a change.
            NotCrashed: `crash_after` was not reached.
        """
        if self.is_running:
            return await self._caught_up(timeout_seconds)
        self._begin(until="now")
        summary = await self._ended(timeout_seconds)
        if self._crash.calls_left is not None:
            raise self._not_crashed()
        return summary

    async def redeliver(self, timeout_seconds: float = DRAIN_SECONDS) -> list[str]:
        """Deliver again what the last run was given, and then the rest, as `drain` does.

        The slot is put back to where the last run began: that is where a process starts again that
        was killed before it could confirm anything.

        Returns:
            The ids of what handlers were called with before, and now again, in this order.

        Raises:
            RuntimeError: the handlers run; nothing comes twice to a process that goes on.
            Exception: as `drain`.
        """
        if self.is_running:
            raise RuntimeError("the handlers run: let them crash or stop before redeliver()")
        if not self.crashed:  # a crash has put it back already
            await self._rewind()
        before = set(self._called)
        self._begin(until="now")
        life = self._life
        await self._ended(timeout_seconds)
        assert life is not None  # noqa: S101 - it has just begun
        return [one for one in dict.fromkeys(life.called) if one in before]

    def crash_after(self, calls: int) -> None:
        """Let the process die as soon as so many more calls of handlers have returned.

        The effect of the last call is there, and the change is not taken; nothing is confirmed to
        the server, and no handler is called any more. With 0 it dies at the first call. Handlers of
        `record` do not count. Afterwards `drain` and `redeliver` start a new life.

        Raises:
            ValueError: the number is negative.
        """
        if calls < 0:
            message = f"a crash comes after 0 calls or more, not {calls}"
            raise ValueError(message)
        self._crash.arm(calls)

    async def crash(self) -> None:
        """Let the running process die now, as `crash_after` does.

        Raises:
            RuntimeError: the handlers do not run.
        """
        if self._life is None or not self.is_running:
            raise RuntimeError("the handlers do not run: there is nothing to crash")
        await self._life.kill()
        await self._ended(DRAIN_SECONDS)

    @property
    def crashed(self) -> bool:
        """Whether the last run has ended in a crash."""
        return self._life is not None and self._life.crashed

    @property
    def is_running(self) -> bool:
        """Whether the handlers run beside the test."""
        return self._life is not None and not self._life.task.done()

    def start(self) -> None:
        """Run the handlers beside the test, until `stop`.

        Raises:
            RuntimeError: they run already.
        """
        if self.is_running:
            raise RuntimeError("the handlers run already")
        self._begin(until=None)

    async def stop(self, timeout_seconds: float = DRAIN_SECONDS) -> Summary:
        """Stop the handlers that `start` has started: what is in hand is finished and confirmed.

        Raises:
            WalstreamError: what has ended them before.
            DrainTimedOut: some handler still holds a change.
            RuntimeError: they were never started.
        """
        if self._life is None:
            raise RuntimeError("the handlers were not started")
        await self._life.stop()
        return await self._ended(timeout_seconds)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        life = self._life
        if life is None or life.told:
            return
        if exception is None:
            await self.stop()
        else:
            await _gone(life)

    def record(self, table: str = "*.*", *operations: str, **route: Any) -> None:
        """Keep the changes of a route in `changes`; the arguments are those of ``Walstream.on``."""

        @self.app.on(table, *operations, **route)
        async def keep(taken: Change | list[Change]) -> None:
            self.changes += taken if isinstance(taken, list) else [taken]

        self._recorders.append(self.app.handlers[-1][1])

    def confirmed_flush_lsn(self) -> Lsn:
        """Ask the server up to where the slot is confirmed."""
        return self._slot.confirmed_flush_lsn()

    def close(self) -> None:
        """Drop the slot; a process that still streams from it is sent away."""
        try:
            self._slot.drop()
        finally:
            if self._own is not None:
                self._own.close()

    def _make_slot(self) -> RewindableSlot:
        try:
            return RewindableSlot(self._database, self.slot)
        except BaseException:
            if self._own is not None:
                self._own.close()
            raise

    def _begin(self, until: str | None) -> None:
        if not self.app.handlers:
            self.record()
        _configure_logs(self.config)
        self._began_at = self._slot.confirmed_flush_lsn()
        self._life = Life(
            self.app, self.config, self._crash, until=until, uncounted=self._recorders
        )

    async def _ended(self, timeout_seconds: float) -> Summary:
        """Wait for the end of the run, and clean up after a crash."""
        life = self._life
        assert life is not None  # noqa: S101 - the callers have begun one
        try:
            async with asyncio.timeout(timeout_seconds):
                summary = await asyncio.shield(life.task)
        except TimeoutError:
            if life.task.done():  # it was not our time that is over
                raise
            raise self._timed_out(life, timeout_seconds) from None
        finally:
            life.told = True
            await _gone(life)
            self._called.update(life.called)
        if life.crashed:
            self._crash.disarm()
            await self._rewind()
        return summary

    async def _caught_up(self, timeout_seconds: float) -> Summary:
        """Wait until the run beside the test has passed what is committed by now."""
        life = self._life
        assert life is not None  # noqa: S101 - it is running
        target = await asyncio.to_thread(self._written)
        try:
            await async_wait_until(
                lambda: life.flush_lsn >= target or life.task.done(), timeout_seconds
            )
        except AssertionError:
            raise self._timed_out(life, timeout_seconds, target) from None
        if life.task.done():
            return await self._ended(timeout_seconds)
        return life.summary()

    def _written(self) -> Lsn:
        with self._database.connect() as connection:
            row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None  # noqa: S101 - a SELECT of a function
        return Lsn.parse(row[0])

    async def _rewind(self) -> None:
        if self._began_at is not None:
            await asyncio.to_thread(self._slot.rewind, self._began_at)

    def _timed_out(
        self, life: Life, timeout_seconds: float, target: Lsn | None = None
    ) -> DrainTimedOut:
        held = "; ".join(map(str, life.held)) or "no handler holds a change"
        wanted = "" if target is None else f" of {target}"
        return DrainTimedOut(
            f"not everything was taken within {timeout_seconds:g} seconds: {held}; acknowledged up"
            f" to {life.flush_lsn}{wanted}"
        )

    def _not_crashed(self) -> NotCrashed:
        wanted = self._crash.armed_with
        done = wanted - (self._crash.calls_left or 0)
        self._crash.disarm()
        return NotCrashed(
            f"crash_after({wanted}) was not reached: everything is taken, and {done} calls of"
            " handlers have returned"
        )


class MakeStream(Protocol):
    """The fixture ``walstream_stream``: makes streams that are closed after the test."""

    def __call__(
        self, app: Walstream | None = None, *, dsn: str | None = None, **configuration: Any
    ) -> HandlerStream:
        """Make a stream; ``dsn`` names another database than that of ``walstream_dsn``."""


async def _gone(life: Life) -> None:
    """Let a run end that nobody waits for any more."""
    if not life.task.done():
        life.task.cancel()
        await asyncio.wait({life.task})


def _copy(app: Walstream) -> Walstream:
    """Return an application with the same handlers, to attach others to."""
    copied = copy.copy(app)
    copied.handlers = list(app.handlers)
    return copied


def _configure(dsn: str, slot: str, folder: Path, sections: Mapping[str, Any]) -> Config:
    content = {
        "dead_letters": {"path": folder / "dead-letters.sqlite3"},
        **sections,
        "handlers": {"attempts": 1, **sections.get("handlers", {})},
        "postgres": {"dsn": dsn},
        "slot": {"name": slot},
    }
    with _without_our_variables():
        return configuration.parse(content, source="walstream_stream")


@contextmanager
def _without_our_variables() -> Iterator[None]:
    """Keep the environment out of it: it may lead to a database that is no test's."""
    ours = [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]
    kept = {name: os.environ.pop(name) for name in ours}
    try:
        yield
    finally:
        os.environ.update(kept)


class _CurrentStderr:
    """Writes to what is ``sys.stderr`` at the moment: pytest puts another one there per test."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _configure_logs(config: Config) -> None:
    """Log as ``walstream run`` does, unless the project has configured structlog itself."""
    if not structlog.is_configured():
        logs.configure(config.log.level, config.log.format)
        stderr = cast("TextIO", _CurrentStderr())
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(stderr))
