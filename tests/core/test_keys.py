"""Which rows a change is about."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.keys import NO_KEY, WHOLE_TABLE, Key, conflict, keys_of
from walstream.lsn import Lsn
from walstream.values import Types

TYPES = Types(lambda _: lambda text: text.decode())
ORDERS = Relation("public", "orders")
TRANSACTION = Transaction(1, Lsn(1), Lsn(2), "2026-01-01 00:00:00+00")


def layout(*key: str, relation: Relation = ORDERS, ancestors: tuple[Relation, ...] = ()) -> Layout:
    return Layout(relation, ["id", "part", "customer"], [23, 25, 23], list(key), TYPES, ancestors)


def columns(values: dict[str, Any]) -> list[Column]:
    return [
        Column(name, msgspec.Raw(msgspec.json.encode(value)), 25 if name == "part" else 23)
        for name, value in values.items()
    ]


def change(
    operation: Operation,
    shape: Layout,
    new: dict[str, Any] | None = None,
    old: dict[str, Any] | None = None,
) -> Change:
    return Change(
        operation,
        shape,
        TRANSACTION,
        1,
        None if new is None else columns(new),
        None if old is None else columns(old),
    )


def orders(*values: bytes) -> tuple[Key, ...]:
    return tuple(("public.orders", one) for one in values)


@pytest.mark.parametrize("operation", [Operation.INSERT, Operation.READ])
def test_a_new_row_is_known_by_its_primary_key(operation: Operation) -> None:
    one = change(operation, layout("id", "part"), {"part": "a", "id": 1, "customer": 7})
    assert keys_of(one) == orders(b'[1,"a"]')


def test_a_number_is_the_same_key_from_all_versions_of_wal2json() -> None:
    """From 2.6 on it is sent as a string; what is parked by a key outlives an upgrade."""
    one = change(Operation.INSERT, layout("id", "part"), {"id": "1", "part": "1", "customer": 7})
    assert keys_of(one) == orders(b'[1,"1"]')


def test_a_row_that_is_deleted_is_known_by_its_identity() -> None:
    assert keys_of(change(Operation.DELETE, layout("id"), old={"id": 1})) == orders(b"[1]")


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ({"id": 1}, {"id": 1}, [b"[1]"]),
        ({"id": 2}, {"id": 1}, [b"[1]", b"[2]"]),
        # Postgres sends the old primary key when it changes: without it, it has not.
        ({"id": 1}, None, [b"[1]"]),
        ({"id": 1}, {"customer": 7}, [WHOLE_TABLE]),
        # A long value that was not touched.
        ({"customer": 7}, {"id": 1}, [WHOLE_TABLE]),
    ],
)
def test_an_update_has_two_keys_when_it_changes_the_key(
    new: dict[str, Any], old: dict[str, Any] | None, expected: list[bytes]
) -> None:
    assert keys_of(change(Operation.UPDATE, layout("id"), new, old)) == orders(*expected)


def test_other_columns_can_be_the_key() -> None:
    one = change(Operation.INSERT, layout("id"), {"id": 1, "customer": 7})
    assert keys_of(one, ("customer", "id")) == orders(b"[7,1]")
    deleted = change(Operation.DELETE, layout("id"), old={"id": 1})
    assert keys_of(deleted, ("customer",)) == orders(WHOLE_TABLE)


def test_without_a_key_all_changes_of_a_table_keep_their_order() -> None:
    assert keys_of(change(Operation.INSERT, layout(), {"id": 1})) == orders(NO_KEY)


def test_a_truncate_is_about_all_rows() -> None:
    assert keys_of(change(Operation.TRUNCATE, layout("id"))) == orders(WHOLE_TABLE)


def test_a_row_of_a_partition_is_one_of_the_partitioned_table() -> None:
    partition = layout(
        "id",
        relation=Relation("public", "orders_2026_01"),
        ancestors=(Relation("public", "orders_2026"), ORDERS),
    )
    assert keys_of(change(Operation.INSERT, partition, {"id": 1})) == orders(b"[1]")


def test_a_row_that_is_a_model_has_the_key_that_was_sent() -> None:
    one = change(Operation.INSERT, layout("id"), {"id": 1})
    with_model: Change[Any] = msgspec.structs.replace(one, _row=object())
    assert keys_of(with_model) == orders(b"[1]")


KINDS = [b"[1]", b"[2]", NO_KEY, WHOLE_TABLE]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(KINDS, KINDS)))
def test_keys_conflict_when_they_are_equal_or_one_is_of_all_rows(one: bytes, other: bytes) -> None:
    expected = one == other or WHOLE_TABLE in (one, other)
    assert conflict(orders(one), orders(other)) is expected
    assert conflict([("public.a", one)], [("public.b", other)]) is False
    assert conflict(orders(one, b"[9]"), orders(b"[9]", other)) is True
    assert conflict(orders(one), ()) is False
