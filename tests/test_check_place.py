"""``walstream check``: the place where walstream runs, what it writes to and has kept there."""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.checks import SLOT, finding
from tests.postgres import Database
from walstream import Change, Walstream, files
from walstream import config as configuration
from walstream.assembly import letters_of
from walstream.check import Finding, Status, check, place
from walstream.config import Config
from walstream.lineage import Lineage
from walstream.lsn import Lsn
from walstream.state import STATE_DIRECTORY, StateFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STATE_DIRECTORY, raising=False)
    return tmp_path


def parsed(dsn: str = "host=127.0.0.1 port=1", **sections: Any) -> Config:
    return configuration.parse({"postgres": {"dsn": dsn}, "slot": SLOT, **sections})


async def of_handlers(config: Config, stream: Walstream, group: str) -> Finding:
    report = await check(config, stream.handlers)
    [found] = [one for one in report.findings if one.group == group]
    return found


def carry_out(database: Database, mend: str) -> None:
    for step in mend.splitlines():
        if step.startswith("$ "):
            subprocess.run(shlex.split(step.removeprefix("$ ")), check=True)
        elif not step.startswith("-- "):
            database.execute(step)


@pytest.fixture
def plain(database: Database) -> Iterator[str]:
    """The connection string of a role without any rights."""
    name = f"plain_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'")
    yield make_conninfo(database.dsn, user=name, password="plain")  # noqa: S106
    database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


# ---- The state file


async def test_a_state_that_is_not_kept_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await finding(parsed(), "here", "state")).status is Status.WARNING
    monkeypatch.setenv(STATE_DIRECTORY, str(Path.cwd()))
    assert (await finding(parsed(), "here", "state")).status is Status.OK


async def test_another_slots_state_is_a_problem() -> None:
    await StateFile(Path("state.json"), "other").record(Lineage("1", 1, Lsn(1)))
    found = await finding(parsed(state={"path": "state.json"}), "here", "state")
    assert found.status is Status.PROBLEM
    assert "is that of the slot other" in found.found


async def test_a_slot_that_does_not_go_on_from_what_was_confirmed_is_a_problem(
    database: Database,
) -> None:
    """As the next start would say."""
    [(systemid,)] = database.execute("SELECT system_identifier::text FROM pg_control_system()")
    config = parsed(database.dsn, state={"path": "state.json"})
    await StateFile(Path("state.json"), SLOT["name"]).record(Lineage(systemid, 1, Lsn(1)))
    found = await finding(config, "here", "lineage")
    assert found.status is Status.PROBLEM
    assert "was there and is gone" in found.found


def test_a_folder_that_may_not_be_written_to_says_to_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # who is root may
    outcome = place.unwritable_folder(tmp_path / "file")
    assert outcome is not None
    assert outcome.mend == f"$ chmod u+rwx {tmp_path}"


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be entered, for somebody without rights and without a name."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    if is_root := not os.geteuid():
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield folder
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o700)


NOBODY = 54_321
"""A number that no user has."""


async def test_a_folder_that_may_not_be_entered_is_a_problem_of_all_that_is_in_it(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_names(monkeypatch)
    config = parsed(
        state={"path": closed / "state.json"},
        sinks={"out": {"type": "file", "path": closed / "further" / "out"}},
        dead_letters={"path": closed / "letters"},
        routes=[{"table": "public.t", "to": "out"}],
    )
    report = await check(config, with_letters().handlers)
    kept = [one for one in report.findings if one.group in {"sinks", "dead letters", "here"}]
    assert [(one.group, one.status) for one in kept] == [
        ("sinks", Status.PROBLEM),
        ("dead letters", Status.PROBLEM),
        ("here", Status.PROBLEM),
    ]
    for one in kept:
        assert f"the user {os.geteuid()} may not enter the folder /" in one.found
        assert one.mend


def forget_names(patch: pytest.MonkeyPatch) -> None:
    """As in a container with a user of its own."""

    def unknown(uid: int) -> None:
        message = f"getpwuid(): uid not found: {uid}"
        raise KeyError(message)

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_name_is_told_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_names(monkeypatch)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)  # and not the folder's owner
    outcome = place.unwritable_folder(tmp_path / "file")
    assert outcome is not None
    assert outcome.found == f"the user {NOBODY} may not write to the folder {tmp_path}"
    assert outcome.mend.startswith(f"-- let the user {NOBODY} write to {tmp_path}")


async def test_an_error_of_this_machine_is_the_answer_to_its_question_only() -> None:
    long = "x" * 300
    config = parsed(
        sinks={"out": {"type": "file", "path": long}, "other": {"type": "file", "path": "other"}},
        routes=[{"table": "public.t", "to": name} for name in ("out", "other")],
    )
    found = await sink(config, "out")
    assert found.status is Status.PROBLEM
    assert found.found.endswith(f"{long}: File name too long")
    assert (await sink(config, "other")).status is Status.OK


# ---- Sinks


async def sink(config: Config, name: str) -> Finding:
    return await finding(config, "sinks", name)


def to_file(path: str, **more: Any) -> dict[str, Any]:
    return {
        "sinks": {"out": {"type": "file", "path": path}, **more},
        "routes": [{"table": "public.t", "to": name} for name in ("out", *more)],
    }


async def test_a_file_that_somebody_else_has_locked_is_a_problem_unless_it_is_us(
    database: Database,
) -> None:
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", database.name)
    config = parsed(database.dsn, **to_file("out.jsonl"))
    config = config.model_copy(
        update={"slot": config.slot.model_copy(update={"name": database.name})}
    )
    with Path("out.jsonl").open("w") as file:  # noqa: ASYNC230 - nothing else runs here
        fcntl.flock(file, fcntl.LOCK_EX)
        found = await sink(config, "out")
        assert found.status is Status.PROBLEM
        assert f"PID {os.getpid()} has locked" in found.found
    assert (await sink(config, "out")).status is Status.OK


async def test_where_the_system_tells_no_locks_there_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCKS", tmp_path / "none")
    Path("out.jsonl").touch()
    assert (await sink(parsed(**to_file("out.jsonl")), "out")).status is Status.OK


@pytest.mark.parametrize(
    ("sections", "status", "sentence"),
    [
        (to_file("there/is/none"), Status.PROBLEM, "is not there"),
        (to_file("/dev/null"), Status.PROBLEM, "is not a regular file"),
        (
            to_file("a", other={"type": "file", "path": "./a"}),
            Status.PROBLEM,
            "is another sink's, too",
        ),
        (to_file("a"), Status.OK, "which the first start makes"),
        ({"sinks": {"out": {"type": "stdout"}}}, Status.WARNING, "no route leads to it"),
    ],
)
async def test_a_sinks_file_is_looked_at(
    sections: dict[str, Any], status: Status, sentence: str
) -> None:
    found = await sink(parsed(**sections), "out")
    assert found.status is status
    assert sentence in found.found


@pytest.mark.parametrize(
    ("sink_keys", "status", "sentence"),
    [
        ({"url": "http://example.org/x"}, Status.WARNING, "unencrypted"),
        ({"url": "https://example.org", "verify": False}, Status.WARNING, "is believed"),
        ({"url": "https://example.org"}, Status.WARNING, "nothing tells the receiver"),
        (
            {"url": "http://127.0.0.1:1/x?token=abc", "headers": {"authorization": "abc"}},
            Status.OK,
            "http://127.0.0.1, which is not called now",
        ),
        ({"url": "https://example.org", "ca_file": "none.pem"}, Status.PROBLEM, "none.pem"),
        ({"url": "https://example.org", "secret_file": "none"}, Status.PROBLEM, "secret_file"),
    ],
)
async def test_a_webhooks_configuration_is_looked_at_and_nobody_is_called(
    sink_keys: dict[str, Any], status: Status, sentence: str
) -> None:
    config = parsed(
        sinks={"hook": {"type": "webhook", **sink_keys}},
        routes=[{"table": "public.t", "to": "hook"}],
    )
    found = await sink(config, "hook")
    assert found.status is status
    assert sentence in found.found
    assert "abc" not in found.found


async def test_packages_that_are_not_installed_are_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parsed(http={"listen": "127.0.0.1:8432"}, tracing={"enabled": True})
    monkeypatch.setattr(place, "find_spec", lambda name: object() if name != "uvicorn" else None)
    found = await finding(config, "here", "extras")
    assert (found.status, found.mend) == (Status.PROBLEM, '$ pip install "walstream[http]"')


# ---- Dead letters


def with_letters() -> Walstream:
    stream = Walstream()

    @stream.on("public.t", on_failure="dead_letter", attempts=1, name="send")
    def send(change: Change) -> None:
        raise RuntimeError

    return stream


async def test_where_no_route_keeps_dead_letters_their_store_is_not_asked_for() -> None:
    stream = Walstream()
    stream.on("public.t")(print)
    report = await check(parsed(dead_letters={"path": "none/letters"}), stream.handlers)
    assert not [one for one in report.findings if one.group == "dead letters"]


async def test_the_file_of_dead_letters_is_looked_at_and_not_made(database: Database) -> None:
    config = parsed(dead_letters={"path": "kept/letters.sqlite3"})
    found = await of_handlers(config, with_letters(), "dead letters")
    assert found.status is Status.PROBLEM
    carry_out(database, found.mend)
    found = await of_handlers(config, with_letters(), "dead letters")
    assert found.status is Status.OK
    assert not list(Path("kept").iterdir())


async def test_a_nearly_full_store_of_dead_letters_says_so(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    config = configuration.parse(
        {
            "postgres": {"dsn": database.dsn},
            "slot": {"create": True, "name": database.name},
            "dead_letters": {"path": "letters.sqlite3", "max_letters": 2},
        }
    )
    await with_letters().run(config, until="now")
    database.execute("INSERT INTO t VALUES (1), (2)")
    await with_letters().run(config, until="now")
    found = await of_handlers(config, with_letters(), "dead letters")
    assert found.status is Status.WARNING
    assert "2 wait" in found.found
    assert "100% of what there is room for" in found.found


async def test_the_schema_of_dead_letters_is_looked_at_and_each_right_is_granted(
    database: Database, plain: str
) -> None:
    config = parsed(plain, dead_letters={"store": "postgres", "schema": "odd schema"})
    for sentence in ("there is no schema", "has no such tables", "may not use the tables"):
        found = await of_handlers(config, with_letters(), "dead letters")
        assert (found.status, sentence in found.found) == (Status.PROBLEM, True), found
        carry_out(database, found.mend)
        assert (await of_handlers(config, with_letters(), "dead letters")).status is Status.OK
        if sentence == "there is no schema":
            database.execute('ALTER SCHEMA "odd schema" OWNER TO CURRENT_USER')
            database.execute(f'REVOKE ALL ON SCHEMA "odd schema" FROM {_role(plain)}')
        elif sentence == "has no such tables":
            owner = parsed(database.dsn, dead_letters={"store": "postgres", "schema": "odd schema"})
            await _make_store(owner)
            database.execute(f'REVOKE ALL ON SCHEMA "odd schema" FROM {_role(plain)}')


def _role(dsn: str) -> str:
    return psycopg.conninfo.conninfo_to_dict(dsn)["user"]  # type: ignore[return-value]


async def _make_store(config: Config) -> None:
    store = letters_of(config)
    await store.open()
    await store.close()


# ---- Transactional handlers


def booking(dsn: str) -> Walstream:
    stream = Walstream()

    @stream.on("public.t", transactional=dsn, name="book")
    async def book(change: Change, connection: psycopg.AsyncConnection[Any]) -> None: ...

    return stream


async def test_the_database_of_a_handler_is_looked_at_and_each_right_is_granted(
    database: Database, plain: str
) -> None:
    config = parsed(database.dsn)
    for sentence in ("there is no schema", "has no such tables", "may not use the tables"):
        found = await of_handlers(config, booking(plain), "targets")
        assert (found.status, sentence in found.found) == (Status.PROBLEM, True), found
        carry_out(database, found.mend)
        assert (await of_handlers(config, booking(plain), "targets")).status is Status.OK
        if sentence == "there is no schema":
            database.execute("ALTER SCHEMA walstream OWNER TO CURRENT_USER")
            database.execute(f"REVOKE ALL ON SCHEMA walstream FROM {_role(plain)}")
        elif sentence == "has no such tables":
            await _book(database)
            database.execute(f"REVOKE ALL ON SCHEMA walstream FROM {_role(plain)}")


async def _book(database: Database) -> Config:
    database.execute("CREATE TABLE IF NOT EXISTS t (id int PRIMARY KEY)")
    config = configuration.parse(
        {"postgres": {"dsn": database.dsn}, "slot": {"create": True, "name": database.name}}
    )
    await booking(database.dsn).run(config, until="now")
    return config


async def test_what_is_recorded_of_another_source_is_a_problem(database: Database) -> None:
    config = await _book(database)
    assert (await of_handlers(config, booking(database.dsn), "targets")).status is Status.OK
    for spoiled in ("system_identifier = '1'", "end_lsn = 'FFFF/0'"):
        database.execute(f"UPDATE walstream.progress SET {spoiled}")
        found = await of_handlers(config, booking(database.dsn), "targets")
        assert found.status is Status.PROBLEM
        carry_out(database, found.mend)
        assert (await of_handlers(config, booking(database.dsn), "targets")).status is Status.OK
        await _book(database)


async def test_a_database_that_forgets_what_was_committed_is_a_warning(
    database: Database, plain: str
) -> None:
    role = _role(plain)
    database.execute(f"ALTER ROLE {role} SET synchronous_commit = off")
    database.execute(f"CREATE SCHEMA walstream AUTHORIZATION {role}")
    found = await of_handlers(parsed(database.dsn), booking(plain), "targets")
    assert found.status is Status.WARNING
    carry_out(database, found.mend)
    found = await of_handlers(parsed(database.dsn), booking(plain), "targets")
    assert found.status is Status.OK


async def test_a_handlers_database_that_is_not_there_is_unreachable() -> None:
    found = await of_handlers(parsed(), booking("host=127.0.0.1 port=1"), "targets")
    assert found.status is Status.UNREACHABLE
