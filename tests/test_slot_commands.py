"""``walstream slot`` shows what the server knows of a slot, and makes and alters failover slots."""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.postgres import Database
from walstream.slots import FAILOVER_VERSION


@pytest.fixture
def slot(database: Database) -> str:
    name = f"commanded_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    return name


@pytest.fixture
def version(database: Database) -> int:
    ((number,),) = database.execute("SELECT current_setting('server_version_num')::int")
    return int(number)


class SlotCommands(CommandLine):
    """Runs ``walstream slot`` on a test's database."""

    def __init__(self, folder: Path, database: Database) -> None:
        super().__init__(folder)
        self._dsn = database.dsn

    def slot(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("slot", *arguments, "--dsn", self._dsn)

    def status(self, slot: str) -> dict[str, Any]:
        return dict(json.loads(self.slot("status", "--json", "--name", slot).stdout))


@pytest.fixture
def commands(tmp_path: Path, database: Database) -> SlotCommands:
    return SlotCommands(tmp_path, database)


def test_the_status_has_spills_and_what_standbys_keep(
    commands: SlotCommands, slot: str, version: int
) -> None:
    status = commands.status(slot)
    assert [status[key] for key in ("spilled_transactions", "spills", "spilled_bytes")] == [0, 0, 0]
    known = [False, False] if version >= FAILOVER_VERSION else [None, None]
    assert [status["failover"], status["synced"]] == known
    shown = commands.slot("status", "--name", slot).stdout
    assert "spilled_bytes                 0 bytes" in shown
    assert "failover                      " + ("False" if known[0] is False else "-") in shown


def test_what_bounds_the_slot_is_shown_in_bytes(
    commands: SlotCommands, database: Database, slot: str
) -> None:
    ((bound,),) = database.execute("SELECT current_setting('max_slot_wal_keep_size')")
    shown = commands.status(slot)["max_slot_wal_keep_size_bytes"]
    assert (shown is None) == (bound == "-1")


def test_failover_is_refused_before_17_whoever_wishes_it(
    commands: SlotCommands, slot: str, version: int
) -> None:
    if version >= FAILOVER_VERSION:
        pytest.skip("this server has failover slots")
    new = f"{slot}_new"
    commands.environment["WALSTREAM_SLOT_FAILOVER"] = "true"
    for answer in (
        commands.slot("create", "--name", new),
        commands.slot("create", "--failover", "--name", new),
        commands.slot("alter", "--failover", "--name", slot),
    ):
        assert (answer.returncode, answer.stdout) == (78, "")
        assert "failover slots need 17 or later" in answer.stderr
    answer = commands.slot("create", "--no-failover", "--name", new)
    assert answer.stdout.startswith(f"created {new} at ")


def test_failover_slots_are_made_and_altered_from_17_on(
    commands: SlotCommands, slot: str, version: int
) -> None:
    if version < FAILOVER_VERSION:
        pytest.skip(f"PostgreSQL {version // 10_000} has no failover slots")
    new = f"{slot}_new"
    commands.environment["WALSTREAM_SLOT_FAILOVER"] = "true"
    answer = commands.slot("create", "--name", new)
    assert answer.stdout.startswith(f"created {new} at ")
    assert commands.status(new)["failover"] is True
    answer = commands.slot("alter", "--no-failover", "--name", new)
    assert answer.stdout == f"{new}: failover is off\n"
    answer = commands.slot("alter", "--failover", "--name", slot)
    assert answer.stdout == f"{slot}: failover is on\n"
    assert [commands.status(one)["failover"] for one in (new, slot)] == [False, True]


def test_to_alter_a_slot_one_has_to_say_how(commands: SlotCommands, slot: str) -> None:
    answer = commands.slot("alter", "--name", slot)
    assert (answer.returncode, answer.stdout) == (64, "")
    assert "--failover" in answer.stderr
