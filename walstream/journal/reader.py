"""How the journal is read: with a connection of its own, so that nobody waits for the writer.

Blocks that have been decoded are remembered for a while: many clients come back at once, and read
the same. A block is read in one short transaction, and whether it still goes on from where a reader
stands is asked in the same.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from walstream.changes import Change, Layout
from walstream.errors import SinkFailed
from walstream.journal import file
from walstream.journal.blocks import Piece, decoded, microseconds, time_of
from walstream.journal.file import JournalTrimmed, State
from walstream.journal.layouts import Shapes
from walstream.positions import Position
from walstream.worker import Worker

T = TypeVar("T")

CACHE_BYTES: Final = 32 << 20
"""How much memory decoded blocks may take, about."""

_PIECE_CHANGES: Final = 500
_PIECE_BYTES: Final = 64 << 10
"""About how many changes, and how many bytes of blocks, are read at once."""

_MOST_LAYOUTS: Final = 4096


class JournalStatus(msgspec.Struct, frozen=True):
    """What is in a journal, as a process sees it that does not write it."""

    path: Path
    state: State
    bytes: int
    oldest_time: datetime | None
    newest_time: datetime | None


class JournalReader:
    """Reads a journal, also beside the process that writes it."""

    def __init__(self, path: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.path = path.absolute()
        self._worker = Worker("walstream-journal-reader")
        self._blocks = _Blocks(self.path, cache_bytes)

    async def open(self) -> None:
        """Open a file that is there.

        Raises:
            SetupError: there is none, or it is no journal of this version.
            SinkFailed: it cannot be read now.
        """
        await self._worker.call(self._blocks.open)

    async def close(self) -> None:
        """Let go of the file."""
        await self._worker.call(self._blocks.close)

    async def status(self) -> JournalStatus:
        """Look at what there is.

        Raises:
            SinkFailed: it cannot be read.
        """
        return await self._call(self._blocks.status)

    async def state(self) -> State:
        """Look where the journal stands now.

        Raises:
            SinkFailed: it cannot be read.
        """
        return await self._call(self._blocks.state)

    async def read(self, after: Position, upto: Position) -> AsyncIterator[Sequence[Change]]:
        """Read what stands behind the one position, up to the other, in order and in pieces.

        Raises:
            JournalTrimmed: what stands behind ``after`` is not complete any more.
            SinkFailed: it cannot be read.
        """
        place: _Place | None = _Place(after)
        while place is not None:
            changes, place = await self._call(self._blocks.read, place, upto)
            if changes:
                yield changes

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later.

        None means that what is here does not go back so far.

        Raises:
            SinkFailed: it cannot be read.
        """
        return await self._call(self._blocks.position_before, microseconds(time))

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._worker.call(function, *arguments)
        except (sqlite3.Error, OSError, ValueError) as error:
            raise file.failed(error, self.path, "cannot be read") from error


class _Place(NamedTuple):
    """Where a reader stands: behind a position, at a block, in a journal of this generation."""

    after: Position
    block: int | None = None
    generation: int | None = None


class _Row(NamedTuple):
    """A block without its data."""

    number: int
    first: str
    last: str
    changes: int
    size_bytes: int


class _Blocks:
    """Has the file open; its methods block."""

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._pieces: OrderedDict[int, Piece] = OrderedDict()
        self._cache_bytes = self._room = cache_bytes
        self._layouts: dict[int, Layout] = {}
        self._shapes = Shapes()

    def open(self) -> None:
        if self._connection is None:
            self._connection = file.connect_beside(self._path)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        self._layouts.clear()
        self._shapes = Shapes()
        while self._pieces:
            self._drop(next(iter(self._pieces)))
        if connection is not None:
            connection.close()

    def state(self) -> State:
        return file.load_state(self._opened)

    def status(self) -> JournalStatus:
        with file.transaction(self._opened, "DEFERRED"):
            state = self.state()
            [(oldest,)] = self._opened.execute(_OLDEST_TIME, [state.next_block]).fetchall()
            [(newest,)] = self._opened.execute(_NEWEST_TIME, [state.next_block]).fetchall()
        return JournalStatus(
            self._path,
            state,
            file.sizes(self._path).total_bytes,
            None if oldest is None else time_of(oldest),
            None if newest is None else time_of(newest),
        )

    def read(self, place: _Place, upto: Position) -> tuple[Sequence[Change], _Place | None]:
        """Return a piece, and where the reader stands then; None when that was the last."""
        with file.transaction(self._opened, "DEFERRED"):
            state = self.state()
            is_another = place.generation not in {None, state.generation}
            if is_another or place.after < state.begins:
                self._drop_trimmed()
                raise JournalTrimmed(state.begins)
            upto = min(upto, state.position)
            if place.after >= upto:
                return (), None
            rows = self._rows(state, place, upto)
            pieces = [self._piece(row.number) for row in rows]
        changes = _between(rows, pieces, place.after, upto)
        last = _position(rows[-1].last)
        rest = _Place(last, rows[-1].number + 1, state.generation)
        return changes, rest if last < upto else None

    def position_before(self, time: int) -> Position | None:
        with file.transaction(self._opened, "DEFERRED"):
            state = self.state()
            if time <= state.since_time:
                return None
            if time > state.latest_time:
                return state.position
            number = self._search(state, "latest_time", time)
            piece = self._piece(number)
            before = self._opened.execute(_LAST_BEFORE, [number]).fetchall()
        position = _position(before[0][0]) if before else state.begins
        for change in piece.changes:
            if microseconds(change.commit_time) >= time:
                break
            position = Position.of(change)
        return position

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SinkFailed(f"the journal {self._path} is not open")
        return self._connection

    def _rows(self, state: State, place: _Place, upto: Position) -> list[_Row]:
        """Return so many blocks as make a piece."""
        number = place.block
        if number is None:
            # Of equal texts the block is behind it: its last change is not.
            after = file.position_text(place.after)
            number = self._search(state, "last", after + "~")
        found = self._opened.execute(_ROWS, [number, state.next_block, _PIECE_CHANGES]).fetchall()
        rows: list[_Row] = []
        changes = size_bytes = 0
        for row in map(_Row._make, found):
            rows.append(row)
            changes += row.changes
            size_bytes += row.size_bytes
            is_enough = changes >= _PIECE_CHANGES or size_bytes >= _PIECE_BYTES
            if is_enough or _position(row.last) >= upto:
                break
        if not rows:
            raise ValueError("blocks are missing")
        return rows

    def _search(self, state: State, column: str, value: str | int) -> int:
        """Return the number of the first block whose column, which only grows, has this value.

        Or a higher one. There is one.
        """
        [(low,)] = self._opened.execute("SELECT min(id) FROM blocks").fetchall()
        high = state.next_block - 1
        statement = f"SELECT {column} FROM blocks WHERE id = ?"  # noqa: S608 - one of two names
        while low is not None and low < high:
            middle = (low + high) // 2
            [(found,)] = self._opened.execute(statement, [middle]).fetchall()
            if found >= value:
                high = middle
            else:
                low = middle + 1
        return high

    def _piece(self, number: int) -> Piece:
        piece = self._pieces.get(number)
        if piece is not None:
            self._pieces.move_to_end(number)
            return piece
        rows = self._opened.execute("SELECT data FROM blocks WHERE id = ?", [number]).fetchall()
        if not rows:
            raise ValueError("a block is missing")
        piece = decoded(rows[0][0], self._layout)
        if piece.size_bytes <= self._cache_bytes:
            self._keep(number, piece)
        return piece

    def _keep(self, number: int, piece: Piece) -> None:
        self._pieces[number] = piece
        self._room -= piece.size_bytes
        while self._room < 0:
            self._drop(next(iter(self._pieces)))

    def _drop(self, number: int) -> None:
        self._room += self._pieces.pop(number).size_bytes

    def _drop_trimmed(self) -> None:
        [(first,)] = self._opened.execute("SELECT min(id) FROM blocks").fetchall()
        for number in [one for one in self._pieces if first is None or one < first]:
            self._drop(number)

    def _layout(self, number: int) -> Layout:
        layout = self._layouts.get(number)
        if layout is None:
            rows = self._opened.execute(_DEFINITION, [number]).fetchall()
            if not rows:
                raise ValueError("the shape of a relation is missing")
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
                self._shapes = Shapes()
            layout = self._layouts[number] = self._shapes.layout(rows[0][0])
        return layout


def _between(
    rows: Sequence[_Row], pieces: Sequence[Piece], after: Position, upto: Position
) -> Sequence[Change]:
    """Return the changes of blocks that stand behind the one position, up to the other."""
    is_whole = _position(rows[0].first) > after and _position(rows[-1].last) <= upto
    if is_whole and len(pieces) == 1:
        return pieces[0].changes
    changes = [change for piece in pieces for change in piece.changes]
    if is_whole:
        return changes
    return [change for change in changes if after < Position.of(change) <= upto]


_position = file.position_of

_OLDEST_TIME: Final = """
    SELECT (SELECT oldest_time FROM blocks WHERE id < ? ORDER BY id LIMIT 1)
"""
_NEWEST_TIME: Final = """
    SELECT (SELECT newest_time FROM blocks WHERE id < ? ORDER BY id DESC LIMIT 1)
"""
_LAST_BEFORE: Final = "SELECT last FROM blocks WHERE id < ? ORDER BY id DESC LIMIT 1"
_ROWS: Final = """
    SELECT id, first, last, changes, length(data) FROM blocks
     WHERE id >= ? AND id < ? ORDER BY id LIMIT ?
"""
_DEFINITION: Final = "SELECT definition FROM layouts WHERE id = ?"
