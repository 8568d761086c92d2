"""Filters: checked against a relation's columns, compiled, and put to rows."""

from __future__ import annotations

import re
from itertools import product
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.changes import Column, Layout, Relation, Row
from walstream.errors import DecodeError, FilterError
from walstream.filters import (
    ABSENT,
    Condition,
    Literal,
    Outcome,
    columns,
    compile_filter,
    equality_key,
    equality_keys,
    literals,
    parse,
    required_equalities,
)
from walstream.values import Kind, PgType, Types, UnknownLabel

MOOD: Final = PgType(
    90001, "mood", "public", Kind.ENUM, labels=("sad", "ok", "happy"), sql_name="mood%"
)
PLACE: Final = PgType(
    90002, "place", "public", Kind.COMPOSITE, attributes=(("name", 25), ("floor", 23))
)
CITEXT: Final = PgType(90003, "citext", "public")
PRICE: Final = PgType(90004, "price", "public", Kind.DOMAIN, base=1700)
TYPES: Final = Types(lambda _: bytes.decode, (MOOD, PLACE, CITEXT, PRICE))
ORDERS: Final = Relation("public", "orders")
COLUMNS: Final = {
    "id": 23,
    "name": 25,
    "code": 1042,
    "paid": 16,
    "price": PRICE.oid,
    "at": 1184,
    "mood": MOOD.oid,
    "place": PLACE.oid,
    "nick": CITEXT.oid,
    "doc": 114,
    "docs": 3802,
    "who": 2950,
    "odd": 99999,
}


def row(**values: Any) -> Row:
    """A row with these columns; bytes are JSON, text is a JSON string, None is null."""
    sent = [
        Column(
            name,
            msgspec.Raw(value if isinstance(value, bytes) else msgspec.json.encode(value)),
            COLUMNS[name],
        )
        for name, value in values.items()
    ]
    return Row(Layout(ORDERS, list(COLUMNS), list(COLUMNS.values()), ["id"], TYPES), sent)


def compiled(text: str, **normalised: str) -> Condition:
    """Compile a filter; the server reads each value as it is written, unless told otherwise."""
    where = parse(text)
    read = {
        literal: normalised.get(literal.column, literal.text)
        for literal in literals(where, COLUMNS, TYPES)
    }
    return compile_filter(where, COLUMNS, TYPES, read)


@pytest.mark.parametrize(
    ("text", "kept", "dropped"),
    [
        ("id=eq.5", row(id=5), row(id=6)),
        ("id=neq.5", row(id=6), row(id=5)),
        ("id=not.eq.5", row(id=6), row(id=5)),
        ("id=lt.5", row(id=4), row(id=5)),
        ("id=lte.5", row(id=5), row(id=6)),
        ("id=gt.5", row(id=10), row(id=5)),
        ("id=gte.5", row(id=5), row(id=4)),
        ("id=in.(1,2)", row(id=2), row(id=3)),
        ("id=not.in.(1,2)", row(id=3), row(id=2)),
        ("id=in.(1)", row(id=b'"1"'), row(id=b'"2"')),
        ("id=not.in.()", row(id=None), row(name="no id")),
        ("id=isdistinct.5", row(id=None), row(id=5)),
        ("id=not.isdistinct.5", row(id=5), row(id=None)),
        ("name=eq.a b", row(name="a b"), row(name="a")),
        ("name=gt.Z", row(name="a"), row(name="A")),
        ("name=like.a*b%", row(name="a-b-c"), row(name="ab".upper())),
        ("name=ilike.A_B", row(name="axb"), row(name="ab")),
        ("name=match.^a.c$", row(name="a\nc"), row(name="xabc")),
        ("name=imatch.É", row(name="é"), row(name="e")),
        ("name=not.match.x", row(name="y"), row(name="x")),
        ("code=eq.ab", row(code="ab   "), row(code="a    ")),
        ("code=like.ab__", row(code="ab  "), row(code="ab")),
        ("nick=eq.BOB", row(nick="Bob"), row(nick="Rob")),
        ("nick=like.b%", row(nick="Bob"), row(nick="Rob")),
        ("nick=match.^B", row(nick="bob"), row(nick="rob")),
        ("paid=eq.t", row(paid=True), row(paid=False)),
        ("paid=is.true", row(paid=True), row(paid=None)),
        ("paid=is.false", row(paid=False), row(paid=None)),
        ("paid=is.unknown", row(paid=None), row(paid=True)),
        ("paid=not.is.true", row(paid=None), row(paid=True)),
        ("name=is.null", row(name=None), row(name="null")),
        ("name=is.not_null", row(name="null"), row(name=None)),
        ("odd=is.null", row(odd=None), row(odd="x")),
        ("doc=not.is.null", row(doc="null"), row(doc=None)),
        ("place=is.null", row(place="(,)"), row(place="(a,)")),
        ("place=is.null", row(place=None), row(place="(a,1)")),
        ("place=is.not_null", row(place="(a,1)"), row(place="(a,)")),
        ("place=is.not_null", row(place="(a,1)"), row(place=None)),
        ("price=eq.1.5", row(price="1.50"), row(price="1.51")),
        ("price=gt.9", row(price="10"), row(price="9.0")),
        ("mood=lt.happy", row(mood="ok"), row(mood="happy")),
        ("mood=eq.ok", row(mood="ok"), row(mood="elated")),
        ("docs=eq.{}", row(docs="{}"), row(docs="[]")),
        ('place=eq."(a,1)"', row(place="(a,1)"), row(place="(b,1)")),
    ],
)
def test_a_row_is_kept_or_not(text: str, kept: Row, dropped: Row) -> None:
    condition = compiled(text)
    assert condition(kept) is True
    assert condition(dropped) is not True


def test_a_value_is_compared_as_the_server_read_it() -> None:
    condition = compiled("at=gte.tomorrow", at="2024-02-29 00:00:00+00")
    assert condition(row(at="2024-02-29 00:00:00+00")) is True
    assert condition(row(at="2024-02-28 23:59:59.999999+00")) is False


@pytest.mark.parametrize(
    "operator",
    ["eq.1", "neq.1", "lt.1", "in.(1)", "not.eq.1", "like.1", "match.1"],
)
def test_null_compares_as_unknown(operator: str) -> None:
    assert compiled(f"name={operator}")(row(name=None)) is None


@pytest.mark.parametrize(
    "test",
    [
        *("id=eq.1", "id=neq.1", "id=lt.1", "id=in.(1)", "id=isdistinct.1", "id=is.null"),
        *("id=is.not_null", "name=like.x", "paid=is.true", "place=is.null", "not.or(id.eq.1)"),
    ],
)
def test_a_column_that_is_not_carried_is_absent(test: str) -> None:
    assert compiled(test)(row(at="2024-02-29 00:00:00+00")) is ABSENT


@pytest.mark.parametrize(("one", "other"), [*product((True, False, None, ABSENT), repeat=2)])
def test_groups_follow_the_truth_tables(one: Outcome, other: Outcome) -> None:
    """False decides an AND, true an OR; else what is absent counts more than what is unknown."""
    names = {True: "id=eq.1", False: "id=eq.0", None: "paid=eq.t", ABSENT: "at=is.null"}
    tested = row(id=1, paid=None)
    values = {one, other}
    both = compiled(f"{names[one]},{names[other]}")(tested)
    either = compiled(f"or({names[one]},{names[other]})")(tested)
    undecided = ABSENT if ABSENT in values else None
    assert both is (False if False in values else True if values == {True} else undecided)
    assert either is (True if True in values else False if values == {False} else undecided)
    negated = compiled(f"not.or({names[one]},{names[other]})")(tested)
    assert negated is (not either if isinstance(either, bool) else either)


def test_the_blank_filter_keeps_every_row() -> None:
    assert compiled("")(row()) is True


def test_a_new_label_is_reported_when_its_place_matters() -> None:
    condition = compiled("mood=gt.sad")
    with pytest.raises(UnknownLabel):
        condition(row(mood="elated"))


def test_a_value_that_wal2json_does_not_write_stops_the_stream() -> None:
    with pytest.raises(DecodeError):
        compiled("id=eq.1")(row(id=b"[1]"))


def test_the_server_reads_each_value_once() -> None:
    where = parse(
        "id=in.(1,2,1),id=gt.1,name=eq.x,name=match.^x,price=lt.5,paid=is.true,name=like.x"
    )
    found = literals(where, COLUMNS, TYPES)
    assert [(one.column, one.text, one.typeoid) for one in found] == [
        ("id", "1", 23),
        ("id", "2", 23),
        ("name", "^x", 25),
        ("price", "5", 1700),
    ]
    assert [one.is_pattern for one in found] == [False, False, True, False]


def test_a_literal_is_read_by_a_query() -> None:
    (literal,) = literals(parse("mood=eq.ok"), COLUMNS, TYPES)
    assert literal == Literal("mood", MOOD.oid, "mood%", "ok")
    assert literal.sql == "SELECT CAST(%s AS mood%%)::text"
    (pattern,) = literals(parse("name=match.ok"), COLUMNS, TYPES)
    assert "'' ~" in pattern.sql


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("nope=eq.1", "there is no column 'nope' of public.orders", "id, name, code"),
        ("id=like.1", "column 'id' of public.orders of type .*int4.*: like is not", "eq, neq, lt"),
        ("doc=eq.{}", "of type .*json.*: eq is not", "its operators are is$"),
        ("docs=gt.{}", "of type .*jsonb.*: gt is not", "are eq, neq, in, is, isdistinct$"),
        ("odd=eq.1", "of type unknown .OID 99999.: eq is not", "its operators are is$"),
        ("mood=like.x", "of type mood%: like is not", "gte, in, is, isdistinct$"),
        ("id=is.true", "is.true needs a boolean", "is.null and is.not_null"),
        ("name=like.x\\", "must not end with a backslash", ""),
        ("name=match.(x)\\1", r"with \\1 are not supported", ""),
    ],
)
def test_what_the_columns_cannot_do_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(FilterError, match=message) as refused:
        literals(parse(text), COLUMNS, TYPES, ORDERS)
    assert re.search(hint, refused.value.hint)
    with pytest.raises(FilterError):
        compile_filter(parse(text), COLUMNS, TYPES, {})


def test_a_filter_names_its_columns() -> None:
    assert columns(parse("a=eq.1,not.or(b.eq.2,c.is.null)")) == {"a", "b", "c"}
    assert columns(parse("")) == frozenset()


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("id=eq.1", {"id": "1"}),
        ("id=eq.1,and(name.eq.x,paid.eq.t),price=gt.1", {"id": "1", "name": "x", "paid": "t"}),
        ("id=eq.1,id=eq.2", {"id": "1"}),
        ("id=not.eq.1", {}),
        ("or(id.eq.1,id.eq.2)", {}),
        ("", {}),
    ],
)
def test_what_a_row_must_equal_is_found(text: str, required: dict[str, str]) -> None:
    found = required_equalities(parse(text))
    assert {name: comparison.values[0] for name, comparison in found.items()} == required


def test_rows_can_be_looked_up_by_what_they_must_equal() -> None:
    where = parse("id=eq.1,mood=eq.ok,price=eq.1.50")
    read = {literal: literal.text for literal in literals(where, COLUMNS, TYPES)}
    keys = equality_keys(where, COLUMNS, TYPES, read)
    tested = row(id=1, mood="ok", price="1.5")
    for name, key in keys.items():
        column = tested.column(name)
        assert column is not None
        assert equality_key(COLUMNS[name], TYPES)(column.value) == key
    assert equality_key(MOOD.oid, TYPES)(msgspec.Raw(b'"elated"')) == "elated"


CONDITIONS: Final = [
    *("id=eq.1", "id=gt.0", "name=eq.x", "name=is.null", "price=lt.2", "paid=is.true"),
    *("id=in.(1,2)", "mood=gte.ok", "name=ilike.X%"),
]


@given(
    st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["id", "name", "price", "paid", "mood"]), st.booleans()),
)
def test_de_morgan_holds_whatever_a_row_carries(texts: list[str], present: dict[str, bool]) -> None:
    filled = {"id": 1, "name": "x", "price": "1", "paid": True, "mood": "happy"}
    tested = row(**{name: filled[name] if full else None for name, full in present.items()})
    negations = [text.replace("=", "=not.") for text in texts]
    neither = compiled(f"not.or({','.join(texts)})")
    assert neither(tested) is compiled(",".join(negations))(tested)
