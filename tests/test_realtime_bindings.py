"""The filters of bindings say what Realtime's documented semantics say, by PostgreSQL's own word.

Realtime lets PostgreSQL compare: ``'<row's value>'::type <op> '<filter's value>'::type``, all
conditions of a filter have to be true, and of an insert and update the new row is tested, of a
delete the old one. The reference here is that SQL. Text is ordered under ``COLLATE "C"``, and
matched under a UTF-8 locale.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests import test_filters_live as live
from tests.postgres import Database, create_database, drop_database
from tests.records import Records, learned_types, utf8_collation
from tests.streaming import Stream
from walstream import Change
from walstream.access.readers import Grant, Reader, Sight
from walstream.catalog import Catalog
from walstream.changes import Layout, Relation, Row
from walstream.errors import FilterError, Unavailable
from walstream.filters import Comparison, Filter, Literal, Operator, compile_filter, literals, parse
from walstream.filters import Condition as Compiled
from walstream.live.literals import Literals
from walstream.live.requests import Requests
from walstream.live.subscriptions import Limits, RequestRefused, Subscription
from walstream.live.views import Look, View, literals_of
from walstream.offline import read_offline
from walstream.projection import Mask, Projection
from walstream.realtime.bindings import Binding, read_bindings
from walstream.realtime.filters import (
    Condition,
    ValueRefused,
    condition_on_rows,
    read_conditions,
)
from walstream.realtime.verifying import verify
from walstream.router import Route, TablePattern


def bind(**raw: Any) -> Binding:
    [binding] = read_bindings([raw], Limits())
    return binding


# What is seen of a change

BIG: Final = "x" * 9_000

HAPPENINGS: Final = """
    CREATE TABLE plain (id int PRIMARY KEY, n int, at date, note text, big text);
    ALTER TABLE plain ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE whole (LIKE plain INCLUDING ALL);
    ALTER TABLE whole REPLICA IDENTITY FULL;
"""


@pytest.fixture(scope="module")
def happened(server_dsn: str, database_template: str) -> Iterator[dict[str, Change]]:
    """Changes as the server sends them, by the table and what was done."""
    with create_database(server_dsn, database_template) as database:
        yield asyncio.run(_happen(database))
    drop_database(server_dsn, database.name)


async def _happen(database: Database) -> dict[str, Change]:
    database.execute(HAPPENINGS)
    stream = Stream(database)
    for table in ("plain", "whole"):
        database.execute(f"INSERT INTO {table} VALUES (10, 9, '2024-10-01', 'mine', '{BIG}')")
        database.execute(f"INSERT INTO {table} VALUES (11, NULL, NULL, NULL, NULL)")
        database.execute(f"UPDATE {table} SET n = 100 WHERE id = 10")
        database.execute(f"UPDATE {table} SET note = 'theirs' WHERE id = 10")
        database.execute(f"UPDATE {table} SET note = 'mine' WHERE id = 10")
        database.execute(f"DELETE FROM {table} WHERE id = 10")
        database.execute(f"TRUNCATE {table}")
    await stream.drain()
    names = ("insert", "nulls", "update", "hide", "show", "delete", "truncate")
    keys = [f"{table} {name}" for table in ("plain", "whole") for name in names]
    return dict(zip(keys, stream.changes, strict=True))


def look(
    change: Change, text: str, *, sight: str | None = None, event: str = "*", leaving: bool = False
) -> Look | None:
    """Say how somebody sees a change who asks for it by a filter."""
    binding = bind(
        event=event,
        schema="public",
        table=change.layout.relation.name,
        filter=text,
        leaving=leaving,
    )
    assert binding.error == ""
    assert binding.subscription is not None
    seen = Sight("public.*", where=None if sight is None else parse(sight))
    asked = literals_of(binding.subscription, seen, change.layout)
    values = {one: read_offline(one, change.layout.types) or "" for one in asked}
    return View(binding.subscription, seen, change.layout, values).look(change)


WHOLE: Final = Look.WHOLE


@pytest.mark.parametrize(
    ("what", "text", "seen"),
    [
        # By the order of the type, and not of text.
        ("plain insert", "id=gt.9", WHOLE),
        ("plain insert", "id=lt.9", None),
        ("plain insert", "n=lt.10", WHOLE),
        ("plain insert", "at=gt.2024-09-30", WHOLE),
        # All conditions.
        ("plain insert", "id=eq.10,n=eq.9", WHOLE),
        ("plain insert", "id=eq.10,n=eq.8", None),
        ("plain insert", "id=in.(9,10),note=like.m%", WHOLE),
        ("plain insert", "", WHOLE),
        # An unknown value is neither equal nor not, is distinct, and is null.
        *(
            ("plain nulls", f"n={one}", None)
            for one in ("eq.1", "neq.1", "not.eq.1", "not.neq.1", "in.(1)", "not.in.(1)", "lt.1")
        ),
        *(("plain nulls", f"note={one}", None) for one in ("like.%", "not.like.%", "match.a")),
        ("plain nulls", "n=is.null", WHOLE),
        ("plain nulls", "n=not.is.null", None),
        ("plain insert", "n=not.is.null", WHOLE),
        ("plain nulls", "n=isdistinct.1", WHOLE),
        ("plain nulls", "n=not.isdistinct.1", None),
        ("plain nulls", "id=eq.11,n=eq.1", None),
        ("plain insert", "n=in.(9,NULL)", WHOLE),
        ("plain insert", "n=not.in.(8,NULL)", None),
        ("plain insert", "n=not.in.(8)", WHOLE),
        # Of an update the new row counts alone.
        ("plain update", "n=eq.100", WHOLE),
        ("plain update", "n=eq.9", None),
        ("whole update", "n=eq.9", None),
        ("whole hide", "note=eq.mine", None),
        ("whole show", "note=eq.mine", WHOLE),
        # Every column of the filter has to be there: what was not touched may not be.
        ("plain update", "big=like.x%", None),
        ("plain update", "big=not.like.x%", None),
        ("plain update", "big=is.null", None),
        ("plain update", "big=not.is.null", None),
        ("plain update", "n=eq.100,big=like.x%", None),
        ("whole update", "big=like.x%", WHOLE),
        ("whole update", "n=eq.100,big=not.is.null", WHOLE),
        # Of a delete the old row counts, or its key where there is no more.
        ("plain delete", "id=eq.10", WHOLE),
        ("plain delete", "id=eq.9", None),
        ("plain delete", "n=eq.100", None),
        ("plain delete", "n=is.null", None),
        ("plain delete", "id=eq.10,note=eq.mine", None),
        ("whole delete", "n=eq.100", WHOLE),
        ("whole delete", "n=eq.9", None),
        ("whole delete", "note=eq.mine,big=like.x%", WHOLE),
        # A truncate is never delivered.
        ("plain truncate", "", None),
        ("whole truncate", "", None),
        ("whole truncate", "id=eq.10", None),
    ],
)
def test_a_change_is_seen_by_who_asks_for_it(
    happened: dict[str, Change], what: str, text: str, seen: Look | None
) -> None:
    assert look(happened[what], text) is seen


@pytest.mark.parametrize(
    ("what", "event", "seen"),
    [
        *(("whole insert", event, WHOLE) for event in ("*", "INSERT", "insert")),
        *(("whole insert", event, None) for event in ("UPDATE", "DELETE")),
        *(("whole update", event, WHOLE) for event in ("*", "UPDATE")),
        *(("whole update", event, None) for event in ("INSERT", "DELETE")),
        *(("whole delete", event, WHOLE) for event in ("*", "DELETE")),
        *(("whole delete", event, None) for event in ("INSERT", "UPDATE")),
        ("whole truncate", "TRUNCATE", None),
    ],
)
def test_an_event_is_seen_by_who_asks_for_it(
    happened: dict[str, Change], what: str, event: str, seen: Look | None
) -> None:
    assert look(happened[what], "", event=event) is seen


@pytest.mark.parametrize(
    ("what", "text", "seen"),
    [
        ("whole hide", "note=eq.mine", Look.LEAVING),
        ("whole show", "note=eq.mine", WHOLE),
        ("whole update", "n=eq.9", Look.LEAVING),
        ("plain update", "n=eq.9", None),  # the old row is not there to tell
        ("whole update", "n=eq.8", None),
    ],
)
def test_an_update_that_leaves_the_filter_is_seen_by_who_asks_for_that(
    happened: dict[str, Change], what: str, text: str, seen: Look | None
) -> None:
    assert look(happened[what], text, leaving=True) is seen


@pytest.mark.parametrize(
    ("what", "leaving", "seen"),
    [
        # A row that is shown comes without its past; one that is hidden goes without a word.
        ("whole insert", False, WHOLE),
        ("whole show", False, Look.WITHOUT_PAST),
        ("whole hide", False, None),
        ("whole hide", True, Look.LEAVING_BY_KEY),
        ("plain hide", True, None),
        ("whole delete", False, WHOLE),
        ("plain delete", False, None),  # nobody can tell whose it was
    ],
)
def test_a_row_that_may_not_be_seen_is_not(
    happened: dict[str, Change],
    what: str,
    leaving: bool,  # noqa: FBT001
    seen: Look | None,
) -> None:
    assert look(happened[what], "", sight="note=eq.mine", leaving=leaving) is seen


@pytest.mark.parametrize(
    ("select", "hidden", "shown"),
    [
        (None, None, ["id", "n", "at", "note", "big"]),
        (["n"], None, ["id", "n"]),
        (["id"], None, ["id"]),
        (["n"], "id", ["n"]),
        (["n", "note"], "note", ["id", "n"]),
    ],
)
def test_the_key_comes_with_the_columns_that_are_selected(
    happened: dict[str, Change], select: list[str] | None, hidden: str | None, shown: list[str]
) -> None:
    change = happened["whole update"]
    subscription = bind(schema="public", table="whole", select=select).subscription
    assert subscription is not None
    projection = None if hidden is None else Projection(exclude=[hidden])
    view = View(subscription, Sight("*.*", projection), change.layout, {})
    seen = view.show(change, Look.WHOLE)
    assert [column.name for column in seen.new_columns or ()] == shown
    assert [column.name for column in seen.identity_columns or ()] == shown


# What can be had

TABLES: Final = """
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE TABLE test (
        id int PRIMARY KEY, subject text, n int, flag bool, j json, secret text, code varchar(9),
        at timestamptz, felt mood, masked text, ids uuid[]
    );
    CREATE TABLE other (id int PRIMARY KEY);
    CREATE TABLE hidden (id int PRIMARY KEY);
    CREATE TABLE unfitting (id int PRIMARY KEY, n int);
    CREATE SCHEMA elsewhere;
    CREATE TABLE elsewhere.test (id int PRIMARY KEY, subject text);
    CREATE SCHEMA sparse;
    CREATE TABLE sparse.one (id int PRIMARY KEY);
"""

READER: Final = Reader(
    "reader",
    grants=(
        Grant(
            TablePattern("public", "test"),
            Sight(
                "public.test",
                Projection(exclude=["secret"], mask={"masked": Mask.parse("redact")}),
            ),
        ),
        Grant(TablePattern("public", "other"), Sight("public.other")),
        Grant(
            TablePattern("public", "unfitting"), Sight("public.unfitting", where=parse("n=eq.x"))
        ),
        Grant(TablePattern("elsewhere", None), Sight("elsewhere.*")),
        Grant(TablePattern("sparse", "one"), Sight("sparse.one")),
    ),
)
ROUTES: Final = (
    Route("all", TablePattern("public", None), None),
    Route("sparse", TablePattern("sparse", None), None, projection=Projection(exclude=["id"])),
)


@pytest.fixture(scope="module")
def tables(server_dsn: str, database_template: str) -> Iterator[Database]:
    with create_database(server_dsn, database_template) as database:
        database.execute(TABLES)
        yield database
    drop_database(server_dsn, database.name)


@pytest.fixture
async def requests(tables: Database) -> AsyncIterator[Requests]:
    catalog = Catalog(tables.dsn, application_name="tests")
    requests = Requests(catalog, Literals(catalog))
    requests.routes = ROUTES
    yield requests
    await catalog.close()


@pytest.mark.parametrize(
    "raw",
    [
        {"table": "test"},
        {"schema": "public"},
        {"schema": "*"},
        {"schema": "*", "table": "*"},
        {"schema": "*", "table": "other"},
        {"table": "test", "select": ["id", "subject", "masked"]},
        *(
            {"table": "test", "filter": one}
            for one in (
                "subject=eq.hey",
                "n=in.(1, 2)",
                "n=not.in.(1,NULL)",
                "flag=is.true",
                "flag=not.is.unknown",
                "j=is.null",
                "code=ilike.a%",
                "subject=match.^a+$",
                "at=gt.2024-01-01 10:00+02",
                "felt=eq.ok",
                "ids=not.is.null",
            )
        ),
    ],
)
async def test_what_the_reader_may_have_is_not_refused(
    requests: Requests, raw: dict[str, Any]
) -> None:
    binding = bind(**{"schema": "public", **raw} if "filter" in raw else raw)
    assert binding.error == ""
    assert await verify(binding, requests, READER) is None


_EXCEPTION: Final = (
    "Unable to subscribe to changes with given parameters. An exception happened so please check"
    " your connect parameters: [{}]. Exception: ERROR {}"
)
_RAISED: Final = "P0001 (raise_exception)"


@pytest.mark.parametrize(
    ("filter_", "shown", "reason"),
    [
        *(
            (f"{name}=eq.hey", f'{{"{name}", "eq", "hey", false}}', f"{_RAISED} {reason}")
            for name in ("nope", "secret", "masked")
            for reason in [f"invalid column for filter {name}"]
        ),
        (
            "n=eq.abc",
            '{"n", "eq", "abc", false}',
            '22P02 (invalid_text_representation) invalid input syntax for type integer: "abc"',
        ),
        (
            "n=not.in.(1,abc)",
            '{"n", "in", "{1,abc}", true}',
            '22P02 (invalid_text_representation) invalid input syntax for type integer: "abc"',
        ),
        (
            "n=gt.99999999999",
            '{"n", "gt", "99999999999", false}',
            (
                "22003 (numeric_value_out_of_range)"
                ' value "99999999999" is out of range for type integer'
            ),
        ),
        (
            "at=lt.2024-02-31",
            '{"at", "lt", "2024-02-31", false}',
            '22008 (datetime_field_overflow) date/time field value out of range: "2024-02-31"',
        ),
        (
            "felt=eq.glad",
            '{"felt", "eq", "glad", false}',
            '22P02 (invalid_text_representation) invalid input value for enum public.mood: "glad"',
        ),
        *(
            (
                f"n={one}.a",
                f'{{"n", "{one}", "a", false}}',
                f"{_RAISED} operator {one} requires a text-compatible column type, got integer",
            )
            for one in ("like", "ilike", "match", "imatch")
        ),
        (
            "n=is.maybe",
            '{"n", "is", "maybe", false}',
            f"{_RAISED} invalid value for is filter: must be null, true, false, or unknown",
        ),
        (
            "n=is.true",
            '{"n", "is", "true", false}',
            f"{_RAISED} is true filter requires a boolean column, got integer",
        ),
        (
            "n=not.is.unknown",
            '{"n", "is", "unknown", true}',
            f"{_RAISED} is unknown filter requires a boolean column, got integer",
        ),
        (
            "subject=match.(a",
            '{"subject", "match", "(a", false}',
            f"{_RAISED} invalid regular expression for match filter: a parenthesis is not closed",
        ),
        (
            "subject=imatch.(?=a)",
            '{"subject", "imatch", "(?=a)", false}',
            (
                f"{_RAISED} invalid regular expression for imatch filter:"
                " a pattern cannot look ahead or behind here"
            ),
        ),
        (
            "subject=like.a\\",
            '{"subject", "like", "a\\\\", false}',
            "22025 (invalid_escape_sequence) LIKE pattern must not end with escape character",
        ),
        (
            f"n=in.({','.join(map(str, range(101)))})",
            f'{{"n", "in", "{{{",".join(map(str, range(101)))}}}", false}}',
            f"{_RAISED} too many values for `in` filter. Maximum 100",
        ),
        (
            "j=eq.1",
            '{"j", "eq", "1", false}',
            f"{_RAISED} operator eq is not supported on column j of type json",
        ),
        (
            "n=eq.1,nope=eq.2,j=eq.3",
            '{"n", "eq", "1", false}, {"nope", "eq", "2", false}, {"j", "eq", "3", false}',
            f"{_RAISED} invalid column for filter nope",
        ),
    ],
)
async def test_what_the_server_refuses_is_told_in_the_words_that_clients_know(
    requests: Requests, filter_: str, shown: str, reason: str
) -> None:
    binding = bind(event="*", schema="public", table="test", filter=filter_)
    shown = f"event: *, schema: public, table: test, filters: [{shown}], select: nil"
    assert await verify(binding, requests, READER) == _EXCEPTION.format(shown, reason)


@pytest.mark.parametrize("name", ["nope", "secret"])
async def test_a_column_that_may_not_be_read_cannot_be_selected(
    requests: Requests, name: str
) -> None:
    binding = bind(event="INSERT", schema="public", table="test", select=["id", name])
    shown = f'event: INSERT, schema: public, table: test, filters: [], select: ["id", "{name}"]'
    reason = f"{_RAISED} invalid column for select {name}"
    assert await verify(binding, requests, READER) == _EXCEPTION.format(shown, reason)


@pytest.mark.parametrize(
    ("schema", "table"),
    [
        ("public", "doesnotexist"),
        ("public", "hidden"),
        ("public", "unfitting"),
        ("public", "te%"),
        ("public", "t_st"),
        ("elsewhere", "test"),  # no route brings it here
        ("elsewhere", "*"),
        ("nowhere", "*"),
        ("pg_catalog", "pg_class"),
        ("information_schema", "*"),
    ],
)
async def test_nothing_is_told_of_a_table_that_may_not_be_seen(
    requests: Requests, schema: str, table: str
) -> None:
    binding = bind(event="*", schema=schema, table=table)
    assert await verify(binding, requests, READER) == (
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for"
        f" the given connect parameters: [event: *, schema: {schema}, table: {table}, filters: [],"
        " select: nil]"
    )


async def test_a_filter_on_a_hidden_table_does_not_tell_its_columns(requests: Requests) -> None:
    texts = [
        await verify(
            bind(event="*", schema="public", table="hidden", filter=f"{name}=eq.1"),
            requests,
            READER,
        )
        for name in ("id", "nope")
    ]
    assert [text is not None and "Please check Realtime" in text for text in texts] == [True, True]


async def test_a_filter_of_a_wildcard_has_to_fit_all_tables(requests: Requests) -> None:
    fits = bind(event="*", schema="public", table="*", filter="id=gt.3")
    assert await verify(fits, requests, READER) is None
    binding = bind(event="*", schema="public", table="*", filter="subject=eq.x")
    text = await verify(binding, requests, READER)
    assert text is not None
    assert text.endswith("invalid column for filter subject")


async def test_a_column_that_no_route_brings_cannot_be_compared(requests: Requests) -> None:
    binding = bind(schema="sparse", table="one", filter="id=eq.1")
    text = await verify(binding, requests, READER)
    assert text is not None
    assert text.endswith("invalid column for filter id")


async def test_what_was_wrong_before_is_told_without_the_database(requests: Requests) -> None:
    binding = bind(schema="public", table="test", filter="nonsense")
    assert await verify(binding, requests, READER) == binding.error != ""


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (
            "n=eq.of-a-claim",
            "a value cannot be read as the type of its column: SQLSTATE 22P02",
        ),
        ("gone=eq.of-a-claim", "there is no column 'gone'"),
    ],
)
async def test_a_condition_of_a_role_that_does_not_fit_is_logged_without_its_values(
    requests: Requests, where: str, error: str
) -> None:
    """Once a minute: clients that come back would fill the log."""
    sight = Sight("public.unfitting", where=parse(where))
    reader = Reader("owner", grants=(Grant(TablePattern("public", "unfitting"), sight),))
    subscription = Subscription(TablePattern("public", "unfitting"))
    with capture_logs() as logs:
        for _ in range(2):
            with pytest.raises(RequestRefused, match=r"public\.unfitting may not be read"):
                await requests.check([subscription], reader)
            assert await verify(bind(schema="public", table="unfitting"), requests, reader)
    [told] = logs
    assert (told["event"], told["log_level"]) == ("role_condition_unusable", "warning")
    assert (told["relation"], told["role"]) == ("public.unfitting", "owner")
    assert told["error"] == error
    assert "of-a-claim" not in str(told)


async def test_a_database_that_is_away_says_nothing_about_a_binding() -> None:
    catalog = Catalog("host=127.0.0.1 port=1 connect_timeout=1", application_name="tests")
    requests = Requests(catalog, Literals(catalog))
    with pytest.raises(Unavailable):
        await verify(bind(schema="public", table="test"), requests, READER)


# What is compared

TYPES: Final[dict[str, st.SearchStrategy[str]]] = {
    "int2": live.TYPES["int2"],
    "int4": live.TYPES["int4"],
    "int8": live.TYPES["int8"],
    "numeric": live.TYPES["numeric"],
    "float8": live.TYPES["float8"],
    "text": live.TYPES["text"],
    "varchar": live.TYPES["varchar(20)"],
    "bool": live.TYPES["bool"],
    "date": live.TYPES["date"],
    "timestamp": live.TYPES["timestamp"],
    "timestamptz": live.TYPES["timestamptz"],
    "uuid": live.TYPES["uuid"],
    "mood": live.TYPES["mood"],
    "jsonb": live.TYPES["jsonb"],
}
COLUMNS: Final = {f"c{place}": name for place, name in enumerate(TYPES)}
TEXT_TYPES: Final = frozenset({"text", "varchar"})
ORDER: Final = frozenset({Operator.LT, Operator.LTE, Operator.GT, Operator.GTE})
PATTERNS: Final = frozenset({Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH})
Values = dict[str, str | None]


def operators(pg_type: str) -> list[Operator]:
    return [
        one
        for one in Operator
        if (one not in ORDER or pg_type != "jsonb")
        and (one not in PATTERNS or pg_type in TEXT_TYPES)
    ]


def built(value: str) -> str:
    """Write a value as the stock client does."""
    if not set(value) & set(',()"\\') and value == value.strip():
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def listed(value: str | None) -> str:
    """Write an element; those that an array could take for something else are quoted too."""
    if value is None:
        return "NULL"
    if value and value.upper() != "NULL" and not set(value) & set("{}"):
        return built(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def written(draw: st.DrawFn, column: str) -> str:
    """One condition on a column, as a client writes it."""
    pg_type = COLUMNS[column]
    operator = draw(st.sampled_from(operators(pg_type)))
    values = TYPES[pg_type]
    match operator:
        case Operator.IS:
            truths = ["null", "true", "false", "unknown"] if pg_type == "bool" else ["null"]
            value = draw(st.sampled_from(truths))
        case Operator.IN:
            some = draw(st.lists(values | values | st.none(), max_size=4))
            texts = list(map(listed, some))
            # Quotes behind a space do not open, and so do not hide a parenthesis.
            is_plain = not {"(", ")"} & set("".join(texts))
            value = f"({(draw(st.sampled_from([',', ' , '])) if is_plain else ',').join(texts)})"
        case Operator.LIKE | Operator.ILIKE:
            value = built(draw(live.LIKE_PATTERNS | values))
        case Operator.MATCH | Operator.IMATCH:
            value = built(draw(live.REGULAR_EXPRESSIONS))
        case _:
            value = built(draw(values))
    negation = draw(st.sampled_from(["", "not."]))
    return f"{column}={negation}{operator}.{value}"


@st.composite
def examples(draw: st.DrawFn) -> tuple[list[str], list[Values]]:
    """Filters, and rows that have values where the filters look."""
    names = draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=1, max_size=3, unique=True))
    conditions = st.sampled_from(names).flatmap(written)
    texts = draw(
        st.lists(st.lists(conditions, min_size=1, max_size=3).map(",".join), min_size=1, max_size=6)
    )
    row = st.fixed_dictionaries(
        {
            name: st.none() | values | values | values
            for name in names
            for values in [TYPES[COLUMNS[name]]]
        }
    )
    return texts, draw(st.lists(row, min_size=1, max_size=6))


SQL_OPERATORS: Final = {
    Operator.EQ: "=",
    Operator.NEQ: "<>",
    Operator.LT: "<",
    Operator.LTE: "<=",
    Operator.GT: ">",
    Operator.GTE: ">=",
    Operator.LIKE: "LIKE",
    Operator.ILIKE: "ILIKE",
    Operator.MATCH: "~",
    Operator.IMATCH: "~*",
}


class Reference:
    """A table, its rows as they come out of the write-ahead log, and PostgreSQL's word on them."""

    def __init__(self, database: Database) -> None:
        database.execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'fine', 'happy')")
        declared = ", ".join(f"{name} {pg_type}" for name, pg_type in COLUMNS.items())
        database.execute(f"CREATE TABLE rows (id int GENERATED ALWAYS AS IDENTITY, {declared})")
        self.records = Records(database)
        self.connection = self.records.connection
        self.connection.execute("SET search_path TO public, pg_catalog")
        self.oids: dict[str, int] = dict(
            self.connection.execute(
                "SELECT attname, atttypid::bigint::int FROM pg_attribute"
                " WHERE attrelid = 'rows'::regclass AND attnum > 0"
            ).fetchall()
        )
        self.types = learned_types(database, self.oids.values())
        relation = Relation("public", "rows")
        self.layout = Layout(relation, [*self.oids], [*self.oids.values()], [], self.types)
        self.collation = utf8_collation(self.connection)

    def insert(self, rows: list[Values]) -> list[Row]:
        names = list(rows[0])
        typed = ", ".join(f"%s::{COLUMNS[name]}" for name in names)
        self.connection.execute(
            f"INSERT INTO rows ({', '.join(names)})"
            f" VALUES {', '.join([f'({typed})'] * len(rows))}".encode(),
            [row[name] for row in rows for name in names],
        )
        return [Row(self.layout, columns) for columns in self.records.inserted()]

    def compile(self, where: Filter) -> Compiled | None:
        """Compile as for a client; None when it cannot have the filter."""
        normalised: dict[Literal, str] = {}
        try:
            for literal in literals(where, self.oids, self.types, is_linear=True):
                normalised[literal] = self.read(literal)
        except (FilterError, psycopg.errors.InvalidRegularExpression):
            return None
        return compile_filter(where, self.oids, self.types, normalised, is_linear=True)

    def read(self, literal: Literal) -> str:
        row = self.connection.execute(literal.sql.encode(), [literal.text]).fetchone()
        assert row is not None
        return str(row[0])

    def passing(self, texts: Iterable[str], ids: list[int]) -> list[set[int]]:
        """Ask for each filter which rows pass all of its conditions."""
        filters = ", ".join(
            " AND ".join(f"({self.sql(one)})" for one in read_conditions(text)) for text in texts
        )
        rows = self.connection.execute(
            f"SELECT id, {filters} FROM rows WHERE id IN ({', '.join(map(str, ids))})".encode()
        ).fetchall()
        answers = zip(*(row[1:] for row in rows), strict=True)
        return [
            {row[0] for row, passes in zip(rows, one, strict=True) if passes is True}
            for one in answers
        ]

    def sql(self, condition: Condition) -> str:
        """Write the condition as Realtime's semantics have it."""
        pg_type = COLUMNS[condition.column]
        value = f"{condition.column}::text::{pg_type}"
        other = f"({live.quoted(condition.value)}::{pg_type})"
        negated = "NOT " if condition.is_negated else ""
        match condition.operator:
            case Operator.IS:
                return f"{value} IS {negated}{condition.value.upper()}"
            case Operator.ISDISTINCT:
                return f"{value} IS {negated}DISTINCT FROM {other}"
            case Operator.IN:
                array = f"({live.quoted(condition.value)}::{pg_type}[])"
                return f"{negated}({value} = ANY {array})"
            case operator:
                collation = ""
                if pg_type in TEXT_TYPES:
                    name = self.collation if operator in PATTERNS else '"C"'
                    collation = f" COLLATE {name}"
                return f"{negated}({value}{collation} {SQL_OPERATORS[operator]} {other})"


@pytest.fixture(scope="module")
def reference(server_dsn: str, database_template: str) -> Iterator[Reference]:
    with create_database(server_dsn, database_template) as database:
        reference = Reference(database)
        yield reference
        reference.connection.close()
    drop_database(server_dsn, database.name)


EXAMPLES: Final = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(EXAMPLES, max_examples=100)
@given(examples())
def test_rows_pass_filters_as_postgres_says(
    reference: Reference, example: tuple[list[str], list[Values]]
) -> None:
    agree(reference, *example)


@pytest.mark.parametrize("column", COLUMNS, ids=list(TYPES))
@settings(EXAMPLES, max_examples=10)
@given(data=st.data())
def test_every_operator_of_a_type_says_what_postgres_says(
    reference: Reference, column: str, data: st.DataObject
) -> None:
    """Every value of a few is compared with every other one by every operator, and negated."""
    values = data.draw(st.lists(TYPES[COLUMNS[column]], min_size=1, max_size=4, unique=True))
    texts = [
        f"{column}={negation}{operator}.{operand}"
        for operator in operators(COLUMNS[column])
        for operand in operands(operator, values, data)
        for negation in ("", "not.")
    ]
    agree(reference, texts, [{column: value} for value in [*values, None]])


def operands(operator: Operator, values: list[str], data: st.DataObject) -> list[str]:
    """What an operator is tried with, given the values that the rows have."""
    match operator:
        case Operator.IS:
            return ["null"]
        case Operator.IN:
            some: list[list[str | None]] = [[], [*values[:1]], [None, *values[:1]], [*values[1:]]]
            return [f"({','.join(map(listed, one))})" for one in some]
        case Operator.LIKE | Operator.ILIKE:
            return [built(one) for one in data.draw(st.lists(live.LIKE_PATTERNS, max_size=5))]
        case Operator.MATCH | Operator.IMATCH:
            some_patterns = data.draw(st.lists(live.REGULAR_EXPRESSIONS, max_size=8))
            return [built(one) for one in some_patterns]
        case _:
            return [built(one) for one in values]


def agree(reference: Reference, texts: list[str], rows: list[Values]) -> None:
    compiled: dict[str, Compiled] = {}
    for text in texts:
        binding = bind(schema="public", table="rows", filter=text)
        assert binding.error == "", (text, binding.error)
        assert binding.subscription is not None
        assert binding.subscription.where is not None
        condition = reference.compile(binding.subscription.where)
        if condition is not None:
            compiled[text] = condition
    assume(compiled)
    carried = {row["id"]: row for row in reference.insert(rows)}
    passing = reference.passing(compiled, list(carried))
    for (text, condition), ids in zip(compiled.items(), passing, strict=True):
        assert {id_ for id_, row in carried.items() if condition(row) is True} == ids, text


@settings(EXAMPLES, max_examples=200)
@given(st.text(alphabet='aN"\\,{} \tul', max_size=8) | st.text(alphabet='a",', max_size=6))
def test_lists_are_read_as_postgres_reads_arrays(reference: Reference, inner: str) -> None:
    array = f"{{{inner}}}"
    read = read_array(array)
    try:
        [(elements, dimensions)] = reference.connection.execute(
            "SELECT array(SELECT unnest(t)), coalesce(array_ndims(t), 1)"
            " FROM (SELECT %s::text[]) AS one (t)",
            [array],
        ).fetchall()
    except psycopg.errors.InvalidTextRepresentation as error:
        assert read == error.diag.message_primary  # noqa: PT017 - the server's own
        return
    if dimensions == 1:
        assert read == {one for one in elements if one is not None}


def read_array(array: str) -> set[str] | str:
    """Return the values that are compared with, or why there are none."""
    try:
        where = condition_on_rows([Condition("a", Operator.IN, array)])
    except ValueRefused as refused:
        return refused.message
    assert isinstance(where, Comparison)
    return set(where.values)
