"""Values: from what wal2json wrote to Python objects, JSON, text and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import postgres
from psycopg.types.multirange import MultirangeInfo
from psycopg.types.range import RangeInfo

from walstream.errors import DecodeError, FilterError
from walstream.values import Kind, PgType, Support, Types, UnknownLabel, scalar_text

MOOD: Final = PgType(
    90001, "mood", "public", Kind.ENUM, labels=("sad", "ok", "happy"), sql_name="mood"
)
PRICE: Final = PgType(90002, "price", "public", Kind.DOMAIN, base=1700)
FINAL_PRICE: Final = PgType(90003, "final price", 'a "b"', Kind.DOMAIN, base=90002)
PLACE: Final = PgType(
    90004,
    "place",
    "public",
    Kind.COMPOSITE,
    attributes=(("name", 25), ("since", 1082), ("price", 90002), ("moods", 90005)),
)
MOODS: Final = PgType(90005, "_mood", "public", Kind.ARRAY, element=90001)
HSTORE: Final = PgType(90006, "hstore", "public", json_cast=True)
CITEXT: Final = PgType(90007, "citext", "public")
PLACES: Final = PgType(90008, "_place", "public", Kind.ARRAY, element=90004)
NOTHING: Final = PgType(90009, "nothing", "public", Kind.COMPOSITE)
DATES: Final = PgType(90010, "dates", "public", Kind.DOMAIN, base=1182)
MOOD_RANGE: Final = PgType(90011, "moodrange", "public", Kind.RANGE, element=90001)
FLAG: Final = PgType(90012, "flag", "public", Kind.DOMAIN, base=16)
LEARNED: Final = (
    *(MOOD, PRICE, FINAL_PRICE, PLACE, MOODS, HSTORE, CITEXT, PLACES, NOTHING, DATES),
    *(MOOD_RANGE, FLAG),
)

BOOL, BYTEA, INT8, INT4, TEXT, OID, JSON, FLOAT8 = 16, 17, 20, 23, 25, 26, 114, 701
DATE, TIMESTAMP, TIMESTAMPTZ, NUMERIC, JSONB = 1082, 1114, 1184, 1700, 3802
UNKNOWN = 99999


def load_text(oid: int) -> Callable[[bytes], Any]:
    """What a psycopg loader does, as far as these tests need it."""

    def load_date(text: bytes) -> date:
        return date.fromisoformat(text.decode())

    def load_dates(text: bytes) -> list[date]:
        return [load_date(one) for one in text.strip(b"{}").split(b",")]

    def load_composite(text: bytes) -> Any:
        raise TypeError("not as many attributes as the class has")

    loaders: dict[int, Callable[[bytes], Any]] = {
        DATE: load_date,
        1182: load_dates,
        NUMERIC: lambda text: Decimal(text.decode()),
        BYTEA: lambda text: bytes.fromhex(text[2:].decode()),
        JSON: json.loads,
        JSONB: json.loads,
        PLACE.oid: load_composite,
        PLACES.oid: load_composite,
    }
    return loaders.get(oid, bytes.decode)


@pytest.fixture
def types() -> Types:
    return Types(load_text, LEARNED)


def raw(scalar: Any) -> msgspec.Raw:
    """A value as wal2json writes it: text as a JSON string, bytes as they are."""
    return msgspec.Raw(scalar if isinstance(scalar, bytes) else msgspec.json.encode(scalar))


@pytest.mark.parametrize(
    ("oid", "scalar", "expected"),
    [
        (INT4, b"42", 42),
        (INT8, b"-9223372036854775808", -(2**63)),
        (INT4, b'"42"', 42),
        (INT4, b"null", None),
        (OID, b"4294967295", 4294967295),
        (FLOAT8, b"1.5", 1.5),
        (FLOAT8, b"2", 2.0),
        (FLOAT8, b"-0", -0.0),
        (FLOAT8, b'"Infinity"', float("inf")),
        (FLOAT8, b'"1e-7"', 1e-7),
        (FLOAT8, b"null", None),
        (NUMERIC, b"1.50000", Decimal("1.50000")),
        (NUMERIC, b'"1.50000"', Decimal("1.50000")),
        (NUMERIC, b"null", None),
        (BOOL, b"true", True),
        (BOOL, b"false", False),
        (BOOL, b"null", None),
        (FLAG.oid, b'"t"', True),
        (FLAG.oid, b'"f"', False),
        (TEXT, "hällo\n", "hällo\n"),
        (TEXT, b"null", None),
        (BYTEA, "dead", b"\xde\xad"),
        (BYTEA, "\\xdead", b"\xde\xad"),
        (BYTEA, b"null", None),
        (DATE, "2024-02-29", date(2024, 2, 29)),
        (DATE, "infinity", "infinity"),
        (DATE, "0044-03-15 BC", "0044-03-15 BC"),
        (1182, "{2024-02-29}", [date(2024, 2, 29)]),
        (1182, "{2024-02-29,infinity,NULL}", [date(2024, 2, 29), "infinity", None]),
        (1182, "{{2024-02-29},{infinity}}", [[date(2024, 2, 29)], ["infinity"]]),
        (DATES.oid, "{-infinity}", ["-infinity"]),
        (PRICE.oid, "12.30", Decimal("12.30")),
        (FINAL_PRICE.oid, "12.30", Decimal("12.30")),
        (MOOD.oid, "ok", "ok"),
        (JSON, '{"a": 1}', {"a": 1}),
        (JSON, "[" * 100_000 + "]" * 100_000, "[" * 100_000 + "]" * 100_000),
        (UNKNOWN, "anything", "anything"),
        (UNKNOWN, b"1.50", "1.50"),
        (UNKNOWN, b"true", "t"),
        (UNKNOWN, b"null", None),
    ],
)
def test_a_value_loads_as_its_object(types: Types, oid: int, scalar: Any, expected: Any) -> None:
    loaded = types.load(oid, raw(scalar))
    assert loaded == expected
    assert type(loaded) is type(expected)
    assert types.load(oid, raw(scalar)) == expected


def test_minus_zero_keeps_its_sign(types: Types) -> None:
    assert str(types.load(FLOAT8, raw(b"-0"))) == "-0.0"


def test_a_composite_that_psycopg_cannot_load_loads_by_its_attributes(types: Types) -> None:
    place = types.load(PLACE.oid, raw('("a b",infinity,1.5,"{ok,NULL}")'))
    assert place == ("a b", "infinity", Decimal("1.5"), "{ok,NULL}")
    assert place.since == "infinity"
    (inner,) = types.load(PLACES.oid, raw('{"(,2024-02-29,,)"}'))
    assert inner == (None, date(2024, 2, 29), None, None)


def test_a_composite_may_be_named_by_a_keyword() -> None:
    named = PgType(91001, "class", "s", Kind.COMPOSITE, attributes=(("a", TEXT),))

    def refuse(oid: int) -> Callable[[bytes], Any]:
        def load(text: bytes) -> Any:
            if oid == named.oid:
                raise ValueError
            return text.decode()

        return load

    value = Types(refuse, [named]).load(named.oid, msgspec.Raw(b'"(x)"'))
    assert (type(value).__name__, value) == ("class_", ("x",))


def test_a_composite_is_named_as_psycopg_names_it() -> None:
    odd = PgType(
        91000, "1 odd", "s", Kind.COMPOSITE, attributes=(("a b", TEXT), ("_c", TEXT), ("def", TEXT))
    )

    def refuse(_: int) -> Callable[[bytes], Any]:
        def load(text: bytes) -> Any:
            raise ValueError(text)

        return load

    loaded = Types(refuse, [odd]).load(odd.oid, raw("(1,2,3)"))
    assert loaded == ("1", "2", "3")
    assert type(loaded).__name__ == "f_1_odd"
    assert loaded._fields == ("a_b", "f_c", "_2")


def test_attributes_added_since_are_null_and_dropped_ones_leave_the_text(types: Types) -> None:
    assert types.load(PLACE.oid, raw("(a,)")) == ("a", None, None, None)
    assert types.load(PLACE.oid, raw("(a,,,,5)")) == "(a,,,,5)"
    assert types.to_json(PLACE.oid, raw("(a,)")).startswith(b'{"name":"a","since":null')
    assert types.to_json(PLACE.oid, raw("(a,,,,5)")) == b'"(a,,,,5)"'
    with pytest.raises(ValueError, match="more attributes"):
        types.comparable(PLACE.oid)("(a,,,,5)")


@pytest.mark.parametrize(
    ("oid", "scalar", "expected"),
    [
        (INT4, b"42", b"42"),
        (INT4, b'"42"', b"42"),
        (INT4, b"null", b"null"),
        (NUMERIC, b"1.50000", b"1.50000"),
        (NUMERIC, b'"1.50000"', b"1.50000"),
        (NUMERIC, b'"NaN"', b'"NaN"'),
        (FLOAT8, b'"-Infinity"', b'"-Infinity"'),
        (FLOAT8, b"1e+20", b"1e+20"),
        (OID, b"7", b'"7"'),
        (OID, b"null", b"null"),
        (BOOL, b"true", b"true"),
        (FLAG.oid, b'"t"', b"true"),
        (FLAG.oid, b'"f"', b"false"),
        (FLAG.oid, b"null", b"null"),
        (TEXT, b'"h\\u0001"', b'"h\\u0001"'),
        (BYTEA, "dead", b'"\\\\xdead"'),
        (BYTEA, "\\xdead", b'"\\\\xdead"'),
        (BYTEA, b"null", b"null"),
        (DATE, "0044-03-15 BC", b'"0044-03-15 BC"'),
        (TIMESTAMP, "2024-01-01 12:00:00.5", b'"2024-01-01T12:00:00.5"'),
        (TIMESTAMP, "0044-03-15 00:00:00 BC", b'"0044-03-15T00:00:00 BC"'),
        (TIMESTAMP, "infinity", b'"infinity"'),
        (TIMESTAMPTZ, "2024-01-01 12:00:00+00", b'"2024-01-01T12:00:00+00:00"'),
        (TIMESTAMPTZ, "0044-03-15 00:00:00+00 BC", b'"0044-03-15T00:00:00+00:00 BC"'),
        (TIMESTAMPTZ, "-infinity", b'"-infinity"'),
        (TIMESTAMPTZ, b"null", b"null"),
        (JSON, '{"a":\r\n [1.50,\n2]}', b'{"a":   [1.50, 2]}'),
        (JSONB, '"a\\nb"', b'"a\\nb"'),
        (JSONB, "null", b"null"),
        (JSONB, b"null", b"null"),
        (22, "1 2", b"[1,2]"),
        (22, "", b"[]"),
        (22, b"null", b"null"),
        (30, "1 2", b'["1","2"]'),
        (30, b"null", b"null"),
        (1007, "{1,NULL,3}", b"[1,null,3]"),
        (1007, "[2:3]={{1},{2}}", b"[[1],[2]]"),
        (1007, b"null", b"null"),
        (1022, "{NaN,1}", b'["NaN",1]'),
        (1000, "{t,f,NULL}", b"[true,false,null]"),
        (1001, '{"\\\\xdead"}', b'["\\\\xdead"]'),
        (1028, "{1,2}", b'["1","2"]'),
        (1115, '{"2024-01-01 12:00:00"}', b'["2024-01-01T12:00:00"]'),
        (199, '{"{\\"a\\":\n1}"}', b'[{"a": 1}]'),
        (1020, "{(1,1),(0,0);(2,2),(1,1)}", b'["(1,1),(0,0)","(2,2),(1,1)"]'),
        (3908, '["2024-01-01 00:00:00",)', b'"[\\"2024-01-01 00:00:00\\",)"'),
        (FINAL_PRICE.oid, "12.30", b"12.30"),
        (MOOD.oid, "ok", b'"ok"'),
        (MOODS.oid, "{ok,NULL}", b'["ok",null]'),
        (HSTORE.oid, '"a"=>"1", "b"=>NULL', b'{"a":"1","b":null}'),
        (HSTORE.oid, b"null", b"null"),
        (NOTHING.oid, "()", b"{}"),
        (PLACE.oid, b"null", b"null"),
        (
            PLACES.oid,
            '{"(\\"a b\\",2024-02-29,1.50,\\"{ok,sad}\\")"}',
            b'[{"name":"a b","since":"2024-02-29","price":1.50,"moods":["ok","sad"]}]',
        ),
        (UNKNOWN, "anything", b'"anything"'),
    ],
)
def test_a_value_becomes_the_json_of_to_jsonb(
    types: Types, oid: int, scalar: Any, expected: bytes
) -> None:
    assert types.to_json(oid, raw(scalar)) == expected
    assert types.to_json(oid, raw(scalar)) == expected


def test_a_type_named_hstore_that_is_not_hstore_stays_text() -> None:
    impostor = PgType(91001, "hstore", "public")
    assert Types(load_text, [impostor]).to_json(impostor.oid, raw("x")) == b'"x"'


@pytest.mark.parametrize(
    ("oid", "scalar", "expected"),
    [
        (INT4, b"42", "42"),
        (NUMERIC, b"1.50000", "1.50000"),
        (NUMERIC, b'"1.50000"', "1.50000"),
        (BOOL, b"true", "t"),
        (BOOL, b"false", "f"),
        (BOOL, b"null", None),
        (FLAG.oid, b'"t"', "t"),
        (BYTEA, "dead", "\\xdead"),
        (BYTEA, "", "\\x"),
        (BYTEA, b"null", None),
        (TEXT, 'a"b', 'a"b'),
        (TEXT, b"null", None),
        (UNKNOWN, b"5", "5"),
    ],
)
def test_a_value_prints_as_its_output_function_prints_it(
    types: Types, oid: int, scalar: Any, expected: str | None
) -> None:
    assert types.text(oid, raw(scalar)) == expected
    assert types.text(oid, raw(scalar)) == expected


@pytest.mark.parametrize(
    ("oid", "scalar"),
    [
        (INT4, b"[1]"),
        (INT4, b'"x"'),
        (INT4, b"true"),
        (FLOAT8, b"{}"),
        (NUMERIC, b"[1]"),
        (NUMERIC, b"nil"),
        (BOOL, b"1"),
        (TEXT, b"1"),
        (TEXT, b'"\xff"'),
        (TEXT, b"[]"),
        (UNKNOWN, b"[]"),
        (UNKNOWN, b""),
    ],
)
def test_what_wal2json_does_not_write_is_refused_without_its_text(
    types: Types, oid: int, scalar: bytes
) -> None:
    with pytest.raises(DecodeError) as refused:
        types.load(oid, raw(scalar))
    assert f"{len(scalar)} bytes" in refused.value.message
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("oid", [INT4, NUMERIC, BOOL, TEXT, BYTEA, UNKNOWN])
@pytest.mark.parametrize("scalar", [b"[1]", b"{}", b"", b"nil", b'"\xff"'])
def test_what_is_no_json_scalar_has_no_text(types: Types, oid: int, scalar: bytes) -> None:
    with pytest.raises(DecodeError):
        types.text(oid, raw(scalar))


@pytest.mark.parametrize(
    ("oid", "scalar"),
    [(INT4, b"[1]"), (TEXT, b"{}"), (TEXT, b""), (1007, b'"1"'), (JSON, b"1"), (JSON, b'"\xff"')],
)
def test_what_wal2json_does_not_write_never_becomes_json(
    types: Types, oid: int, scalar: bytes
) -> None:
    with pytest.raises(DecodeError):
        types.to_json(oid, raw(scalar))


@given(st.sampled_from([INT4, TEXT, NUMERIC, BOOL, BYTEA, JSONB, 1007, PLACE.oid]), st.binary())
def test_any_bytes_convert_or_raise_the_decoders_error(oid: int, scalar: bytes) -> None:
    types = Types(load_text, LEARNED)
    for convert in (types.load, types.to_json, types.text):
        try:
            convert(oid, msgspec.Raw(scalar))
        except DecodeError:
            continue


@given(st.text())
def test_any_text_passes_through(text: str) -> None:
    types = Types(load_text)
    scalar = raw(text)
    assert types.load(TEXT, scalar) == types.text(TEXT, scalar) == scalar_text(scalar) == text
    assert msgspec.json.decode(types.to_json(TEXT, scalar)) == text


def test_a_type_is_known_by_its_oid(types: Types) -> None:
    assert MOOD.oid in types
    assert INT4 in types
    assert UNKNOWN not in types
    assert types.get(MOOD.oid) == MOOD
    assert types.get(UNKNOWN) is None
    assert types.learned() == {one.oid for one in LEARNED}


def test_a_domain_resolves_through_domains(types: Types) -> None:
    assert types.resolve(FINAL_PRICE.oid) == NUMERIC
    assert types.resolve(NUMERIC) == NUMERIC
    assert types.resolve(UNKNOWN) == UNKNOWN
    types.add(PgType(PRICE.oid, "price", "public", Kind.DOMAIN, base=UNKNOWN))
    assert types.resolve(FINAL_PRICE.oid) == UNKNOWN


def test_a_type_has_a_name_that_sql_can_read(types: Types) -> None:
    assert types.name(INT4) == '"pg_catalog"."int4"'
    assert types.name(FINAL_PRICE.oid) == '"a ""b"""."final price"'
    assert types.name(MOOD.oid) == "mood"
    assert types.name(UNKNOWN) == "unknown (OID 99999)"


def test_learning_a_type_anew_changes_what_is_built_on_it(types: Types) -> None:
    value = raw("{happy}")
    scalar = raw('("a b",2024-02-29,1,{ok})')
    before = types.to_json(PLACE.oid, scalar), types.load(MOODS.oid, value)
    types.add(PgType(PRICE.oid, "price", "public", Kind.DOMAIN, base=TEXT))
    assert types.to_json(PLACE.oid, scalar) == before[0].replace(b'"price":1', b'"price":"1"')
    types.add(PgType(MOOD.oid, "mood", "public", Kind.ENUM, labels=("happy", "sad")))
    assert types.comparable(MOOD.oid)("happy") < types.comparable(MOOD.oid)("sad")


def test_every_type_that_psycopg_knows_is_built_in(types: Types) -> None:
    for info in postgres.types:
        known = types.get(info.oid)
        array = types.get(info.array_oid)
        assert known is not None, info.name
        assert array is not None, info.name
        assert known.name == info.name.strip('"')
        assert (array.kind, array.element) == (Kind.ARRAY, info.oid)
        assert known.delimiter == array.delimiter == info.delimiter
        if isinstance(info, RangeInfo | MultirangeInfo):
            assert known.element == info.subtype_oid
            assert known.kind == info.__class__.__name__.removesuffix("Info").lower()


@pytest.mark.parametrize(
    ("oid", "ascending"),
    [
        (MOOD.oid, ["sad", "ok", "happy"]),
        (1007, ["{}", "{1}", "{1,2}", "[2:3]={1,2}", "{{1,2}}", "{1,10}", "{2}", "{2,NULL}"]),
        (1007, ["{{1,2}}", "{{1},{2}}", "{NULL}"]),
        (MOODS.oid, ["{}", "{sad}", "{sad,happy}", "{ok}", "{NULL}"]),
        (PLACE.oid, ["(a,,1,)", "(b,2024-01-01,2,)", "(b,2024-01-01,10,)", "(b,,1,)", "(,,,)"]),
        (3904, ["empty", "(,1)", "(,)", "[1,5)", "[1,6)", "[1,)", "[2,3)"]),
        (3906, ["[1,2)", "[1,2]", "[1,)", "(1,2)"]),
        (4451, ["{}", "{(,1)}", "{[1,3)}", "{[1,3),[5,7)}", "{[1,4)}"]),
        (MOOD_RANGE.oid, ["empty", "[sad,ok)", "[ok,happy]"]),
        (CITEXT.oid, ["A", "b", "C"]),
        (FINAL_PRICE.oid, ["2", "10.5"]),
    ],
)
def test_values_in_values_sort_as_postgres_sorts_them(
    types: Types, oid: int, ascending: list[str]
) -> None:
    keys = list(map(types.comparable(oid), ascending))
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_a_new_label_is_told_apart_from_a_wrong_one(types: Types) -> None:
    with pytest.raises(UnknownLabel) as unknown:
        types.comparable(MOODS.oid)("{sad,elated}")
    assert unknown.value.typeoid == MOOD.oid


@pytest.mark.parametrize(
    ("oid", "supports"),
    [
        (INT4, {Support.EQUALITY, Support.ORDER}),
        (JSONB, {Support.EQUALITY}),
        (3807, {Support.EQUALITY}),
        (HSTORE.oid, {Support.EQUALITY}),
        (JSON, set()),
        (600, set()),
        (199, set()),
        (UNKNOWN, set()),
        (PLACE.oid, {Support.EQUALITY, Support.ORDER}),
        (NOTHING.oid, {Support.EQUALITY, Support.ORDER}),
        (MOOD.oid, {Support.EQUALITY, Support.ORDER}),
        (3912, {Support.EQUALITY, Support.ORDER}),
        (DATES.oid, {Support.EQUALITY, Support.ORDER}),
    ],
)
def test_a_type_supports_what_is_exact(types: Types, oid: int, supports: set[Support]) -> None:
    assert types.supports(oid) == supports


@pytest.mark.parametrize("oid", [JSON, 199, UNKNOWN])
def test_a_type_without_equality_has_no_keys(types: Types, oid: int) -> None:
    with pytest.raises(FilterError, match="cannot be compared"):
        types.comparable(oid)


@pytest.mark.parametrize(
    ("oid", "scalar", "text"),
    [
        (INT4, b"42", "42"),
        (FLOAT8, b"1.5", "1.5"),
        (FLOAT8, b'"NaN"', "NaN"),
        (BOOL, b"true", "t"),
        (TEXT, "a", "a"),
        (BYTEA, "dead", "\\xdead"),
        (NUMERIC, b"1.50", "1.5"),
        (TIMESTAMPTZ, "2024-01-01 00:00:00+00", "2024-01-01 00:00:00+00"),
        (FINAL_PRICE.oid, "1.50", "1.5"),
    ],
)
def test_the_key_of_a_value_is_that_of_its_text(
    types: Types, oid: int, scalar: Any, text: str
) -> None:
    key_of = types.key_of(oid)
    assert key_of(raw(scalar)) == types.comparable(oid)(text)
    assert key_of(raw(b"null")) is None
