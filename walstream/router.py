"""Which handlers and sinks get a change.

A route says which changes go where. Routes are made from decorators and from the configuration, and
are bound to each shape of a relation when it first comes: its filter is compiled for the relation's
types, once. From then on a change costs one look-up, and one filter for each route that wants its
relation and operation; routes that ask a column to equal a value are found by that value.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import StrEnum
from operator import itemgetter
from typing import Any, Final

import msgspec

from walstream.changes import Change, Layout, Message, Operation, Relation, Row
from walstream.errors import DecodeError
from walstream.filters import (
    ABSENT,
    Condition,
    Filter,
    Literal,
    Outcome,
    columns,
    compile_filter,
    equality_key,
    equality_keys,
    failing_part,
    literals,
)
from walstream.projection import Projection
from walstream.vitals import ChangeCount
from walstream.vitals import Outcome as ChangeOutcome

ALL_OPERATIONS: Final = frozenset(
    {Operation.INSERT, Operation.UPDATE, Operation.DELETE, Operation.TRUNCATE}
)

# An enum's member is found faster by a name of ours.
_UPDATE: Final = Operation.UPDATE
_DELETE: Final = Operation.DELETE
_TRUNCATE: Final = Operation.TRUNCATE
_ROUTED: Final = ChangeOutcome.ROUTED
_DROPPED: Final = ChangeOutcome.DROPPED

DEAD_LETTER_TABLES: Final = ("dead_letters", "dead_letter_keys", "dead_letters_version")

OWN_TABLES: Final = frozenset(
    Relation("walstream", name) for name in (*DEAD_LETTER_TABLES, "progress", "replayed")
)
"""What walstream writes itself: with a pattern such as ``*.*`` nobody means these. A route that
fails would make a dead letter of each row of a dead letter, and so on without end."""

HEARTBEAT_PREFIX: Final = "walstream.heartbeat"
"""The prefix of the messages that walstream writes itself; again no pattern means them."""

_PLAIN: Final = re.compile(r'[^".*]+')
_NAME: Final = re.compile(r'"((?:[^"]|"")+)"|([^".*]+)|(\*)')


class TablePattern(msgspec.Struct, frozen=True):
    """``schema.table``; None, written ``*``, for either part stands for all."""

    schema: str | None
    name: str | None

    @classmethod
    def parse(cls, text: str) -> TablePattern:
        """Read a pattern. Names are case-sensitive; one with a dot, a star or a quote is quoted.

        Raises:
            ValueError: it is not two names with a dot between them.
        """
        parts: list[str | None] = []
        position = 0
        while matched := _NAME.match(text, position):
            quoted, plain, _ = matched.groups()
            parts.append(quoted.replace('""', '"') if quoted else plain)
            position = matched.end()
            if position == len(text) or text[position] != ".":
                break
            position += 1
        if len(parts) != 2 or position != len(text):  # noqa: PLR2004 - schema and table
            message = (
                f"{text!r} is not a table: write schema.table, with * for either part;"
                ' names with dots, stars or quotes in double quotes: "my.schema"."my table"'
            )
            raise ValueError(message)
        return cls(parts[0], parts[1])

    @property
    def relation(self) -> Relation | None:
        """The one table that is meant, or None when the pattern has a ``*``."""
        if self.schema is None or self.name is None:
            return None
        return Relation(self.schema, self.name)

    def covers(self, relation: Relation) -> bool:
        """Whether the pattern means this table."""
        return self.schema in (None, relation.schema) and self.name in (None, relation.name)

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return f"{_printable(self.schema)}.{_printable(self.name)}"


def _printable(name: str | None) -> str:
    if name is None:
        return "*"
    return name if _PLAIN.fullmatch(name) else '"' + name.replace('"', '""') + '"'


class Route(msgspec.Struct, frozen=True, eq=False):
    """Which changes go to one destination, and what of them.

    ``where`` keeps rows: of an insert and update the new row, of a delete the identity. A truncate
    has no row; a route with a filter gets it only when its operations are named (``explicit``).
    ``leaving`` asks for updates whose old row passes the filter and whose new row does not.

    ``changed`` keeps of the updates those that gave one of these columns another value than it had;
    other operations pass. What counts is the text that Postgres sent: a numeric that went from 1.0
    to 1.00 has changed. A value that Postgres left out as unchanged has not. Where the identity
    does not carry the column, it cannot be known, and the update is dropped as ``absent``: without
    REPLICA IDENTITY FULL it carries the key's columns alone.

    ``policy`` is what the destination wants done when it fails; the router only carries it.

    ``own_tables`` are walstream's own: a pattern does not cover them, a route that names one gets
    it.
    """

    name: str
    pattern: TablePattern
    destination: Any
    operations: frozenset[Operation] = ALL_OPERATIONS
    explicit: bool = False
    where: Filter | None = None
    projection: Projection | None = None
    leaving: bool = False
    changed: tuple[str, ...] = ()
    policy: Any = None
    own_tables: frozenset[Relation] = OWN_TABLES

    def wants(self, relation: Relation, ancestors: Iterable[Relation]) -> bool:
        """Whether the route's table is this one, or one that this one is a partition of."""
        if relation in self.own_tables and self.pattern.relation is None:
            return False
        return any(self.pattern.covers(candidate) for candidate in (relation, *ancestors))

    def wants_operation(self, operation: Operation) -> bool:
        """Whether such changes reach the destination, when they pass."""
        if operation is Operation.TRUNCATE:
            return self.wants_truncate()
        return operation in self.operations

    def wants_truncate(self) -> bool:
        """Whether truncates reach the destination."""
        return Operation.TRUNCATE in self.operations and (self.where is None or self.explicit)


class Rule(StrEnum):
    """What decides about a change and a route."""

    KEPT = "kept"
    TABLE = "table"
    OPERATION = "operation"
    TRUNCATE = "truncate"
    FILTER = "filter"
    CHANGED = "changed"
    ABSENT = "absent"
    PREFIX = "prefix"


class Explanation(msgspec.Struct, frozen=True):
    """Why a route keeps or drops a change or a message.

    ``reason`` holds names and the route's own filter, and no row's values. Of a change that is kept
    ``left_out`` are the columns that the route does not pass on, ``masked`` those that it disguises
    with what their masks are called, and ``seen`` is what the destination sees.
    """

    route: str
    rule: Rule
    reason: str
    left_out: tuple[str, ...] = ()
    masked: Mapping[str, str] = {}
    seen: Change | None = None

    @property
    def kept(self) -> bool:
        """Whether the destination gets the change."""
        return self.rule is Rule.KEPT


class MessageRoute(msgspec.Struct, frozen=True, eq=False):
    """Which logical messages go to one destination.

    ``prefix`` is the whole prefix, or the beginning of one with a ``*`` behind it, by which
    walstream's own heartbeats are never meant.
    """

    name: str
    prefix: str
    destination: Any
    policy: Any = None

    def wants(self, prefix: str) -> bool:
        """Whether messages of this prefix go to the destination."""
        if self.prefix.endswith("*"):
            return prefix.startswith(self.prefix[:-1]) and prefix != HEARTBEAT_PREFIX
        return prefix == self.prefix


class RouteCounts(msgspec.Struct):
    """What became of the changes of one route's tables and operations.

    ``absent`` are those dropped because the change did not carry a column of the filter, or the old
    value of a column that has to have changed.
    """

    matched: int = 0
    filtered: int = 0
    absent: int = 0

    def add(self, others: RouteCounts) -> None:
        """Count on from what another router has counted."""
        self.matched += others.matched
        self.filtered += others.filtered
        self.absent += others.absent


class _ChangeCounts(msgspec.Struct):
    """How many changes of one relation and operation a route kept, and how many none did."""

    routed: int = 0
    dropped: int = 0


class _BoundRoute(msgspec.Struct, frozen=True, eq=False):
    """A route with its filter compiled for one layout."""

    route: Route
    place: int
    condition: Condition | None
    counts: RouteCounts


class _Terms(msgspec.Struct, frozen=True, eq=False):
    """What a layout was bound with, to explain it: the routes that want it, by their places."""

    wanting: dict[int, _BoundRoute]
    normalised: Mapping[Literal, str]


class _Index(msgspec.Struct, frozen=True, eq=False):
    """Routes that need one column to equal a value, found by the value."""

    column: str
    key_of: Callable[[msgspec.Raw], Any]
    routes: dict[Any, list[_BoundRoute]]


class _Candidates(msgspec.Struct, frozen=True, eq=False):
    """The routes for one layout and operation: those to be tried each time, and those indexed."""

    scanned: list[_BoundRoute]
    indexes: list[_Index]
    counts: _ChangeCounts


class Router:
    """Finds the routes for each change.

    Before a change of a new layout can be routed, its layout must be bound: `literals` says which
    of the filters' values the server has to read for that, `bind` takes the answers. Messages need
    no binding.
    """

    def __init__(
        self, routes: Iterable[Route], message_routes: Iterable[MessageRoute] = ()
    ) -> None:
        self.routes = list(routes)
        self.message_routes = list(message_routes)
        self.counts = [RouteCounts() for _ in self.routes]
        self.message_counts = [RouteCounts() for _ in self.message_routes]
        self._bound: dict[Layout, dict[Operation, _Candidates]] = {}
        self._terms: dict[Layout, _Terms] = {}
        self._change_counts: dict[tuple[Relation, Operation], _ChangeCounts] = {}

    def counted(self) -> list[tuple[Route | MessageRoute, RouteCounts]]:
        """List all routes with what became of their changes and messages."""
        return [
            *zip(self.routes, self.counts, strict=True),
            *zip(self.message_routes, self.message_counts, strict=True),
        ]

    def change_counts(self) -> tuple[ChangeCount, ...]:
        """List how many changes of each relation and operation a route kept, and none did.

        A partition is a relation of its own. What comes again is counted again.
        """
        return tuple(
            ChangeCount(relation, operation, outcome, count)
            for (relation, operation), counts in self._change_counts.items()
            for outcome, count in ((_ROUTED, counts.routed), (_DROPPED, counts.dropped))
            if count
        )

    def adopt_counts(self, other: Router) -> None:
        """Count on from where another router is, whose place this one takes.

        Routes count on from those of their names; of several with one name in their order.
        """
        for (relation, operation), theirs in other._change_counts.items():
            mine = self._counts_of(relation, operation)
            mine.routed += theirs.routed
            mine.dropped += theirs.dropped
        _adopt(self.routes, self.counts, other.routes, other.counts)
        _adopt(self.message_routes, self.message_counts, other.message_routes, other.message_counts)

    def unbind(self) -> None:
        """Forget all layouts, and no count: a new stream brings its own."""
        self._bound.clear()
        self._terms.clear()

    def forget(self, layout: Layout) -> None:
        """Drop what was bound for a layout; it may be bound again."""
        self._bound.pop(layout, None)
        self._terms.pop(layout, None)

    def layouts(self) -> list[Layout]:
        """List the layouts that are bound."""
        return list(self._bound)

    def wanting(self, layout: Layout) -> list[Route]:
        """List the routes that want the relation."""
        return [route for route in self.routes if route.wants(layout.relation, layout.ancestors)]

    def covers(self, relation: Relation) -> bool:
        """Whether a route wants the relation, as far as is known."""
        return any(route.wants(relation, ()) for route in self.routes) or any(
            layout.relation == relation and self.wanting(layout) for layout in self._bound
        )

    def may_gain(self, layout: Layout) -> bool:
        """Whether there are routes that would want the relation if it became a partition."""
        return not layout.ancestors and len(self.wanting(layout)) < len(self.routes)

    def literals(self, route: Route, layout: Layout) -> list[Literal]:
        """List the values in a route's filter that the server must read as the relation's types.

        Raises:
            FilterError: the filter does not fit the relation's types.
        """
        if route.where is None or not _fits(route.where, layout):
            return []
        return literals(route.where, layout.columns, layout.types, layout.relation)

    def bind(
        self, layout: Layout, fitting: Collection[Route], normalised: Mapping[Literal, str]
    ) -> None:
        """Compile the filters for a layout.

        Args:
            layout: to be routed from now on.
            fitting: of the routes that want it, those whose filter fits its types; the others
                never keep a row of it.
            normalised: what the server made of each of `literals`.
        """
        wanting = [
            _BoundRoute(
                route,
                place,
                _condition(route, layout, normalised) if route in fitting else _never,
                self.counts[place],
            )
            for place, route in enumerate(self.routes)
            if route.wants(layout.relation, layout.ancestors)
        ]
        self._bound[layout] = {
            operation: _candidates(
                operation,
                wanting,
                layout,
                normalised,
                self._counts_of(layout.relation, operation),
            )
            for operation in Operation
        }
        self._terms[layout] = _Terms({bound.place: bound for bound in wanting}, normalised)

    def route(self, change: Change) -> list[tuple[Route, Change]]:
        """Return the routes that keep a change, in their order, each with what it shall see.

        Raises:
            UnknownLabel: an enum has a label that its type did not have when it was fetched.
        """
        candidates = self._bound[change.layout][change.operation]
        found = candidates.scanned
        if candidates.indexes:
            found = _with_indexed(candidates, change)
        routed = []
        for bound in found:  # which costs less than a comprehension that refers to the change
            kept = _keep(bound, change)
            if kept is not None:
                routed.append((bound.route, kept))
        if routed:
            candidates.counts.routed += 1
        else:
            candidates.counts.dropped += 1
        return routed

    def explain(self, change: Change) -> list[Explanation]:
        """Say of every route, in their order, whether `route` keeps a change, and why.

        Nothing is counted.

        Raises:
            UnknownLabel: as `route`.
        """
        terms = self._terms[change.layout]
        return [
            _explain(route, terms.wanting.get(place), terms.normalised, change)
            for place, route in enumerate(self.routes)
        ]

    def explain_message(self, message: Message) -> list[Explanation]:
        """Say of every message route, in their order, whether it keeps a message, and why.

        Nothing is counted.
        """
        return [
            Explanation(
                route.name,
                Rule.KEPT if route.wants(message.prefix) else Rule.PREFIX,
                f"is for the prefix {route.prefix}",
            )
            for route in self.message_routes
        ]

    def route_message(self, message: Message) -> list[tuple[MessageRoute, Message]]:
        """Return the routes that want a message, in their order, each with what it shall see."""
        routed = []
        for route, counts in zip(self.message_routes, self.message_counts, strict=True):
            if route.wants(message.prefix):
                counts.matched += 1
                routed.append((route, message))
        return routed

    def _counts_of(self, relation: Relation, operation: Operation) -> _ChangeCounts:
        return self._change_counts.setdefault((relation, operation), _ChangeCounts())


INDEX_FROM: Final = 4
"""So many routes on one relation and operation must need a value of the same column before an index
over the values is cheaper than trying each route."""


def _adopt(
    routes: Iterable[Route | MessageRoute],
    counts: Iterable[RouteCounts],
    other_routes: Iterable[Route | MessageRoute],
    other_counts: Iterable[RouteCounts],
) -> None:
    by_name: defaultdict[str, deque[RouteCounts]] = defaultdict(deque)
    for route, theirs in zip(other_routes, other_counts, strict=True):
        by_name[route.name].append(theirs)
    for route, mine in zip(routes, counts, strict=True):
        if by_name[route.name]:
            mine.add(by_name[route.name].popleft())


def _fits(where: Filter, layout: Layout) -> bool:
    """Whether the relation has all columns of the filter.

    A route on one table was checked for that at the start; a pattern also covers tables that do not
    have them, and a column can be dropped later. The filter is then never passed, and counted.
    """
    return columns(where) <= layout.columns.keys()


def _condition(route: Route, layout: Layout, normalised: Mapping[Literal, str]) -> Condition | None:
    if route.where is None:
        return None
    if not _fits(route.where, layout):
        return _never
    return compile_filter(route.where, layout.columns, layout.types, normalised)


def _never(_: Row) -> Outcome:
    return ABSENT


def _candidates(
    operation: Operation,
    wanting: list[_BoundRoute],
    layout: Layout,
    normalised: Mapping[Literal, str],
    counts: _ChangeCounts,
) -> _Candidates:
    """Sort the routes that want an operation into indexes and those to be tried each time."""
    wanting = [bound for bound in wanting if bound.route.wants_operation(operation)]
    if operation is Operation.TRUNCATE:
        return _Candidates(wanting, [], counts)
    scanned = []
    by_column: defaultdict[str, list[tuple[Any, _BoundRoute]]] = defaultdict(list)
    for bound in wanting:
        required = _required(bound, layout, normalised)
        if required is None:
            scanned.append(bound)
        else:
            column, key = required
            by_column[column].append((key, bound))
    indexes = []
    for column, keyed in by_column.items():
        if len(keyed) < INDEX_FROM:
            scanned += [bound for _, bound in keyed]
        else:
            indexes.append(_make_index(column, keyed, layout))
    return _Candidates(sorted(scanned, key=_place), indexes, counts)


def _required(
    bound: _BoundRoute, layout: Layout, normalised: Mapping[Literal, str]
) -> tuple[str, Any] | None:
    """Return a column and the value it must have for the route to keep a row, if there is one.

    A route that asks for leaving updates also wants rows that do not have it.
    """
    where = bound.route.where
    if where is None or bound.route.leaving or bound.condition is _never:
        return None
    keys = equality_keys(where, layout.columns, layout.types, normalised)
    return min(keys.items(), key=itemgetter(0), default=None)


def _make_index(column: str, keyed: list[tuple[Any, _BoundRoute]], layout: Layout) -> _Index:
    routes: defaultdict[Any, list[_BoundRoute]] = defaultdict(list)
    for key, bound in keyed:
        routes[key].append(bound)
    return _Index(column, equality_key(layout.columns[column], layout.types), dict(routes))


def _with_indexed(candidates: _Candidates, change: Change) -> list[_BoundRoute]:
    """Return the routes to be tried: those always tried, and those that the indexes find."""
    found = list(candidates.scanned)
    tested = change.identity if change.operation is _DELETE else change.row
    for index in candidates.indexes:
        column = tested.column(index.column)
        if column is None:
            # Not carried: each route tells so for its own count.
            found += [bound for routes in index.routes.values() for bound in routes]
        else:
            try:
                found += index.routes.get(index.key_of(column.value), ())
            except ValueError:
                message = f"a value of {index.column} is not what wal2json writes for its type"
                raise DecodeError(message) from None
    found.sort(key=_place)
    return found


def _keep(bound: _BoundRoute, change: Change) -> Change | None:
    """Return what the route's destination shall see of the change, None for nothing."""
    route = bound.route
    leaving = False
    if bound.condition is not None and change.operation is not _TRUNCATE:
        tested = change.identity if change.operation is _DELETE else change.row
        outcome = bound.condition(tested)
        if outcome is not True:
            leaving = route.leaving and _leaves(bound.condition, change)
            if not leaving:
                _count_dropped(bound, outcome)
                return None
    if route.changed and change.operation is _UPDATE:
        outcome = _any_changed(route.changed, change)
        if outcome is not True:
            _count_dropped(bound, outcome)
            return None
    bound.counts.matched += 1
    if leaving:
        change = msgspec.structs.replace(change, leaving=True)
    return change if route.projection is None else route.projection.project(change)


def _leaves(condition: Condition, change: Change) -> bool:
    """Whether the old row of an update passes the filter that the new one does not."""
    return change.operation is _UPDATE and condition(change.identity) is True


def _count_dropped(bound: _BoundRoute, outcome: Outcome) -> None:
    if outcome is ABSENT:
        bound.counts.absent += 1
    else:
        bound.counts.filtered += 1


def _any_changed(names: Iterable[str], change: Change) -> Outcome:
    """Whether an update gave one of the columns another value; `ABSENT` when that is not known."""
    outcome: Outcome = False
    for name in names:
        one = _has_changed(name, change)
        if one is True:
            return True
        if one is ABSENT:
            outcome = ABSENT
    return outcome


def _has_changed(name: str, change: Change) -> Outcome:
    if name in change.unchanged:
        return False
    new, old = change.row.column(name), change.identity.column(name)
    if new is None or old is None:
        return ABSENT
    return new.value != old.value


def _place(bound: _BoundRoute) -> int:
    return bound.place


def _explain(
    route: Route, bound: _BoundRoute | None, normalised: Mapping[Literal, str], change: Change
) -> Explanation:
    operation = change.operation
    if bound is None:
        return Explanation(route.name, Rule.TABLE, _elsewhere(route, change))
    if not route.wants_operation(operation):
        return _unwanted(route, operation)
    seen = _keep(msgspec.structs.replace(bound, counts=RouteCounts()), change)
    if seen is not None:
        return _kept(bound, change, seen)
    rule, reason = _whether_filtered(bound, normalised, change) or _unchanged(route, change)
    return Explanation(route.name, rule, reason)


def _elsewhere(route: Route, change: Change) -> str:
    if route.pattern.covers(change.relation):
        return f"is for {route.pattern}, which does not mean walstream's own {change.relation}"
    names = " of ".join(map(str, (change.relation, *change.layout.ancestors)))
    return f"is for {route.pattern}, not for {names}"


def _unwanted(route: Route, operation: Operation) -> Explanation:
    if operation in route.operations:
        reason = "has a filter, and a truncate has no row: it comes only when operations are named"
        return Explanation(route.name, Rule.TRUNCATE, reason)
    wanted = ", ".join(sorted(route.operations))
    return Explanation(route.name, Rule.OPERATION, f"is for {wanted}, not for {operation}")


def _kept(bound: _BoundRoute, change: Change, seen: Change) -> Explanation:
    route = bound.route
    reasons = [f"is for {change.operation} of {route.pattern}"]
    if seen.leaving:
        reasons.append(f"the row has left {route.where}")
    elif route.where is not None and change.operation is not _TRUNCATE:
        reasons.append(f"{_tested_name(change)} passes {route.where}")
    if route.changed and change.operation is _UPDATE:
        changed = [name for name in route.changed if _has_changed(name, change) is True]
        reasons.append(f"{_and(changed)} changed")
    names = dict.fromkeys(
        [column.name for column in change.new_columns or ()]
        + [column.name for column in change.identity_columns or ()]
        + [*change.unchanged]
    )
    passes = route.projection.passes if route.projection else lambda _: True
    masks = route.projection.masks if route.projection else {}
    return Explanation(
        route=route.name,
        rule=Rule.KEPT,
        reason="; ".join(reasons),
        left_out=tuple(name for name in names if not passes(name)),
        masked={name: str(masks[name]) for name in names if name in masks and passes(name)},
        seen=seen,
    )


def _whether_filtered(
    bound: _BoundRoute, normalised: Mapping[Literal, str], change: Change
) -> tuple[Rule, str] | None:
    """Say why the filter drops a change; None when it does not."""
    route, condition = bound.route, bound.condition
    if route.where is None or condition is None or change.operation is _TRUNCATE:
        return None
    tested = _tested(change)
    if condition(tested) is True or (route.leaving and _leaves(condition, change)):
        return None
    if condition is _never:
        return Rule.ABSENT, _unfit(route.where, change.layout)
    rule, reason = _failing(route.where, tested, normalised, change)
    if route.leaving and change.operation is _UPDATE:
        is_unknown = condition(change.identity) is ABSENT
        reason += (
            "; whether the old row passed is not known" if is_unknown else "; nor did the old row"
        )
    return rule, reason


def _unfit(where: Filter, layout: Layout) -> str:
    lacking = sorted(columns(where) - layout.columns.keys())
    if lacking:
        return f"the table has no column {_and(lacking)}, which the filter reads"
    return "the filter does not fit the types of the table's columns"


def _failing(
    where: Filter, tested: Row, normalised: Mapping[Literal, str], change: Change
) -> tuple[Rule, str]:
    layout = change.layout

    def test(part: Filter) -> Outcome:
        return compile_filter(part, layout.columns, layout.types, normalised)(tested)

    part = failing_part(where, test)
    outcome = test(part)
    if outcome is ABSENT:
        absent = sorted(name for name in columns(part) if tested.column(name) is None)
        return Rule.ABSENT, f"{part}: {_tested_name(change)} does not carry {_and(absent)}"
    if outcome is None:
        return Rule.FILTER, f"{part} is unknown for {_tested_name(change)}, because of a null"
    return Rule.FILTER, f"{part} is false for {_tested_name(change)}"


def _unchanged(route: Route, change: Change) -> tuple[Rule, str]:
    """Say why an update is dropped that gave no column another value, as far as is known."""
    unknown = [name for name in route.changed if _has_changed(name, change) is ABSENT]
    same = [name for name in route.changed if name not in unknown]
    told = f"{_and(same)} did not change" if same else ""
    if not unknown:
        return Rule.CHANGED, told
    reason = f"whether {_and(unknown)} changed is not known: the identity does not carry the old"
    return Rule.ABSENT, "; ".join(filter(None, [f"{reason} value", told]))


def _tested(change: Change) -> Row:
    return change.identity if change.operation is _DELETE else change.row


def _tested_name(change: Change) -> str:
    return "the identity" if change.operation is _DELETE else "the new row"


def _and(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))
