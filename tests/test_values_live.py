"""Values against PostgreSQL: output text, ``to_jsonb``, and the order of its operators.

`test_types.py` sends the usual types through the whole of walstream; here are the rest, and what
only filters and masks look at.
"""

from __future__ import annotations

import json
import operator
import unicodedata
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any, Final

import pytest

from tests.postgres import Database, create_database, drop_database
from tests.records import Records, learned_types, utf8_collation
from walstream.changes import Column
from walstream.comparables import fold
from walstream.errors import FilterError
from walstream.patterns import regular_expression
from walstream.values import Support, Types

SET_UP: Final = """
    CREATE EXTENSION citext;
    CREATE EXTENSION hstore;
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TYPE pair AS (number int, "a label" text COLLATE "C");
    CREATE TYPE deep AS (flag bool, pairs pair[], since date, raw bytea, at timestamptz, x float8);
    CREATE TYPE nothing AS ();
    CREATE TABLE shrunk (a int, gone text, b bool);
    ALTER TABLE shrunk DROP COLUMN gone;
    CREATE DOMAIN number AS numeric;
    CREATE DOMAIN numbers AS number[];
    CREATE DOMAIN instant AS timestamptz;
    CREATE DOMAIN blob AS bytea;
    CREATE DOMAIN document AS jsonb;
    CREATE DOMAIN tags AS hstore;
    CREATE DOMAIN place AS pair;
    CREATE TYPE floatrange AS RANGE (subtype = float8, multirange_type_name = floatranges);
"""

TYPES: Final[dict[str, list[str]]] = {
    "bool": ["t", "f"],
    "int2": ["-1", "0", "32767"],
    "int8": ["-9223372036854775808", "10", "9", "9223372036854775807"],
    "oid": ["0", "9", "10", "4294967295"],
    "float4": ["-1.5", "0", "-0", "1e-45", "3.4e38", "0.1", "16777216"],
    "float8": ["-1e300", "0", "1e20", "1e-7", "5e-324", "0.1", "123456789012345678"],
    "numeric": ["-1", "0", "0.00", "1.0", "1.00", "1" + "0" * 60, "0." + "0" * 60 + "1"],
    "number": ["NaN", "Infinity", "-Infinity", "12.30", "9"],
    "money": ["-12345.67", "0", "1.5", "10"],
    "text": ["", "a", "B", "é", "€", "😀", "a b", 'q"\\', "line\nend"],
    "varchar": ["a", "B"],
    "char(4)": ["a", "a!", "A", ""],
    '"char"': ["", "a", "\\", "\\200"],
    "name": ["a", "B"],
    "citext": ["a", "B", "A", "b"],
    "uuid": ["00000000-0000-0000-0000-000000000001", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "bytea": ["\\x", "\\x00", "\\x00ff", "\\xff", "\\x5c78"],
    "blob": ["\\x", "\\x5c78"],
    "date": ["-infinity", "0044-03-15 BC", "0001-01-01", "2024-02-29", "10000-01-01", "infinity"],
    "time": ["00:00", "00:00:00.5", "12:30", "24:00"],
    "timetz": ["12:00+00", "13:00+01", "12:00-01", "24:00+15:59:59", "00:00-15:59"],
    "timestamp": ["-infinity", "0044-03-15 12:00 BC", "2024-01-01", "20024-01-01 00:00:00.5"],
    "timestamptz": ["-infinity", "0044-03-15 12:00+00 BC", "2024-01-01 00:00+05:30", "infinity"],
    "instant": ["2024-01-01 00:00+05:30", "infinity"],
    "interval": ["0", "1 mon", "30 days", "1 mon -00:00:01", "-1 year 2 mons 3 days -04:05:06.789"],
    "mood": ["sad", "ok", "happy"],
    "inet": ["10.0.0.1", "10.0.0.0/8", "10.1.0.0/16", "::1", "::ffff:1.2.3.4/96", "9.0.0.0/8"],
    "cidr": ["10.0.0.0/8", "10.0.0.0/9", "10.0.0.0/32", "::/0"],
    "macaddr": ["08:00:2b:01:02:03", "08:00:2b:01:02:0a"],
    "macaddr8": ["08:00:2b:01:02:03:04:05", "0a:00:2b:01:02:03:04:05"],
    "bit(3)": ["101", "011"],
    "varbit": ["", "0", "01", "1", "10", "100000001"],
    "pg_lsn": ["0/0", "0/A0", "1/0", "A/FF"],
    "tid": ["(0,2)", "(0,10)", "(1,1)"],
    "xid": ["1", "10"],
    "cid": ["1", "10"],
    "xid8": ["9", "10", "18446744073709551615"],
    "int2vector": ["", "1 2 3"],
    "oidvector": ["", "1 2"],
    "regclass": ["pg_class", "0"],
    "regproc": ["now"],
    "regprocedure": ["abs(int)"],
    "regoperator": ["+(int,int)"],
    "regtype": ["int4", "timestamptz[]"],
    "regnamespace": ["pg_catalog"],
    "regconfig": ["simple"],
    "refcursor": ["a cursor"],
    "aclitem": ["=r/postgres"],
    "jsonpath": ['$."a"[*]'],
    "txid_snapshot": ["1:5:2,3"],
    "pg_snapshot": ["1:5:2,3"],
    "tsvector": ["", "'a':1 'b c':2"],
    "tsquery": ["a & !b"],
    "xml": ["<a>\n</a>"],
    "json": ['{"a":\r\n 1.50, "b": [true, null, "\\u00e9\\n"]}', "1e2", '"\\u2028"'],
    "jsonb": ['{"bb": 1.50, "a": []}', '{"a": [], "bb": 1.5}', "1.0", "1", '"1.0"', "null"],
    "document": ['{"a": 1}'],
    "point": ["(1,-2.5)"],
    "box": ["(1,1),(0,0)"],
    "hstore": ['a=>1, "b c"=>NULL, "q\\"\\\\"=>""', ""],
    "tags": ["a=>1"],
    "pair": ["(1,x)", '(,"a ""b"", \\\\ c")', '(2,"")', "(,)"],
    "place": ["(1,x)"],
    "nothing": ["()"],
    "shrunk": ["(1,t)"],
    "deep": [
        '(t,"{""(1,x)"",NULL}",infinity,"\\\\xdead","2024-01-01 00:00:00+00",NaN)',
        '(f,"{}","0044-03-15 BC",,,)',
    ],
    "int4[]": ["{}", "{1}", "{1,2}", "[2:3]={1,2}", "{{1,2}}", "{{1},{2}}", "{NULL}", "{1,NULL}"],
    "float8[]": ["{NaN,Infinity,1.5}", "{1e20}"],
    "text[]": ['{"",NULL,"NULL","a,b"," "}', "{B}", "{a}"],
    "bytea[]": ['{"\\\\x00ff"}'],
    "oid[]": ["{1,2}"],
    "date[]": ["{infinity,2024-01-01,NULL}"],
    "timestamp[]": ["{infinity,2024-01-01 00:00:00}"],
    "json[]": ['{"{\\"a\\":\n1}"}'],
    "box[]": ["{(1,1),(0,0);(2,2),(1,1)}"],
    "mood[]": ["{sad,NULL}", "{happy}"],
    "number[]": ["{NaN,1.50}"],
    "numbers": ["{1.50,NULL}"],
    "hstore[]": ['{"a=>1",NULL}'],
    "deep[]": ['{"(t,{},infinity,,,)",NULL}'],
    "int4range": ["empty", "[1,5)", "(,5)", "[1,)", "(,)", "[2,3)"],
    "numrange": ["[1.5,2.50]", "[1.5,2.5)", "(1.5,2)", "[1,infinity)"],
    "tstzrange": ["[2024-01-01 00:00+00,)", "[2024-01-01 00:00+00,infinity)"],
    "int4range[]": ['{"[1,3)",empty}'],
    "int4multirange": ["{}", "{[1,3),[5,7)}", "{[1,3)}", "{(,)}"],
    "floatrange": ["[1.5,2.5)", "(1e20,)"],
    "floatranges": ["{[1.5,2.5),[3,4)}"],
}
COLLATED: Final = frozenset({"text", "varchar", "char(4)", "citext", "text[]"})
"""Their order is that of a collation: here, ``C``."""


class Typed:
    """A table for each type, and its values as wal2json wrote them, the last one null."""

    def __init__(self, database: Database) -> None:
        database.execute(SET_UP)
        self.records = Records(database)
        self.connection = self.records.connection
        self.connection.execute("SET search_path TO public, pg_catalog")
        self.tables = {pg_type: f"t{place}" for place, pg_type in enumerate(TYPES)}
        self.sent = {pg_type: self.send(pg_type) for pg_type in TYPES}
        self.types: Types = learned_types(
            database, {sent[0].typeoid for sent in self.sent.values()}
        )

    def send(self, pg_type: str) -> list[Column]:
        table = self.tables[pg_type]
        self.connection.execute(f"CREATE TABLE {table} (id int, v {pg_type})".encode())
        for place, value in enumerate([*TYPES[pg_type], None]):
            self.connection.execute(
                f"INSERT INTO {table} VALUES ({place}, %s::{pg_type})".encode(), [value]
            )
        return [columns[1] for columns in self.records.inserted()]

    def ask(self, pg_type: str, expression: str) -> list[Any]:
        """Evaluate an expression over ``v``, the values in their order."""
        table = self.tables[pg_type]
        rows = self.connection.execute(
            f"SELECT {expression} FROM {table} ORDER BY id".encode()
        ).fetchall()
        return [row[0] for row in rows]


@pytest.fixture(scope="module")
def typed(server_dsn: str, database_template: str) -> Iterator[Typed]:
    with create_database(server_dsn, database_template) as database:
        typed = Typed(database)
        yield typed
        typed.connection.close()
    drop_database(server_dsn, database.name)


ALL_TYPES: Final = pytest.mark.parametrize("pg_type", TYPES)


@ALL_TYPES
def test_json_is_that_of_to_jsonb(typed: Typed, pg_type: str) -> None:
    for column, expected in zip(
        typed.sent[pg_type], typed.ask(pg_type, "to_jsonb(v)::text"), strict=True
    ):
        written = typed.types.to_json(column.typeoid, column.value)
        assert b"\n" not in written
        assert _exact(written) == _exact("null" if expected is None else expected)


@ALL_TYPES
def test_text_is_that_of_the_output_function(typed: Typed, pg_type: str) -> None:
    expected = typed.ask(pg_type, "CASE WHEN v::text IS NULL THEN NULL ELSE format('%s', v) END")
    got = [typed.types.text(column.typeoid, column.value) for column in typed.sent[pg_type]]
    assert got == expected


@ALL_TYPES
def test_keys_compare_as_the_operators_do(typed: Typed, pg_type: str) -> None:
    """Every value of a type against every other one, in both directions."""
    column = typed.sent[pg_type][0]
    supports = typed.types.supports(column.typeoid)
    if not supports:
        with pytest.raises(FilterError):
            typed.types.comparable(column.typeoid)
        return
    to_key = typed.types.comparable(column.typeoid)
    table, count = typed.tables[pg_type], len(TYPES[pg_type])
    key_of = typed.types.key_of(column.typeoid)
    keys = [key_of(sent.value) for sent in typed.sent[pg_type][:count]]
    casts = typed.ask(pg_type, "v::text")[:count]
    assert list(map(to_key, casts)) == keys
    for symbol, compare in OPERATORS.items():
        if symbol != "=" and Support.ORDER not in supports:
            continue
        collate = ' COLLATE "C"' if pg_type in COLLATED and symbol != "=" else ""
        rows = typed.connection.execute(
            f"SELECT a.id, b.id, a.v{collate} {symbol} b.v FROM {table} a, {table} b"
            f" WHERE a.id < {count} AND b.id < {count}".encode()
        )
        for one, other, answer in rows:
            assert compare(keys[one], keys[other]) is answer, (symbol, casts[one], casts[other])


OPERATORS: Final = {"=": operator.eq, "<": operator.lt, ">=": operator.ge}


def test_what_python_has_no_object_for_is_text_inside_of_others_too(typed: Typed) -> None:
    def first(pg_type: str) -> Any:
        column = typed.sent[pg_type][0]
        return typed.types.load(column.typeoid, column.value)

    assert first("date[]") == ["infinity", date(2024, 1, 1), None]
    assert first("deep").since == "infinity"
    assert first("deep").pairs == [(1, "x"), None]
    assert first("deep").raw == b"\xde\xad"
    assert first("deep[]")[0].since == "infinity"


KNOWN: Final = """
    FROM generate_series(1, 131071) AS c
   WHERE c NOT BETWEEN 55296 AND 57343 AND chr(c) ~ '[[:print:][:cntrl:]]' COLLATE {}
"""
"""Characters, as numbers, that the server's locale has heard of."""


def test_case_is_folded_as_libc_does_it(typed: Typed) -> None:
    collation = utf8_collation(typed.connection)
    rows = typed.connection.execute(
        f"SELECT chr(c), lower(chr(c) COLLATE {collation}) {KNOWN.format(collation)}".encode()
    )
    differing = [one for one, lower in rows if fold(one) != lower]
    assert [one for one in differing if unicodedata.category(one) != "Cn"] == []


@pytest.mark.parametrize("name", ["alpha", "alnum", "upper", "lower", "digit", "space", "punct"])
def test_character_classes_are_those_of_libc(typed: Typed, name: str) -> None:
    """But for combining vowels, circled and modifier letters, on which versions differ."""
    collation = utf8_collation(typed.connection)
    matches = regular_expression(f"[[:{name}:]]")
    matched = f"chr(c) ~ '[[:{name}:]]' COLLATE {collation}"
    rows = typed.connection.execute(f"SELECT chr(c), {matched} {KNOWN.format(collation)}".encode())
    differing = [one for one, answer in rows if matches(one) is not answer]
    assert {unicodedata.category(one) for one in differing} <= {"Mn", "Mc", "So", "Lt", "Lm", "Cn"}


def _exact(text: str | bytes) -> Any:
    """Read JSON so that numbers keep their digits, and true is not 1."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)
