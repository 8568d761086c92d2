"""``walstream journal``: the changes that clients can ask for again."""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from walstream import logs
from walstream.cli.options import ConfigFile, load_config
from walstream.config import Config
from walstream.config.section import in_bytes
from walstream.errors import SetupError, UsageError
from walstream.files import lock_holders
from walstream.journal import JournalReader, JournalStatus, lock_path
from walstream.journal import trim as trim_journal

app = typer.Typer(
    help="Look at the journal, which clients that come back are sent from, and make it shorter.",
    no_args_is_help=True,
)

JournalPath = Annotated[
    Path | None,
    typer.Option("--path", metavar="FILE", help="The journal, instead of the configuration's."),
]


@app.command(
    epilog="Examples: walstream journal status; walstream journal status --json | jq .oldest_time"
)
def status(
    config: ConfigFile = None,
    path: JournalPath = None,
    *,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object; so it is in a pipe anyway.")
    ] = False,
) -> None:
    """Show how far back the journal goes, how large it is, and who writes it.

    It may run beside walstream. What is behind begins, up to position, can be replayed.
    """
    settings, found = _journal(config, path)
    described = _described(asyncio.run(_status(found)), settings)
    if json or not sys.stdout.isatty():
        typer.echo(msgspec.json.encode(described).decode())
    else:
        Console().print(_table(described))


@app.command(
    epilog="Examples: walstream journal trim --keep-bytes 500MB;"
    " walstream journal trim --before 2026-01-31T12:00; walstream journal trim --all --yes"
)
def trim(
    config: ConfigFile = None,
    path: JournalPath = None,
    *,
    keep_bytes: Annotated[
        str | None,
        typer.Option(
            "--keep-bytes", metavar="SIZE", help="Leave not more than this, such as 500MB."
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--before",
            metavar="TIME",
            help="Remove what was committed before this time, such as 2026-01-31T12:00 (UTC).",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all changes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the oldest changes; the file gets smaller at once.

    It may run beside walstream, which goes on. A client that comes back and has not got what is
    gone is told so (reset). Changes go in blocks of up to 1,000.
    """
    if [keep_bytes is not None, before is not None, everything].count(True) != 1:
        raise UsageError(
            "trim which changes?", hint="give one of --keep-bytes SIZE, --before TIME and --all"
        )
    size, moment = _size("--keep-bytes", keep_bytes), _time("--before", before)
    _, found = _journal(config, path)
    if not yes:
        _confirm(asyncio.run(_status(found)))
    stood, stands = trim_journal(found, keep_bytes=size, before=moment)
    gone = stood.changes - stands.changes
    typer.echo(f"removed {max(gone, 0):,} changes; the journal begins at {stands.begins}")


# ---- The journal


def _journal(file: Path | None, path: Path | None) -> tuple[Config | None, Path]:
    logs.configure("warning")
    if path is not None:
        return None, path.absolute()
    settings = load_config(file, None)
    if settings.journal.path is None:
        raise SetupError(
            "no journal is configured", hint="set path under [journal], or give --path FILE"
        )
    return settings, settings.journal.path.absolute()


async def _status(path: Path) -> JournalStatus:
    reader = JournalReader(path)
    await reader.open()
    try:
        return await reader.status()
    finally:
        await reader.close()


def _confirm(status: JournalStatus) -> None:
    changes = f"{status.state.changes:,} changes"
    if not sys.stdin.isatty():
        message = f"some of {changes} would be removed, and nobody is here to ask"
        raise UsageError(message, hint="--yes removes them")
    typer.confirm(f"Remove some of {changes} for good?", abort=True)


# ---- Options


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = in_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    assert isinstance(size, int)  # noqa: S101 - it was a text
    return size


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        message = f"{option}: found {text!r}; a time looks like 2026-01-31T12:00 or 2026-01-31"
        raise UsageError(message) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# ---- Output


def _described(status: JournalStatus, settings: Config | None) -> dict[str, Any]:
    state, oldest = status.state, status.oldest_time
    section = None if settings is None else settings.journal
    return {
        "path": str(status.path),
        "pid": _writer(status.path),
        "bytes": status.bytes,
        "max_bytes": None if section is None else section.max_bytes,
        "changes": state.changes,
        "oldest_time": oldest,
        "oldest_seconds": None if oldest is None else round(time.time() - oldest.timestamp(), 1),
        "max_age_seconds": None if section is None else section.max_age_seconds,
        "newest_time": status.newest_time,
        "begins": str(state.begins),
        "position": str(state.position),
        "covered": str(state.covered),
        "history": state.history,
    }


def _writer(path: Path) -> int | None:
    lock = lock_path(path)
    return next(lock_holders(lock), None) if lock.exists() else None


def _table(described: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in described.items():
        table.add_row(name, _shown(name, value))
    return table


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "pid":
        return f"{value} writes it"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if name == "history":
        return str(value)[:12]
    return f"{value:,}" if isinstance(value, int | float) else str(value)
