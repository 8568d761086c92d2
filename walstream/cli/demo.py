"""``walstream demo``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from walstream import logs
from walstream.demo import demonstrate


def demo(
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", min=0, help="How long changes are shown.")
    ] = 15.0,
) -> None:
    """Show walstream at work on a private PostgreSQL, which is gone afterwards.

    A small chat application writes, three handlers get what they asked for, and in the end it is
    checked that nothing is missing. Ctrl-C ends it early.
    """
    logs.configure("warning")
    asyncio.run(demonstrate(seconds))
