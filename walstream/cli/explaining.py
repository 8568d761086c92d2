"""``walstream explain``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from walstream import logs
from walstream.assembly import make_router
from walstream.changes import Change, Message
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.cli.routing import App, load_handlers, print_counts
from walstream.errors import UsageError
from walstream.explain import Explained, explain_recording, explain_slot
from walstream.router import Explanation, TablePattern


class Only(StrEnum):
    """Which routes are shown for a change."""

    KEPT = "kept"
    DROPPED = "dropped"


def explain(  # noqa: PLR0913 - the options of a command
    app: App = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    *,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many changes and messages are looked at.")
    ] = 100,
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE",
            help="Show changes of schema.table, * for either part; may be repeated. All without.",
        ),
    ] = None,
    only: Annotated[
        Only | None, typer.Option(help="Show only the routes that keep a change, or drop it.")
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Explain a recording instead; needs no database."),
    ] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Show kept changes as the route sees them, masked.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each change.")] = False,
) -> None:
    """Say which routes keep or drop the changes that wait in the slot, and why.

    The slot is looked into and not moved, and no handler is called. Nobody may stream from it
    meanwhile.
    """
    settings = load_config(config, dsn)
    logs.configure("warning", settings.log.format)
    router = make_router(settings, load_handlers(settings, app))
    patterns = _patterns(table or [])
    found = (
        explain_recording(recording, router)
        if recording is not None
        else explain_slot(settings, router, limit=limit)
    )
    show = _json_printer(rows=rows) if json else _text_printer(rows=rows)
    looked_at = asyncio.run(_show(found, limit, patterns, only, show))
    print_counts(router)
    if looked_at == limit:
        typer.echo(f"looked at {limit}, and there may be more: --limit", err=True)


async def _show(
    found: AsyncGenerator[Explained, None],
    limit: int,
    patterns: Sequence[TablePattern],
    only: Only | None,
    show: Callable[[Explained, Sequence[Explanation]], None],
) -> int:
    """Show what was asked for; return how many were looked at."""
    looked_at = 0
    async with aclosing(found):
        async for explained in found:
            looked_at += 1
            told = [
                one
                for one in explained.explanations
                if only is None or one.kept is (only is Only.KEPT)
            ]
            if _is_wanted(explained.item, patterns) and (told or only is None):
                show(explained, told)
            if looked_at == limit:
                break
    return looked_at


def _patterns(tables: Sequence[str]) -> list[TablePattern]:
    try:
        return [TablePattern.parse(table) for table in tables]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_wanted(item: Change | Message, patterns: Sequence[TablePattern]) -> bool:
    if not patterns:
        return True
    if isinstance(item, Message):
        return False
    relations = (item.relation, *item.layout.ancestors)
    return any(pattern.covers(relation) for pattern in patterns for relation in relations)


def _json_printer(*, rows: bool) -> Callable[[Explained, Sequence[Explanation]], None]:
    def show(explained: Explained, told: Sequence[Explanation]) -> None:
        routes = [_route_to_json(one, rows=rows) for one in told]
        typer.echo(msgspec.json.encode({**_item_to_json(explained), "routes": routes}))

    return show


def _item_to_json(explained: Explained) -> dict[str, Any]:
    item = explained.item
    if isinstance(item, Message):
        return {"id": item.id, "operation": "message", "prefix": item.prefix}
    root = {} if item.root is None else {"root": str(item.root)}
    return {
        "id": item.id if explained.is_sent else None,
        "operation": item.operation,
        "schema": item.relation.schema,
        "table": item.relation.name,
        **root,
        "sent": explained.is_sent,
    }


def _route_to_json(one: Explanation, *, rows: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "route": one.route,
        "kept": one.kept,
        "rule": one.rule,
        "reason": one.reason,
    }
    if one.seen is not None:
        told |= {"left_out": one.left_out, "masked": one.masked}
        if rows:
            told["change"] = msgspec.Raw(one.seen.to_json())
    return told


def _text_printer(*, rows: bool) -> Callable[[Explained, Sequence[Explanation]], None]:
    console = Console(soft_wrap=True, highlight=False)

    def show(explained: Explained, told: Sequence[Explanation]) -> None:
        console.print(_headline(explained))
        width = max((len(one.route) for one in told), default=0)
        for one in told:
            console.print(_line(one, width))
            if rows and one.seen is not None:
                console.print(Text(f"           {one.seen.to_json().decode()}", style="dim"))

    return show


def _headline(explained: Explained) -> Text:
    item = explained.item
    if isinstance(item, Message):
        return Text(f"{item.id}  message {item.prefix}", style="bold")
    text = Text(f"{item.operation} {item.relation}", style="bold")
    if item.root is not None:
        text.append(f", a partition of {item.root}")
    if not explained.is_sent:
        return text.append("  no route needs it: it is not asked of the server", style="dim")
    return Text(f"{item.id}  ").append(text)


def _line(one: Explanation, width: int) -> Text:
    text = Text("  ")
    text.append("kept   " if one.kept else "dropped", style="green" if one.kept else "yellow")
    text.append(f"  {one.route:<{width}}  ", style="dim")
    text.append(one.reason)
    if one.masked:
        masks = ", ".join(f"{column} ({mask})" for column, mask in one.masked.items())
        text.append(f"; masked: {masks}")
    if one.left_out:
        text.append(f"; left out: {', '.join(one.left_out)}")
    return text
