"""``walstream test``."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from walstream import logs
from walstream.assembly import make_router
from walstream.changes import Change, Message
from walstream.cli.options import ConfigFile, load_config
from walstream.cli.routing import App, load_handlers, print_counts
from walstream.errors import EX_DATAERR, EX_OK, UsageError
from walstream.recording import Recording, replay
from walstream.router import MessageRoute, Route, Router


def try_recording(
    recording: Annotated[
        Path, typer.Argument(metavar="RECORDING", help="What walstream tail --record has written.")
    ],
    app: App = None,
    config: ConfigFile = None,
    *,
    dsn: Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            help="A server that reads the filters' values, if they are of types that only a server"
            " can read. Nothing is written there.",
        ),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with this file, and print the differences."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the file of --expect instead of comparing.")
    ] = False,
) -> None:
    """Send recorded changes through the routes, and print what each destination would get.

    No handler is called, and no database is needed. One line of JSON for each route and change:
    {"route": name, "change": {...}}. Exits 65 when it is not what is expected.
    """
    if write and expect is None:
        raise UsageError("--write does not say where to", hint="name the file by --expect FILE")
    settings = load_config(config, None)
    logs.configure("warning", settings.log.format)
    router = make_router(settings, load_handlers(settings, app))
    code = asyncio.run(_test(Recording(recording), router, dsn, expect, write=write))
    print_counts(router)
    raise typer.Exit(code)


async def _test(
    recording: Recording, router: Router, dsn: str | None, expect: Path | None, *, write: bool
) -> int:
    """Print, write or compare; return the exit code."""
    lines = _lines(recording, router, dsn)
    if expect is None:
        async for line in lines:
            typer.echo(line)
        return EX_OK
    found = [line.decode() async for line in lines]
    if write:
        _write(expect, found)
        return EX_OK
    expected = _read(expect)
    if found == expected:
        return EX_OK
    named = (str(expect), str(recording.path))
    for difference in difflib.unified_diff(expected, found, *named, lineterm=""):
        typer.echo(difference)
    return EX_DATAERR


async def _lines(
    recording: Recording, router: Router, dsn: str | None
) -> AsyncGenerator[bytes, None]:
    async with aclosing(replay(recording, router, dsn=dsn)) as replayed:
        async for _, routed in replayed:
            for route, item in routed:
                yield _line(route, item)


def _line(route: Route | MessageRoute, item: Change | Message) -> bytes:
    name = msgspec.json.encode(route.name)
    if isinstance(item, Change):
        return b'{"route":%b,"change":%b}' % (name, item.to_json())
    told = {"id": item.id, "prefix": item.prefix, "content": item.content}
    return b'{"route":%b,"message":%b}' % (name, msgspec.json.encode(told))


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        message = f"{path} cannot be read: {reason}"
        raise UsageError(message, hint="make it with --write") from None


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise UsageError(message) from None
