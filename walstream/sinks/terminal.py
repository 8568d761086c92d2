"""Changes laid out for people, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from walstream.changes import Change, Operation, Row
from walstream.sinks.stdout import write_stdout

_STYLES: Final = {
    Operation.INSERT: "bold green",
    Operation.UPDATE: "bold yellow",
    Operation.DELETE: "bold red",
    Operation.TRUNCATE: "bold magenta",
    Operation.READ: "bold cyan",
}

_LONGEST_VALUE: Final = 60


class TerminalSink:
    """One line a change: time, operation, table, key, and what changed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._console = Console(soft_wrap=True, highlight=False, force_terminal=True)

    async def open(self) -> None:
        """Nothing to make ready."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Print the changes.

        Raises:
            OutputClosed: the terminal is gone.
        """
        with self._console.capture() as captured:
            for change in changes:
                self._console.print(describe(change))
        await write_stdout(captured.get().encode())

    async def close(self) -> None:
        """Nothing to let go."""


def describe(change: Change) -> Text:
    """Lay a change out on one line."""
    text = Text()
    text.append(f"{change.commit_time:%H:%M:%S.%f}"[:-3], style="dim")
    text.append(f"  {change.operation:<8} ", style=_STYLES[change.operation])
    text.append(str(change.relation), style="bold")
    match change.operation:
        case Operation.UPDATE:
            _append_update(text, change)
        case Operation.DELETE:
            _append_row(text, change.identity)
        case _:
            _append_row(text, change.row)
    for name in change.unchanged:
        text.append(f"  {name}=")
        text.append("unchanged", style="dim italic")
    if change.leaving:
        text.append("  leaving", style="italic")
    return text


def _append_update(text: Text, change: Change) -> None:
    """Show the key and, where the old values were sent, only what differs."""
    old = change.identity
    for name, value in change.row.items():
        if name in change.layout.key and (name not in old or old[name] == value):
            text.append(f"  {name}=", style="dim")
            text.append(_short(value))
        elif name in old and old[name] != value:
            text.append(f"  {name}=")
            text.append(_short(old[name]), style="red")
            text.append(" → ", style="dim")
            text.append(_short(value), style="green")
        elif name not in old:
            text.append(f"  {name}=", style="dim")
            text.append(_short(value))


def _append_row(text: Text, row: Row) -> None:
    for name, value in row.items():
        text.append(f"  {name}=", style="dim")
        text.append(_short(value))


def _short(value: object) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 1]}…"
