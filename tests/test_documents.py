"""The documents are true: examples run, tables say what the source says, links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import re
import secrets
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tests.postgres import Database
from walstream import Change, Walstream, WalstreamError, config, errors
from walstream.backoff import Backoff
from walstream.cli import app
from walstream.config import Config
from walstream.grammar import Operator
from walstream.projection import MaskKind
from walstream.recovery import SERVER_FAILURES, Action, Pauses, decide

ROOT: Final = Path(__file__).parent.parent
DOCUMENTS: Final = [
    ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
] + sorted((ROOT / "docs").glob("*.md"))


class Block:
    """A fenced block of a document; ``marks`` are the words of the comment right above it."""

    def __init__(self, place: str, language: str, text: str, marks: list[str]) -> None:
        self.place = place
        self.language = language
        self.text = text
        self.marks = marks

    def __repr__(self) -> str:
        return self.place


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(language: str, mark: str = "", documents: list[Path] = DOCUMENTS) -> list[Block]:
    """The blocks of a language, in the order of the documents."""
    return [
        block
        for document in documents
        for block in _blocks(document)
        if block.language == language and (not mark or mark in block.marks)
    ]


_FENCED: Final = re.compile(
    r"(?:^<!-- ([a-z ]+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def _blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for matched in _FENCED.finditer(text):
        place = f"{document.name}:{text[: matched.start(2)].count(chr(10)) + 1}"
        yield Block(place, matched[2], matched[3], (matched[1] or "").split())


def the_block(language: str, document: str) -> Block:
    """The only block of a language in a document."""
    [block] = blocks(language, documents=[ROOT / document])
    return block


def tables(document: str, *header: str) -> list[list[str]]:
    """The rows of all tables of a document whose header begins with these cells."""
    rows: list[list[str]] = []
    inside = False
    for line in text_of(document).splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(header)] == list(header):
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            rows.append(cells)
    assert rows, f"{document} has no table that begins with {header}"
    return rows


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# ---- Python


@pytest.mark.parametrize("block", blocks("python"), ids=repr)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.fixture
def shop(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The tables that the examples are about, and the environment that leads to them."""
    database.execute(the_block("sql", "docs/filters.md").text)
    database.execute(
        """
        CREATE TABLE messages_v2 (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            conversation_id text NOT NULL,
            content text NOT NULL
        );
        CREATE TABLE seen (id text PRIMARY KEY);
        CREATE TABLE bookings (order_id int, amount numeric);
        """
    )
    for variable in [name for name in os.environ if name.startswith("WALSTREAM_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WALSTREAM_POSTGRES_DSN", database.dsn)
    monkeypatch.setenv("LEDGER_DSN", database.dsn)
    return database


def make_slot(database: Database, name: str = "") -> str:
    name = name or f"documents_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    return name


def trade(database: Database) -> None:
    """What happens while the examples run."""
    database.execute(
        """
        INSERT INTO messages_v2 (conversation_id, content) VALUES ('abc-123', 'Hello');
        INSERT INTO orders (id, status, amount) VALUES (1, 'active', 12.50), (2, 'new', 3);
        UPDATE orders SET amount = 15 WHERE id = 1;
        DELETE FROM orders WHERE id = 1;
        SELECT pg_logical_emit_message(true, 'jobs.mail', 'welcome 1');
        """
    )


@pytest.mark.parametrize("block", blocks("python", "handlers"), ids=repr)
async def test_handlers_take_changes(shop: Database, tmp_path: Path, block: Block) -> None:
    """Those marked ``twice`` get everything a second time, and have done it once."""
    slot, beginning = make_slot(shop), f"beginning_{secrets.token_hex(4)}"
    shop.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", slot, beginning)
    trade(shop)
    times = 2 if "twice" in block.marks else 1
    for _ in range(times):
        names: dict[str, Any] = {}
        # Without this module's own "from __future__", which models could not do with.
        compiled = compile(block.text, block.place, "exec", dont_inherit=True)
        exec(compiled, names)  # noqa: S102 - our own documents
        stream: Walstream = names["stream"]
        settings = {
            "slot": {"name": slot},
            "handlers": {"backoff_seconds": 0.01},
            "dead_letters": {"path": tmp_path / "letters"},
        }
        summary = await stream.run(config.parse(settings), until="now")
        assert summary.retries == ("Retry" in block.text)
        assert all(route.matched > 0 for route in summary.routes)
        shop.execute("SELECT pg_drop_replication_slot(%s)", slot)
        shop.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", beginning, slot)
    booked = 2 if "twice" in block.marks else 0  # there are two orders
    assert shop.execute("SELECT count(*) FROM bookings") == [(booked,)]


@pytest.mark.parametrize("block", blocks("python", "script"), ids=repr)
def test_scripts_run(shop: Database, tmp_path: Path, block: Block) -> None:
    [slot] = re.findall(r'"name": "(\w+)"', block.text)
    make_slot(shop, slot)
    trade(shop)
    script = tmp_path / "script.py"
    script.write_text(block.text)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("order 1\norder 2\n2 delivered, confirmed up to ")


# ---- Configuration


@pytest.mark.parametrize("block", blocks("toml"), ids=repr)
def test_toml_is_a_configuration(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("WALSTREAM_")]:
        monkeypatch.delenv(variable)
    config.parse(tomllib.loads(block.text), source=block.place)


def keys() -> dict[str, Any]:
    """Every key that the configuration knows, with its default."""
    found = {}
    for section, field in Config.model_fields.items():
        for path, model in _models(section, field.annotation):
            for name, inner in model.model_fields.items():
                if not _is_model(inner.annotation):
                    found[f"{path}.{inner.alias or name}"] = inner.default
    return found


_KEYED: Final = {
    "routes": "[]",
    "sinks": ".<name>",
    "access.roles": ".<name>",
    "access.roles.<name>.tables": "[]",
    "access.api_keys": "[]",
    "realtime.private": "[]",
}


def _models(path: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    if _is_model(annotation):
        yield path, annotation
        for name, field in annotation.model_fields.items():
            yield from _models(f"{path}.{name}", field.annotation)
        return
    inner = path + _KEYED.get(path, "")
    for argument in get_args(annotation):
        yield from _models(inner, argument)


def _is_model(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def documented_keys() -> dict[str, list[str]]:
    rows = tables("docs/configuration.md", "key", "type", "default", "meaning")
    return {code(row[0])[0]: row for row in rows}


def test_every_key_is_documented_and_no_other() -> None:
    assert sorted(documented_keys()) == sorted(keys())


def test_defaults_are_as_documented() -> None:
    wrong = []
    for key, default in keys().items():
        said = documented_keys()[key][2]
        if default is PydanticUndefined:
            right = said.startswith("needed")
        elif default is None or default in ([], {}):
            # A route's own key can stand for the same one of all handlers.
            right = said in ("none", "all") or said.startswith(("`handlers.", "`routes[0]`"))
        elif isinstance(default, bool):
            right = said == f"`{str(default).lower()}`"
        elif isinstance(default, float):
            right = said == f"`{default:g}`"
        else:
            right = said == f"`{default}`"
        if not right:
            wrong.append(f"{key}: {said}, is {default}")
    assert wrong == []


_NESTED: Final = (
    "routes",
    "sinks",
    "access.roles.",
    "access.api_keys[",
    "access.row_security.",
    "realtime.private[",
)


def test_environment_variables_are_as_documented() -> None:
    variables = {key: code(row[4])[0] for key, row in documented_keys().items() if len(row) > 4}
    assert variables == {
        key: f"WALSTREAM_{key.replace('.', '_').upper()}"
        for key in keys()
        if not key.startswith(_NESTED)
    }


def test_every_mask_is_documented() -> None:
    rows = tables("docs/configuration.md", "mask")
    documented = {code(row[0])[0].removesuffix("-N") for row in rows}
    assert documented == {str(kind) for kind in MaskKind}


# ---- The command line


def shown_commands() -> list[str]:
    """Commands in blocks, and in the text with their placeholders made arguments."""
    lines = [line for block in blocks("sh") for line in block.text.splitlines()]
    shown = [part.strip() for line in lines for part in line.partition(" #")[0].split("|")]
    for document in DOCUMENTS:
        text = _FENCED.sub("", document.read_text(encoding="utf-8"))
        shown += [re.sub(r"[\[\]]|\.\.\.", "", command) for command in code(text)]
    return sorted({one for one in shown if one.startswith("walstream ")})


@pytest.mark.parametrize("line", shown_commands())
def test_commands_parse(line: str) -> None:
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line)[1:]
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        command = command.commands[arguments.pop(0)]
    if arguments == ["--help"]:
        return
    command.make_context(line, arguments)


def test_every_command_is_in_the_readme() -> None:
    readme = text_of("README.md")
    command: Any = typer.main.get_command(app)
    for name in command.commands:
        assert f"`walstream {name}" in readme
    for name in command.commands["slot"].commands:
        assert f"`{name}`" in readme or f"`walstream slot {name}`" in readme


def test_every_make_target_shown_exists() -> None:
    shown = re.findall(r"(?:`|^|=\S+ )make (\w+)", all_texts(), re.MULTILINE)
    targets = re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE)
    assert {"demo", "test"} <= set(shown) <= set(targets)


def test_every_file_of_sql_is_shown_and_exists() -> None:
    shown = re.findall(r"sql/(\w+\.sql)", all_texts())
    assert set(shown) == {file.name for file in (ROOT / "sql").iterdir()}


def all_texts() -> str:
    return "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)


# ---- Filters


def documented_filters() -> dict[str, str]:
    rows = tables("docs/filters.md", "filter", "in SQL")
    return {code(where)[0]: code(in_sql)[0] for where, in_sql, *_ in rows}


async def test_filters_keep_what_their_sql_selects(shop: Database) -> None:
    slot = make_slot(shop)
    fill_orders(shop, 400)
    stream = Walstream()
    kept: dict[str, list[int]] = {where: [] for where in documented_filters()}
    for where in documented_filters():

        @stream.on("public.orders", "insert", where=where)
        async def keep(change: Change, ids: list[int] = kept[where]) -> None:
            ids.append(change.key["id"])

    await stream.run(config.parse({"slot": {"name": slot}}), until="now")
    shop.execute("SET timezone = 'UTC'")
    for where, in_sql in documented_filters().items():
        selected = shop.execute(f"SELECT id FROM orders WHERE {in_sql} ORDER BY id")
        assert kept[where] == [number for (number,) in selected], where
        assert 0 < len(selected) < 400, f"{where} shows nothing"


def fill_orders(database: Database, count: int) -> None:
    pick = random.Random(15).choice  # noqa: S311 - the same rows each time
    texts = ["red, green", "a,b", 'say "hi"', "c", "(", "", None]
    addresses = ["ann@example.org", "ANNA@EXAMPLE.ORG", "bo@example.com", None]
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO orders VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                (
                    number,
                    pick(["active", "new", "draft", "spam", None]),
                    pick(["9.99", "10", "10.50", "10.51", "200", None]),
                    pick(addresses),
                    pick(texts),
                    pick(["A1", "a1", "B2", None]),
                    pick([6, 7, None]),
                    pick([True, False, None]),
                    pick(["low", "normal", "high", None]),
                    pick([["red", "green"], ["red"], None]),
                    pick(["2025-12-31 22:00:00+00", "2025-12-31 21:59:59+00", "2026-01-01 00:00Z"]),
                    pick(["2026-01-01 00:00:00+00", None]),
                )
                for number in range(count)
            ],
        )


async def test_filters_of_the_readme_fit_the_table(shop: Database) -> None:
    rows = tables("README.md", "operator", "keeps a row when its column")
    named = {word for row in rows for word in code(row[0])}
    assert named == {str(one) for one in Operator} | {"not.", "or(...)", "and(...)"}
    stream = Walstream()
    for row in rows:
        stream.on("public.orders", where=code(row[2])[0])(print)
    await stream.run(config.parse({"slot": {"name": make_slot(shop)}}), until="now")


# ---- Types

SAMPLES: Final = {
    "smallint": ("smallint", "1"),
    "integer": ("integer", "1"),
    "bigint": ("bigint", "9007199254740993"),
    "oid": ("oid", "1"),
    "numeric": ("numeric", "1.50"),
    "real": ("real", "1.5"),
    "double precision": ("double precision", "1.5"),
    "boolean": ("boolean", "t"),
    "text": ("text", "x"),
    "varchar": ("varchar", "x"),
    "name": ("name", "x"),
    "char(n)": ("char(5)", "x"),
    "bytea": ("bytea", "\\x00ff"),
    "date": ("date", "2024-02-29"),
    "time": ("time", "12:00"),
    "timetz": ("timetz", "12:00+02"),
    "timestamp": ("timestamp", "2024-01-01 12:00:00.123456"),
    "timestamptz": ("timestamptz", "2024-01-01 12:00:00+00"),
    "interval": ("interval", "1 day"),
    "uuid": ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "json": ("json", "[1]"),
    "jsonb": ("jsonb", "[1]"),
    "inet": ("inet", "10.0.0.1"),
    "cidr": ("cidr", "10.0.0.0/8"),
    "ranges": ("int4range", "[1,5)"),
    "multiranges": ("int4multirange", "{[1,5)}"),
    "arrays": ("int[]", "{1}"),
    "enums": ("priority", "low"),
    "composites": ("pair", "(1,x)"),
    "domains": ("price", "1.50"),
    "hstore": ("hstore", "a=>1"),
    "money": ("money", "1"),
    "xml": ("xml", "<a/>"),
    "macaddr": ("macaddr", "08:00:2b:01:02:03"),
    "tsvector": ("tsvector", "a"),
    "pg_lsn": ("pg_lsn", "0/1"),
}


async def test_types_are_as_documented(shop: Database) -> None:
    shop.execute(
        "CREATE EXTENSION hstore; CREATE TYPE pair AS (number int, label text);"
        "CREATE DOMAIN price AS numeric"
    )
    columns = ", ".join(f'"{name}" {sql_type}' for name, (sql_type, _) in SAMPLES.items())
    shop.execute(f"CREATE TABLE samples ({columns})")
    slot = make_slot(shop)
    literals = ", ".join(f"'{literal}'" for _, literal in SAMPLES.values())
    shop.execute(f"INSERT INTO samples VALUES ({literals})")
    changes: list[Change] = []
    stream = Walstream()
    stream.on("public.samples")(changes.append)
    await stream.run(config.parse({"slot": {"name": slot}}), until="now")
    [change] = changes
    as_json = json.loads(change.to_json())["row"]
    named = set()
    for cell, python, in_json, *_ in tables("docs/types.md", "column type", "in Python"):
        for name in code(cell) or re.findall(r"ranges|multiranges|arrays|\w+s$", cell):
            named.add(name)
            assert is_documented_object(change.row[name], python), name
            assert is_documented_json(as_json[name], in_json), name
    assert named == SAMPLES.keys()


def is_documented_object(value: object, said: str) -> bool:
    kind = type(value)
    if said.startswith("as the type"):
        return True
    if "named tuple" in said:
        return isinstance(value, tuple)
    if "json.loads" in said:
        return value == [1]
    if kind.__module__ == "ipaddress":
        return "`ipaddress`" in said
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return re.search(rf"`{re.escape(module + kind.__name__)}\b", said) is not None


def is_documented_json(value: object, said: str) -> bool:
    kinds = {
        "number": (int, float),
        "string": (str,),
        "array": (list,),
        "object": (dict,),
        "`true`": (bool,),
        '`"': (str,),
    }
    for word, kind in kinds.items():
        if said.startswith(word):
            return isinstance(value, kind)
    return said in ("the JSON itself", "likewise")


async def test_the_change_of_the_readme_has_the_keys_of_a_change(shop: Database) -> None:
    shown = the_block("json", "README.md")
    slot = make_slot(shop)
    trade(shop)
    changes: list[Change] = []
    stream = Walstream()
    stream.on("public.orders", "update")(changes.append)
    await stream.run(config.parse({"slot": {"name": slot}}), until="now")
    assert list(json.loads(shown.text)) == list(json.loads(changes[0].to_json()))


def test_the_attributes_of_the_readme_are_those_of_a_change() -> None:
    for row in tables("README.md", "attribute", "what it is"):
        for name in code(row[0]):
            assert hasattr(Change, name.removeprefix("change."))


# ---- Logging, exit codes, errors


def logged_events() -> dict[str, tuple[str, set[str]]]:
    """Every event of the source with its level and keys."""
    found = {}
    for file in (ROOT / "walstream").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                    args=[ast.Constant(value=str(event)), *_],
                    keywords=keywords,
                ):
                    found[event] = (level, {keyword.arg or "**" for keyword in keywords})
    return found


def test_every_event_is_documented_and_no_other() -> None:
    rows = tables("docs/logging-and-exit-codes.md", "event", "level", "keys")
    documented = {code(row[0])[0]: (row[1], set(code(row[2]))) for row in rows}
    assert documented == logged_events()


def test_every_error_is_documented_with_its_exit_code() -> None:
    rows = tables("docs/logging-and-exit-codes.md", "error", "exit code")
    documented = {code(row[0])[0]: int(row[1]) for row in rows}
    assert documented == {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, WalstreamError)
    }


def test_every_exit_code_is_documented() -> None:
    rows = tables("docs/logging-and-exit-codes.md", "code", "meaning", "who acts")
    documented = {int(number) for row in rows for number in row[0].split(",")}
    known = {value for name, value in vars(errors).items() if name.startswith("EX_")}
    assert known <= documented


def test_the_log_line_shown_is_one_of_ours() -> None:
    line = json.loads(the_block("json", "docs/logging-and-exit-codes.md").text)
    first, second, third, *keys = line
    assert [first, second, third] == ["timestamp", "level", "event"]
    assert logged_events()[line["event"]] == (line["level"], set(keys))


# ---- Operations

DONE: Final = {
    "connects again": Action.CONNECT,
    "stands by": Action.STAND_BY,
    "leaves the server alone": Action.LEAVE_ALONE,
    "ends": Action.STOP,
}

ENDS: Final = (
    errors.Unavailable,
    errors.SetupError,
    errors.DeliveryError,
    errors.StreamBroken,
)


def documented_decisions() -> dict[tuple[str, bool], tuple[Action, str, str]]:
    """By an error's name, and whether it has come often: what is done, the exit code, and why."""
    found = {}
    for ended, does, _, exit_code, sentence in tables(
        "docs/operations.md", "what ended the session"
    ):
        is_frequent = "time at one position" in ended
        for name in code(ended):
            found[name, is_frequent] = (DONE[does], exit_code, sentence)
    return found


def test_what_ends_a_session_is_decided_as_documented() -> None:
    """Each error is as its own row says, or as that of the nearest group it belongs to."""
    assert SERVER_FAILURES == 3, "the third time, says the page"
    documented = documented_decisions()
    pauses = Pauses(Backoff(1.0, 1.0), 1.0, 1.0)
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if not issubclass(kind, ENDS):
            continue
        lineage = [one.__name__ for one in kind.__mro__]
        for failures in (1, SERVER_FAILURES):
            decision = decide(kind.__new__(kind), failures, pauses)
            ends_as = errors.ChangeUnsendable if kind is errors.ServerFailed else kind
            code_there = str(ends_as.exit_code) if decision.action is Action.STOP else ""
            rows = [(one, often) for one in lineage for often in (failures > 1, False)]
            nearest = next(documented[row] for row in rows if row in documented)
            assert nearest == (decision.action, code_there, decision.sentence), (name, failures)


def test_operations_names_what_there_is() -> None:
    """Its metrics, log events, errors and configuration keys are those of the reference pages."""
    text = _FENCED.sub("", text_of("docs/operations.md"))
    metrics = {code(row[0])[0] for row in tables("docs/metrics-and-health.md", "metric", "type")}
    sections = "|".join(Config.model_fields)
    for named in code(text):
        metric = re.fullmatch(r"((?:walstream|process)_\w+)(?:\{.*\})?", named)
        if metric:
            assert metric[1] in metrics, named
        elif re.fullmatch(rf"(?:{sections})\.\w+", named):
            assert named in documented_keys(), named
        elif error := re.fullmatch(r"((?:[A-Z][a-z0-9]+){2,})(?:: .*)?", named):
            assert hasattr(errors, error[1]), named
    shown = re.findall(r'"event":"(\w+)"', text_of("docs/operations.md"))
    assert shown
    assert set(shown) <= set(logged_events())


# ---- Between the documents


@pytest.mark.parametrize("document", [pytest.param(one, id=one.name) for one in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def test_every_document_is_linked_from_the_readme() -> None:
    readme = text_of("README.md")
    for document in DOCUMENTS:
        name = document.relative_to(ROOT).as_posix()
        assert name == "README.md" or f"({name})" in readme, name


def test_the_architecture_has_every_module_in_its_layer() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [set(re.findall(r"\w+", layer)) for layer in contracts[0]["layers"]]
    rows = tables("ARCHITECTURE.md", "modules", "own")
    assert [set(code(row[0])) for row in rows] == layers
    core = {name for row in rows for name in re.findall(r"`(\w+)` ·", row[0])}
    whole = {one for one in contracts[1]["source_modules"] if one.count(".") == 1}
    assert {f"walstream.{name}" for name in core} == whole  # beside modules of packages
