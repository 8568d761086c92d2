"""How an error looks on the terminal."""

from __future__ import annotations

from rich.console import Console

from walstream.errors import WalstreamError


def report(error: WalstreamError) -> None:
    """Print an error and its hint to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    console.print(error.message, markup=False)
    if error.hint:
        console.print("[bold]hint[/]: ", end="")
        console.print(error.hint, markup=False)
