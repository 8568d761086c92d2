"""What a channel asks for of the database: its ``postgres_changes`` bindings.

Each is echoed as it came, with an id; what is wrong with it is told in the original's words. What
only the database knows, `realtime.verifying` finds out.

A binding may have keys that the original does not know, which its clients pass on: ``since`` asks
for what was missed, and for the position of each record with it; ``leaving`` for updates that take
a row out of the filter.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from walstream.changes import Operation
from walstream.filters import Filter
from walstream.live.subscriptions import Limits, Subscription, costs_too_much
from walstream.realtime.filters import (
    Condition,
    Unreadable,
    ValueRefused,
    condition_on_rows,
    read_conditions,
)
from walstream.realtime.joins import truth
from walstream.realtime.refusals import NOT_IN_SEVERAL, failed, not_enabled, not_given, unreadable
from walstream.realtime.terms import term
from walstream.router import TablePattern

_OPERATIONS: Final = {
    "INSERT": frozenset({Operation.INSERT}),
    "UPDATE": frozenset({Operation.UPDATE}),
    "DELETE": frozenset({Operation.DELETE}),
}
_ALL: Final = frozenset().union(*_OPERATIONS.values())
_READ_FACTOR: Final = 10
"""So many times what a channel may have is read, and refused one by one."""


class Binding(msgspec.Struct, frozen=True):
    """One of the things that a channel asks for.

    Attributes:
        id: a positive number of 31 bits; equal bindings have equal ones, wherever they come from,
            and so have those that ask for the same from different positions.
        echo: the binding as it came, and its id.
        subscription: what is asked for; None when that cannot be read.
        error: what the client is told when the binding cannot be had, as far as it can be known
            without the database; or nothing.
        since: where the client left off; None for from now on.
        with_position: each record is to carry its position.
        conditions: of the filter, in its order.
        parameters: the binding as the original shows it in its messages.
    """

    id: int
    echo: Mapping[str, Any]
    subscription: Subscription | None = None
    error: str = ""
    since: str | None = None
    with_position: bool = False
    conditions: tuple[Condition, ...] = ()
    parameters: str = ""


class TooMany(Exception):
    """More bindings than it is worth to tell what is wrong with each; the text is the client's."""


class _Refused(Exception):
    """A binding that cannot be had; the argument is what the client is told."""


def read_bindings(raw: Sequence[Mapping[str, Any]], limits: Limits) -> list[Binding]:
    """Read the bindings of a channel, in their order; none is left out.

    Args:
        raw: as they came in the join, nested no deeper than a message may be.
        limits: of one channel.

    Raises:
        TooMany: it is not worth reading them.
    """
    if len(raw) > _READ_FACTOR * limits.max_subscriptions:
        raise TooMany(_too_many(len(raw), limits))
    ids = _Ids()
    bindings: list[Binding] = []
    for number, one in enumerate(raw):
        binding = _binding(one, ids.id_of(one), limits)
        if number >= limits.max_subscriptions:
            binding = _without(binding, _too_many(len(raw), limits))
        bindings.append(binding)
    return _affordable(bindings)


class _Ids:
    """Numbers for bindings: different ones of a channel never have the same."""

    def __init__(self) -> None:
        self._taken: dict[int, bytes] = {}

    def id_of(self, raw: Mapping[str, Any]) -> int:
        # From where is not what: clients that differ in it alone can share their frames.
        content = json.dumps({**raw, "since": "since" in raw}, sort_keys=True).encode()
        number = zlib.crc32(content) & 0x7FFFFFFF or 1
        while self._taken.setdefault(number, content) != content:
            number = number % 0x7FFFFFFF + 1
        return number


def _binding(raw: Mapping[str, Any], number: int, limits: Limits) -> Binding:
    binding = Binding(
        number,
        {**raw, "id": number},
        since=raw.get("since") if isinstance(raw.get("since"), str) else None,
        with_position="since" in raw,
    )
    try:
        return _read(binding, raw, limits)
    except _Refused as refused:
        return _without(binding, str(refused))


def _without(binding: Binding, error: str) -> Binding:
    return msgspec.structs.replace(binding, subscription=None, error=error)


def _read(binding: Binding, raw: Mapping[str, Any], limits: Limits) -> Binding:
    select = _select(raw)
    schema, table = _table(raw)
    conditions = _conditions(raw, limits)
    if select is not None and "*" in (schema, table):
        raise _Refused(NOT_IN_SEVERAL)
    event = _event(raw)
    shown = ", ".join(
        f"{name}: {value}"
        for name, value in (
            ("event", event),
            ("schema", schema),
            ("table", table),
            ("filters", f"[{', '.join(map(str, conditions))}]"),
            ("select", term(select)),
        )
    )
    if "\0" in schema + table:  # no name has that, and the server takes no such text
        raise _Refused(not_enabled(shown))
    try:
        where = condition_on_rows(conditions)
    except ValueRefused as refused:
        raise _Refused(failed(shown, refused.sqlstate, refused.message)) from None
    _verify_since(raw)
    _verify_leaving(raw)
    subscription = Subscription(
        pattern=TablePattern(_part(schema), _part(table)),
        operations=_OPERATIONS.get(event, _ALL),
        explicit=True,
        where=where,
        columns=None if select is None else frozenset(select),
        leaving=truth(raw.get("leaving")),
        tells_departure=False,
        with_key=True,
    )
    return msgspec.structs.replace(
        binding, subscription=subscription, conditions=conditions, parameters=shown
    )


def _event(raw: Mapping[str, Any]) -> str:
    event = raw.get("event")
    upper = event.upper() if isinstance(event, str) else "*"
    return upper if upper in _OPERATIONS else "*"


def _select(raw: Mapping[str, Any]) -> list[str] | None:
    """Return the columns that are asked for; None for all."""
    select = raw.get("select")
    if isinstance(select, str):
        example = 'select: ["col1", "col2"]'
        reason = f"expected a list of column name strings, e.g. {example}"
        raise _Refused(unreadable("select", reason))
    if not isinstance(select, list):
        return None
    return [name for name in select if isinstance(name, str)] or None


def _table(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return the schema and the table; a filter needs that both are given."""
    schema, table = raw.get("schema"), raw.get("table")
    given = [one for one in (schema, table) if one is not None]
    needed = 1 if raw.get("filter") is None else 2
    if len(given) < needed or not all(isinstance(one, str) for one in given):
        raise _Refused(not_given(raw))
    return str(schema or "public"), str(table or "*")


def _part(name: str) -> str | None:
    return None if name == "*" else name


def _conditions(raw: Mapping[str, Any], limits: Limits) -> tuple[Condition, ...]:
    text = raw.get("filter")
    if text is None:
        return ()
    if not isinstance(text, str):
        raise _Refused(not_given(raw))
    if len(text.encode()) > limits.max_filter_bytes:
        reason = f"a filter of {len(text.encode())} bytes; allowed: {limits.max_filter_bytes}"
        raise _Refused(unreadable("filter", reason))
    try:
        return read_conditions(text)
    except Unreadable as error:
        raise _Refused(unreadable("filter", str(error))) from None


def _verify_since(raw: Mapping[str, Any]) -> None:
    since = raw.get("since")
    if not isinstance(since, str | None):
        reason = 'expected the id of a change, an LSN, a time, "beginning" or null'
        raise _Refused(unreadable("since", reason))


def _verify_leaving(raw: Mapping[str, Any]) -> None:
    leaving = raw.get("leaving")
    if leaving is not None and truth(leaving) != truth(leaving, default=True):
        raise _Refused(unreadable("leaving", "expected true or false"))


def _too_many(count: int, limits: Limits) -> str:
    return (
        f"Too many postgres_changes: {count} in one channel; allowed: {limits.max_subscriptions}."
        " Use another channel, or a wildcard"
    )


def _affordable(bindings: list[Binding]) -> list[Binding]:
    """Refuse what makes the filters of a channel, all together, cost the stream too much."""
    wheres: list[Filter] = []
    affordable: list[Binding] = []
    for binding in bindings:
        where = None if binding.subscription is None else binding.subscription.where
        reason = "" if where is None else costs_too_much([*wheres, where])
        if reason:
            affordable.append(_without(binding, unreadable("filter", reason)))
            continue
        wheres += [] if where is None else [where]
        affordable.append(binding)
    return affordable
