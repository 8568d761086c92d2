"""The command line.

The standard output carries data only; logs and errors go to stderr. Exit codes follow sysexits.h:
0 clean, 64 usage, 65 other results than expected, 70 our bug, 75 try again, 78 configuration or
database set-up.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Final, NoReturn

import typer

from walstream.cli import (
    access,
    checking,
    configuring,
    dead_letters,
    demo,
    explaining,
    journal,
    models,
    replaying,
    slot,
    streaming,
    trying,
)
from walstream.cli.reporting import report, report_bug
from walstream.errors import EX_OK, EX_SOFTWARE, EX_USAGE, UsageError, WalstreamError

INTERRUPTED: Final = 130
"""The exit code that shells give to a program ended by SIGINT."""

app = typer.Typer(
    name="walstream",
    help="Every committed change of a PostgreSQL database, delivered to your code.",
    epilog="Exit codes: 0 clean, 64 usage, 65 other results than expected, 70 a bug, 75 try"
    " again, 78 configuration or database set-up.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(streaming.run)
app.command("tail")(streaming.tail)
app.command("check")(checking.check)
app.command("explain")(explaining.explain)
app.command("test")(trying.try_recording)
app.command("replay")(replaying.replay)
app.command("demo")(demo.demo)
app.add_typer(configuring.app, name="config")
app.add_typer(slot.app, name="slot")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(journal.app, name="journal")
app.add_typer(models.app, name="models")
app.add_typer(access.app, name="access")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"walstream {metadata.version('walstream')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:  # what the command line's parser refuses
        report(UsageError(error.format_message(), hint="walstream --help, walstream run --help"))
        sys.exit(EX_USAGE)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except WalstreamError as error:
        report(error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the one place for what nobody foresaw
        report_bug(error)
        sys.exit(EX_SOFTWARE)
    sys.exit(code if isinstance(code, int) else EX_OK)
