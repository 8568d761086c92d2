"""Which routes get a change."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.changes import Change, Column, Layout, Message, Operation, Relation, Transaction
from walstream.errors import DecodeError
from walstream.filters import parse
from walstream.lsn import Lsn
from walstream.projection import Mask, Projection
from walstream.router import (
    INDEX_FROM,
    OWN_TABLES,
    MessageRoute,
    Route,
    Router,
    Rule,
    TablePattern,
)
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


# ---- What has to have changed


def full(old: dict[str, Any], **new: Any) -> Change:
    return update({**new, **old}, **new)


def test_an_update_passes_when_one_of_the_columns_changed() -> None:
    router = bound(route(changed=("status",)), route(changed=("id", "status")))
    assert matches(router, full({"status": "new"}, id=1, status="old")) == [0, 1]
    assert matches(router, full({"id": 2}, id=1, status="old")) == [1]
    assert matches(router, full({}, id=1, status="old")) == []
    assert [counts.filtered for counts in router.counts] == [2, 1]
    assert [counts.absent for counts in router.counts] == [0, 0]


def test_what_counts_as_changed_is_the_text_that_was_sent() -> None:
    """A numeric's scale is part of it; null is a value like others."""
    router = bound(route(changed=("status",)))
    change = update({"id": 1, "status": 1}, id=1, status=1)
    assert change.new_columns is not None
    assert isinstance(change.sent_identity, list)
    change.sent_identity[1] = Column("status", msgspec.Raw(b"1.0"), 1700)
    change.new_columns[1] = Column("status", msgspec.Raw(b"1.00"), 1700)
    assert matches(router, change) == [0]
    assert matches(router, full({"status": None}, id=1, status="")) == [0]
    assert matches(router, full({"status": None}, id=1, status=None)) == []


def test_inserts_deletes_and_truncates_need_not_have_changed_anything() -> None:
    router = bound(route(changed=("status",)))
    for change in (insert(id=1, status="x"), delete(id=1), TRUNCATE):
        assert matches(router, change) == [0]


def test_a_column_that_the_identity_does_not_carry_fails_closed_and_is_counted() -> None:
    """But for a key: Postgres sends it with every update, and it is equal then."""
    router = bound(route(changed=("status",)), route(changed=("status", "id")))
    assert matches(router, update({"id": 1}, id=1, status="new")) == []
    assert [counts.absent for counts in router.counts] == [1, 1]
    assert matches(router, update({"id": 2}, id=1, status="new")) == [1]
    router = bound(route(changed=("id",)))
    assert matches(router, update({"id": 1}, id=1, status="new")) == []
    assert router.counts[0].filtered == 1


def test_a_column_that_the_table_does_not_have_cannot_be_known() -> None:
    router = bound(route("*.*", changed=("ghost",)))
    assert matches(router, full({"id": 2}, id=1)) == []
    assert router.counts[0].absent == 1


def test_an_unchanged_toasted_value_has_not_changed() -> None:
    router = bound(route(changed=("status",)))
    change = msgspec.structs.replace(update({"id": 1}, id=1), unchanged=("status",))
    assert matches(router, change) == []
    assert router.counts[0].filtered == 1


def test_changed_and_where_must_both_hold() -> None:
    router = bound(route(where="status=eq.new", changed=("id",)))
    assert matches(router, full({"id": 2}, id=1, status="new")) == [0]
    assert matches(router, full({"id": 2}, id=1, status="old")) == []
    assert matches(router, full({}, id=1, status="new")) == []
    assert router.counts[0].filtered == 2


def test_an_update_that_leaves_the_filter_must_have_changed_too() -> None:
    router = bound(
        route(where="status=eq.new", leaving=True, changed=("id",)),
        route(where="status=eq.new", leaving=True, changed=("status",)),
    )
    ((found, change),) = router.route(full({"status": "new"}, id=1, status="old"))
    assert found is router.routes[1]
    assert change.leaving


# ---- Messages


@pytest.mark.parametrize(
    ("wanted", "prefix", "is_wanted"),
    [
        ("jobs", "jobs", True),
        ("jobs", "jobs.mail", False),
        ("jobs.*", "jobs.mail", True),
        ("jobs.*", "jobs", False),
        ("*", "", True),
        ("jo*bs", "jobs", False),
        ("jo*bs", "jo*bs", True),
    ],
)
def test_a_message_goes_to_the_routes_of_its_prefix(
    wanted: str,
    prefix: str,
    is_wanted: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    route = MessageRoute("mine", wanted, None)
    router = Router([], [MessageRoute("none", "other", None), route])
    message = Message(prefix, "content", Lsn(1))
    assert router.route_message(message) == ([(route, message)] if is_wanted else [])
    assert [counts.matched for counts in router.message_counts] == [0, int(is_wanted)]
    told = [(one.route, one.rule, one.kept, one.reason) for one in router.explain_message(message)]
    assert told == [
        ("none", Rule.PREFIX, False, "is for the prefix other"),
        ("mine", Rule.KEPT if is_wanted else Rule.PREFIX, is_wanted, f"is for the prefix {wanted}"),
    ]
    assert [counts.matched for counts in router.message_counts] == [0, int(is_wanted)]


# ---- Explanations


def why(one: Route, change: Change, *, to: Layout = LAYOUT) -> tuple[Rule, str]:
    """Explain one route, and see that it agrees with routing and counts nothing."""
    router = bound(one, to=to)
    (explanation,) = router.explain(change)
    counts = router.counts[0]
    assert (counts.matched, counts.filtered, counts.absent) == (0, 0, 0)
    routed = router.route(change)
    assert explanation.kept == bool(routed)
    assert (explanation.seen is not None) == explanation.kept
    if counts.absent:
        assert explanation.rule is Rule.ABSENT
    if counts.filtered:
        assert explanation.rule in (Rule.FILTER, Rule.CHANGED)
    return explanation.rule, explanation.reason


def test_a_route_for_another_table_says_so() -> None:
    rule, reason = why(route("public.other"), insert(id=1))
    assert (rule, reason) == (Rule.TABLE, "is for public.other, not for public.orders")
    part = layout(Relation("public", "part"), ORDERS)
    assert why(route("x.*"), insert(part, id=1), to=part) == (
        Rule.TABLE,
        "is for x.*, not for public.part of public.orders",
    )


def test_a_route_for_other_operations_says_so() -> None:
    assert why(route("*.*", "update", "delete"), insert(id=1)) == (
        Rule.OPERATION,
        "is for delete, update, not for insert",
    )
    assert why(route("*.*", "insert"), TRUNCATE)[0] is Rule.OPERATION


def test_a_route_with_a_filter_says_why_it_gets_no_truncate() -> None:
    assert why(route(where="id=eq.1"), TRUNCATE) == (
        Rule.TRUNCATE,
        "has a filter, and a truncate has no row: it comes only when operations are named",
    )
    assert why(route("*.*", "truncate", where="id=eq.1"), TRUNCATE) == (
        Rule.KEPT,
        "is for truncate of *.*",
    )


@pytest.mark.parametrize(
    ("where", "rule", "reason"),
    [
        ("status=eq.new", Rule.FILTER, "status=eq.new is false for the new row"),
        ("id=eq.1,status=eq.new,id=lt.1", Rule.FILTER, "status=eq.new is false for the new row"),
        ("or(id.gt.5,status.eq.new)", Rule.FILTER, "or(id.gt.5,status.eq.new) is false for"),
        ("and(id.eq.1,and(id.gt.0,id.gt.1))", Rule.FILTER, "id=gt.1 is false for the new row"),
        ("not.and(id.eq.1,status.eq.old)", Rule.FILTER, "not.and(id.eq.1,status.eq.old) is false"),
        ("id=not.eq.1", Rule.FILTER, "id=not.eq.1 is false for the new row"),
        ("id=eq.1,ghost=eq.1", Rule.ABSENT, "the table has no column 'ghost', which the filter"),
    ],
)
def test_the_smallest_condition_that_fails_is_named(where: str, rule: Rule, reason: str) -> None:
    found = why(route("*.*", where=where), insert(id=1, status="old"))
    assert found[0] is rule
    assert found[1].startswith(reason)


def test_a_null_and_a_column_that_is_not_carried_are_told_apart() -> None:
    """False counts more than absent, absent more than unknown."""
    assert why(route(where="id=eq.1,status=eq.new"), insert(id=1, status=None)) == (
        Rule.FILTER,
        "status=eq.new is unknown for the new row, because of a null",
    )
    assert why(route(where="id=eq.1,status=eq.new"), delete(id=1)) == (
        Rule.ABSENT,
        "status=eq.new: the identity does not carry 'status'",
    )
    assert why(route(where="status=eq.new,id=eq.2"), delete(id=1)) == (
        Rule.FILTER,
        "id=eq.2 is false for the identity",
    )
    assert why(route(where="id=eq.1,status=eq.new"), delete(id=None))[0] is Rule.ABSENT


def test_a_filter_that_does_not_fit_the_types_is_told() -> None:
    router = Router([route("*.*", where="status=eq.new")])
    router.bind(LAYOUT, [], {})
    (explanation,) = router.explain(insert(id=1, status="new"))
    assert explanation.rule is Rule.ABSENT
    assert explanation.reason == "the filter does not fit the types of the table's columns"


def test_columns_that_did_not_change_are_named() -> None:
    assert why(route(changed=("status",)), full({}, id=1, status="x")) == (
        Rule.CHANGED,
        "'status' did not change",
    )
    rule, reason = why(route(changed=("status", "id")), update({"id": 1}, id=1, status="x"))
    assert rule is Rule.ABSENT
    first, second = reason.split("; ")
    assert (
        first == "whether 'status' changed is not known: the identity does not carry the old value"
    )
    assert second == "'id' did not change"
    assert why(route(changed=("status",)), update({"id": 1}, id=1, status="x"))[0] is Rule.ABSENT
    assert why(route(where="status=eq.x", changed=("id",)), full({}, id=1, status="x")) == (
        Rule.CHANGED,
        "'id' did not change",
    )


def test_what_keeps_a_change_is_told() -> None:
    one = route("public.*", where="id=gte.1", changed=("id", "status"))
    assert why(one, full({"id": 2, "status": "y"}, id=1, status="x")) == (
        Rule.KEPT,
        "is for update of public.*; the new row passes id=gte.1; 'id' and 'status' changed",
    )
    assert why(one, delete(id=1)) == (
        Rule.KEPT,
        "is for delete of public.*; the identity passes id=gte.1",
    )
    assert why(route(), insert(id=1)) == (Rule.KEPT, "is for insert of public.orders")


def test_an_update_that_leaves_is_told() -> None:
    one = route(where="status=eq.new", leaving=True)
    assert why(one, full({"status": "new"}, id=1, status="old")) == (
        Rule.KEPT,
        "is for update of public.orders; the row has left status=eq.new",
    )
    assert why(one, full({"status": "older"}, id=1, status="old")) == (
        Rule.FILTER,
        "status=eq.new is false for the new row; nor did the old row",
    )
    assert why(one, update({"id": 1}, id=1, status="old")) == (
        Rule.FILTER,
        "status=eq.new is false for the new row; whether the old row passed is not known",
    )
    assert why(one, delete(status="old")) == (
        Rule.FILTER,
        "status=eq.new is false for the identity",
    )
    leaves = msgspec.structs.replace(one, changed=("id",))
    assert why(leaves, full({"status": "new"}, id=1, status="old"))[0] is Rule.CHANGED


def test_columns_that_are_left_out_or_masked_are_named() -> None:
    projection = Projection(
        include=["id", "status"],
        exclude=["id"],
        mask={"status": Mask.parse("keep-last-2"), "id": Mask.parse("null")},
    )
    router = bound(route(projection=projection), route())
    first, second = router.explain(update({"id": 1}, id=1, status="open"))
    assert (first.left_out, first.masked) == (("id",), {"status": "keep-last-2"})
    assert first.seen is not None
    assert dict(first.seen.row) == {"status": "**en"}
    assert (second.left_out, second.masked) == ((), {})
    (unchanged, _) = router.explain(
        msgspec.structs.replace(update({"id": 1}, id=1), unchanged=("status",))
    )
    assert unchanged.masked == {"status": "keep-last-2"}


def test_indexed_routes_are_explained_too() -> None:
    router = bound(*[route(where=f"id=eq.{number}") for number in range(INDEX_FROM)])
    assert [one.kept for one in router.explain(insert(id=2))] == [False, False, True, False]
    assert [one.rule for one in router.explain(delete(status="x"))] == [Rule.ABSENT] * INDEX_FROM


def test_walstreams_own_tables_come_only_to_routes_that_name_them() -> None:
    """A pattern that meant them would make changes of what a change has caused."""
    own = layout(min(OWN_TABLES))
    named = str(TablePattern(own.relation.schema, own.relation.name))
    router = bound(route("*.*"), route(named), to=own)
    assert matches(router, insert(own, id=1)) == [1]
    told = router.explain(insert(own, id=1))[0]
    assert told.rule is Rule.TABLE
    assert told.reason == f"is for *.*, which does not mean walstream's own {own.relation}"


def test_all_routes_are_listed_with_their_counts() -> None:
    message_route = MessageRoute("messages", "*", None)
    router = Router([route()], [message_route])
    router.route_message(Message("mail", "", Lsn(1)))
    assert [(one.name, counts.matched) for one, counts in router.counted()] == [
        ("", 0),
        ("messages", 1),
    ]


# ---- What is counted


def counted(router: Router) -> dict[tuple[str, str, str], int]:
    return {
        (str(one.relation), str(one.operation), str(one.outcome)): one.count
        for one in router.change_counts()
    }


def test_changes_are_counted_by_relation_operation_and_whether_a_route_kept_them() -> None:
    """Once each, however many routes keep or drop them."""
    router = bound(route(where="status=eq.new"), route("public.*", "insert", where="status=eq.new"))
    for change in (
        insert(status="new"),
        insert(status="old"),
        insert(status="new"),
        delete(status="old"),
        TRUNCATE,
    ):
        router.route(change)
    assert counted(router) == {
        ("public.orders", "insert", "routed"): 2,
        ("public.orders", "insert", "dropped"): 1,
        ("public.orders", "delete", "dropped"): 1,
        ("public.orders", "truncate", "dropped"): 1,
    }


def test_changes_that_no_route_wants_and_those_of_partitions_are_counted() -> None:
    part = layout(Relation("public", "part"), ORDERS)
    router = bound(route("*.other"))
    router.bind(part, [], {})
    router.route(insert(id=1))
    router.route(insert(part, id=1))
    assert counted(router) == {
        ("public.orders", "insert", "dropped"): 1,
        ("public.part", "insert", "dropped"): 1,
    }


def test_explaining_counts_no_change() -> None:
    router = bound(route())
    router.explain(insert(id=1))
    assert router.change_counts() == ()


def test_counts_outlive_the_layouts() -> None:
    """A relation that is altered, or comes again in another session, is counted on."""
    router = bound(route())
    router.route(insert(id=1))
    router.unbind()
    assert counted(router) == {("public.orders", "insert", "routed"): 1}
    for again in (LAYOUT, layout(ORDERS)):
        router.bind(again, router.routes, {})
    router.route(insert(id=1))
    assert counted(router) == {("public.orders", "insert", "routed"): 2}


def test_another_router_counts_on() -> None:
    """Routes by their names; what the one before has counted stays as it is."""
    named = [
        Route(name, TablePattern.parse("public.orders"), None, where=parse(f"status=eq.{value}"))
        for name, value in (("twice", "new"), ("twice", "old"), ("gone", "new"))
    ]
    before = Router(named, [MessageRoute("jobs", "jobs", None)])
    literals = {literal: literal.text for one in named for literal in before.literals(one, LAYOUT)}
    before.bind(LAYOUT, named, literals)
    before.route(insert(status="new"))
    before.route_message(Message("jobs", "x", Lsn(1)))
    again = Router([*named[:2], route(where="id=eq.1")], [MessageRoute("jobs", "jobs", None)])
    again.adopt_counts(before)
    assert counted(again) == counted(before) == {("public.orders", "insert", "routed"): 1}
    assert [(one.matched, one.filtered) for one in again.counts] == [(1, 0), (0, 1), (0, 0)]
    assert again.message_counts[0].matched == 1
    again.bind(LAYOUT, named[:2], literals)
    again.route(insert(status="new"))
    again.route(delete(status="none"))
    assert counted(again) == {
        ("public.orders", "insert", "routed"): 2,
        ("public.orders", "delete", "dropped"): 1,
    }
    assert [(one.matched, one.filtered) for one in again.counts[:2]] == [(2, 1), (0, 3)]
    assert [(one.matched, one.filtered) for one in before.counts] == [(1, 0), (0, 1), (1, 0)]
