"""How the journal is written: in one thread, by one process, within its bounds.

What is appended becomes visible all at once, by the transaction that moves `State.position`; a long
append is written in several, so that the file beside the database, ``-wal``, stays small. The
oldest blocks go in the transaction that needs their room, and their pages are used again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from walstream.changes import Change, Layout
from walstream.errors import SinkFailed
from walstream.journal import file
from walstream.journal.blocks import Block, encoded, microseconds, time_of
from walstream.journal.file import PAGE_BYTES, Sizes, State, Work, transaction
from walstream.journal.layouts import definition_of, own_types
from walstream.lsn import ZERO, Lsn
from walstream.positions import BEGINNING, Position
from walstream.values import PgType

_WAL_PART: Final = 8
_WAL_LEAST_BYTES: Final = 256 << 10
_WAL_MOST_BYTES: Final = 16 << 20
"""``-wal`` may have an eighth of the room, within these bounds."""

_SLACK_PART: Final = 256
"""When there is no room, this part of all is made at once: deleting costs less then."""

_MOST_LAYOUTS: Final = 20_000
_CHECKPOINT_MILLISECONDS: Final = 200
_RELEASE_PAGES: Final = 4096


class Bounds(msgspec.Struct, frozen=True):
    """How much there may be, and how old."""

    max_bytes: int
    max_age_seconds: float

    @property
    def wal_bytes(self) -> int:
        """What is left for ``-wal``."""
        return min(max(self.max_bytes // _WAL_PART, _WAL_LEAST_BYTES), _WAL_MOST_BYTES)

    @property
    def group_bytes(self) -> int:
        """What one transaction writes, unless one block is larger."""
        return self.wal_bytes // 4

    @property
    def block_bytes(self) -> int:
        """How large a block may be that is kept at all: one change can be as large as it likes."""
        return self.max_bytes // 8

    @property
    def append_bytes(self) -> int:
        """How much of one append is kept."""
        return (self.max_bytes - self.wal_bytes) // 2

    def pages(self, written_bytes: int) -> int:
        """Return how many pages the file may have when so much is written at once."""
        large = max(written_bytes - self.group_bytes, 0)
        return (self.max_bytes - self.wal_bytes - 2 * large) // PAGE_BYTES


class Front(NamedTuple):
    """The oldest block's times."""

    oldest_time: int
    newest_time: int


class _Known(NamedTuple):
    """A layout that new blocks use: its number, the first of them, and the types it was kept with."""

    number: int
    since_block: int
    types: list[PgType]


class Writer:
    """Has the file open, and a lock on it; all its methods block."""

    def __init__(self, path: Path, bounds: Bounds, *, durable: bool) -> None:
        self.path = path
        self.state = State()
        self.newest_time: int | None = None
        self.front: Front | None = None
        self.sizes = Sizes(0, 0)
        self.appended = 0
        self._bounds = bounds
        self._durable = durable
        self._lock = -1
        self._connection: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None
        self._seen = 0
        self._layouts: dict[Layout, _Known] = {}
        self._unfinished = False

    def open(self, history: str) -> None:
        """Take the lock, open the file, and begin anew when it was kept under other rules.

        Raises:
            SetupError: see `file.lock_to_write` and `file.connect_to_write`.
            SinkFailed: it cannot be written to now.
        """
        if self._connection is None:
            self._lock = file.lock_to_write(self.path)
            try:
                self._connect()
            except BaseException:
                self.close()
                raise
        if self.state.history != history:
            self._begin_anew(msgspec.structs.replace(self._renewed(), history=history))

    def close(self) -> None:
        """Let go of the file and of the lock."""
        connection, self._connection = self._connection, None
        self._layouts.clear()
        try:
            if connection is not None:
                connection.close()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def append(self, changes: Sequence[Change], told: Position) -> None:
        """Keep changes, all or none.

        Args:
            changes: behind ``told``, in order.
            told: up to where the caller knows what is here. What stands behind it and is here was
                appended by a call whose end nobody waited for, and is not kept twice.

        Raises:
            ValueError: they are not in order.
            SinkFailed: there is no room although the oldest were removed.
        """
        _verify_order(changes, told)
        if self.state.position > told:
            changes = [one for one in changes if Position.of(one) > self.state.position]
            if not changes:
                return
        self._learn(dict.fromkeys(change.layout for change in changes))
        blocks = list(encoded(changes, lambda layout: self._layouts[layout].number))
        kept = self._kept(blocks)
        groups = list(_groups(kept, self._bounds.group_bytes)) or [[]]
        ending = _Ending(blocks, len(kept))
        number = self.state.next_block
        self._unfinished = len(groups) > 1
        for place, group in enumerate(groups):
            is_last = place == len(groups) - 1
            self._verify_room(group)
            self._write(_Appending(self, group, number, ending if is_last else None, len(kept)).work)
            number += len(group)
        self._unfinished = False
        self.appended += len(changes)

    def cover(self, lsn: Lsn) -> None:
        """Note up to where nothing is missing, and remove what is too old."""
        if lsn > self.state.covered:
            self._write(
                lambda connection, state: self.expire(
                    connection, msgspec.structs.replace(state, covered=lsn)
                )
            )

    def interrupt(self, at: Lsn) -> None:
        """Begin anew behind a position."""
        begins = Position.after(at)
        self._begin_anew(
            msgspec.structs.replace(self._renewed(), begins=begins, position=begins, covered=at)
        )

    def refresh(self) -> None:
        """See what another process has removed."""
        self._write(lambda _connection, state: state)

    # ---- Opening

    def _connect(self) -> None:
        self._connection = file.connect_to_write(
            self.path, durable=self._durable, wal_bytes=self._bounds.wal_bytes
        )
        self._file = self.path.stat()
        self._reload()
        self._unfinished = True  # what a process was killed at
        self._write(self._tidy)
        self._shrink()

    def _tidy(self, connection: sqlite3.Connection, state: State) -> State:
        """Retire all layouts: those that are used again are found by what they are."""
        connection.execute(_RETIRE_ALL, [state.next_block - 1])
        return self.expire(connection, self.make_room(connection, state, 0))

    def _shrink(self) -> None:
        """Bring the file below its bound, which may have been larger; free pages go to the system."""
        limit = self._bounds.pages(0)
        while file.pragma(self._opened, "page_count") > limit:
            if not file.pragma(self._opened, "freelist_count"):
                break
            file.release(self._opened, _RELEASE_PAGES)
        if file.sizes(self.path).total_bytes > self._bounds.max_bytes:
            file.checkpoint(self._opened)
        self._measure()

    def _renewed(self) -> State:
        state = self.state
        return State(
            history=state.history,
            generation=state.generation + 1,
            begins=BEGINNING,
            position=BEGINNING,
            covered=ZERO,
            since_time=_now(),
            next_block=state.next_block,
        )

    def _begin_anew(self, state: State) -> None:
        """Forget everything, on disk too."""

        def work(connection: sqlite3.Connection, _: State) -> State:
            connection.execute("DELETE FROM blocks")
            connection.execute("DELETE FROM layouts")
            return state

        had_changes = bool(self.front) or self._unfinished
        self._layouts.clear()
        self._write(work)
        self._layouts.clear()
        self.newest_time = None
        if had_changes:
            # What is left is written anew, so that nothing of what was masked since can be read.
            self._opened.execute("VACUUM")
            file.checkpoint(self._opened)
            self._measure()

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SinkFailed(f"the journal {self.path} is not open")
        return self._connection

    # ---- Transactions

    def _write(self, work: Work) -> None:
        """Do work in a transaction; when it fails nothing of it is kept, here neither."""
        connection = self._opened
        try:
            with transaction(connection):
                if file.other_changes(connection) != self._seen:
                    self._reload()
                if self._unfinished:
                    pass
                state = work(connection, self.state)
                if state != self.state:
                    file.save_state(connection, state)
                front = self._front(connection, state)
        except BaseException:
            self._layouts.clear()  # some may have got their number in it
            raise
        self.state, self.front = state, front
        self._measure()

    def _reload(self) -> None:
        connection = self._opened
        self._seen = file.other_changes(connection)
        self.state = file.load_state(connection)
        self.front = self._front(connection, self.state)
        rows = connection.execute(_NEWEST, [self.state.next_block]).fetchall()
        self.newest_time = rows[0][0] if rows else None
