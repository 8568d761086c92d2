"""``walstream check``."""

from __future__ import annotations

import asyncio
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from walstream import check as checks
from walstream import logs
from walstream.check import Finding, Report, Status
from walstream.cli.options import ConfigFile, Dsn, load_config, tell_ignored_environment
from walstream.cli.streaming import load_app

_STYLES: Final = {
    Status.OK: "green",
    Status.SKIPPED: "dim",
    Status.WARNING: "yellow",
    Status.UNREACHABLE: "bold red",
    Status.PROBLEM: "bold red",
}

_STATUS_WIDTH: Final = max(map(len, Status))

_MEND_LINES: Final = 6
"""What mends a pattern of a thousand tables is a thousand lines."""

_ROUTES: Final = 12
"""Where more routes are in order, they are counted."""

_NARROWEST: Final = 30
"""The narrowest column of text, on however narrow a terminal."""


def check(
    app: Annotated[
        str | None,
        typer.Argument(
            metavar="[APP]",
            help="Handlers as module:name of a Walstream object, instead of the configuration's.",
        ),
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look for everything that could go wrong, and show what mends it.

    Changes nothing. Exits 0 when there is no problem (warnings are allowed), 78 when there is one,
    75 when the server cannot be reached.
    """
    settings = load_config(config, dsn)
    logs.configure("warning", settings.log.format)
    tell_ignored_environment()
    path = app or settings.handlers.app
    handlers = load_app(path).handlers if path else []
    report = asyncio.run(checks.check(settings, handlers, arguments=_arguments(app, config)))
    if json:
        typer.echo(report.to_json())
    else:
        _show(report)
    raise typer.Exit(report.exit_code)


def _arguments(app: str | None, config: Path | None) -> str:
    """Write what leads other commands to the same handlers and file; a DSN may hold a secret."""
    given = [] if app is None else [app]
    return shlex.join([*given, *([] if config is None else ["-c", str(config)])])


def _show(report: Report) -> None:
    console = Console(soft_wrap=True, highlight=False)
    shown = list(_screen(report))
    width = max(len(finding.name) for finding in shown)
    for group, findings in groupby(shown, attrgetter("group")):
        console.print(Text(group, style="bold"))
        for finding in findings:
            console.print(_line(finding, width, console))
    console.print(_verdict(report))


def _screen(report: Report) -> Iterator[Finding]:
    """Give what fits on a screen: one line for what was not asked, one for many routes in order."""
    for group, status, findings in _runs(report):
        is_much = len(findings) > (_ROUTES if status is Status.OK else 1)
        if is_much and status is Status.SKIPPED:
            for reason, alike in groupby(findings, attrgetter("found")):
                yield _summed(list(alike), "questions", reason)
        elif is_much and status is Status.OK and group == "routes":
            yield _summed(findings, "routes", "their tables send what they want to see")
        else:
            yield from findings


def _runs(report: Report) -> Iterator[tuple[str, Status, list[Finding]]]:
    """Give the findings of a group that stand together and came to the same."""
    for (group, status), findings in groupby(report.findings, attrgetter("group", "status")):
        yield group, status, list(findings)


def _summed(findings: list[Finding], what: str, found: str) -> Finding:
    """Make one finding of several that came to the same."""
    first = findings[0]
    if len(findings) == 1:
        return first
    mend = next((one.mend for one in findings if one.mend), "")
    return Finding(first.group, f"{len(findings)} {what}", first.status, found, mend)


def _line(finding: Finding, width: int, console: Console) -> Text:
    """Lay a finding out; SQL is never broken, so that it can be copied."""
    text = Text("  ")
    text.append(f"{finding.status:<{_STATUS_WIDTH}}", style=_STYLES[finding.status])
    text.append(f"  {_printable(finding.name):<{width}}  ", style="dim")
    text.append(_wrapped(_printable(finding.found), len(text), console))
    indent = " " * (_STATUS_WIDTH + 4)
    for line in _shortened(finding.mend.split("\n") if finding.mend else []):
        text.append(f"\n{indent}{_printable(line)}", style="cyan")
    return text


def _printable(text: str) -> str:
    """Show what would command the terminal; names of tables may hold anything."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _wrapped(found: str, indent: int, console: Console) -> str:
    if not console.is_terminal:
        return found
    lines = textwrap.wrap(found, max(console.width - indent, _NARROWEST), break_long_words=False)
    return f"\n{' ' * indent}".join(lines)


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - _MEND_LINES
    return lines if rest <= 0 else [*lines[:_MEND_LINES], f"... {rest} more lines with --json"]


def _verdict(report: Report) -> Text:
    counts = Counter(finding.status for finding in report.findings)
    told = [_counted(counts[status], status) for status in reversed(Status) if counts[status]]
    return Text(", ".join(told), style=_STYLES[report.status])


def _counted(count: int, status: Status) -> str:
    is_noun = status in (Status.PROBLEM, Status.WARNING)
    return f"{count} {status}{'s' if is_noun and count > 1 else ''}"
