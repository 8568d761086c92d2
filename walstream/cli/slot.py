"""``walstream slot``: the replication slot by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from walstream import logs
from walstream.catalog import Catalog
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.config import Config, SlotConfig
from walstream.connection import ReplicationConnection
from walstream.errors import ConfigError, UsageError
from walstream.lsn import Lsn
from walstream.slots import (
    SlotStatus,
    advance_slot,
    alter_slot,
    create_slot,
    drop_slot,
    slot_status,
)
from walstream.state import note_given_up, state_path

T = TypeVar("T")

app = typer.Typer(
    help="Create, alter, drop, look at and advance the replication slot.", no_args_is_help=True
)

Name = Annotated[
    str | None, typer.Option("--name", metavar="SLOT", help="Instead of the configuration's.")
]


@app.command()
def create(
    config: ConfigFile = None,
    dsn: Dsn = None,
    name: Name = None,
    *,
    failover: Annotated[
        bool | None,
        typer.Option(
            "--failover/--no-failover",
            help="Let standbys keep a copy (PostgreSQL 17); by default as the configuration says.",
        ),
    ] = None,
) -> None:
    """Create the slot for wal2json: changes are kept from now on.

    From then on the server keeps all WAL until it is confirmed. Undo it by [bold]walstream slot
    drop[/].
    """

    async def work(settings: Config, catalog: Catalog, slot: str) -> None:
        async with await _replication(settings) as connection:
            wished = settings.slot.failover if failover is None else failover
            created = await create_slot(connection, catalog, slot, failover=wished)
        typer.echo(f"created {created.name} at {created.consistent_point}")

    _with_catalog(config, dsn, name, work)


@app.command()
def alter(
    config: ConfigFile = None,
    dsn: Dsn = None,
    name: Name = None,
    *,
    failover: Annotated[
        bool,
        typer.Option("--failover/--no-failover", help="Whether standbys keep a copy of the slot."),
    ],
) -> None:
    """Let standbys keep a copy of the slot, or not any more (PostgreSQL 17 and later).

    Nobody may stream from it meanwhile.
    """

    async def work(settings: Config, catalog: Catalog, slot: str) -> None:
        async with await _replication(settings) as connection:
            await alter_slot(connection, catalog, slot, failover=failover)
        typer.echo(f"{slot}: failover is {'on' if failover else 'off'}")

    _with_catalog(config, dsn, name, work)


@app.command()
def drop(config: ConfigFile = None, dsn: Dsn = None, name: Name = None) -> None:
    """Drop the slot: what it has not delivered is given up, and the server may remove the WAL."""

    async def work(_settings: Config, catalog: Catalog, slot: str) -> None:
        await drop_slot(catalog, slot)
        typer.echo(f"dropped {slot}")

    _with_catalog(config, dsn, name, work)


@app.command()
def status(
    config: ConfigFile = None,
    dsn: Dsn = None,
    name: Name = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show where the slot stands, who uses it, and how much WAL it holds back."""

    async def work(_settings: Config, catalog: Catalog, slot: str) -> None:
        found = await slot_status(catalog, slot)
        if json:
            typer.echo(msgspec.json.encode(found, enc_hook=str).decode())
        else:
            Console().print(_table(found))

    _with_catalog(config, dsn, name, work)


@app.command()
def advance(
    to: Annotated[str, typer.Argument(metavar="LSN|now", help="The new position.")],
    config: ConfigFile = None,
    dsn: Dsn = None,
    name: Name = None,
) -> None:
    """Move the slot forward; the changes in between are given up, no handler sees them.

    Where a state file is kept, it is noted there: the next start takes it for no gap.
    """

    async def work(settings: Config, catalog: Catalog, slot: str) -> None:
        position = (await catalog.server()).flush_lsn if to == "now" else _lsn(to)
        position = await advance_slot(catalog, slot, position)
        state = state_path(settings.state.path, slot)
        await note_given_up(state, slot, position)
        typer.echo(f"{slot} stands at {position}")
        if state is None:
            typer.echo(
                "a service that keeps a state file takes this for a gap: start it once with"
                " --accept-gap",
                err=True,
            )

    _with_catalog(config, dsn, name, work)


async def _replication(settings: Config) -> ReplicationConnection:
    return await ReplicationConnection.open(
        settings.postgres.streaming_dsn(), application_name=settings.postgres.application_name
    )


def _with_catalog(
    file: Path | None,
    dsn: str | None,
    name: str | None,
    work: Callable[[Config, Catalog, str], Awaitable[None]],
) -> None:
    settings = load_config(file, dsn)
    slot = _slot_name(name) if name is not None else settings.slot.name
    logs.configure("warning")

    async def run() -> None:
        catalog = Catalog(
            settings.postgres.catalog_dsn(), application_name=settings.postgres.application_name
        )
        try:
            await work(settings, catalog, slot)
        finally:
            await catalog.close()

    asyncio.run(run())


def _slot_name(name: str) -> str:
    try:
        return SlotConfig.declared("--name", name=name).name
    except ConfigError as error:
        raise UsageError(error.message) from None


def _lsn(text: str) -> Lsn:
    try:
        return Lsn.parse(text)
    except ValueError as error:
        raise UsageError(str(error), hint="give an LSN, or now") from None


def _table(status: SlotStatus) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for field, value in msgspec.structs.asdict(status).items():
        shown = "-" if value is None else str(value)
        table.add_row(field, _size(value) if field.endswith("_bytes") else shown)
    return table


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    scaled = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if scaled < 1024:  # noqa: PLR2004 - binary units
            return f"{scaled:.0f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} GiB"
