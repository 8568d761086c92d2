"""Letters as rows, and queries for them as SQL, for both stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, TypeAlias

import msgspec

from walstream.changes import Operation, Relation
from walstream.dead_letters.letters import DeadLetter, storable
from walstream.dead_letters.store import LetterQuery, StoredLetter
from walstream.keys import Key
from walstream.lsn import Lsn

MESSAGE: Final = "message"
"""In the place of a message's operation."""

COLUMNS: Final = """
    id, route, change_id, operation, relation_schema, relation_name, keys, attempts, error, parked,
    first_failed_at, last_failed_at, stored_at, deliveries, size_bytes
"""

INSERTED: Final = """
    slot, route, change_id, lsn, ordinal, operation, relation_schema, relation_name, keys, attempts,
    error, traceback, first_failed_at, last_failed_at, size_bytes, parked, stored_at, payload
"""
INSERTED_COUNT: Final = INSERTED.count(",") + 1

Condition: TypeAlias = tuple[str, tuple[object, ...]]


class Dialect(msgspec.Struct, frozen=True):
    """What the databases write differently, and how parameters are given to them.

    ``mark`` stands for a parameter, ``within`` behind a column compares it with a parameter made by
    ``members``, and ``find`` is the function that looks for a text in another.
    """

    keys: str
    mark: str
    within: str
    find: str
    members: Callable[[Iterable[object]], object]
    time: Callable[[datetime], object]
    lsn: Callable[[Lsn], object]


def where(query: LetterQuery, slot: str, dialect: Dialect) -> tuple[str, list[object]]:
    """Return what follows WHERE, up to the end of the statement, and its parameters."""
    conditions: list[Condition] = [("slot = ?", (slot,)), *_conditions(query, dialect)]
    text = " AND ".join(condition for condition, _ in conditions)
    text += " ORDER BY lsn, ordinal, id"
    parameters = [one for _, given in conditions for one in given]
    if query.limit is not None:
        text += " LIMIT ?"
        parameters.append(query.limit)
    return text.replace("?", dialect.mark), parameters


def _conditions(query: LetterQuery, dialect: Dialect) -> Iterator[Condition]:  # noqa: C901 - a list
    key = f"EXISTS (SELECT 1 FROM {dialect.keys} AS k WHERE k.letter_id = l.id AND"  # noqa: S608
    if query.ids is not None:
        yield f"id {dialect.within}", (dialect.members(query.ids),)
    if query.route is not None:
        yield "route = ?", (query.route,)
    if query.table is not None:
        own = "relation_schema || '.' || relation_name"
        yield f"({own} = ? OR {key} k.relation = ?))", (query.table, query.table)
    if query.key_values is not None:
        values = dialect.members(values.decode() for values in query.key_values)
        yield f"{key} k.key_values {dialect.within})", (values,)
    if query.operation is not None:
        yield "operation = ?", (query.operation,)
    if query.parked is not None:
        yield "parked = ?", (query.parked,)
    if query.error is not None:
        yield f"{dialect.find}(lower(error), lower(?)) > 0", (query.error,)
    if query.stored_before is not None:
        yield "stored_at < ?", (dialect.time(query.stored_before),)
    if query.stored_after is not None:
        yield "stored_at >= ?", (dialect.time(query.stored_after),)
    if query.after is not None:
        (lsn, ordinal), letter_id = query.after
        yield "(lsn, ordinal, id) > (?, ?, ?)", (dialect.lsn(lsn), ordinal, letter_id)


def inserted_values(letter: DeadLetter, slot: str, dialect: Dialect) -> list[object]:
    """Return the values of the `INSERTED` columns."""
    lsn, ordinal = letter.position
    relation = letter.relation
    return [
        slot,
        letter.route,
        letter.change_id,
        dialect.lsn(lsn),
        ordinal,
        MESSAGE if letter.operation is None else letter.operation.value,
        None if relation is None else relation.schema,
        None if relation is None else relation.name,
        _keys_to_json(letter.keys),
        *tried_values(letter, dialect),
        letter.size_bytes,
        letter.parked,
        dialect.time(letter.stored_at),
        letter.payload,
    ]


def tried_values(letter: DeadLetter, dialect: Dialect) -> list[object]:
    """Return attempts, error, traceback, first_failed_at and last_failed_at."""
    at = None if letter.first_failed_at is None else dialect.time(letter.first_failed_at)
    error, traceback = storable(letter.error), storable(letter.traceback)
    return [letter.attempts, error, traceback, at, at]


def text_bytes(*texts: str) -> int:
    """Return what errors and tracebacks count as, as they are stored."""
    return sum(len(storable(text).encode()) for text in texts)


def stored_letter(
    row: Sequence[Any], time: Callable[[Any], datetime] = lambda time: time
) -> StoredLetter:
    """Make a letter of `COLUMNS`, payload and traceback; ``time`` reads the store's times."""
    return StoredLetter(
        id=row[0],
        letter=DeadLetter(
            route=row[1],
            change_id=row[2],
            operation=None if row[3] == MESSAGE else Operation(row[3]),
            relation=None if row[4] is None else Relation(row[4], row[5]),
            keys=_keys_of_json(row[6]),
            attempts=row[7],
            error=row[8],
            parked=bool(row[9]),
            first_failed_at=None if row[10] is None else time(row[10]),
            stored_at=time(row[12]),
            payload=row[15],
            traceback=row[16],
        ),
        last_failed_at=None if row[11] is None else time(row[11]),
        deliveries=row[13],
        size_bytes=row[14],
    )


def _keys_to_json(keys: tuple[Key, ...]) -> str:
    """Write a list of lists of two strings."""
    return msgspec.json.encode([(table, values.decode()) for table, values in keys]).decode()


def _keys_of_json(text: str) -> tuple[Key, ...]:
    pairs: Any = msgspec.json.decode(text)
    return tuple((table, values.encode()) for table, values in pairs)
