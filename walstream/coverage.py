"""Whether what is kept in the journal is all that a handler would have got.

In the journal is what routes to the live sink keep, as they pass it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from walstream.changes import Operation
from walstream.filters import columns
from walstream.router import Route, TablePattern


def uncovered(route: Route, live_routes: Sequence[Route]) -> list[str]:
    """Name the operations that the route wants, and that no route to the live sink keeps all of."""
    return [
        str(operation)
        for operation in sorted(route.operations)
        if route.wants_operation(operation)
        and not any(_keeps_all(one, route, operation) for one in live_routes)
    ]


def disguised(route: Route, live_routes: Sequence[Route]) -> list[str]:
    """Name the columns that decide what the route keeps, and do not come as they were.

    These are columns of its filter and of ``changed`` that a route to the live sink masks or
    leaves out.
    """
    return sorted({name for name, _ in _disguised(route, live_routes)})


def _disguised(route: Route, live_routes: Sequence[Route]) -> Iterator[tuple[str, Route]]:
    deciding = {*route.changed}
    if route.where is not None:
        deciding |= columns(route.where)
    for one in live_routes:
        if one.projection is None or not _overlap(one.pattern, route.pattern):
            continue
        for name in deciding:
            if not one.projection.shows(name):
                yield name, one


def _keeps_all(live: Route, route: Route, operation: Operation) -> bool:
    """Whether a route to the live sink keeps each change of an operation that the other keeps."""
    if not _contains(live, route) or not live.wants_operation(operation):
        return False
    if operation is Operation.TRUNCATE:
        return True
    if live.where is not None:
        is_same = live.where == route.where
        if not is_same or (route.leaving and not live.leaving):
            return False
    if operation is Operation.UPDATE and live.changed:
        return bool(route.changed) and set(route.changed) <= set(live.changed)
    return True


def _contains(live: Route, route: Route) -> bool:
    """Whether all tables of the route are tables of the other one."""
    relation = route.pattern.relation
    if relation is not None:
        return live.wants(relation, ())
    return live.pattern.schema in (None, route.pattern.schema) and live.pattern.name in (
        None,
        route.pattern.name,
    )


def _overlap(one: TablePattern, other: TablePattern) -> bool:
    return (None in (one.schema, other.schema) or one.schema == other.schema) and (
        None in (one.name, other.name) or one.name == other.name
    )
