"""The mixed workload, going on through restarts of the server."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Final, Self

import psycopg

from tests import workload
from tests.postgres import wait_until

UP_SECONDS: Final = 30.0

REBUILD: Final = (
    """
    DROP SCHEMA IF EXISTS public, "Sales, 2026.*", "ünï 💡" CASCADE;
    CREATE SCHEMA public;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
    """
    + workload.SCHEMA
)
"""One transaction: nobody ever sees the tables missing."""


class Enough(Exception):
    """The workload is to end."""


class Load:
    """Writes in a thread while the block runs, so many transactions a second.

    When its connections are cut it makes its tables anew, since it cannot know what of its last
    transactions was committed, and goes on.
    """

    def __init__(self, dsn: str, seed: int, transactions_per_second: float) -> None:
        self.begun = 0
        self.rebuilt = 0
        self._dsn = dsn
        self._seed = seed
        self._pause_seconds = 1 / transactions_per_second
        self._ended = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop writing; what was committed stays."""
        self._ended.set()
        self._may_run.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """Begin no more transactions for now."""
        self._may_run.clear()

    def resume(self) -> None:
        """Go on."""
        self._may_run.set()

    def _run(self) -> None:
        try:
            self._write()
        except Enough:
            pass
        except BaseException as failure:  # noqa: BLE001 - told by end()
            self._failure = failure

    def _write(self) -> None:
        while not self._ended.is_set():
            with suppress(psycopg.OperationalError, psycopg.InterfaceError):
                self._rebuild()
                workload.run(self._dsn, self._seed + self.rebuilt, 1_000_000_000, self._pace)

    def _pace(self) -> None:
        self._ended.wait(self._pause_seconds)
        self._may_run.wait()
        if self._ended.is_set():
            raise Enough
        self.begun += 1

    def _rebuild(self) -> None:
        if not wait_until(self._is_up, UP_SECONDS):
            return
        self.rebuilt += 1
        with ExitStack() as opened:
            connection = psycopg.connect(self._dsn, autocommit=True)
            opened.enter_context(connection)
            workload._roll_back_prepared(self._dsn)
            connection.execute(REBUILD.encode())

    def _is_up(self) -> bool:
        if self._ended.is_set():
            raise Enough
        try:
            psycopg.connect(self._dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.02)
            return False
        return True
