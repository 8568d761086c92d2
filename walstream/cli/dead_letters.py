"""``walstream dead-letters``: what could not be delivered."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from walstream import logs
from walstream.assembly import letters_of
from walstream.catalog import Catalog
from walstream.changes import Change, Message, Operation
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.cli.routing import load_handlers
from walstream.cli.streaming import leave
from walstream.config import Config, StdoutSinkConfig
from walstream.dead_letters import (
    DeadLetterStore,
    LetterQuery,
    StoredLetter,
    item_of,
    pages,
    typeoids_of,
)
from walstream.dead_letters.rows import MESSAGE
from walstream.errors import LettersLeft, UsageError, WalstreamError
from walstream.keys import NO_KEY, WHOLE_TABLE, Key
from walstream.replay import Replay, RouteReport
from walstream.service import run_until_signal

app = typer.Typer(
    help="Look at, deliver again, and drop the changes that could not be delivered.",
    no_args_is_help=True,
)

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
            async for stored in pages(store, query):
                typer.echo(msgspec.json.encode(_described(stored)).decode())
            return
        letters = [stored async for stored in pages(store, query)]
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
    """Drop dead letters: their changes are given up.

    What waits behind them is delivered by the next replay. Refused while a replay runs.
    """
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
    _verify_meant(query, "drop", all_letters=all_letters)

    async def work(_settings: Config, store: DeadLetterStore) -> None:
        letters = [stored async for stored in pages(store, query)]
        _verify_found(ids or [], letters)
        if letters and not yes:
            _confirm(len(letters), "drop")
        # A replay delivers what it has read, also what is dropped meanwhile: later than what then
        # comes directly.
        async with store.exclusive():
            dropped = await store.drop([stored.id for stored in letters])
        keys = {(stored.letter.route, key) for stored in letters for key in stored.letter.keys}
        _print_dropped(dropped, keys, set(await store.blocked()))

    _with_store(config, dsn, slot, work)


@app.command()
def replay(  # noqa: PLR0913 - one for each option
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[APP] [ID]...",
            help="Handlers as module:name of a Walstream object, instead of the configuration's;"
            " the letters' numbers.",
        ),
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
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
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each route.")] = False,
) -> None:
    """Deliver dead letters again, in order; those that are delivered are gone.

    Handlers and sinks are called as in a run, with the attempts of their routes. A letter that
    fails stays, and so do those behind it. With what is asked for go the letters before and behind
    it that are about the same rows, also those that a running walstream parks there meanwhile.

    Exits 0 when all are delivered. SIGINT or SIGTERM finishes what is being delivered; a second one
    exits at once. What was being delivered then may be delivered again.
    """
    path, ids = _path_and_ids(what or [])
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
    _verify_meant(query, "replay", all_letters=all_letters)
    settings = load_config(config, dsn)
    logs.configure(settings.log.level, settings.log.format)
    replaying = Replay(settings, load_handlers(settings, path))

    def confirm(letters: Sequence[StoredLetter]) -> None:
        _verify_found(ids, letters)
        if letters and not yes:
            _confirm(len(letters), "replay")

    try:
        reports = asyncio.run(run_until_signal(replaying, lambda: replaying.run(query, confirm)))
        # Where a sink is the standard output, letters go there.
        has_stdout = any(isinstance(sink, StdoutSinkConfig) for sink in settings.sinks.values())
        _print_reports(reports, as_json=json, err=has_stdout)
        _verify_nothing_left(reports)
    except WalstreamError as failure:
        leave(replaying, failure)
        raise
    leave(replaying)


# ---- The store


def _with_store(
    file: Path | None,
    dsn: str | None,
    slot: str | None,
    work: Callable[[Config, DeadLetterStore], Awaitable[None]],
) -> None:
    settings = load_config(file, dsn)
    logs.configure("warning")
    store = letters_of(settings, slot)

    async def run() -> None:
        try:
            await store.open(create=False)
            await work(settings, store)
        finally:
            await store.close()

    asyncio.run(run())


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
    with contextlib.suppress(msgspec.DecodeError):
        parts = msgspec.json.decode(text, type=list[msgspec.Raw])
        values.append(b"[%b]" % b",".join(map(_compact, parts)))
    return values


def _compact(value: msgspec.Raw) -> bytes:
    """Write a value as walstream does: without spaces and needless escapes, numbers as they are."""
    if bytes(value).startswith(b'"'):
        return msgspec.json.encode(msgspec.json.decode(value))
    return msgspec.json.format(bytes(value), indent=-1)


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        message = f"{option}: found {text!r}; a time looks like 2026-01-31T12:00 or 2026-01-31"
        raise UsageError(message) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _verify_meant(query: LetterQuery, verb: str, *, all_letters: bool) -> None:
    is_filtered = query != LetterQuery(limit=query.limit)
    if is_filtered == all_letters:
        message = (
            "--all goes without numbers and filters"
            if all_letters
            else f"{verb} which letters? Neither a number nor a filter is given"
        )
        raise UsageError(message, hint="give numbers, filters such as --route, or --all")


def _confirm(count: int, verb: Literal["drop", "replay"]) -> None:
    letters = _counted(count, "dead letter")
    if not sys.stdin.isatty():
        done = "dropped" if verb == "drop" else "replayed"
        message = f"{letters} would be {done}, and nobody is here to ask"
        raise UsageError(message, hint=f"--yes {verb}s them")
    question = f"Drop {letters} for good?" if verb == "drop" else f"Deliver {letters} again?"
    typer.confirm(question, abort=True)


def _path_and_ids(words: Sequence[str]) -> tuple[str | None, list[int]]:
    """Tell the handlers' module:name from the letters' numbers."""
    paths = [word for word in words if not word.isdecimal()]
    if len(paths) > 1:
        message = f"{paths[1]!r} is not the number of a letter"
        raise UsageError(message, hint="give one module:name, and numbers as the list shows them")
    return next(iter(paths), None), [int(word) for word in words if word.isdecimal()]


def _verify_found(ids: Sequence[int], letters: Sequence[StoredLetter]) -> None:
    if missing := set(ids) - {stored.id for stored in letters}:
        raise _unknown(sorted(missing))


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
        "keys": [_described_key(key) for key in letter.keys],
        "attempts": letter.attempts,
        "error": letter.error,
        "parked": letter.parked,
        "first_failed_at": letter.first_failed_at,
        "last_failed_at": stored.last_failed_at,
        "stored_at": letter.stored_at,
    }


def _described_key(key: Key) -> dict[str, Any]:
    table, values = key
    return {"table": table, "values": _raw_values(values)}


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
    for name in ("id", "route", "change", "key", "attempts", "error", "time (UTC)"):
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


def _print_reports(reports: Sequence[RouteReport], *, as_json: bool, err: bool) -> None:
    if as_json:
        for report in reports:
            described = msgspec.structs.asdict(report)
            described["blocked"] = [_described_key(key) for key in report.blocked]
            typer.echo(msgspec.json.encode(described).decode(), err=err)
        return
    if not reports:
        typer.echo("no dead letters", err=err)
    for report in reports:
        parts = [f"{report.delivered} delivered", f"{report.failed} failed again"]
        if waiting := report.left - report.failed:
            parts.append(f"{waiting} left")
        if report.added:
            parts.append(f"{report.added} of them not asked for, but about the same rows")
        if report.reason:
            parts = [f"{report.left} left: {report.reason}"]
        typer.echo(f"{report.route}: {', '.join(parts)}", err=err)
    blocked = {(report.route, key) for report in reports for key in report.blocked}
    _print_keys("still held up", blocked, err=err)


def _verify_nothing_left(reports: Sequence[RouteReport]) -> None:
    left = sum(report.left for report in reports)
    if left:
        delivered = sum(report.delivered for report in reports)
        message = f"{delivered} delivered, {_counted(left, 'dead letter')} left"
        hint = (
            "mend what fails (walstream dead-letters list --failed), then replay again; changes of"
            " their rows wait behind them"
        )
        raise LettersLeft(message, hint=hint)


def _print_keys(what: str, keys: Iterable[tuple[str, Key]], *, err: bool = False) -> None:
    lines = sorted(f"{what}: {_key_text(key)} of {route}" for route, key in keys)
    for line in lines[:_KEYS_SHOWN]:
        typer.echo(line, err=err)
    if len(lines) > _KEYS_SHOWN:
        typer.echo(f"{what}: {len(lines) - _KEYS_SHOWN} more", err=err)


def _key_text(key: Key) -> str:
    table, values = key
    names = {WHOLE_TABLE: "all rows", NO_KEY: "no key"}
    return f"{table} {names.get(values) or values.decode()}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
