"""How the journal is written: in one thread, by one process, within its bounds.

What is appended becomes visible at once, by the transaction that moves ``State.position``; a long
append is written in several, so that the file beside the database, ``-wal``, stays small. The
oldest blocks go in the transaction that needs their room, and their pages are used again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from walstream.changes import Change, Layout
from walstream.errors import SetupError, SinkFailed
from walstream.journal import file
from walstream.journal.attachments import Attachment, load_attachment, save_attachment
from walstream.journal.blocks import BLOCK_BYTES, Block, encoded
from walstream.journal.file import PAGE_BYTES, Sizes, State, Work
from walstream.journal.layouts import definition_of, own_types
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.values import PgType

T = TypeVar("T")

_SLACK_PART: Final = 256
"""When there is no room, this part of all is made at once: deleting costs less then."""

_MOST_LAYOUTS: Final = 20_000
_HELD_MILLISECONDS: Final = 200
"""How long readers in other processes are waited for when ``-wal`` has to be emptied."""

_RELEASED_PAGES: Final = 4096
_CLEAN_PAGES: Final = 16
"""What a journal without changes has at most, without what is left of earlier ones."""


class Bounds(msgspec.Struct, frozen=True):
    """How much there may be, and how old."""

    max_bytes: int
    max_age_seconds: float

    @property
    def wal_bytes(self) -> int:
        """What of it is left for ``-wal``."""
        return min(max(self.max_bytes // 8, 256 << 10), 16 << 20)

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

    def wal_bytes_for(self, written_bytes: int) -> int:
        """How large ``-wal`` may get by a transaction that writes so much."""
        return self.wal_bytes + 2 * max(written_bytes - self.group_bytes, 0)

    def pages_for(self, written_bytes: int) -> int:
        """How many pages the file may have then."""
        return (self.max_bytes - self.wal_bytes_for(written_bytes)) // PAGE_BYTES


class Front(NamedTuple):
    """The oldest block's times."""

    oldest_time: int
    newest_time: int


class _Known(NamedTuple):
    """A layout that new blocks may use, from which block on, and the types it was kept with."""

    number: int
    since_block: int
    types: list[PgType]

    def is_current(self, layout: Layout) -> bool:
        """Whether its types are still the same; a type may have been learned anew."""
        return all(layout.types.get(one.oid) is one for one in self.types)


class Writer:
    """Has the file open, and a lock; its methods block, and are called one at a time."""

    def __init__(self, path: Path, bounds: Bounds, *, durable: bool) -> None:
        self.path = path
        self.state = State()
        self.front: Front | None = None
        self.newest_time: int | None = None
        self.sizes = Sizes(0, 0)
        self.appended = 0
        self.failure = ""
        self._bounds = bounds
        self._durable = durable
        self._lock = -1
        self._connection: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None
        self._seen = 0
        self._layouts: dict[Layout, _Known] = {}
        self._is_unfinished = False
        self._reserved = 0

    def attempt(self, work: Callable[..., T], *arguments: object) -> T:
        """Call one of the methods, and note why it has failed.

        Raises:
            SinkFailed: it could not be done now.
        """
        try:
            return work(*arguments)
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error
        except SinkFailed as failure:
            if failure.__cause__ is None:  # otherwise it is noted
                self.failure = failure.message
            raise

    def prepare(self) -> None:
        """Take the lock, and open the file.

        Raises:
            SetupError: see `file.lock_to_write` and `file.connect_to_write`.
        """
        if self._connection is None:
            self._lock = file.lock_to_write(self.path)
            try:
                self._connect()
            except BaseException:
                self.close()
                raise

    def open(self, history: str, accept_gap: bool = False) -> int:  # noqa: FBT001, FBT002 - by a worker
        """Begin anew when what is here was kept under other rules; return how much is forgotten.

        Raises:
            SetupError: as `prepare`; or what is here is of another slot or cluster.
        """
        self.prepare()
        before = self.state
        if before.history == history:
            return 0
        if before.changes and not accept_gap and _subject(before.history) != _subject(history):
            raise SetupError(
                f"the journal {self.path} has {before.changes} changes of"
                f" {_subject(before.history) or 'something else'}, and this is"
                f" {_subject(history)}",
                hint="give each slot a file of its own (journal.path); --accept-gap begins this one"
                " anew, and forgets what is in it",
            )
        self._begin_anew(self._renewed(history=history))
        return before.changes

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
        """Keep changes, all or none; of more than there is room for, the last.

        Args:
            changes: behind ``told``, in order.
            told: up to where the caller knows what is here. What stands behind it and is here was
                appended by a call whose end nobody waited for, and is not kept twice.

        Raises:
            ValueError: they are not in order.
            SinkFailed: the bound cannot be held.
        """
        _verify_order(changes, told)
        if self.state.position > told:
            changes = [one for one in changes if Position.of(one) > self.state.position]
        if not changes:
            return
        self._learn(list(dict.fromkeys(change.layout for change in changes)))
        size_bytes = min(BLOCK_BYTES, self._bounds.block_bytes // 2)
        known = self._layouts
        blocks = list(encoded(changes, lambda layout: known[layout].number, size_bytes=size_bytes))
        self._store(blocks, self._fitting(blocks))
        self.newest_time = blocks[-1].newest_time
        self.appended += len(changes)

    def cover(self, lsn: Lsn) -> None:
        """Note up to where nothing is missing, and remove what is too old."""
        if lsn <= self.state.covered:
            return
        self._write(
            lambda connection, state: self._expire(
                connection, msgspec.structs.replace(state, covered=lsn)
            )
        )

    def interrupt(self, at: Lsn) -> None:
        """Begin anew behind a position."""
        begins = Position.after(at)
        self._begin_anew(self._renewed(begins=begins, position=begins, covered=at))

    def attachment(self, stream: str, route: str) -> Attachment | None:
        """Return how far a handler with history is."""
        return load_attachment(self._opened, stream, route)

    def attach(self, stream: str, route: str, attachment: Attachment) -> None:
        """Note how far a handler with history is."""

        def work(connection: sqlite3.Connection, state: State) -> State:
            save_attachment(connection, stream, route, attachment)
            return state

        self._write(work)

    def refresh(self) -> None:
        """See what another process has removed."""
        self._write(lambda _, state: state)

    # ---- Opening, and beginning anew

    def _connect(self) -> None:
        self._connection = file.connect_to_write(
            self.path, durable=self._durable, wal_bytes=self._bounds.wal_bytes
        )
        self._file = self.path.stat()
        self._reload(self._connection)
        self._write(self._tidy)
        self._shrink()
        if not self.state.changes:
            self._clean()

    def _tidy(self, connection: sqlite3.Connection, state: State) -> State:
        """Remove what an append did not finish, and what the bounds do not allow any more."""
        connection.execute(_UNFINISHED, [state.next_block])
        return self._expire(connection, self._make_room(connection, state, []))

    def _shrink(self) -> None:
        """Give pages back that a larger bound had allowed."""
        connection = self._opened
        limit = self._bounds.pages_for(0)
        while file.pragma(connection, "page_count") > limit:
            with file.transaction(connection):
                if not file.release(connection, _RELEASED_PAGES):
                    break
        self._measure()
        if self.sizes.total_bytes > self._bounds.max_bytes:
            self._empty_wal()

    def _begin_anew(self, renewed: State) -> None:
        def work(connection: sqlite3.Connection, _: State) -> State:
            connection.execute("DELETE FROM blocks")
            connection.execute("DELETE FROM layouts")
            return renewed

        self._layouts.clear()
        self._write(work)
        self.newest_time = None
        self._clean()

    def _renewed(self, **fields: object) -> State:
        state = self.state
        anew = State(
            history=state.history,
            generation=state.generation + 1,
            since_time=_now(),
            next_block=state.next_block,
        )
        return msgspec.structs.replace(anew, **fields)

    def _clean(self) -> None:
        """Leave nothing in the file of what was forgotten: it may be masked since."""
        if file.pragma(self._opened, "page_count") > _CLEAN_PAGES:
            self._opened.execute("VACUUM")
        self._empty_wal()

    # ---- Appending

    def _learn(self, layouts: list[Layout]) -> None:
        """Give layouts their numbers, as far as they have none."""
        known = self._layouts
        if len(known) + len(layouts) > _MOST_LAYOUTS:
            known.clear()
        new = [one for one in layouts if one not in known or not known[one].is_current(one)]
        if not new:
            return
        learned: dict[Layout, _Known] = {}

        def work(connection: sqlite3.Connection, state: State) -> State:
            if not known:  # whatever was in use is found again by what it is
                connection.execute(_RETIRE_ALL, [state.next_block - 1])
            for layout in new:
                types = own_types(layout)
                number = _number_of(connection, definition_of(layout, types))
                learned[layout] = _Known(number, state.next_block, types)
            return state

        self._write(work)
        known.update(learned)

    def _fitting(self, blocks: list[Block]) -> list[Block]:
        """Return the last blocks, as many as there is room for."""
        room = self._bounds.append_bytes
        place = len(blocks)
        while place and len(blocks[place - 1].data) <= min(room, self._bounds.block_bytes):
            place -= 1
            room -= len(blocks[place].data)
        return blocks[place:]

    def _store(self, blocks: list[Block], kept: list[Block]) -> None:
        """Write the blocks that are kept; those before them were appended and trimmed at once."""
        if self._is_unfinished:
            self._write(self._tidy)
            self._is_unfinished = False
        number = self.state.next_block
        self._reserved = number + len(kept)
        groups = list(_groups(kept, self._bounds.group_bytes))
        for group in groups[:-1]:
            self._is_unfinished = True
            self._write_group(group, number, blocks, kept, is_last=False)
            number += len(group)
        last = groups[-1] if groups else []
        self._write_group(last, number, blocks, kept, is_last=True)
        self._is_unfinished = False

    def _write_group(
        self,
        group: list[Block],
        number: int,
        blocks: list[Block],
        kept: list[Block],
        *,
        is_last: bool,
    ) -> None:
        def work(connection: sqlite3.Connection, state: State) -> State:
            if len(kept) < len(blocks):
                state = self._forget(connection, state, state.next_block - 1)
            state = self._make_room(connection, state, group)
            for its_number, block in enumerate(group, start=number):
                file.insert(connection, its_number, block, latest[its_number - number])
            if is_last:
                state = self._expire(connection, _ended(state, blocks, kept))
            return state

        before = kept[: number - self.state.next_block]
        start = max([self.state.latest_time, *(block.newest_time for block in before)])
        latest = list(accumulate((block.newest_time for block in group), max, initial=start))[1:]
        self._verify_room(group)
        self._write(work)

    # ---- Bounds

    def _make_room(self, connection: sqlite3.Connection, state: State, group: list[Block]) -> State:
        """Remove the oldest blocks until there is room for these."""
        written = _written_bytes(group)
        limit = self._bounds.pages_for(written)
        needed = written // PAGE_BYTES
        while (over := file.used_pages(connection) + needed - limit) > 0:
            size_bytes = (over + limit // _SLACK_PART) * PAGE_BYTES
            last = file.oldest_up_to(connection, state, size_bytes)
            if last is None:
                if written:
                    raise self._too_small()
                break
            state = self._forget(connection, state, last)
        if (pages := file.pragma(connection, "page_count") - limit) > 0:
            file.release(connection, pages)
        return state

    def _expire(self, connection: sqlite3.Connection, state: State) -> State:
        """Remove blocks of which all is too old."""
        oldest = _now() - int(self._bounds.max_age_seconds * 1_000_000)
        front = _front(connection, state)
        if front is None or front.newest_time >= oldest:
            return state
        last = file.older_than(connection, state, oldest)
        return state if last is None else self._forget(connection, state, last)

    def _forget(self, connection: sqlite3.Connection, state: State, last: int) -> State:
        """Remove blocks, and the layouts that none needs any more."""
        for layout, known in list(self._layouts.items()):
            if known.since_block <= last:  # it gets a new number, so that the old one can go
                connection.execute(_RETIRE, [max(self._reserved, state.next_block), known.number])
                del self._layouts[layout]
        connection.execute("DELETE FROM layouts WHERE last_block <= ?", [last])
        return file.forget(connection, state, last)

    def _verify_room(self, group: list[Block]) -> None:
        """Make sure that ``-wal`` stays within its part: beside a reader it grows and grows."""
        written = _written_bytes(group)
        room = self._bounds.wal_bytes_for(written)
        if self.sizes.wal_bytes + written <= room:
            return
        self._empty_wal()
        if self.sizes.wal_bytes + written > room:
            raise SinkFailed(
                f"the journal {self.path} cannot be kept within max_bytes: another process reads"
                " from it and does not end",
                hint="find out which (fuser), and end it",
            )

    def _too_small(self) -> SinkFailed:
        return SinkFailed(
            f"the journal {self.path} has no room: the shapes of tables take all of it",
            hint="raise max_bytes under [journal]",
        )

    def _empty_wal(self) -> None:
        connection = self._opened
        connection.execute(f"PRAGMA busy_timeout = {_HELD_MILLISECONDS}")
        try:
            file.checkpoint(connection)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(file.BUSY_SECONDS * 1000)}")
        self._measure()

    # ---- Transactions

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SinkFailed(f"the journal {self.path} is not open")
        return self._connection

    def _write(self, work: Work) -> None:
        """Do work in a transaction; when it fails nothing of it is kept, here neither."""
        connection = self._opened
        try:
            with file.transaction(connection):
                if file.other_changes(connection) != self._seen:
                    self._reload(connection)
                state = work(connection, self.state)
                if state != self.state:
                    file.save_state(connection, state)
                front = _front(connection, state)
        except BaseException as error:
            self._layouts.clear()  # one may have got its number in it
            if not isinstance(error, sqlite3.Error):
                raise
            failure = self._failed(error)
            with suppress(sqlite3.Error):  # what -wal takes may be the room that is missing
                file.checkpoint(connection)
            raise failure from error
        self.state, self.front = state, front
        self.failure = ""
        self._measure()

    def _failed(self, error: Exception) -> SinkFailed:
        self.failure = file.reason_of(error, self.path).word
        return file.failed(error, self.path)

    def _reload(self, connection: sqlite3.Connection) -> None:
        self._seen = file.other_changes(connection)
        try:
            self.state = file.load_state(connection)
        except ValueError as error:
            raise self._failed(error) from error
        rows = connection.execute(_NEWEST, [self.state.next_block]).fetchall()
        self.newest_time = rows[0][0] if rows else None

    def _measure(self) -> None:
        self.sizes = file.sizes(self.path)
        try:
            is_same = self._file is not None and os.path.samestat(self._file, self.path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise SinkFailed(
                f"the journal {self.path} was removed or replaced while in use",
                hint="start walstream again: the journal begins anew, and clients that come back"
                " are told so (reset)",
            )


def _subject(history: str) -> str:
    """Return of what the changes are that a history stands for."""
    return history.partition(" ")[0]


def _verify_order(changes: Sequence[Change], told: Position) -> None:
    last_lsn, last_ordinal = told
    for change in changes:
        lsn, ordinal = change.transaction.end_lsn, change.ordinal
        if lsn < last_lsn or (lsn == last_lsn and ordinal <= last_ordinal):
            last = Position(last_lsn, last_ordinal)
            message = f"the change {change.id} does not come after {last}"
            raise ValueError(message)
        last_lsn, last_ordinal = lsn, ordinal


def _number_of(connection: sqlite3.Connection, definition: bytes) -> int:
    digest = hashlib.sha256(definition).digest()
    rows = connection.execute("SELECT id FROM layouts WHERE digest = ?", [digest]).fetchall()
    if rows:
        [(number,)] = rows
        connection.execute("UPDATE layouts SET last_block = NULL WHERE id = ?", [number])
        return int(number)
    inserted = connection.execute(
        "INSERT INTO layouts (digest, definition) VALUES (?, ?)", [digest, definition]
    )
    assert inserted.lastrowid is not None  # noqa: S101 - a row has one
    return inserted.lastrowid


def _groups(blocks: list[Block], size_bytes: int) -> Iterator[list[Block]]:
    """Divide blocks so that each part has this size at most, or is one block."""
    group: list[Block] = []
    total = 0
    for block in blocks:
        if group and total + len(block.data) > size_bytes:
            yield group
            group, total = [], 0
        group.append(block)
        total += len(block.data)
    if group:
        yield group


def _ended(state: State, blocks: list[Block], kept: list[Block]) -> State:
    """Return where the journal stands when blocks were appended, of which the last are kept."""
    since_time, begins = state.since_time, state.begins
    if not state.latest_time:  # the first: what came before it was committed before it
        since_time = blocks[0].oldest_time - 1
    if dropped := blocks[: len(blocks) - len(kept)]:
        begins = dropped[-1].last
        since_time = max([since_time, *(block.newest_time for block in dropped)])
    return msgspec.structs.replace(
        state,
        begins=begins,
        position=blocks[-1].last,
        since_time=since_time,
        latest_time=max([state.latest_time, *(block.newest_time for block in blocks)]),
        next_block=state.next_block + len(kept),
        changes=state.changes + sum(block.changes for block in kept),
    )


def _front(connection: sqlite3.Connection, state: State) -> Front | None:
    rows = connection.execute(_FRONT, [state.next_block]).fetchall()
    return Front(*rows[0]) if rows else None


def _written_bytes(group: list[Block]) -> int:
    """Return about what a transaction writes: whole pages, and those that lead to them."""
    if not group:
        return 0
    pages = sum(len(block.data) // (PAGE_BYTES - 100) + 2 for block in group)
    return (pages + pages // 16 + 12) * PAGE_BYTES


def _now() -> int:
    return int(time.time() * 1_000_000)


_UNFINISHED: Final = "DELETE FROM blocks WHERE id >= ?"
_RETIRE: Final = "UPDATE layouts SET last_block = ? WHERE id = ?"
_RETIRE_ALL: Final = "UPDATE layouts SET last_block = ? WHERE last_block IS NULL"
_FRONT: Final = """
    SELECT oldest_time, newest_time FROM blocks WHERE id < ? ORDER BY id LIMIT 1
"""
_NEWEST: Final = "SELECT newest_time FROM blocks WHERE id < ? ORDER BY id DESC LIMIT 1"
