"""Values of every type: what a handler gets, and what JSON gets.

The oracle is PostgreSQL: a psycopg ``SELECT`` of the same rows for Python objects, ``to_jsonb`` for
JSON. The rows go through the whole of walstream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.hstore import register_hstore
from psycopg.types.range import RangeInfo, register_range

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until, create_database
from tests.streaming import Stream
from walstream.postgres import SESSION_SETTINGS

OWN_TYPES = """
    CREATE EXTENSION IF NOT EXISTS hstore;
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'with "quotes", commas');
    CREATE TYPE pair AS (number int, label text);
    CREATE TYPE nest AS (inner_pair pair, numbers int[], flag bool, moment timestamptz);
    CREATE DOMAIN price AS numeric(12, 2);
    CREATE DOMAIN cheap AS price CHECK (value < 1000000);
    CREATE DOMAIN flag AS bool;
    CREATE DOMAIN ints AS int[];
    CREATE DOMAIN blob AS bytea;
    CREATE TYPE floatspan AS RANGE (subtype = float8);
    CREATE SCHEMA "Odd Schema";
    CREATE TYPE "Odd Schema"."Odd ""Type" AS ENUM ('a');
"""

# By column type: literals that PostgreSQL casts to it.
VALUES: dict[str, list[str]] = {
    "int2": ["0", "-32768", "32767"],
    "int4": ["0", "-2147483648", "2147483647"],
    "int8": ["9007199254740993", "-9223372036854775808", "9223372036854775807"],
    "oid": ["0", "4294967295"],
    "numeric": ["0", "1.50000", "-0.00001", "9" * 200, "0." + "1" * 200, "1e20"],
    "numeric(10,2)": ["1.5", "-99999999.99"],
    "float4": ["0", "1.5", "-0", "3.4028235e38", "1e-45"],
    "float8": ["0", "0.1", "-0", "1e300", "5e-324", "123456789.123456789", "1"],
    "bool": ["true", "false"],
    "text": [
        "",
        "plain",
        'quo"te',
        "back\\slash",
        "new\nline\ttab\rreturn",
        "é€😀",
        "\x01\x7f",
        "NULL",
    ],
    "varchar(10)": ["", "abc"],
    "char(5)": ["ab", ""],
    '"char"': ["x"],
    "name": ["some_name"],
    "bytea": ["", "\\x00ff5c", "\\xdeadbeef"],
    "date": ["2024-02-29", "0001-01-01", "9999-12-31"],
    "time": ["00:00:00", "23:59:59.999999", "12:30:00.5"],
    "timetz": ["12:00:00+05:30", "23:59:59.123456-08"],
    "timestamp": [
        "2024-01-01 12:00:00.123456",
        "0001-01-01 00:00:00",
        "9999-12-31 23:59:59.999999",
    ],
    "timestamptz": [
        "2024-01-01 12:00:00.5+05:30",
        "1970-01-01 00:00:00+00",
        "0001-06-01 00:00:00+00",
    ],
    "interval": ["0", "1 year 2 mons 3 days 04:05:06.789", "-1 day", "-00:00:01.5", "178 years"],
    "json": [
        '{"a": [1, 2.50, null],\n "b": "x"}',
        "null",
        "[]",
        '"text"',
        "12345678901234567890.5",
    ],
    "jsonb": ['{"a": [1, 2.50, null], "b": "é\\n"}', "null", "[]", '"text"'],
    "uuid": ["00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "inet": ["10.0.0.1", "10.1.2.3/8", "::1", "2001:db8::/32"],
    "cidr": ["10.0.0.0/8", "2001:db8::/32"],
    "macaddr": ["08:00:2b:01:02:03"],
    "macaddr8": ["08:00:2b:01:02:03:04:05"],
    "money": ["1.50", "-12345.67"],
    "bit(4)": ["B'1010'"],
    "varbit": ["B'10101'", "B''"],
    "xml": ['<a b="c">text</a>'],
    "point": ["(1.5,-2)"],
    "box": ["(1,1),(0,0)"],
    "circle": ["<(1,2),3>"],
    "path": ["[(0,0),(1,1)]"],
    "polygon": ["((0,0),(1,1),(1,0))"],
    "line": ["{1,2,3}"],
    "lseg": ["[(0,0),(1,1)]"],
    "tsvector": ["'a':1 'b':2"],
    "tsquery": ["a & !b"],
    "pg_lsn": ["16/B374D848"],
    "int4range": ["empty", "[1,5)", "(,)", "[3,)"],
    "numrange": ["[1.5,2.50]"],
    "daterange": ["[2024-01-01,2024-02-01)"],
    "tsrange": ["[2024-01-01 00:00,2024-01-02 00:00)"],
    "tstzrange": ["[2024-01-01 00:00+00,2024-01-02 00:00+00)"],
    "int4multirange": ["{}", "{[1,3),[5,7)}"],
    "int4[]": ["{}", "{1,NULL,3}", "{{1,2},{3,4}}", "[2:3]={7,8}"],
    "text[]": ['{"",NULL,"NULL","a,b","q\\"uote","back\\\\slash"," "}', "{{a},{b}}"],
    "numeric[]": ["{1.50,NULL,2}"],
    "bool[]": ["{t,f,NULL}"],
    "bytea[]": ['{"\\\\x00ff",NULL}'],
    "timestamptz[]": ['{"2024-01-01 00:00:00+00"}'],
    "date[]": ["{2024-01-01}"],
    "jsonb[]": ['{"{\\"a\\": 1}",NULL}'],
    "uuid[]": ["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"],
    "box[]": ["{(1,1),(0,0);(2,2),(1,1)}"],
    "mood": ["sad", 'with "quotes", commas'],
    "mood[]": ['{sad,"with \\"quotes\\", commas"}'],
    '"Odd Schema"."Odd ""Type"': ["a"],
    "pair": ["(1,x)", '(,"a ""b"", \\\\ c")', "(2,)"],
    "pair[]": ['{"(1,x)",NULL}'],
    "nest": ['("(1,x)","{1,2}",t,"2024-01-01 00:00:00+00")'],
    "price": ["12.3"],
    "cheap": ["999.99"],
    "flag": ["true", "false"],
    "ints": ["{1,2}"],
    "blob": ["\\x00ff"],
    "floatspan": ["[1.5,2.5)"],
    "hstore": ['"a"=>"1", "b"=>NULL, "c \\"d"=>"e,f"', ""],
    "hstore[]": ['{"\\"a\\"=>\\"1\\""}'],
}

# Values that Python has no object for come as PostgreSQL's text: psycopg's SELECT raises for them.
AS_TEXT: dict[str, list[str]] = {
    "date": ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01"],
    "timestamp": ["infinity", "-infinity", "0044-03-15 12:00:00 BC", "294276-12-31 23:59:59"],
    "timestamptz": ["infinity", "-infinity", "0044-03-15 12:00:00+00 BC"],
    "time": ["24:00:00"],
}

NOT_A_NUMBER: dict[str, list[str]] = {
    "numeric": ["NaN", "Infinity", "-Infinity"],
    "float4": ["NaN", "Infinity", "-Infinity"],
    "float8": ["NaN", "Infinity", "-Infinity"],
}

INSIDE: dict[str, list[str]] = {
    "numeric[]": ["{NaN,Infinity}"],
    "float8[]": ["{NaN,-Infinity}"],
    "numrange": ["[1,infinity)"],
}


@pytest.fixture
def typed(database: Database) -> Database:
    database.execute(OWN_TYPES)
    return database


def create(database: Database, values: dict[str, list[str]]) -> list[str]:
    """Make one table a type, each with a null besides; return the tables."""
    tables = []
    for number, pg_type in enumerate(values):
        table = f"t{number:03}"
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, v {pg_type})")
        database.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")
        tables.append(table)
    return tables


def fill(database: Database, values: dict[str, list[str]]) -> None:
    """Insert each literal, and a null."""
    with database.connect(client_encoding="utf8") as connection:
        for number, (pg_type, literals) in enumerate(values.items()):
            for row, literal in enumerate([*literals, None]):
                value = "NULL" if literal is None else sql_literal(literal)
                connection.execute(
                    f"INSERT INTO t{number:03} VALUES ({row}, {value}::{pg_type})".encode()
                )


def sql_literal(text: str) -> str:
    if text.startswith("B'"):
        return text
    return "'" + text.replace("'", "''") + "'"


def session(database: Database) -> psycopg.Connection:
    """A session as walstream pins its own, with the types registered that psycopg can."""
    connection = database.connect(client_encoding="utf8")
    for name, value in SESSION_SETTINGS.items():
        connection.execute(f"SET {name} TO {value}".encode())
    connection.execute("SET search_path TO public, pg_catalog")
    for name in ("mood", '"Odd Schema"."Odd ""Type"'):
        info = TypeInfo.fetch(connection, name)
        assert info is not None
        info.register(connection)
    for name in ("pair", "nest"):
        composite = CompositeInfo.fetch(connection, name)
        assert composite is not None
        register_composite(composite, connection)
    span = RangeInfo.fetch(connection, "floatspan")
    assert span is not None
    register_range(span, connection)
    hstore = TypeInfo.fetch(connection, "hstore")
    assert hstore is not None
    register_hstore(hstore, connection)
    return connection


async def differences(database: Database, values: dict[str, list[str]]) -> Iterator[str]:
    """Stream the values; tell where objects or JSON are not what PostgreSQL gives."""
    tables = create(database, values)
    stream = Stream(database)
    stream.record("public.*", "insert")
    fill(database, values)
    await stream.drain()
    assert len(stream.changes) == sum(len(literals) + 1 for literals in values.values())
    found = []
    with session(database) as connection:
        for change in stream.changes:
            pg_type = list(values)[tables.index(change.relation.name)]
            row = connection.execute(
                f"SELECT v, to_jsonb(v)::text FROM {change.relation.name} WHERE id = %s".encode(),
                [change.row["id"]],
            ).fetchone()
            assert row is not None
            value, as_json = row
            got = change.row["v"]
            if not same(got, value):
                found.append(f"{pg_type}: {got!r}, psycopg gives {value!r}")
            got_json = exact_json(change.to_json())["row"]["v"]
            want_json = None if as_json is None else exact_json(as_json)
            if not same(got_json, want_json):
                found.append(f"{pg_type} as JSON: {got_json!r}, to_jsonb gives {want_json!r}")
    return iter(found)


def exact_json(text: str | bytes) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def same(left: Any, right: Any) -> bool:
    """Equal and of one type; NaN is itself."""
    if isinstance(left, list | tuple) and type(left).__name__ == type(right).__name__:
        return len(left) == len(right) and all(map(same, left, right))
    return type(left).__name__ == type(right).__name__ and (
        left == right or str(left).lower() == str(right).lower() == "nan"
    )


async def test_every_type_comes_as_psycopg_and_to_jsonb_give_it(typed: Database) -> None:
    assert list(await differences(typed, {**VALUES, **INSIDE})) == []


async def test_the_settings_of_the_role_do_not_matter(typed: Database) -> None:
    """The session's own settings are pinned."""
    typed.execute(
        f"""
        ALTER DATABASE {typed.name} SET bytea_output = 'escape';
        ALTER DATABASE {typed.name} SET DateStyle = 'SQL, DMY';
        ALTER DATABASE {typed.name} SET TimeZone = 'Asia/Kolkata';
        ALTER DATABASE {typed.name} SET IntervalStyle = 'iso_8601';
        ALTER DATABASE {typed.name} SET extra_float_digits = 0;
        """
    )
    assert list(await differences(typed, VALUES)) == []


async def test_text_of_a_latin1_database_is_read(private_cluster: StartCluster) -> None:
    cluster = private_cluster(encoding="LATIN1")
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute(OWN_TYPES)
        values = {**VALUES, "text": ["é\xff", "plain"], "jsonb": ['{"é": "ü"}']}
        assert list(await differences(database, values)) == []


@pytest.mark.parametrize("pg_type", AS_TEXT)
async def test_what_python_has_no_object_for_comes_as_text(typed: Database, pg_type: str) -> None:
    """psycopg's SELECT raises for these; JSON is that of to_jsonb."""
    create(typed, {pg_type: AS_TEXT[pg_type]})
    stream = Stream(typed)
    fill(typed, {pg_type: AS_TEXT[pg_type]})
    await stream.drain()
    texts = [change.row["v"] for change in stream.changes][:-1]
    with session(typed) as connection:
        rows = connection.execute("SELECT v::text, to_jsonb(v)::text FROM t000 ORDER BY id")
        wanted = rows.fetchall()[:-1]
    assert texts == [text for text, _ in wanted]
    json_values = [exact_json(change.to_json())["row"]["v"] for change in stream.changes][:-1]
    assert json_values == [exact_json(as_json) for _, as_json in wanted]


@pytest.mark.parametrize("pg_type", NOT_A_NUMBER)
async def test_nan_and_infinity_come_exactly_or_as_the_documented_null(
    typed: Database, pg_type: str
) -> None:
    """wal2json before 2.6 sends null for them."""
    create(typed, {pg_type: NOT_A_NUMBER[pg_type]})
    stream = Stream(typed)
    fill(typed, {pg_type: NOT_A_NUMBER[pg_type]})
    await stream.drain()
    values = [change.row["v"] for change in stream.changes][:-1]
    json_values = [exact_json(change.to_json())["row"]["v"] for change in stream.changes][:-1]
    if knows_numbers_as_strings(typed):
        assert json_values == ["NaN", "Infinity", "-Infinity"]
        assert str(values[0]).lower() == "nan"
        assert [str(value).lower()[:4] for value in values[1:]] == ["inf", "-inf"] or values[
            1:
        ] == [Decimal("Infinity"), Decimal("-Infinity")]
    else:
        assert values == json_values == [None, None, None]


def knows_numbers_as_strings(database: Database) -> bool:
    stream = Stream(database)
    try:
        database.execute(
            "SELECT 1 FROM pg_logical_slot_peek_changes(%s, NULL, 1, 'format-version', '2',"
            " 'numeric-data-types-as-string', '1')",
            stream.slot,
        )
    except psycopg.errors.InvalidParameterValue:
        return False
    return True


@pytest.mark.parametrize("attributes", ['"from" int, "to" text', '"a b" int, "a-b" text'])
async def test_a_composite_that_cannot_be_a_named_tuple_comes_with_numbered_attributes(
    database: Database, attributes: str
) -> None:
    """Alone, in an array and inside of another composite."""
    database.execute(
        f"CREATE TYPE segment AS ({attributes}); CREATE TYPE way AS (name text, whole segment);"
        "CREATE TABLE ways (id int PRIMARY KEY, one segment, several segment[], inside way)"
    )
    stream = Stream(database)
    stream.record("public.ways")
    database.execute(
        "INSERT INTO ways VALUES (1, '(1,x)', ARRAY['(2,y)', NULL]::segment[], '(n,\"(3,)\")')"
    )
    await stream.drain()
    [change] = stream.changes
    row = change.row
    assert (row["one"], row["several"], row["inside"]) == (
        (1, "x"),
        [(2, "y"), None],
        ("n", (3, None)),
    )
    assert row["inside"].name == "n"
    [(as_json,)] = database.execute("SELECT to_jsonb(ways)::text FROM ways")
    assert exact_json(change.to_json())["row"] == exact_json(as_json)


async def test_values_older_than_an_attribute_have_none_for_it(typed: Database) -> None:
    typed.execute("CREATE TABLE pairs (id int PRIMARY KEY, one pair, several pair[])")
    stream = Stream(typed)
    stream.record("public.pairs")
    typed.execute("INSERT INTO pairs VALUES (1, '(1,x)', ARRAY['(1,x)']::pair[])")
    typed.execute("ALTER TYPE pair ADD ATTRIBUTE further date")
    typed.execute("INSERT INTO pairs VALUES (2, '(2,y,2024-02-29)')")
    await stream.drain()
    old, new = (change.row for change in stream.changes)
    assert (old["one"], old["several"]) == ((1, "x", None), [(1, "x", None)])
    assert old["one"].further is None
    assert new["one"] == (2, "y", date(2024, 2, 29))


async def test_values_with_more_attributes_than_their_type_had_come_as_text(
    typed: Database,
) -> None:
    """The type is not read again in a running session."""
    typed.execute("CREATE TABLE pairs (id int PRIMARY KEY, one pair)")
    stream = Stream(typed)
    stream.record("public.pairs")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stream.app.run(stream.config))
        typed.execute("INSERT INTO pairs VALUES (1, '(1,x)')")
        await async_wait_until(lambda: stream.changes)
        first = stream.changes[0].row["one"]
        typed.execute("ALTER TYPE pair ADD ATTRIBUTE further int")
        typed.execute("INSERT INTO pairs VALUES (2, '(2,y,3)')")
        await async_wait_until(lambda: len(stream.changes) > 1)
        stream.app.stop()
    assert (first, stream.changes[1].row["one"]) == ((1, "x"), "(2,y,3)")


async def test_an_enum_that_has_grown_is_filtered_by_its_new_order(typed: Database) -> None:
    """The type is fetched again when a label comes that it did not have."""
    typed.execute("CREATE TABLE feelings (id int PRIMARY KEY, v mood)")
    stream = Stream(typed)
    stream.record("public.feelings", "insert", where="v=gte.ok")
    typed.execute("INSERT INTO feelings VALUES (1, 'ok'), (2, 'sad')")
    await stream.drain()
    typed.execute("ALTER TYPE mood ADD VALUE 'fine' AFTER 'ok'")
    typed.execute("INSERT INTO feelings VALUES (3, 'fine')")
    await stream.drain()
    assert [change.row["id"] for change in stream.changes] == [1, 3]
