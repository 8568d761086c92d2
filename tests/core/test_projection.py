"""Columns are left out and masked, in the row, the identity and the key alike."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.errors import RelationMissing
from walstream.lsn import Lsn
from walstream.projection import REDACTED, Mask, Projection
from walstream.values import TEXT_OID, Types

PEOPLE: Final = Relation("public", "people")
TYPES: Final = Types(lambda _: bytes.decode)
COLUMNS: Final = {"id": 23, "email": TEXT_OID, "iban": 1043, "born": 1082, "photo": 17}
LAYOUT: Final = Layout(PEOPLE, list(COLUMNS), list(COLUMNS.values()), ["id", "email"], TYPES)
TRANSACTION: Final = Transaction(7, Lsn(1), Lsn(2), "2026-11-22 12:51:35.2096+00")


def sent(**values: Any) -> list[Column]:
    return [
        Column(name, msgspec.Raw(msgspec.json.encode(value)), COLUMNS[name])
        for name, value in values.items()
    ]


def update(**values: Any) -> Change:
    """An update whose old row differs in nothing but the key."""
    old = sent(**{**values, "id": 1})
    return Change(Operation.UPDATE, LAYOUT, TRANSACTION, 1, sent(id=2, **values), old, ("photo",))


def masked(**masks: str) -> Projection:
    rules = {name: Mask.parse(mask) for name, mask in masks.items()}
    return Projection(mask=rules, key=b"secret")


def test_nothing_to_do_leaves_the_change_as_it_is() -> None:
    change = update(email="a@b.example")
    assert Projection().project(change) is change
    assert Projection(exclude=["iban"], mask={}).project(change) is change
    assert masked(iban="redact").project(change) is change
    assert Projection(include=COLUMNS).project(change) is change


@pytest.mark.parametrize(
    "projection",
    [
        Projection(exclude=["email", "photo"]),
        Projection(include=["id", "iban"]),
        Projection(include=["id", "iban", "email"], exclude=["email"]),
    ],
)
def test_a_column_that_is_left_out_is_nowhere(projection: Projection) -> None:
    change = projection.project(update(email="a@b.example", iban="DE00"))
    assert dict(change.row) == {"id": 2, "iban": "DE00"}
    assert dict(change.identity) == {"id": 1, "iban": "DE00"}
    assert change.key == {"id": 2}
    assert change.unchanged == ()
    assert b"email" not in change.to_json()


def test_an_unchanged_column_is_still_named_when_it_is_masked() -> None:
    assert masked(photo="redact").project(update(email="x")).unchanged == ("photo",)


def test_a_masked_key_is_masked_in_the_key() -> None:
    change = masked(email="redact").project(update(email="a@b.example"))
    assert change.row["email"] == change.identity["email"] == change.key["email"] == REDACTED
    assert b"a@b.example" not in change.to_json()


def test_values_seen_before_do_not_shine_through() -> None:
    change = update(email="a@b.example")
    assert change.row["email"] == change.identity["email"] == "a@b.example"
    projected = masked(email="redact").project(change)
    assert projected.row["email"] == projected.identity["email"] == REDACTED
    assert change.row["email"] == "a@b.example"


@pytest.mark.parametrize(
    ("mask", "value", "expected"),
    [
        ("redact", "a@b.example", REDACTED),
        ("null", "a@b.example", None),
        ("keep-last-4", "DE0012345678", "********5678"),
        ("keep-last-1", "ab", "*b"),
        ("keep-last-4", "5678", "****"),
        ("keep-last-4", "", ""),
        ("hash", "a", hmac.new(b"secret", b"a", hashlib.sha256).hexdigest()),
    ],
)
def test_a_mask_hides_a_text(mask: str, value: str, expected: str | None) -> None:
    assert masked(email=mask).project(update(email=value)).row["email"] == expected


@pytest.mark.parametrize("mask", ["null", "redact", "keep-last-4", "hash"])
def test_null_stays_null(mask: str) -> None:
    assert masked(email=mask).project(update(email=None)).row["email"] is None


@pytest.mark.parametrize(
    ("mask", "typeoid"), [("null", 1082), ("redact", TEXT_OID), ("keep-last-2", TEXT_OID)]
)
def test_what_is_no_date_any_more_is_text(mask: str, typeoid: int) -> None:
    change = masked(born=mask).project(update(born="2024-02-29"))
    column = change.row.column("born")
    assert column is not None
    assert column.typeoid == typeoid


def test_a_hash_is_that_of_the_output_text() -> None:
    change = masked(photo="hash").project(update(photo="dead"))
    assert change.row["photo"] == hmac.new(b"secret", b"\\xdead", hashlib.sha256).hexdigest()


def test_changes_without_rows_pass() -> None:
    truncate = Change(Operation.TRUNCATE, LAYOUT, TRANSACTION, 1)
    assert masked(email="redact").project(truncate) is truncate
    delete = Change(Operation.DELETE, LAYOUT, TRANSACTION, 1, None, sent(id=1, email="a"))
    projected = masked(email="redact").project(delete)
    assert projected.new_columns is None
    assert dict(projected.identity) == {"id": 1, "email": REDACTED}


def test_hashing_needs_a_key() -> None:
    for key in (None, b""):
        with pytest.raises(ValueError, match="hash of column 'email' needs a key"):
            Projection(mask={"email": Mask.parse("hash")}, key=key)


@pytest.mark.parametrize("text", ["null", "redact", "hash", "keep-last-1", "keep-last-9999"])
def test_a_mask_prints_as_it_is_written(text: str) -> None:
    assert str(Mask.parse(text)) == text


@pytest.mark.parametrize("text", ["", "Redact", "keep-last", "keep-last-0", "keep-last--1", "sha"])
def test_a_mask_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="masks are null, redact, hash and keep-last-N"):
        Mask.parse(text)


def test_rules_for_columns_that_are_not_there_are_refused() -> None:
    projection = Projection(include=["id", "emial"], exclude=["x"], mask={"y": Mask.parse("null")})
    with pytest.raises(
        RelationMissing, match=r"public.people has no column 'emial', 'x', 'y'"
    ) as no:
        projection.check(COLUMNS, PEOPLE)
    assert no.value.hint == "its columns are id, email, iban, born, photo"
    masked(email="redact").check(COLUMNS, PEOPLE)


@given(st.text(min_size=1), st.sampled_from(["redact", "hash", "null", "keep-last-3"]))
def test_a_masked_value_is_nowhere_in_the_json(value: str, mask: str) -> None:
    secret = f"§{value}§§§"
    written = masked(email=mask).project(update(email=secret)).to_json()
    assert msgspec.json.encode(secret)[1:-1] not in written
