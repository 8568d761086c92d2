"""Filters against PostgreSQL: whatever the filter and the rows, SQL's WHERE says the same.

Rows are random, inserted, and read back as wal2json writes them; filters are random, and compiled
from values that the server has normalised. Each is compared with the same condition in SQL: true,
false and unknown alike. Text is compared under ``COLLATE "C"``, and matched under a UTF-8 locale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.postgres import Database, create_database, drop_database
from tests.records import Records, learned_types, utf8_collation
from walstream.changes import Layout, Relation, Row
from walstream.errors import FilterError
from walstream.filters import (
    And,
    Comparison,
    Condition,
    Filter,
    Literal,
    Not,
    Operator,
    Or,
    columns,
    compile_filter,
    literals,
    parse,
)

SET_UP: Final = """
    CREATE EXTENSION citext;
    CREATE EXTENSION hstore;
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    ALTER TYPE mood ADD VALUE 'fine' BEFORE 'happy';
    CREATE TYPE place AS (name text COLLATE "C", floor int, at timestamptz);
    CREATE DOMAIN amount AS numeric;
    CREATE DOMAIN price AS amount CHECK (value IS NULL OR value > -1000000);
    CREATE DOMAIN flag AS bool;
    CREATE DOMAIN moods AS mood[];
    CREATE TYPE floatrange AS RANGE (subtype = float8);
"""

INTEGERS: Final = st.integers(-3, 3) | st.integers(-(2**15), 2**15 - 1)
LETTERS: Final = "abAB01 _-%*\\\"',()é É\nßΣσςİ€😀"  # noqa: RUF001 - a letter with two small forms
TEXTS: Final = st.text(alphabet=LETTERS, max_size=5) | st.text(alphabet="ab", max_size=3)
ASCII_TEXTS: Final = st.text(alphabet="abAB01 _-%\\\"'", max_size=4)
HEX: Final = st.binary(max_size=3).map(bytes.hex)
BITS: Final = st.text(alphabet="01", max_size=9)
YEARS: Final = st.sampled_from([1, 4, 44, 1999, 2000, 2024, 9999, 10000, 20044])
DATES: Final = st.one_of(
    st.sampled_from(["infinity", "-infinity", "2024-02-29", "2024-03-01"]),
    st.sampled_from(["0044-03-15 BC", "0044-02-01 BC", "0045-12-31 BC", "0001-12-31 BC"]),
    st.builds(
        "{:04}-{:02}-{:02}".format, YEARS, st.integers(1, 12), st.sampled_from([1, 2, 10, 28])
    ),
)
TIMES: Final = st.sampled_from(
    ["00:00:00", "00:00:00.5", "00:00:00.05", "12:30:00", "23:59:59.999999", "24:00:00"]
)
OFFSETS: Final = st.sampled_from(["+00", "+05:30", "-08", "+15:59:59", "-15:59"])
NUMBERS: Final = st.one_of(
    INTEGERS.map(str),
    st.decimals(-1000, 1000, places=4).map(str),
    st.sampled_from(["0", "0.0", "-0.00", "1.50", "1.5", "1e20", "100000000000000000000.0"]),
    st.sampled_from(["0.00000000000000000000000001", "9" * 60]),
)
NOT_NUMBERS: Final = st.sampled_from(["NaN", "Infinity"])
FLOATS: Final = st.one_of(
    INTEGERS.map(str),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.sampled_from(["0", "-0", "0.1", "1e-30", "1e30", "16777217"]),
)


def _at(date: str, time: str, offset: str = "") -> str:
    """Put the era behind the time, where PostgreSQL wants it."""
    if "infinity" in date:
        return date
    day, _, era = date.partition(" ")
    return f"{day} {time}{offset} {era}".strip()


TIMESTAMPS: Final = st.builds(_at, DATES, TIMES)
TIMESTAMPTZS: Final = st.builds(_at, DATES, TIMES, OFFSETS)
INTERVALS: Final = st.sampled_from(
    ["1 mon", "30 days", "31 days", "720:00:00", "-1 mon", "-30 days", "1 year", "360 days", "0"]
) | st.builds(
    "{} years {} mons {} days {}{}".format,
    *[st.integers(-2, 2), st.integers(-13, 13), st.integers(-40, 40)],
    *[st.sampled_from(["", "-"]), st.sampled_from(["00:00:00", "24:00:00.000001", "720:00:00"])],
)
MOODS: Final = st.sampled_from(["sad", "ok", "fine", "happy"])
NETWORKS: Final = st.one_of(
    st.builds("10.{}.0.{}/{}".format, *[st.integers(0, 2)] * 2, st.sampled_from([8, 15, 16, 32])),
    st.sampled_from(["10.0.0.1", "::1", "::ffff:10.0.0.1", "2001:db8::/32", "2001:db8::1/32"]),
)
CIDRS: Final = st.sampled_from(["10.0.0.0/8", "10.0.0.0/9", "10.1.0.0/16", "10.1.0.0/32", "::/0"])


def _array(elements: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quoted = elements.map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    rows = st.lists(quoted | st.just("NULL"), min_size=2, max_size=2).map(_braced)
    return st.one_of(
        st.lists(quoted | st.just("NULL"), max_size=3).map(_braced),
        st.lists(rows, min_size=1, max_size=2).map(_braced),
        quoted.map("[2:2]={{{}}}".format),
    )


def _braced(elements: list[str]) -> str:
    return "{" + ",".join(elements) + "}"


RANGES: Final = st.one_of(
    st.integers(-3, 3).flatmap(lambda low: st.integers(low, 4).map(f"[{low},{{}})".format)),
    st.sampled_from(["empty", "(,)", "(,1)", "[1,)", "(1,3]"]),
)
MULTIRANGES: Final = st.lists(RANGES.filter(lambda one: one != "empty"), max_size=3).map(_braced)
JSONS: Final = st.sampled_from(
    ["1", "1.0", "1.50", "1.5", '{"a":10.0}', '{"a":10}', '["1.0"]', '["1"]', "[0.10]", "[0.1]"]
) | st.recursive(
    st.sampled_from(["null", "true", "1", "1.0", "1.50", "1.5", '"1.0"', '"a\\n\\"1.0"', '""']),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(lambda some: "[" + ",".join(some) + "]"),
        st.dictionaries(st.sampled_from(["a", "b", "cc"]), inner, max_size=2).map(
            lambda pairs: "{" + ",".join(f'"{key}":{one}' for key, one in pairs.items()) + "}"
        ),
    ),
    max_leaves=4,
)
PLACES: Final = st.builds(
    "({},{},{})".format,
    st.sampled_from(["", "a", '"B b"', '"a ""q"""', '""']),
    st.sampled_from(["", "1", "10", "-2"]),
    st.sampled_from(["", '"2024-01-01 00:00:00+00"', "infinity"]),
)

TYPES: Final[dict[str, st.SearchStrategy[str]]] = {
    "int2": INTEGERS.map(str),
    "int4": INTEGERS.map(str),
    "int8": (INTEGERS | st.integers(-(2**63), 2**63 - 1)).map(str),
    "oid": st.integers(0, 2**32 - 1).map(str),
    "numeric": NUMBERS,
    "float4": FLOATS,
    "float8": FLOATS,
    "price": st.one_of(NUMBERS, NOT_NUMBERS),
    "bool": st.sampled_from(["t", "false"]),
    "flag": st.sampled_from(["true", "f"]),
    "text": TEXTS,
    "varchar(20)": TEXTS,
    "char(6)": TEXTS,
    "name": TEXTS,
    '"char"': st.sampled_from(["", "a", "b", "\\", " "]),
    "citext": ASCII_TEXTS,
    "uuid": st.uuids(version=4).map(str) | st.just("00000000-0000-0000-0000-00000000000A"),
    "bytea": HEX.map("\\x{}".format),
    "date": DATES,
    "timestamp": TIMESTAMPS,
    "timestamptz": TIMESTAMPTZS,
    "time": TIMES,
    "timetz": st.builds("{}{}".format, TIMES, OFFSETS),
    "interval": INTERVALS,
    "mood": MOODS,
    "inet": NETWORKS,
    "cidr": CIDRS,
    "macaddr": st.sampled_from(["08:00:2b:01:02:03", "08:00:2b:01:02:0A", "ff:00:00:00:00:00"]),
    "macaddr8": st.sampled_from(["08:00:2b:01:02:03:04:05", "ff:00:00:00:00:00:00:00"]),
    "pg_lsn": st.sampled_from(["0/0", "0/A0", "1/0", "A/FF", "FFFFFFFF/FFFFFFFF"]),
    "bit(4)": st.text(alphabet="01", min_size=4, max_size=4),
    "varbit": BITS,
    "money": st.decimals(-2000, 2000, places=2).map(str),
    "tid": st.sampled_from(["(0,1)", "(0,10)", "(2,1)"]),
    "xid8": st.integers(0, 20).map(str),
    "int4[]": _array(INTEGERS.map(str)),
    "text[]": _array(TEXTS),
    "price[]": _array(st.one_of(NUMBERS, NOT_NUMBERS)),
    "float8[]": _array(FLOATS | NOT_NUMBERS),
    "moods": _array(MOODS),
    "timestamptz[]": _array(TIMESTAMPTZS),
    "place": PLACES,
    "place[]": _array(PLACES),
    "int4range": RANGES,
    "floatrange": RANGES,
    "daterange": st.builds(
        "[{},{}]".format,
        st.sampled_from(["2024-01-01", "-infinity", ""]),
        st.sampled_from(["2024-02-29", "infinity", ""]),
    ),
    "int4multirange": MULTIRANGES,
    "jsonb": JSONS,
    "jsonb[]": _array(JSONS),
    "hstore": st.sampled_from(["", "a=>1", "a=>1,b=>NULL", "b=>NULL, a=>1", 'a=>"1 "']),
    "tsvector": st.sampled_from(["", "a b", "b a", "a:1 b:2"]),
    "xid": st.integers(0, 3).map(str),
    "json": JSONS,
    "point": st.just("(1,2)"),
}
COLUMNS: Final = {f"c{place}": name for place, name in enumerate(TYPES)}
TEXT_TYPES: Final = frozenset({"text", "varchar(20)", "char(6)", "name", "citext"})
COLLATED: Final = TEXT_TYPES | {"text[]"}
EQUALITY_ONLY: Final = frozenset({"jsonb", "jsonb[]", "hstore", "tsvector", "xid"})
INCOMPARABLE: Final = frozenset({"json", "point"})

IS_VALUES: Final = ("null", "not_null", "true", "false", "unknown")
LIKE_PATTERNS: Final = st.text(alphabet=LETTERS + "%%%___", max_size=5)
DIRECTORS: Final = st.sampled_from(["", "", "", "(?i)", "(?n)", "(?p)", "(?w)", "***=", "(?c)"])
REGULAR_EXPRESSIONS: Final = st.sampled_from(["a", "A", "é", "É", "Σ", "^[a-é]"]) | st.builds(
    "{}{}".format,
    DIRECTORS,
    st.lists(
        st.sampled_from(
            [
                *(
                    "a",
                    "b",
                    "B",
                    ".",
                    "É",
                    "ß",
                    "[ab]",
                    "[^a]",
                    "[[:alpha:]]",
                    "[[:upper:]]",
                    "(a|B)",
                ),
                *(
                    "(?:ab)?",
                    "^",
                    "$",
                    "\\m",
                    "\\M",
                    "\\y",
                    "\\Y",
                    "\\A",
                    "\\Z",
                    "\\w",
                    "\\W",
                    "\\d",
                ),
                *("\\s", "*", "+", "?", "{2}", "{0,1}", "|", "(?=a)", "(?!b)", "(?<=a)", "(?<!a)"),
                *("\\n", "\\x41", "[a-c]", "[É-ß]", "\\\\", "\\.", "'", '"', "%", " ", "(a)\\1"),
            ]
        ),
        max_size=4,
    ).map("".join),
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    """A comparison that the column's type has, with a value of the kind its rows have."""
    column = draw(st.sampled_from(list(COLUMNS)))
    pg_type = COLUMNS[column]
    operator = draw(st.sampled_from(operators(pg_type)))
    operands = operands_of(
        operator, pg_type, draw(st.lists(TYPES[pg_type], min_size=1, max_size=3))
    )
    return Comparison(column, operator, draw(st.sampled_from(draw(operands.filter(bool)))))


def operators(pg_type: str) -> list[Operator]:
    if pg_type in INCOMPARABLE:
        return [Operator.IS]
    order = {Operator.LT, Operator.LTE, Operator.GT, Operator.GTE}
    patterns = {Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH}
    return [
        one
        for one in Operator
        if (one not in order or pg_type not in EQUALITY_ONLY)
        and (one not in patterns or pg_type in TEXT_TYPES)
    ]


def groups(parts: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    group = st.builds(And, several) | st.builds(Or, several)
    return group | st.builds(Not, group | comparisons())


FILTERS: Final = st.one_of(
    comparisons(), st.builds(Not, comparisons()), st.recursive(comparisons(), groups, max_leaves=4)
)


@st.composite
def examples(draw: st.DrawFn) -> tuple[list[Filter], list[dict[str, str | None]]]:
    """Filters, and rows that have values where the filters look."""
    wheres = draw(st.lists(FILTERS, min_size=1, max_size=12))
    looked_at = sorted({name for where in wheres for name in columns(where)})
    row = st.fixed_dictionaries(
        {
            name: st.none() | values | values | values
            for name in looked_at
            for values in [TYPES[COLUMNS[name]]]
        }
    )
    return wheres, draw(st.lists(row, min_size=1, max_size=8))


class Oracle:
    """A table of the server, its rows as wal2json writes them, and SQL's word on filters."""

    def __init__(self, database: Database) -> None:
        database.execute(SET_UP)
        declared = ", ".join(f"{name} {pg_type}" for name, pg_type in COLUMNS.items())
        database.execute(f"CREATE TABLE rows (id int GENERATED ALWAYS AS IDENTITY, {declared})")
        self.database = database
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
        self.layout = Layout(
            Relation("public", "rows"), [*self.oids], [*self.oids.values()], [], self.types
        )
        self.collation = utf8_collation(self.connection)
        self.normalised: dict[Literal, str] = {}

    def insert(self, rows: list[dict[str, str | None]]) -> list[Row]:
        """Insert rows; return them as they come out of the write-ahead log."""
        names = list(rows[0])
        typed = ", ".join(f"%s::{COLUMNS[name]}" for name in names)
        self.connection.execute(
            f"INSERT INTO rows ({', '.join(names)})"
            f" VALUES {', '.join([f'({typed})'] * len(rows))}".encode(),
            [row[name] for row in rows for name in names],
        )
        return [Row(self.layout, columns) for columns in self.records.inserted()]

    def compile(self, where: Filter) -> Condition | None:
        """Compile a filter; None when a pattern of it is not one, or cannot be translated."""
        try:
            for literal in literals(where, self.oids, self.types):
                if literal not in self.normalised:
                    self.normalised[literal] = self.read(literal)
        except (FilterError, psycopg.errors.InvalidRegularExpression):
            return None
        return compile_filter(where, self.oids, self.types, self.normalised)

    def read(self, literal: Literal) -> str:
        row = self.connection.execute(literal.sql.encode(), [literal.text]).fetchone()
        assert row is not None
        return str(row[0])

    def answers(self, wheres: list[Filter], ids: list[int]) -> dict[int, list[bool | None]]:
        """Ask PostgreSQL what each filter is for each row."""
        conditions = ", ".join(f"({self.sql(where)})" for where in wheres)
        among = ", ".join(map(str, ids))
        rows = self.connection.execute(
            f"SELECT id, {conditions} FROM rows WHERE id IN ({among})".encode()
        )
        return {row[0]: list(row[1:]) for row in rows}

    def sql(self, where: Filter) -> str:
        match where:
            case Comparison():
                return self.condition(where)
            case Not(negated):
                return f"NOT ({self.sql(negated)})"
            case And(parts):
                return " AND ".join(f"({self.sql(part)})" for part in parts)
            case Or(parts):
                return " OR ".join(f"({self.sql(part)})" for part in parts)

    def condition(self, comparison: Comparison) -> str:
        column, pg_type = comparison.column, COLUMNS[comparison.column]
        # Against a composite PostgreSQL does not read a bare literal as one.
        cast = f"::{pg_type}" if pg_type == "place" else ""
        values = [f"{quoted(value)}{cast}" for value in comparison.values]
        match comparison.operator:
            case Operator.IS:
                return f"{column} IS {comparison.values[0].replace('_', ' ')}"
            case Operator.IN:
                return f"{column} IN ({', '.join(values)})" if values else "false"
            case Operator.LIKE | Operator.ILIKE:
                pattern = values[0].replace("*", "%")
                return f"{self.matched(column)} {comparison.operator} {pattern}"
            case Operator.MATCH:
                return f"{self.matched(column)} ~ {values[0]}"
            case Operator.IMATCH:
                return f"{self.matched(column)} ~* {values[0]}"
            case operator:
                collate = ' COLLATE "C"' if pg_type in COLLATED else ""
                return f"{column}{collate} {SQL_OPERATORS[operator]} {values[0]}"

    def matched(self, column: str) -> str:
        citext = COLUMNS[column] == "citext"
        return column if citext else f"{column} COLLATE {self.collation}"


SQL_OPERATORS: Final = {
    Operator.EQ: "=",
    Operator.NEQ: "<>",
    Operator.LT: "<",
    Operator.LTE: "<=",
    Operator.GT: ">",
    Operator.GTE: ">=",
    Operator.ISDISTINCT: "IS DISTINCT FROM",
}


def quoted(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


@pytest.fixture(scope="module")
def oracle(server_dsn: str, database_template: str) -> Iterator[Oracle]:
    with create_database(server_dsn, database_template) as database:
        oracle = Oracle(database)
        yield oracle
        oracle.connection.close()
    drop_database(server_dsn, database.name)


EXAMPLES: Final = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("column", COLUMNS, ids=list(TYPES))
@settings(EXAMPLES, max_examples=30)
@given(data=st.data())
def test_every_operator_of_a_type_says_what_where_says(
    oracle: Oracle, column: str, data: st.DataObject
) -> None:
    """Every value of a few is compared with every other one by every operator, and negated."""
    pg_type = COLUMNS[column]
    values = data.draw(st.lists(TYPES[pg_type], min_size=1, max_size=6, unique=True))
    wheres = [
        Comparison(column, operator, operands)
        for operator in operators(pg_type)
        for operands in data.draw(operands_of(operator, pg_type, values))
    ]
    negated = [Not(where) for where in wheres]
    rows: list[dict[str, str | None]] = [{column: value} for value in [*values, None]]
    agree(oracle, [*wheres, *negated], rows)


def operands_of(
    operator: Operator, pg_type: str, values: list[str]
) -> st.SearchStrategy[list[tuple[str, ...]]]:
    """What an operator is tried with, given the values that the rows have."""
    match operator:
        case Operator.IS:
            truths = IS_VALUES if pg_type in ("bool", "flag") else IS_VALUES[:2]
            return st.just([(truth,) for truth in truths])
        case Operator.IN:
            return st.just([(), tuple(values[:1]), tuple(values[1:])])
        case Operator.LIKE | Operator.ILIKE:
            return st.lists(st.tuples(LIKE_PATTERNS | st.sampled_from(values)), max_size=6)
        case Operator.MATCH | Operator.IMATCH:
            return st.lists(st.tuples(REGULAR_EXPRESSIONS), max_size=6)
        case _:
            return st.just([(value,) for value in values])


@settings(EXAMPLES, max_examples=200)
@given(examples())
def test_groups_say_what_where_says(
    oracle: Oracle, example: tuple[list[Filter], list[dict[str, str | None]]]
) -> None:
    wheres, rows = example
    agree(oracle, wheres, rows)


def agree(oracle: Oracle, wheres: list[Filter], rows: list[dict[str, str | None]]) -> None:
    conditions = {
        where: condition for where in wheres if (condition := oracle.compile(where)) is not None
    }
    assume(conditions)
    carried = {row["id"]: row for row in oracle.insert(rows)}
    for id_, answers in oracle.answers(list(conditions), list(carried)).items():
        for (where, condition), answer in zip(conditions.items(), answers, strict=True):
            assert condition(carried[id_]) is answer, (str(where), answer)
            assert parse(str(where)) == where
