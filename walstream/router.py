"""Which handlers and sinks get a change.

A route says which changes go where. Routes are made from decorators and from the configuration, and
are bound to each shape of a relation when it first comes: its filter is compiled for the relation's
types, once. From then on a change costs one look-up, and one filter for each route that wants its
relation and operation; routes that ask a column to equal a value are found by that value.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any, Final

import msgspec

from walstream.changes import Change, Layout, Operation, Relation, Row
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
    literals,
)
from walstream.projection import Projection

ALL_OPERATIONS: Final = frozenset(
    {Operation.INSERT, Operation.UPDATE, Operation.DELETE, Operation.TRUNCATE}
)

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
    """

    name: str
    pattern: TablePattern
    destination: Any
    operations: frozenset[Operation] = ALL_OPERATIONS
    explicit: bool = False
    where: Filter | None = None
    projection: Projection | None = None
    leaving: bool = False

    def wants(self, relation: Relation, ancestors: Iterable[Relation]) -> bool:
        """Whether the route's table is this one, or one that this one is a partition of."""
        return any(self.pattern.covers(candidate) for candidate in (relation, *ancestors))

    def wants_truncate(self) -> bool:
        """Whether truncates reach the destination."""
        return Operation.TRUNCATE in self.operations and (self.where is None or self.explicit)


class RouteCounts(msgspec.Struct):
    """What became of the changes of one route's tables and operations.

    ``absent`` are those dropped because the change did not carry a column of the filter.
    """

    matched: int = 0
    filtered: int = 0
    absent: int = 0


class _BoundRoute(msgspec.Struct, frozen=True, eq=False):
    """A route with its filter compiled for one layout."""

    route: Route
    place: int
    condition: Condition | None
    counts: RouteCounts


class _Index(msgspec.Struct, frozen=True, eq=False):
    """Routes that need one column to equal a value, found by the value."""

    column: str
    key_of: Callable[[msgspec.Raw], Any]
    routes: dict[Any, list[_BoundRoute]]


class _Candidates(msgspec.Struct, frozen=True, eq=False):
    """The routes for one layout and operation: those to be tried each time, and those indexed."""

    scanned: list[_BoundRoute]
    indexes: list[_Index]


class Router:
    """Finds the routes for each change.

    Before a change of a new layout can be routed, its layout must be bound: `literals` says which
    of the filters' values the server has to read for that, `bind` takes the answers.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = list(routes)
        self.counts = [RouteCounts() for _ in self.routes]
        self._bound: dict[Layout, dict[Operation, _Candidates]] = {}

    def unbind(self) -> None:
        """Forget all layouts: a new stream brings its own."""
        self._bound.clear()

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
            operation: _candidates(operation, wanting, layout, normalised)
            for operation in Operation
        }

    def route(self, change: Change) -> list[tuple[Route, Change]]:
        """Return the routes that keep a change, in their order, each with what it shall see.

        Raises:
            UnknownLabel: an enum has a label that its type did not have when it was fetched.
        """
        candidates = self._bound[change.layout][change.operation]
        found = candidates.scanned
        if candidates.indexes:
            found = _with_indexed(candidates, change)
        return [
            (bound.route, kept) for bound in found if (kept := _keep(bound, change)) is not None
        ]


INDEX_FROM: Final = 4
"""So many routes on one relation and operation must need a value of the same column before an index
over the values is cheaper than trying each route."""


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
) -> _Candidates:
    """Sort the routes that want an operation into indexes and those to be tried each time."""
    if operation is Operation.TRUNCATE:
        return _Candidates([bound for bound in wanting if bound.route.wants_truncate()], [])
    scanned = []
    by_column: defaultdict[str, list[tuple[Any, _BoundRoute]]] = defaultdict(list)
    for bound in wanting:
        if operation not in bound.route.operations:
            continue
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
    return _Candidates(sorted(scanned, key=_place), indexes)


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
    tested = change.identity if change.operation is Operation.DELETE else change.row
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
    if bound.condition is not None and change.operation is not Operation.TRUNCATE:
        tested = change.identity if change.operation is Operation.DELETE else change.row
        outcome = bound.condition(tested)
        if outcome is not True:
            leaving = route.leaving and _leaves(bound.condition, change)
            if not leaving:
                if outcome is ABSENT:
                    bound.counts.absent += 1
                else:
                    bound.counts.filtered += 1
                return None
    bound.counts.matched += 1
    if leaving:
        change = msgspec.structs.replace(change, leaving=True)
    return change if route.projection is None else route.projection.project(change)


def _leaves(condition: Condition, change: Change) -> bool:
    """Whether the old row of an update passes the filter that the new one does not."""
    return change.operation is Operation.UPDATE and condition(change.identity) is True


def _place(bound: _BoundRoute) -> int:
    return bound.place
