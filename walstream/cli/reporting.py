"""How an error looks on the terminal."""

from __future__ import annotations

import sys
import traceback

from rich.console import Console

from walstream.errors import ConfigError, WalstreamError


def report(error: WalstreamError) -> None:
    """Print an error and its hint to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not isinstance(error, ConfigError):  # its lines name their files themselves
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    console.print(error.message, markup=False)
    if error.hint:
        console.print("[bold]hint[/]: ", end="")
        console.print(error.hint, markup=False)


def report_bug(error: Exception) -> None:
    """Print where an unforeseen error came from; its own text may hold row values, and is not."""
    sys.stderr.writelines(traceback.format_tb(error.__traceback__))
    report(
        WalstreamError(
            f"{type(error).__name__}, which walstream did not foresee",
            hint="the slot was not moved past what is not taken; please report the lines above",
        )
    )
