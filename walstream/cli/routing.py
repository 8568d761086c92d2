"""The handlers and the counts of ``walstream explain`` and ``walstream test``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from walstream.assembly import Attached
from walstream.cli.streaming import load_app
from walstream.config import Config
from walstream.router import Router

App = Annotated[
    str | None,
    typer.Argument(
        metavar="[APP]",
        help="Handlers as module:name of a Walstream object, instead of the configuration's.",
    ),
]


def load_handlers(settings: Config, app: str | None) -> Sequence[Attached]:
    """Import the handlers, which are not called.

    Raises:
        UsageError: there are none at the path.
    """
    app = app or settings.handlers.app
    return load_app(app).handlers if app else []


def print_counts(router: Router) -> None:
    """Print to stderr what became of the changes of each route's tables and operations."""
    for route, counts in zip(router.routes, router.counts, strict=True):
        typer.echo(
            f"{route.name}: {counts.matched} kept, {counts.filtered} dropped,"
            f" {counts.absent} dropped for what they do not carry",
            err=True,
        )
    for message_route, counts in zip(router.message_routes, router.message_counts, strict=True):
        typer.echo(f"{message_route.name}: {counts.matched} kept", err=True)
