"""``walstream dead-letters``: what could not be delivered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from walstream import logs
from walstream.catalog import Catalog
from walstream.changes import Change, Message, Operation
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.config import Config
from walstream.dead_letters import (
    DeadLetterStore,
    LetterQuery,
    StoredLetter,
    item_of,
    make_store,
    typeoids_of,
)
from walstream.dead_letters.rows import MESSAGE
from walstream.errors import UsageError
from walstream.keys import NO_KEY, WHOLE_TABLE, Key

T = TypeVar("T")

app = typer.Typer(
    help="Look at, and drop, the changes that could not be delivered.", no_args_is_help=True
)

_PAGE: Final = 1000
_SHOWN: Final = 100
_KEYS_SHOWN: Final = 20

_FILTERS: Final = "Which letters"

Slot = Annotated[
    str | None,
    typer.Option("--slot", metavar="SLOT", help="Whose letters, instead of the configuration's."),
]
RouteName = Annotated[
    str | None,
    typer.Option("--route", metavar="NAME", help="Of this route.", rich_help_panel=_FILTERS),
]
TableName = Annotated[
    str | None,
    typer.Option(
        "--table",
        metavar="SCHEMA.TABLE",
        help="Of this table, or of its partitions.",
        rich_help_panel=_FILTERS,
    ),
]
KeyText = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="About this key: a value, or as the list shows it, such as '[1,\"a\"]'.",
        rich_help_panel=_FILTERS,
    ),
]
OperationText = Annotated[
    str | None,
    typer.Option(
        "--operation",
        metavar="OPERATION",
        help="insert, update, delete, truncate or message.",
        rich_help_panel=_FILTERS,
    ),
]
ErrorText = Annotated[
    str | None,
    typer.Option(
        "--error", metavar="TEXT", help="With this in their error.", rich_help_panel=_FILTERS
    ),
]
Parked = Annotated[
    bool | None,
    typer.Option(
        "--parked/--failed",
        help="Those that wait behind another one; or those that were tried.",
        rich_help_panel=_FILTERS,
    ),
]
Before = Annotated[
    str | None,
    typer.Option(
        "--before",
        metavar="TIME",
        help="Stored before this time, such as 2026-01-31T12:00 (UTC).",
        rich_help_panel=_FILTERS,
    ),
]
After = Annotated[
    str | None,
    typer.Option(
        "--after",
        metavar="TIME",
        help="Stored at this time or later.",
        rich_help_panel=_FILTERS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Not more than N.", rich_help_panel=_FILTERS),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command("list")
def list_letters(  # noqa: PLR0913 - one for each option
    config: ConfigFile = None,
    dsn: Dsn = None,
    slot: Slot = None,
    *,
    route: RouteName = None,
    table: TableName = None,
    key: KeyText = None,
    operation: OperationText = None,
    error: ErrorText = None,
    parked: Parked = None,
    before: Before = None,
    after: After = None,
    limit: Limit = None,
    json: AsJson = False,
) -> None:
    """List dead letters in the order of the stream, without their rows.

    A table shows the first 100 unless --limit says otherwise.
    """
    query = _query(
        route=route,
        table=table,
        key=key,
        operation=operation,
        error=error,
        parked=parked,
        before=before,
        after=after,
        limit=limit or (None if json else _SHOWN),
    )

    async def work(_settings: Config, store: DeadLetterStore) -> None:
        if json:
            async for stored in _pages(store, query):
                typer.echo(msgspec.json.encode(_described(stored)).decode())
            return
        letters = [stored async for stored in _pages(store, query)]
        count = await store.count(msgspec.structs.replace(query, limit=None))
        _print_list(letters, count)

    _with_store(config, dsn, slot, work)


@app.command()
def show(
    letter_id: Annotated[int, typer.Argument(metavar="ID", help="The letter's number.")],
    config: ConfigFile = None,
    dsn: Dsn = None,
    slot: Slot = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show one dead letter: its change as the route saw it, and the last error's traceback."""

    async def work(settings: Config, store: DeadLetterStore) -> None:
        found = await store.select(LetterQuery(ids=[letter_id]))
        if not found:
            raise _unknown([letter_id])
        [stored] = found
        change = await _change_as_json(settings, stored)
        if json:
            described = _described(stored)
            described |= {"traceback": stored.letter.traceback, "change": msgspec.Raw(change)}
            typer.echo(msgspec.json.encode(described).decode())
        else:
            _print_letter(stored, change)

    _with_store(config, dsn, slot, work)


@app.command()
def drop(  # noqa: PLR0913 - one for each option
    ids: Annotated[
        list[int] | None, typer.Argument(metavar="ID", help="The letters' numbers.")
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    slot: Slot = None,
    *,
    route: RouteName = None,
    table: TableName = None,
    key: KeyText = None,
    operation: OperationText = None,
    error: ErrorText = None,
    parked: Parked = None,
    before: Before = None,
    after: After = None,
    limit: Limit = None,
    all_letters: Annotated[
        bool, typer.Option("--all", help="All letters.", rich_help_panel=_FILTERS)
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Drop dead letters: their changes are given up, and later ones of their keys go on."""
    query = _query(
        ids=ids or None,
        route=route,
        table=table,
        key=key,
        operation=operation,
        error=error,
        parked=parked,
        before=before,
        after=after,
        limit=limit,
    )
    _verify_meant(query, all_letters=all_letters)

    async def work(_settings: Config, store: DeadLetterStore) -> None:
        letters = [stored async for stored in _pages(store, query)]
        if ids and (missing := set(ids) - {stored.id for stored in letters}):
            raise _unknown(sorted(missing))
        if letters and not yes:
            _confirm(len(letters))
        dropped = await store.drop([stored.id for stored in letters])
        keys = {(stored.letter.route, key) for stored in letters for key in stored.letter.keys}
        _print_dropped(dropped, keys, set(await store.blocked()))

    _with_store(config, dsn, slot, work)


# ---- The store


def _with_store(
    file: Path | None,
    dsn: str | None,
    slot: str | None,
    work: Callable[[Config, DeadLetterStore], Awaitable[None]],
) -> None:
    settings = load_config(file, dsn)
    logs.configure("warning")
    store = store_of(settings, slot)

    async def run() -> None:
        try:
            await store.open(create=False)
            await work(settings, store)
        finally:
            await store.close()

    asyncio.run(run())


def store_of(settings: Config, slot: str | None = None) -> DeadLetterStore:
    """Return the store that the configuration names, for its slot or another one.

    Raises:
        ConfigError: ``dsn_file`` cannot be read.
    """
    section = settings.dead_letters
    dsn = ""
    if section.store == "postgres":
        dsn = section.own_dsn() or settings.postgres.catalog_dsn()
    return make_store(
        section,
        slot=slot or settings.slot.name,
        dsn=dsn,
        application_name=settings.postgres.application_name,
    )


async def _pages(store: DeadLetterStore, query: LetterQuery) -> AsyncIterator[StoredLetter]:
    """Give letters without their payloads; however many there are, the store is not held up."""
    rest = query.limit
    while rest is None or rest > 0:
        limit = _PAGE if rest is None else min(rest, _PAGE)
        page = await store.select(msgspec.structs.replace(query, limit=limit), payloads=False)
        for stored in page:
            yield stored
        if len(page) < limit:
            return
        rest = None if rest is None else rest - limit
        query = msgspec.structs.replace(query, after=page[-1].place)


async def _change_as_json(settings: Config, stored: StoredLetter) -> bytes:
    payload = stored.letter.payload
    catalog = Catalog(
        settings.postgres.catalog_dsn(), application_name=settings.postgres.application_name
    )
    try:
        await catalog.learn_types(typeoids_of(payload))
    finally:
        await catalog.close()
    match item_of(payload, catalog.types):
        case Change() as change:
            return change.to_json()
        case message:
            return _message_as_json(message)


def _message_as_json(message: Message) -> bytes:
    return msgspec.json.encode(
        {
            "id": message.id,
            "prefix": message.prefix,
            "content": message.content,
            "lsn": str(message.lsn),
        }
    )


# ---- Options


def _query(  # noqa: PLR0913 - one for each option
    *,
    ids: Sequence[int] | None = None,
    route: str | None,
    table: str | None,
    key: str | None,
    operation: str | None,
    error: str | None,
    parked: bool | None,
    before: str | None,
    after: str | None,
    limit: int | None,
) -> LetterQuery:
    operations = [*map(str, Operation), MESSAGE]
    if operation is not None and operation not in operations:
        message = f"--operation: found {operation!r}; allowed: {', '.join(operations)}"
        raise UsageError(message)
    return LetterQuery(
        ids=ids,
        route=route,
        table=table,
        key_values=None if key is None else _key_values(key),
        operation=operation,
        error=error,
        parked=parked,
        stored_before=_time("--before", before),
        stored_after=_time("--after", after),
        limit=limit,
    )


def _key_values(text: str) -> list[bytes]:
    """Return all that a key given by hand can mean."""
    plain = {"all rows": WHOLE_TABLE, "no key": NO_KEY}.get(text, text.encode())
    values = [plain, b"[%b]" % text.encode(), msgspec.json.encode([text])]
    with contextlib.suppress(ValueError):
        values.append(msgspec.json.encode(json.loads(text)))  # without spaces
    return values


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        message = f"{option}: found {text!r}; a time looks like 2026-01-31T12:00 or 2026-01-31"
        raise UsageError(message) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _verify_meant(query: LetterQuery, *, all_letters: bool) -> None:
    is_filtered = query != LetterQuery(limit=query.limit)
    if is_filtered == all_letters:
        message = (
            "--all goes without numbers and filters"
            if all_letters
            else "drop which letters? Neither a number nor a filter is given"
        )
        raise UsageError(message, hint="give numbers, filters such as --route, or --all")


def _confirm(count: int) -> None:
    if not sys.stdin.isatty():
        message = f"{_counted(count, 'dead letter')} would be dropped, and nobody is here to ask"
        raise UsageError(message, hint="--yes drops them")
    typer.confirm(f"Drop {_counted(count, 'dead letter')} for good?", abort=True)


def _unknown(ids: Sequence[int]) -> UsageError:
    numbers = ", ".join(map(str, ids))
    return UsageError(
        f"there is no dead letter {numbers}", hint="walstream dead-letters list shows them"
    )


# ---- Output


def _described(stored: StoredLetter) -> dict[str, Any]:
    letter = stored.letter
    return {
        "id": stored.id,
        "route": letter.route,
        "change": letter.change_id,
        "operation": letter.operation or MESSAGE,
        "table": None if letter.relation is None else str(letter.relation),
        "keys": [{"table": table, "values": _raw_values(values)} for table, values in letter.keys],
        "attempts": letter.attempts,
        "error": letter.error,
        "parked": letter.parked,
        "first_failed_at": letter.first_failed_at,
        "last_failed_at": stored.last_failed_at,
        "stored_at": letter.stored_at,
    }


def _raw_values(values: bytes) -> msgspec.Raw | list[str] | None:
    """All rows are null, and the rows of a table without a key an empty list."""
    if values == WHOLE_TABLE:
        return None
    return [] if values == NO_KEY else msgspec.json.decode(values, type=msgspec.Raw)


def _print_list(letters: Sequence[StoredLetter], count: int) -> None:
    if not count:
        typer.echo("no dead letters")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("id", "route", "change", "key", "attempts", "error", "time"):
        table.add_column(name, overflow="fold", justify="right" if name == "attempts" else "left")
    for stored in letters:
        letter = stored.letter
        cells = [
            str(stored.id),
            letter.route,
            letter.change_id,
            "\n".join(_key_text(key) for key in letter.keys),
            "parked" if letter.parked else str(letter.attempts),
            letter.error,
            f"{stored.last_failed_at or letter.stored_at:%Y-%m-%d %H:%M:%S}",
        ]
        table.add_row(*[Text(cell) for cell in cells])
    Console(highlight=False).print(table)
    rest = count - len(letters)
    typer.echo(f"{_counted(count, 'dead letter')}{f', {rest} not shown' if rest else ''}")


def _print_letter(stored: StoredLetter, change: bytes) -> None:
    letter = stored.letter
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    described = _described(stored)
    described["keys"] = ", ".join(_key_text(key) for key in letter.keys)
    for name, value in described.items():
        table.add_row(name, Text("-" if value in (None, "") else str(value)))
    Console(highlight=False).print(table)
    typer.echo(msgspec.json.format(change, indent=2).decode())
    if letter.traceback:
        typer.echo(letter.traceback)


def _print_dropped(dropped: int, keys: set[tuple[str, Key]], blocked: set[tuple[str, Key]]) -> None:
    typer.echo(f"dropped {_counted(dropped, 'dead letter')}")
    _print_keys("free", keys - blocked)
    _print_keys("still held up by other letters", keys & blocked)


def _print_keys(what: str, keys: Iterable[tuple[str, Key]]) -> None:
    lines = sorted(f"{what}: {_key_text(key)} of {route}" for route, key in keys)
    for line in lines[:_KEYS_SHOWN]:
        typer.echo(line)
    if len(lines) > _KEYS_SHOWN:
        typer.echo(f"{what}: {len(lines) - _KEYS_SHOWN} more")


def _key_text(key: Key) -> str:
    table, values = key
    names = {WHOLE_TABLE: "all rows", NO_KEY: "no key"}
    return f"{table} {names.get(values) or values.decode()}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
