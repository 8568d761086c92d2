"""What a client asks for: tables, operations, a filter, columns.

A request names several subscriptions in one list of parameters; each ``table`` begins one, and what
follows belongs to it::

    table=public.orders&operations=insert,update&where=total=gt.100&columns=id,total&table=public.customers
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from walstream.changes import Operation
from walstream.errors import FilterError
from walstream.filters import Filter, Operator, columns
from walstream.filters import parse as parse_filter
from walstream.grammar import comparisons
from walstream.router import ALL_OPERATIONS, TablePattern

KEYS: Final = ("table", "operations", "where", "columns", "leaving")
"""The parameters of subscriptions; a request may have others beside them."""

_PATTERNS: Final = (Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH)


class RequestRefused(Exception):
    """A client asks for what it cannot have; ``status`` is HTTP's word for why."""

    def __init__(self, status: int, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.hint = hint


class Subscription(msgspec.Struct, frozen=True):
    """Which changes a client wants, and what of them.

    The rules are those of routes: of an insert and update the new row is tested, of a delete the
    identity; a truncate has no row, and comes with a filter only when operations are named
    (``explicit``). ``columns`` None stands for all that the client may read. ``leaving`` asks for
    updates whose old row passes the filter and whose new row does not.

    ``tells_departure``: an update that takes a row out of the reader's sight is told by its key; if
    not, only with ``leaving``. ``with_key``: the key's columns are sent beside ``columns``, as far
    as the reader may see them.
    """

    pattern: TablePattern
    operations: frozenset[Operation] = ALL_OPERATIONS
    explicit: bool = False
    where: Filter | None = None
    columns: frozenset[str] | None = None
    leaving: bool = False
    tells_departure: bool = True
    with_key: bool = False

    def wants(self, operation: Operation) -> bool:
        """Whether such changes are asked for."""
        if operation is Operation.TRUNCATE:
            return operation in self.operations and (self.where is None or self.explicit)
        return operation in self.operations or (
            operation is Operation.READ and Operation.INSERT in self.operations
        )


MAX_COMPARISONS: Final = 200
MAX_PATTERNS: Final = 10
MAX_PATTERN_CHARACTERS: Final = 200
"""Of one request: each change is tested with all of it, and patterns cost most."""


class Limits(msgspec.Struct, frozen=True):
    """How much one request may ask for."""

    max_subscriptions: int = 20
    max_filter_bytes: int = 4096


def parse_subscriptions(
    parameters: Iterable[tuple[str, str]], limits: Limits
) -> list[Subscription]:
    """Read the subscriptions of a request, in their order.

    Args:
        parameters: names and values, in the order of the request; others than `KEYS` are passed by.
        limits: of one request.

    Raises:
        RequestRefused: there is none, or one that cannot be read.
    """
    groups: list[dict[str, str]] = []
    for name, value in parameters:
        if name not in KEYS:
            continue
        if name == "table":
            groups.append({})
        elif not groups:
            message = f"{name} stands before the table that it belongs to"
            raise RequestRefused(400, message, hint=f"?table=public.orders&{name}=...")
        if name in groups[-1]:
            raise RequestRefused(400, f"{name} is given twice for one table")
        groups[-1][name] = value
    if not groups:
        raise RequestRefused(400, "no table is asked for", hint="?table=public.orders")
    if len(groups) > limits.max_subscriptions:
        message = f"{len(groups)} tables are asked for; allowed: {limits.max_subscriptions}"
        raise RequestRefused(429, message, hint="open another stream, or use public.*")
    subscriptions = [_subscription(group, limits) for group in groups]
    reason = costs_too_much(one.where for one in subscriptions if one.where is not None)
    if reason:
        raise RequestRefused(400, f"where: {reason}", hint="in.(...) is one comparison")
    return subscriptions


def costs_too_much(wheres: Iterable[Filter]) -> str:
    """Say why the filters of one request would cost the stream too much; nothing if they do not."""
    asked = [comparison for where in wheres for comparison in comparisons(where)]
    if len(asked) > MAX_COMPARISONS:
        return f"{len(asked)} comparisons in one request; allowed: {MAX_COMPARISONS}"
    patterns = [one.values[0] for one in asked if one.operator in _PATTERNS]
    if len(patterns) > MAX_PATTERNS:
        return f"{len(patterns)} patterns in one request; allowed: {MAX_PATTERNS}"
    if any(len(pattern) > MAX_PATTERN_CHARACTERS for pattern in patterns):
        return f"a pattern has at most {MAX_PATTERN_CHARACTERS} characters"
    return ""


def _subscription(group: dict[str, str], limits: Limits) -> Subscription:
    pattern = _pattern(group["table"])
    where = _where(group.get("where", ""), limits)
    names = _names(group.get("columns", ""))
    if (where is not None or names is not None) and pattern.relation is None:
        message = f"where and columns need one table, and {pattern} stands for several"
        raise RequestRefused(400, message, hint="name each table by itself")
    operations = _operations(group.get("operations", ""))
    leaving = group.get("leaving", "false")
    if leaving not in ("true", "false"):
        raise RequestRefused(400, f"leaving: found {leaving!r}; allowed: true, false")
    return Subscription(
        pattern=pattern,
        operations=operations or ALL_OPERATIONS,
        explicit=bool(operations),
        where=where,
        columns=names,
        leaving=leaving == "true",
    )


def _pattern(text: str) -> TablePattern:
    if "\0" in text:
        raise RequestRefused(400, "table: found a NUL, which no name has")
    try:
        return TablePattern.parse(text)
    except ValueError as error:
        raise RequestRefused(400, f"table: {error}") from None


def _operations(text: str) -> frozenset[Operation]:
    words = _split(text)
    known = {str(one): one for one in ALL_OPERATIONS}
    unknown = [word for word in words if word not in known]
    if unknown:
        allowed = ", ".join(sorted(known))
        raise RequestRefused(400, f"operations: found {unknown[0]!r}; allowed: {allowed}")
    return frozenset(known[word] for word in words)


def _names(text: str) -> frozenset[str] | None:
    return frozenset(_split(text)) or None


def _split(text: str) -> Sequence[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _where(text: str, limits: Limits) -> Filter | None:
    if not text:
        return None
    if len(text.encode()) > limits.max_filter_bytes:
        message = f"a filter of {len(text.encode())} bytes; allowed: {limits.max_filter_bytes}"
        raise RequestRefused(400, message)
    try:
        return parse_filter(text)
    except FilterError as error:
        raise RequestRefused(400, f"where: {error.message}", hint=error.hint) from None


def named_columns(subscription: Subscription) -> frozenset[str]:
    """Return the columns that the filter of a subscription names."""
    return frozenset() if subscription.where is None else columns(subscription.where)
