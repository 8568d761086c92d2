"""Models written from the catalog: they take every row of their tables, and notice drift."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests import test_types, test_values_live
from tests.command_line import CommandLine
from tests.postgres import Database
from tests.streaming import Stream
from walstream import Change
from walstream.catalog import Catalog
from walstream.errors import RowInvalid, UsageError
from walstream.models import Request, differences, read_tables, write
from walstream.models.naming import class_names, field_names, member_names
from walstream.models.source import _docstring, literal, printable
from walstream.router import TablePattern
from walstream.typed import UNCHANGED, RowModel

MATRICES: Final = {
    "through_the_whole": (
        test_types.OWN_TYPES,
        {
            pg_type: [
                value
                for matrix in (
                    test_types.VALUES,
                    test_types.AS_TEXT,
                    test_types.NOT_A_NUMBER,
                    test_types.INSIDE,
                )
                for value in matrix.get(pg_type, [])
            ]
            for pg_type in {**test_types.VALUES, **test_types.NOT_A_NUMBER, **test_types.INSIDE}
        },
    ),
    "only_looked_at_by_filters": (test_values_live.SET_UP, test_values_live.TYPES),
}


def generate(database: Database, *tables: str, narrow: bool = False) -> str:
    request = Request(tables, narrow)

    async def read() -> str:
        catalog = Catalog(database.dsn, application_name="tests")
        try:
            return write(request, await read_tables(catalog, request.patterns))
        finally:
            await catalog.close()

    return asyncio.run(read())


def load(source: str, folder: Path, name: str = "generated") -> ModuleType:
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(source: str, folder: Path, name: str) -> Any:
    """A class of a generated file."""
    return getattr(load(source, folder), name)


def models_by_table(module: ModuleType) -> dict[str, type[BaseModel]]:
    return {
        (cls.__doc__ or "").partition(".\n")[0].removeprefix("Table ").removesuffix("."): cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, BaseModel) and cls is not BaseModel
    }


def columns_of(row: BaseModel) -> dict[str, Any]:
    """The values of a model by the names of their columns."""
    fields = type(row).model_fields
    return {field.alias or name: getattr(row, name) for name, field in fields.items()}


def is_the_same(left: Any, right: Any) -> bool:
    """Equal; NaN is itself, and an enum's member is its label."""
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_the_same, left, right))
    return bool(left == right) or str(left).lower() == str(right).lower() == "nan"


def record(database: Database, statements: Iterable[str]) -> list[Change]:
    """Run statements, and return the changes that came of them."""
    stream = Stream(database)
    stream.record()
    for statement in statements:
        database.execute(statement)
    asyncio.run(stream.drain())
    return stream.changes


@pytest.mark.parametrize("matrix", MATRICES)
def test_models_of_the_type_matrix_take_every_row_of_it(
    database: Database, tmp_path: Path, matrix: str
) -> None:
    own_types, values = MATRICES[matrix]
    database.execute(f"SET search_path TO public, pg_catalog; {own_types}")
    test_types.create(database, values)
    stream = Stream(database)
    stream.record("public.*", "insert", "update")
    test_types.fill(database, values)
    for place in range(len(values)):
        database.execute(f"UPDATE t{place:03} SET id = id + 1000")
    asyncio.run(stream.drain())
    assert len(stream.changes) == 2 * sum(len(literals) + 1 for literals in values.values())
    models = models_by_table(load(generate(database, "public.*"), tmp_path))
    for change in stream.changes:
        row = RowModel(models[str(change.relation)]).apply(change).row
        given = dict(change.row)
        assert columns_of(row).keys() == given.keys()
        for name, value in columns_of(row).items():
            assert is_the_same(value, given[name]), (change.relation, name)


ODD: Final = """
    CREATE EXTENSION hstore; CREATE EXTENSION citext;
    CREATE SCHEMA other; CREATE SCHEMA "Odd.Schema";
    CREATE TYPE mood AS ENUM (
        'sad', 'Sad', 'with "quotes", it''s', '', '1st', '+', '-', '_x_', 'mro', 'naïve',
        'back\\slash', E'new\nline', 'None'
    );
    CREATE TYPE other.mood AS ENUM ('a');
    CREATE TYPE orders_kind AS ENUM ('a');
    CREATE TYPE pair AS (number int, "a label" text, "from" mood, count int, "_x" numeric);
    CREATE TYPE nest AS (one pair, many pair[], at timestamptz);
    CREATE DOMAIN price AS numeric(12, 2) NOT NULL;
    CREATE DOMAIN dearer AS price CHECK (value > 1);
    CREATE TABLE "Odd.Schema"."a ""table"" with .* and a very long name, of sixty-two bytes.." (
        a int
    );
    CREATE TABLE orders (
        id bigint PRIMARY KEY, "class" text, "Any" int, dt date, "date" date NOT NULL, "str" text,
        "model_config" int, model_id int, "model_dump" int, schema text, "copy" text, _private int,
        "__dunder__" int, "1st" int, "with space" text NOT NULL, "with-space" int, with_space int,
        "quo""te" int, "quo'te" int, "both""'" int, "ﬁligature" int, filigature int, "é" int,
        "😀" int, "+" int, "-" int, "None" int, "match" int, "type" int, "back\\slash" int,
        price price, dearer dearer, mood mood, mood2 other.mood[], nest nest NOT NULL, tags hstore,
        c citext, j jsonb NOT NULL, r int4range, d daterange, m int4multirange, ip inet,
        grid int[][], twice int GENERATED ALWAYS AS (id * 2) STORED, _2x int, "%s" int, "{x}" int,
        "tab\t" int, "self" int, "cls" int,
        a_very_long_name_of_a_column_that_takes_all_sixty_three_bytes_x timestamptz[]
    );
    CREATE TABLE other.orders (id int, "OrdersKind" orders_kind);
    CREATE TABLE field (id int); CREATE TABLE "2fa" (id int); CREATE TABLE "class" (id int);
    CREATE TABLE empty (); CREATE TABLE shrunk (a int); CREATE TABLE uses (s shrunk, s2 shrunk[]);
    COMMENT ON TABLE orders IS E'The orders.\n\nA second paragraph with \"\"\" quotes and'
        ' a back\\slash, long enough to be wrapped over more than one line, that ends in a "quote"';
    COMMENT ON COLUMN orders.date IS '"quoted" at the start';
    COMMENT ON COLUMN orders.id IS E'Bidi \u202e # noqa type: ignore';
    COMMENT ON COLUMN orders.price IS ' ';
    COMMENT ON COLUMN orders.c IS 'ends in \"\"\"';
    COMMENT ON COLUMN orders.j IS '\"\"\" in the middle of a comment that is long enough to be'
        ' wrapped over more than one line and ends in a back\\slash and a quote \\\"';
"""
"""Names and comments that Python has trouble with."""


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_written_is_formatted_checked_and_typed(
    database: Database, tmp_path: Path, *, narrow: bool
) -> None:
    """At every usual length of lines."""
    database.execute(ODD)
    source = generate(database, "*.*", narrow=narrow)
    load(source, tmp_path)
    for length in ("79", "88", "100", "120"):
        succeeds("ruff", "format", "--isolated", "--diff", "--line-length", length, folder=tmp_path)
    rules = "E,F,I,UP,B,SIM,RUF,PIE,W"
    succeeds("ruff", "check", "--isolated", "--select", rules, "--ignore", "E501", folder=tmp_path)
    succeeds("mypy", "--strict", "--cache-dir", "cache", "generated.py", folder=tmp_path)
    assert generate(database, "*.*", narrow=narrow) == source


def succeeds(tool: str, *arguments: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_odd_columns_come_by_their_names(database: Database, tmp_path: Path) -> None:
    database.execute(ODD)
    [insert] = record(
        database,
        [
            """
            INSERT INTO orders (id, "class", "date", "with space", "with-space", with_space, price,
                dearer, mood, nest, j, "_private", "model_dump", "tab\t")
            VALUES (3, 'x', 'infinity', 'y', 1, 2, 1, 2, '', '("(1,z,sad,3,NaN)",{},infinity)',
                'null', 4, 5, 6)
            """
        ],
    )
    row = (
        RowModel(model_of(generate(database, "public.orders"), tmp_path, "Orders"))
        .apply(insert)
        .row
    )
    assert (row.class_, row.with_space, row.with_space_2, row.with_space_3) == ("x", 2, "y", 1)
    assert (row.private_, row.column_model_dump, row.tab_, row.date) == (4, 5, 6, "infinity")
    assert (row.nest.one.a_label, row.nest.one.from_.name, row.nest.one.count_) == ("z", "SAD", 3)
    assert row.mood.name == "LABEL"
    assert row.twice == 6, "stored generated columns are sent"


def test_what_a_table_says_is_in_its_model(database: Database) -> None:
    database.execute(
        """
        CREATE TYPE status AS ENUM ('new', 'paid');
        CREATE DOMAIN price AS numeric(12, 2) CHECK (value >= 0);
        CREATE TABLE orders (
            id bigint PRIMARY KEY,
            status status NOT NULL,
            amount price NOT NULL,
            placed timestamptz,
            tags text[]
        );
        COMMENT ON TABLE orders IS 'What customers have ordered.';
        COMMENT ON COLUMN orders.amount IS 'In euros, without tax.';
        """
    )
    assert generate(database, "public.orders") == EXPECTED


EXPECTED: Final = '''\
# Generated by: walstream models generate public.orders
# Do not edit: `walstream models check` compares this file with the database.
"""Rows of tables as pydantic models, for the ``model=`` of handlers."""

import datetime as dt
from decimal import Decimal
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict
from walstream.typed import Unchanged


class Status(StrEnum):
    """Enum public.status."""

    NEW = "new"
    PAID = "paid"


class Orders(BaseModel):
    """Table public.orders.

    What customers have ordered.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=True)

    id: int  # bigint
    status: Status  # public.status
    amount: Decimal | Unchanged  # public.price, a domain over numeric(12,2)
    """In euros, without tax."""
    placed: dt.datetime | str | None  # timestamp with time zone
    tags: list[str | list[Any] | None] | Unchanged | None  # text[]
'''


def test_narrow_models_leave_out_what_few_tables_hold(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE days (day date, days daterange, grid int[][], list date[])")
    database.execute("ALTER TABLE days REPLICA IDENTITY FULL")
    source = generate(database, "public.days", narrow=True)
    assert source.startswith("# Generated by: walstream models generate --narrow public.days\n")
    assert [line for line in source.splitlines() if "None" in line] == [
        "    day: dt.date | None  # date",
        "    days: InstanceOf[Range[dt.date]] | None  # daterange",
        "    grid: list[list[int | None]] | None  # integer[]",
        '    list_: list[dt.date | None] | None = Field(alias="list")  # date[]',
    ]
    usual, infinite = record(database, ["INSERT INTO days VALUES ('2024-02-29'), ('infinity')"])
    model = RowModel(model_of(source, tmp_path, "Days"))
    assert model.apply(usual).row.grid is None
    with pytest.raises(RowInvalid, match="day: date_from_datetime_parsing, expects date"):
        model.apply(infinite)


LONG: Final = "repeat('x', 9000)"


def test_columns_that_can_be_left_out_take_unchanged(database: Database, tmp_path: Path) -> None:
    """All that have room elsewhere, unless the replica identity carries them."""
    database.execute(
        """
        CREATE TABLE notes (code text PRIMARY KEY, body text NOT NULL, plain text, number int);
        ALTER TABLE notes ALTER COLUMN body SET STORAGE EXTERNAL;
        ALTER TABLE notes ALTER COLUMN plain SET STORAGE PLAIN;
        CREATE TABLE complete (id int PRIMARY KEY, body text);
        ALTER TABLE complete REPLICA IDENTITY FULL;
        """
    )
    source = generate(database, "public.*")
    assert fields(source) == [
        "body: str | None  # text",
        "body: str | Unchanged  # text",
        "code: str  # text",
        "id: int  # integer",
        "number: int | None  # integer",
        "plain: str | None  # text",
    ]
    changes = record(
        database,
        [
            f"INSERT INTO notes VALUES ('a', {LONG}), ({LONG.replace('9000', '2100')}, {LONG})",
            "UPDATE notes SET number = 1",
        ],
    )
    rows = [RowModel(model_of(source, tmp_path, "Notes")).apply(change).row for change in changes]
    assert [row.body is UNCHANGED for row in rows] == [False, False, True, True]
    assert [len(row.code) for row in rows] == [1, 2100, 1, 2100]


def fields(source: str) -> list[str]:
    return sorted(line.strip() for line in source.splitlines() if "  # " in line)


def test_a_partitioned_table_takes_what_its_partitions_send(
    database: Database, tmp_path: Path
) -> None:
    """Each partition has a replica identity of its own."""
    database.execute(
        """
        CREATE TABLE days (id int, note text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
        ALTER TABLE days REPLICA IDENTITY FULL;
        CREATE TABLE early PARTITION OF days FOR VALUES FROM (0) TO (10);
        CREATE TABLE late PARTITION OF days FOR VALUES FROM (10) TO (20);
        ALTER TABLE early REPLICA IDENTITY FULL;
        """
    )
    source = generate(database, "public.*")
    assert list(models_by_table(load(source, tmp_path))) == ["public.days"]
    assert "note: str | Unchanged | None  # text" in source
    database.execute("ALTER TABLE late REPLICA IDENTITY FULL")
    assert "note: str | None  # text" in generate(database, "public.*")
    assert "note: str | None  # text" in generate(database, "public.late")


def test_a_domain_that_is_not_null_makes_its_columns_so(database: Database) -> None:
    database.execute(
        "CREATE DOMAIN strict AS int NOT NULL; CREATE DOMAIN stricter AS strict;"
        "CREATE DOMAIN loose AS int; CREATE TABLE d (a strict, b stricter, c loose)"
    )
    assert fields(generate(database, "public.d")) == [
        "a: int  # public.strict, a domain over integer",
        "b: int  # public.stricter, a domain over public.strict",
        "c: int | None  # public.loose, a domain over integer",
    ]


# ---- Drift

TABLE: Final = """
    CREATE TYPE status AS ENUM ('new', 'paid');
    CREATE TYPE pair AS (a int, b text);
    CREATE TABLE orders (
        id int PRIMARY KEY, status status NOT NULL, amount numeric(12,2), notes text, one pair
    );
    CREATE TABLE items (id int);
"""


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SELECT 1", []),
        ("ALTER TABLE orders ADD extra date", ["public.orders: column 'extra' (date) added"]),
        (
            "ALTER TABLE orders DROP amount",
            ["public.orders: column 'amount' (numeric(12,2)) dropped"],
        ),
        (
            "ALTER TABLE orders RENAME amount TO net",
            [
                (
                    "public.orders: column 'amount' (numeric(12,2)) dropped, 'net' (numeric(12,2))"
                    " added: perhaps renamed"
                )
            ],
        ),
        (
            "ALTER TABLE orders DROP amount, ADD total numeric(12,2)",
            [
                "public.orders: column 'amount' (numeric(12,2)) dropped",
                "public.orders: column 'total' (numeric(12,2)) added",
            ],
        ),
        (
            "ALTER TABLE orders ALTER amount TYPE text",
            [
                "public.orders: column 'amount': retyped from numeric(12,2) to text",
            ],
        ),
        (
            "ALTER TABLE orders ALTER id TYPE bigint",
            ["public.orders: column 'id': retyped from integer to bigint"],
        ),
        (
            "ALTER TABLE orders ALTER notes SET NOT NULL",
            ["public.orders: column 'notes': is NOT NULL now"],
        ),
        (
            "ALTER TABLE orders ALTER status DROP NOT NULL",
            ["public.orders: column 'status': can be null now"],
        ),
        (
            "ALTER TABLE orders REPLICA IDENTITY FULL",
            [
                "public.orders: column 'amount': is always sent now",
                "public.orders: column 'notes': is always sent now",
                "public.orders: column 'one': is always sent now",
            ],
        ),
        ("ALTER TYPE status ADD VALUE 'sent'", ["public.status: label 'sent' added"]),
        (
            "ALTER TYPE status RENAME VALUE 'new' TO 'open'",
            ["public.status: label 'new' dropped, 'open' added: perhaps renamed"],
        ),
        (
            "ALTER TYPE pair ADD ATTRIBUTE c date",
            ["public.pair: attribute 'c' (date) added"],
        ),
        (
            "COMMENT ON COLUMN orders.notes IS 'Of the customer.'",
            ["public.orders: column 'notes': its comment changed"],
        ),
        ("COMMENT ON TABLE orders IS 'All.'", ["public.orders: its comment changed"]),
        ("DROP TABLE items", ["public.items: the table is gone, or not used"]),
        ("CREATE TABLE more (id int)", ["public.more: the table is new"]),
    ],
)
def test_drift_is_told_in_words(database: Database, statement: str, said: list[str]) -> None:
    database.execute(TABLE)
    before = generate(database, "public.*")
    database.execute(statement)
    assert list(map(str, differences(before, generate(database, "public.*")))) == said


@pytest.mark.parametrize("other", ["a  b", "a\tb", "a\\tb", "a b "])
def test_tables_are_told_apart_by_each_character(database: Database, other: str) -> None:
    database.execute(f'CREATE TABLE "a b" (id int); CREATE TABLE "{other}" (id int)')
    before = generate(database, "public.*")
    database.execute(f'ALTER TABLE "a b" ADD ssn text; ALTER TABLE "{other}" DROP id')
    said = {str(one) for one in differences(before, generate(database, "public.*"))}
    assert len(said) == 2
    assert "public.a b: column 'ssn' (text) added" in said
    assert any(one.endswith(": column 'id' (integer) dropped") for one in said)


def test_an_unused_type_goes_with_its_column(database: Database) -> None:
    database.execute(TABLE)
    before = generate(database, "public.orders")
    database.execute("ALTER TABLE orders DROP one")
    assert list(map(str, differences(before, generate(database, "public.orders")))) == [
        "public.pair: the composite is gone, or not used",
        "public.orders: column 'one' (public.pair) dropped",
    ]


def test_edits_by_hand_are_noticed(database: Database) -> None:
    database.execute(TABLE)
    source = generate(database, "public.*")

    def told(before: str) -> list[str]:
        return list(map(str, differences(before, source)))

    assert told(source + "\n# mine\n") == ["the file: was edited, or written by another version"]
    assert told(source.replace("id: int", "id: float")) == [
        "public.items: column 'id': annotated None | float, would be None | int",
        "public.orders: column 'id': annotated float, would be int",
    ]
    assert told(source + "class") == ["the file: is not Python any more"]


# ---- The command line


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def test_generate_and_check(cli: CommandLine, database: Database) -> None:
    database.execute(TABLE)
    options = ["--dsn", database.dsn]
    written = cli.run("models", "generate", "public.*", "-o", "rows.py", *options)
    assert (written.returncode, written.stdout) == (0, "")
    source = (cli.folder / "rows.py").read_text()
    assert cli.run("models", "generate", "public.*", *options).stdout == source
    assert database.dsn not in source
    same = cli.run("models", "check", "rows.py", *options)
    assert (same.returncode, same.stdout) == (0, "rows.py is up to date\n")
    database.execute("ALTER TABLE items ADD name text")
    drifted = cli.run("models", "check", "rows.py", "--diff", *options)
    assert drifted.returncode == 78
    said, *diff = drifted.stdout.splitlines()
    assert said == "public.items: column 'name' (text) added"
    assert "+    name: str | Unchanged | None  # text" in diff
    assert drifted.stderr.splitlines() == [
        "ModelsDrifted: rows.py is not what the database gives: 1 difference",
        "hint: walstream models generate 'public.*' -o rows.py",
    ]
    assert (cli.folder / "rows.py").read_text() == source
    as_json = json.loads(cli.run("models", "check", "rows.py", "--json", *options).stdout)
    assert as_json == {
        "file": "rows.py",
        "differences": [
            {"kind": "column", "place": "public.items", "what": "column 'name' (text) added"}
        ],
    }


def test_mistakes_are_told(cli: CommandLine, database: Database) -> None:
    cli.write("mine.py", "class Order: ...\n")
    options = ["--dsn", database.dsn]
    for arguments, code, said in [
        (["generate", "orders", *options], 64, "write schema.table"),
        (["generate", "public.orders", *options], 78, "there is no table public.orders"),
        (["check", "mine.py", *options], 64, "does not begin with the line"),
        (["check", "nowhere.py", *options], 64, "nowhere.py cannot be read: No such file"),
        (["generate"], 64, "Missing argument"),
        (["generate", 'public."a\nb"', *options], 64, "cannot stand in the first line of a file"),
    ]:
        answer = cli.run("models", *arguments)
        assert (answer.returncode, answer.stdout) == (code, "")
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_file_knows_what_it_was_made_of() -> None:
    request = Request(("public.*", '"Odd.Schema"."it\'s"'), narrow=True)
    first = f"# Generated by: walstream models generate {request}\nmore"
    assert Request.of(first) == request
    assert request.patterns[1] == TablePattern("Odd.Schema", "it's")
    for text in ("", "import this", "# Generated by: walstream models generate '"):
        with pytest.raises(UsageError):
            Request.of(text)


# ---- The document

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "models.md"


def test_the_handler_of_the_document_gets_its_model(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, amount numeric)")
    stream = Stream(database)
    shown = DOCUMENT.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    stream.app = load(shown, tmp_path).stream
    database.execute("INSERT INTO orders VALUES (1, 'new', 12.50)")
    summary = asyncio.run(stream.drain())
    assert [route.matched for route in summary.routes] == [1]
    assert capsys.readouterr().out == "1 12.50\n"


def test_the_file_of_the_document_is_what_is_written() -> None:
    assert f"```python\n{EXPECTED}```" in DOCUMENT.read_text(encoding="utf-8")


# ---- Names

NAMES: Final = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    unique=True,
)


@given(NAMES)
def test_every_name_gets_an_identifier_of_its_own(names: list[str]) -> None:
    for named in (field_names(names, ["Orders"]), member_names(names)):
        assert list(named) == names
        assert len(set(named.values())) == len(names)
        for identifier in named.values():
            assert identifier.isidentifier()
            assert not identifier.startswith("_")
            assert unicodedata.is_normalized("NFKC", identifier)
            compile(f"{identifier} = 1", "names", "exec")
    classes = class_names([("Table", "public", name) for name in names])
    assert len(set(classes.values())) == len(names)
    assert all(name.isidentifier() for name in classes.values())
    assert all(unicodedata.is_normalized("NFKC", name) for name in classes.values())


@given(st.text())
def test_a_literal_is_read_as_what_was_written(text: str) -> None:
    assert eval(literal(text)) == text  # noqa: S307 - our own


@given(st.text(st.sampled_from("\"\\' \n\tab-") | st.characters(exclude_categories=["Cs"])))
@example('say """')
@example('""""')
@example('\\"')
def test_a_comment_is_read_as_what_was_written(text: str) -> None:
    """Lines may break; what cannot be printed is escaped."""
    assume(printable(text))
    source = "\n".join(["class Orders:", *_docstring(text)])
    (read,) = ast.parse(source).body
    assert isinstance(read, ast.ClassDef)
    assert without_spaces(ast.get_docstring(read)) == without_spaces(printable(text))


def without_spaces(text: str | None) -> str:
    return "".join((text or "").split())


@pytest.mark.parametrize("name", ["mro", "register"])
def test_a_column_named_as_what_every_class_has_is_required(
    database: Database, tmp_path: Path, name: str
) -> None:
    database.execute(f"CREATE TABLE odd (id int PRIMARY KEY, {name} int NOT NULL)")
    model = model_of(generate(database, "public.odd"), tmp_path, "Odd")
    assert [one.is_required() for one in model.model_fields.values()] == [True, True]
    assert model.model_validate({"id": 1, name: 2}).model_dump() == {"id": 1, f"{name}_": 2}


def test_classes_of_one_name_are_told_apart_by_schema_and_kind() -> None:
    tables = [("Table", "public", "orders"), ("Table", "other", "orders"), ("Table", "a", "b_c")]
    types = [("Enum", "public", "orders"), ("Composite", "a", "b_c"), ("Enum", "x", "range")]
    assert list(class_names([*tables, *types]).values()) == [
        "PublicOrders",
        "OtherOrders",
        "BC",
        "PublicOrdersEnum",
        "ABC",
        "XRange",
    ]


def test_the_arguments_are_quoted_as_a_shell_wants() -> None:
    assert shlex.split(str(Request(("a.b c", "d.*")))) == ["a.b c", "d.*"]
