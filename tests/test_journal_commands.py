"""``walstream journal``, and what ``walstream check`` says of the journal."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from tests.command_line import CommandLine
from tests.journals import (
    HISTORY,
    changes_of,
    journal_at,
    numbers_of,
    position_of,
    read_all,
    time_of,
)
from walstream import config as configuration
from walstream.check import stores
from walstream.check.findings import Outcome, Status
from walstream.check.site import Site
from walstream.cli import app
from walstream.errors import SetupError, UsageError
from walstream.journal import Journal
from walstream.lsn import Lsn


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    (tmp_path / "walstream.toml").write_text(
        """
        [postgres]
        dsn = "postgresql://127.0.0.1/none"
        [journal]
        path = "journal"
        max_bytes = "64MB"
        """
    )
    commands = CommandLine(tmp_path)
    monkeypatch.chdir(tmp_path)
    return commands


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """One that this process writes."""
    opened = journal_at(tmp_path / "journal")
    await opened.open(HISTORY)
    for first in range(1, 2001, 100):
        await opened.append(changes_of(first, first + 99, 300))
    await opened.cover(Lsn(200_000))
    yield opened
    await opened.close()


async def test_status_shows_the_journal_beside_who_writes_it(
    commands: CommandLine, journal: Journal
) -> None:
    done = commands.run("journal", "status")
    assert (done.returncode, done.stderr) == (0, "")
    status = json.loads(done.stdout)
    assert status["oldest_seconds"] > 0
    assert {**status, "oldest_seconds": 0, "bytes": 0} == {
        "path": str(journal.path),
        "pid": os.getpid(),
        "bytes": 0,
        "max_bytes": 64 << 20,
        "changes": 2000,
        "oldest_time": "2026-01-31T12:00:01Z",
        "oldest_seconds": 0,
        "max_age_seconds": 604800,
        "newest_time": "2026-01-31T12:33:20Z",
        "begins": "0/0:0",
        "position": str(position_of(2000)),
        "covered": str(Lsn(200_000)),
        "history": HISTORY,
    }
    assert status["bytes"] == journal.vitals().bytes


async def run(*arguments: str) -> Result:
    """In this process, which is quicker."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["journal", *arguments])


async def test_status_works_when_nobody_writes_it(journal: Journal) -> None:
    await journal.close()
    done = await run("status", "--json", "--path", str(journal.path))
    status = json.loads(done.stdout)
    assert (status["pid"], status["max_bytes"], status["changes"]) == (None, None, 2000)
    await journal.open(HISTORY)


async def test_trim_beside_a_writer_leaves_what_was_asked_for(
    commands: CommandLine, journal: Journal
) -> None:
    done = await run("trim", "--before", time_of(101).isoformat(), "--yes")
    assert done.stdout == f"removed 100 changes; the journal begins at {position_of(100)}\n"
    done = await run("trim", "--keep-bytes", "200kB", "-y")
    removed = int(re.findall(r"removed ([\d,]+) changes", done.stdout)[0].replace(",", ""))
    assert 100 < removed < 1900
    await journal.append(changes_of(2001, 2001))
    assert numbers_of(await read_all(journal)) == list(range(101 + removed, 2002))
    assert journal.vitals().bytes < 300_000
    done = await run("trim", "--all", "--yes")
    await journal.append(changes_of(2002, 2002))
    assert numbers_of(await read_all(journal)) == [2002]


async def test_trim_wants_to_be_told_what_and_confirmed(
    commands: CommandLine, journal: Journal
) -> None:
    for arguments, said in [
        ([], "--keep-bytes SIZE, --before TIME and --all"),
        (["--all", "--keep-bytes", "1MB"], "--keep-bytes SIZE, --before TIME and --all"),
        (["--before", "yesterday", "--yes"], "2026-01-31T12:00"),
        (["--keep-bytes", "much", "--yes"], "such as '512MB'"),
        (["--all"], "--yes removes them"),
    ]:
        done = await run("trim", *arguments)
        assert isinstance(done.exception, UsageError)
        assert said in str(done.exception)
        assert done.stdout == ""
    assert len(await read_all(journal)) == 2000


async def test_a_journal_that_is_not_there_is_not_made(commands: CommandLine) -> None:
    for command in (["status"], ["trim", "--all", "--yes"]):
        done = await run(*command)
        assert isinstance(done.exception, SetupError)
        assert "there is no journal at" in str(done.exception)
    assert not (commands.folder / "journal").exists()


async def test_without_a_configured_journal_a_path_is_asked_for(commands: CommandLine) -> None:
    text = '[postgres]\ndsn = "postgresql://127.0.0.1/none"\n'
    (commands.folder / "walstream.toml").write_text(text)
    done = await run("status")
    assert isinstance(done.exception, SetupError)
    assert "--path FILE" in str(done.exception)


async def test_a_file_that_others_may_read_is_told_of(journal: Journal) -> None:
    await journal.close()
    journal.path.chmod(0o644)
    with structlog.testing.capture_logs() as logs:
        await journal.open(HISTORY)
    [said] = [entry for entry in logs if entry["event"] == "journal_readable"]
    assert (said["mode"], said["log_level"]) == ("0644", "warning")


# ---- walstream check


async def checked(path: Path, *, sink: bool = True, max_bytes: int = 1 << 24) -> Outcome:
    settings = {"journal": {"path": path, "max_bytes": max_bytes}}
    if sink:
        settings |= {"sinks": {"clients": {"type": "live"}}}
    outcome = await stores._journal(Site(configuration.parse(settings)))
    assert outcome is not None
    return outcome


async def test_check_tells_how_far_back_it_goes(journal: Journal) -> None:
    outcome = await checked(journal.path)
    assert outcome.status is Status.OK
    assert "2,000 changes" in outcome.found
    assert "back to" in outcome.found


async def test_check_says_that_the_first_start_makes_it(tmp_path: Path) -> None:
    outcome = await checked(tmp_path / "new")
    assert (outcome.status, "first start" in outcome.found) == (Status.OK, True)
    assert not (tmp_path / "new").exists()


async def test_check_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    outcome = await checked(tmp_path / "none" / "journal")
    assert (outcome.status, "is not there" in outcome.found) == (Status.PROBLEM, True)
    outcome = await checked(tmp_path / "journal", sink=False)
    assert (outcome.status, "no sink" in outcome.found) == (Status.WARNING, True)
    outcome = await checked(tmp_path / "journal", max_bytes=1 << 60)
    assert (outcome.status, "are free" in outcome.found) == (Status.WARNING, True)
