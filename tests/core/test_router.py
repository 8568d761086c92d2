"""Which routes get a change."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.errors import DecodeError
from walstream.filters import parse
from walstream.lsn import Lsn
from walstream.projection import Mask, Projection
from walstream.router import INDEX_FROM, Route, Router, TablePattern
from walstream.values import Types

TYPES = Types(lambda _: lambda text: text.decode())
COLUMNS = {"id": 23, "status": 25}
ORDERS = Relation("public", "orders")
TRANSACTION = Transaction(1, Lsn(1), Lsn(2), "2026-01-01 00:00:00+00")


def layout(relation: Relation = ORDERS, *ancestors: Relation, **columns: int) -> Layout:
    known = columns or COLUMNS
    return Layout(
        relation, list(known), list(known.values()), ["id"], TYPES, ancestors, columns=known
    )


LAYOUT = layout()


def sent(**values: Any) -> list[Column]:
    return [
        Column(name, msgspec.Raw(msgspec.json.encode(value)), COLUMNS[name])
        for name, value in values.items()
    ]


def insert(shape: Layout = LAYOUT, **values: Any) -> Change:
    return Change(Operation.INSERT, shape, TRANSACTION, 1, sent(**values))


def update(old: dict[str, Any], **new: Any) -> Change:
    return Change(Operation.UPDATE, LAYOUT, TRANSACTION, 1, sent(**new), sent(**old))


def delete(**values: Any) -> Change:
    return Change(Operation.DELETE, LAYOUT, TRANSACTION, 1, None, sent(**values))


TRUNCATE = Change(Operation.TRUNCATE, LAYOUT, TRANSACTION, 1)


def route(table: str = "public.orders", *operations: str, where: str = "", **options: Any) -> Route:
    return Route(
        name=where,
        pattern=TablePattern.parse(table),
        destination=None,
        operations=frozenset(
            map(Operation, operations or ("insert", "update", "delete", "truncate"))
        ),
        explicit=bool(operations),
        where=parse(where) if where else None,
        **options,
    )


def bound(*routes: Route, to: Layout = LAYOUT) -> Router:
    router = Router(routes)
    fitting = router.wanting(to)
    literals = [literal for one in fitting for literal in router.literals(one, to)]
    router.bind(to, fitting, {literal: literal.text for literal in literals})
    return router


def matches(router: Router, change: Change) -> list[int]:
    return [router.routes.index(found) for found, _ in router.route(change)]


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("public.orders", "public", "orders"),
        ("public.*", "public", None),
        ("*.orders", None, "orders"),
        ("*.*", None, None),
        ('"*"."*"', "*", "*"),
        ('"my.schema"."Or""ders *"', "my.schema", 'Or"ders *'),
        ("Schéma.t a b", "Schéma", "t a b"),
    ],
)
def test_a_table_is_two_names(text: str, schema: str | None, name: str | None) -> None:
    pattern = TablePattern.parse(text)
    assert (pattern.schema, pattern.name) == (schema, name)
    assert TablePattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["", "orders", "a.b.c", "public.", ".orders", 'a."b', "a.b*", "*"])
def test_what_is_not_a_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a table: write"):
        TablePattern.parse(text)


name = st.none() | st.text(min_size=1, max_size=8)


@given(name, name)
def test_every_name_survives_a_round_trip(schema: str | None, table: str | None) -> None:
    assert TablePattern.parse(str(TablePattern(schema, table))) == TablePattern(schema, table)


def test_a_pattern_with_a_star_is_not_one_table() -> None:
    assert TablePattern.parse("public.orders").relation == ORDERS
    assert TablePattern.parse("public.*").relation is None


def test_a_change_goes_to_the_routes_of_its_table_and_operation() -> None:
    router = bound(
        route(), route("public.*", "insert"), route("*.other"), route("*.*", "delete", "update")
    )
    assert matches(router, insert(id=1)) == [0, 1]
    assert matches(router, delete(id=1)) == [0, 3]
    assert matches(router, TRUNCATE) == [0]
    assert [counts.matched for counts in router.counts] == [3, 1, 0, 1]


def test_a_partitions_change_goes_to_the_routes_of_its_ancestors() -> None:
    part = layout(Relation("public", "part"), Relation("public", "middle"), ORDERS)
    router = bound(route(), route("public.middle"), route("public.part"), route("x.*"), to=part)
    assert matches(router, insert(part, id=1)) == [0, 1, 2]


def test_an_insert_and_an_update_are_tested_on_the_new_row_a_delete_on_the_identity() -> None:
    router = bound(route(where="status=eq.new"))
    assert matches(router, insert(id=1, status="new")) == [0]
    assert matches(router, insert(id=1, status="old")) == []
    assert matches(router, update({"status": "new"}, status="old")) == []
    assert matches(router, update({"status": "old"}, status="new")) == [0]
    assert matches(router, delete(status="new")) == [0]
    assert matches(router, delete(status="old")) == []
    assert router.counts[0].filtered == 3


def test_a_column_that_is_not_carried_fails_closed_and_is_counted() -> None:
    router = bound(route(where="status=eq.new"), route(where="status=not.eq.new"))
    assert matches(router, delete(id=1)) == []
    assert [counts.absent for counts in router.counts] == [1, 1]


def test_a_filter_on_a_column_that_the_table_does_not_have_is_never_passed() -> None:
    """A pattern covers tables of all kinds."""
    router = bound(route("*.*", where="or(ghost.eq.1,id.eq.1)"))
    assert matches(router, insert(id=1)) == []
    assert router.counts[0].absent == 1


def test_an_update_that_leaves_the_filter_is_marked_when_asked_for() -> None:
    router = bound(route(where="status=eq.new", leaving=True), route(where="status=eq.new"))
    ((found, change),) = router.route(update({"status": "new"}, status="old"))
    assert found is router.routes[0]
    assert change.leaving
    ((_, kept), _) = router.route(update({"status": "new"}, status="new"))
    assert not kept.leaving
    assert matches(router, update({"status": "old"}, status="old")) == []
    assert matches(router, delete(status="old")) == []


def test_a_truncate_reaches_a_filtered_route_only_when_it_is_named() -> None:
    router = bound(
        route(where="id=eq.1"), route("*.*", "truncate", where="id=eq.1"), route("*.*", "insert")
    )
    assert matches(router, TRUNCATE) == [1]
    assert [one.wants_truncate() for one in router.routes] == [False, True, False]


def test_a_projection_is_applied_for_its_route_alone() -> None:
    masked = Projection(include=["status"], mask={"status": Mask.parse("redact")})
    router = bound(route(projection=masked), route())
    (_, first), (_, second) = router.route(insert(id=1, status="x"))
    assert dict(first.row) == {"status": "[redacted]"}
    assert list(second.row) == ["id", "status"]


@pytest.mark.parametrize("routes", [INDEX_FROM - 1, 1000])
def test_routes_on_one_column_are_found_by_its_value(routes: int) -> None:
    """In the order of the routes, whether they are indexed or tried."""
    router = bound(
        *[route(where=f"id=eq.{number % 500},status=eq.new") for number in range(routes)],
        route(where="id=gte.0"),
    )
    found = matches(router, insert(id=2, status="new"))
    assert found == [number for number in range(routes) if number % 500 == 2] + [routes]
    assert matches(router, insert(id=2, status="old")) == [routes]
    assert matches(router, delete(id=None, status="x")) == []


def test_indexed_routes_count_a_column_that_is_not_carried() -> None:
    router = bound(*[route(where=f"status=eq.{number}") for number in range(INDEX_FROM)])
    assert matches(router, delete(id=1)) == []
    assert [counts.absent for counts in router.counts] == [1] * INDEX_FROM


def test_routes_that_ask_for_leaving_updates_are_not_found_by_value() -> None:
    """The new row does not have it any more."""
    router = bound(
        *[route(where=f"status=eq.{number}", leaving=True) for number in range(INDEX_FROM)]
    )
    assert matches(router, update({"status": "2"}, status="9")) == [2]


def test_layouts_are_bound_and_forgotten() -> None:
    router = bound(route())
    assert router.layouts() == [LAYOUT]
    router.unbind()
    assert router.layouts() == []


def test_a_filter_that_does_not_fit_is_never_passed() -> None:
    """One table that a pattern covers must not stop the others."""
    router = Router([route("*.*", where="status=eq.new")])
    router.bind(LAYOUT, [], {})
    assert matches(router, insert(id=1, status="new")) == []
    assert router.counts[0].absent == 1


def test_a_relation_is_covered_by_name_or_by_an_ancestor() -> None:
    part = Relation("public", "part")
    router = bound(route(), to=layout(part, ORDERS))
    assert router.covers(ORDERS)
    assert router.covers(part)
    assert not router.covers(Relation("public", "other"))


def test_a_table_may_gain_routes_by_becoming_a_partition() -> None:
    """Unless it is one, or all routes want it already."""
    router = Router([route("public.whole"), route("*.*")])
    assert router.may_gain(LAYOUT)
    assert not router.may_gain(layout(ORDERS, Relation("public", "whole")))
    assert not Router([route("*.*")]).may_gain(LAYOUT)


def test_an_indexed_value_that_cannot_be_read_is_the_decoders_error() -> None:
    router = bound(*[route(where=f"id=eq.{number}") for number in range(INDEX_FROM)])
    with pytest.raises(DecodeError, match="a value of id"):
        router.route(insert(id="not a number"))
