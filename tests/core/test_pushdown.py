"""What the server need not send."""

from __future__ import annotations

import pytest

from walstream.changes import Operation, Relation
from walstream.filters import parse
from walstream.pushdown import push_down
from walstream.router import ALL_OPERATIONS, Route, TablePattern

ORDERS = Relation("public", "orders")
OTHER = Relation("public", "other")


def route(table: str, *operations: str, where: str = "") -> Route:
    return Route(
        name=table,
        pattern=TablePattern.parse(table),
        destination=None,
        operations=frozenset(map(Operation, operations)) or ALL_OPERATIONS,
        explicit=bool(operations),
        where=parse(where) if where else None,
    )


def test_the_tables_and_operations_of_all_routes_are_asked_for() -> None:
    pushed_down = push_down(
        [route("public.orders", "insert", "update"), route("x.y", "insert"), route("x.y")], []
    )
    assert pushed_down.options == {
        "actions": "delete,insert,truncate,update",
        "add-tables": "public.orders,x.y",
    }
    assert not pushed_down.follow_partitions


def test_what_is_not_asked_for_is_known() -> None:
    pushed_down = push_down([route("public.orders", where="id=eq.1")], [OTHER])
    assert pushed_down.options["actions"] == "delete,insert,update"
    assert pushed_down.sends(ORDERS, Operation.INSERT)
    assert not pushed_down.sends(ORDERS, Operation.TRUNCATE)
    assert not pushed_down.sends(OTHER, Operation.INSERT)


def test_names_are_escaped() -> None:
    pushed_down = push_down([route('"my.schema"."a b,c\\d\te*"')], [])
    assert pushed_down.options["add-tables"] == r"my\.schema.a\ b\,c\\d\	e\*"


@pytest.mark.parametrize("table", ["public.*", "*.orders", "public.orders"])
def test_partitions_are_sorted_out_on_our_side(table: str) -> None:
    """They come under names of their own, and new ones may be made at any time."""
    pushed_down = push_down([route("x.y"), route(table, "insert")], [ORDERS])
    assert "add-tables" not in pushed_down.options
    assert pushed_down.follow_partitions
    assert pushed_down.sends(OTHER, Operation.INSERT)


@pytest.mark.parametrize("table", ["public.orders", "public.*"])
def test_everything_can_be_asked_for(table: str) -> None:
    """Then ordinals do not depend on the other routes. Partitions are another matter."""
    pushed_down = push_down([route(table, "insert")], [], everything=True)
    assert pushed_down.options == {}
    assert pushed_down.follow_partitions is (table == "public.*")
    assert pushed_down.sends(OTHER, Operation.TRUNCATE)


def test_without_routes_on_tables_no_change_is_asked_for() -> None:
    """wal2json sends logical messages whatever its actions are."""
    pushed_down = push_down([], [])
    assert pushed_down.options == {"actions": ""}
    assert not pushed_down.follow_partitions
    assert not pushed_down.sends(ORDERS, Operation.INSERT)
