"""What the demonstration prints: in colours on a terminal, plain lines in a pipe."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from walstream.changes import Change, Operation

_STYLES: Final = {
    Operation.INSERT: "bold green",
    Operation.UPDATE: "bold yellow",
    Operation.DELETE: "bold red",
}

_console: Final = Console(soft_wrap=True, highlight=False)


def show(change: Change, text: str) -> None:
    """Print what a handler makes of a change, and how long after its commit."""
    passed = (datetime.now(UTC) - change.commit_time) / timedelta(milliseconds=1)
    line = Text("walstream  ", style="bold")
    line.append(f"{change.operation} {change.relation.name:<18} ", _STYLES[change.operation])
    line.append(text, style="not bold")
    line.append(f"  ({passed:.1f} ms)", style="dim")
    _console.print(line)


def show_application(text: str) -> None:
    """Print what the application is about to commit, or not to."""
    _console.print(Text(f"app        {text}", style="dim"))


def show_remark(text: str) -> None:
    """Print a line about the demonstration itself."""
    _console.print(Text(text))


def show_heading(text: str) -> None:
    """Print what the next lines are, with an empty line before it."""
    _console.print(Text(f"\n{text}", style="bold"))


def show_code(code: str) -> None:
    """Print Python source."""
    if _console.is_terminal:
        _console.print(Syntax(code, "python", theme="ansi_dark"), soft_wrap=False)
    else:
        _console.print(Text(code))


def show_figure(name: str, text: str) -> None:
    """Print a line of the balance."""
    line = Text(f"{name:<10} ", style="bold")
    line.append(text, style="not bold")
    _console.print(line)
