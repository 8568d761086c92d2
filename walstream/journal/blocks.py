"""Changes as blocks: so many of them, compressed, as one row of the journal has.

Values stay the JSON that wal2json sent. What changes have in common is said once: their
transactions in the block, the shapes of their relations (`walstream.journal.layouts`) in a table of
their own, by number. Making JSON and compressing it is cheap beside what writing it all would be;
zlib does its part without Python's lock.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from walstream.changes import Change, Column, Layout, Operation, Transaction
from walstream.lsn import Lsn
from walstream.positions import Position

BLOCK_CHANGES: Final = 1000
BLOCK_BYTES: Final = 1 << 20
"""How many changes a block has at most, and how large their JSON is.

Compressed it is an eighth of that or less, mostly.
"""

_LEVEL: Final = 2
"""Of zlib: as fast as the lowest. The records of a table resemble each other; more gains little."""

_MICROSECOND: Final = timedelta(microseconds=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Block(NamedTuple):
    """What a row of the journal has. Times are of commits, in microseconds since 1970."""

    first: Position
    last: Position
    oldest_time: int
    newest_time: int
    changes: int
    data: bytes


class Piece(NamedTuple):
    """The changes of a block, and about what they take in memory."""

    changes: tuple[Change, ...]
    size_bytes: int


def encoded(
    changes: Sequence[Change],
    number_of: Callable[[Layout], int],
    *,
    size_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Make blocks of changes.

    Args:
        changes: in order.
        number_of: gives the number of a layout.
        size_bytes: how large their JSON is at most, unless one change alone is larger.
    """
    for start in range(0, len(changes), BLOCK_CHANGES):
        yield from _encoded(changes[start : start + BLOCK_CHANGES], number_of, size_bytes)


def decoded(data: bytes, layout_of: Callable[[int], Layout]) -> Piece:
    """Make changes of a block's data.

    Raises:
        ValueError: it is not what `encoded` made.
    """
    try:
        text = zlib.decompress(data)
        content = _decode(text)
    except (zlib.error, msgspec.DecodeError) as error:
        raise ValueError(f"a block cannot be read: {type(error).__name__}") from None
    transactions = [
        Transaction(xid, Lsn(commit_lsn), Lsn(end_lsn), timestamp)
        for xid, commit_lsn, end_lsn, timestamp in content.transactions
    ]
    layouts = {number: layout_of(number) for number in content.layouts}
    changes = tuple(
        Change(
            _OPERATIONS[one.operation],
            layouts[one.layout],
            transactions[one.transaction],
            one.ordinal,
            one.columns,
            None if one.identity == _NULL else one.identity,
            one.unchanged,
            one.leaving,
        )
        for one in content.changes
    )
    return Piece(changes, len(text) * _IN_MEMORY)


def microseconds(time: datetime) -> int:
    """Return a time as blocks have it."""
    return (time - _EPOCH) // _MICROSECOND


def time_of(microseconds: int) -> datetime:
    """Return a block's time."""
    return _EPOCH + microseconds * _MICROSECOND


_IN_MEMORY: Final = 4
"""How much more than as JSON changes take in memory, all small objects counted."""

_NULL: Final = msgspec.Raw(b"null")

_OPERATIONS: Final = tuple(Operation)
_NUMBERS: Final = {operation: number for number, operation in enumerate(_OPERATIONS)}


class _Stored(msgspec.Struct, array_like=True, gc=False):
    operation: int
    layout: int
    transaction: int
    ordinal: int
    columns: list[Column] | None
    identity: msgspec.Raw
    unchanged: tuple[str, ...]
    leaving: bool


class _Content(msgspec.Struct, array_like=True, gc=False):
    layouts: list[int]
    transactions: list[tuple[int, int, int, str]]
    changes: list[_Stored]


_decode: Final = msgspec.json.Decoder(_Content).decode
_encode: Final = msgspec.json.Encoder().encode


def _encoded(
    changes: Sequence[Change], number_of: Callable[[Layout], int], size_bytes: int
) -> Iterator[Block]:
    """Make one block, or several of parts when it gets too large."""
    text, transactions = _written(changes, number_of)
    if len(text) > size_bytes and len(changes) > 1:
        parts = min(-(-len(text) // size_bytes), len(changes))
        count = -(-len(changes) // parts)
        for start in range(0, len(changes), count):
            yield from _encoded(changes[start : start + count], number_of, size_bytes)
        return
    times = [microseconds(one.commit_time) for one in transactions]
    yield Block(
        Position.of(changes[0]),
        Position.of(changes[-1]),
        min(times),
        max(times),
        len(changes),
        zlib.compress(text, _LEVEL),
    )


def _written(
    changes: Sequence[Change], number_of: Callable[[Layout], int]
) -> tuple[bytes, list[Transaction]]:
    """Write changes as JSON; return it with their transactions."""
    layouts: dict[Layout, int] = {}
    transactions: list[Transaction] = []
    rows: list[tuple[Any, ...]] = []
    transaction: Transaction | None = None
    layout: Layout | None = None
    number = place = -1
    for change in changes:
        if change.transaction is not transaction:
            transaction = change.transaction
            transactions.append(transaction)
            place += 1
        if change.layout is not layout:
            layout = change.layout
            number = layouts[layout] = number_of(layout)
        rows.append(
            (
                _NUMBERS[change.operation],
                number,
                place,
                change.ordinal,
                change.new_columns,
                change.sent_identity,
                change.unchanged,
                change.leaving,
            )
        )
    text = _encode(([*dict.fromkeys(layouts.values())], [*map(_fields, transactions)], rows))
    return text, transactions


def _fields(transaction: Transaction) -> tuple[int, int, int, str]:
    return (
        transaction.xid,
        int(transaction.commit_lsn),
        int(transaction.end_lsn),
        transaction.commit_timestamp,
    )
