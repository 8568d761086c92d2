"""``walstream models``: pydantic models of tables."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from walstream import logs
from walstream.catalog import Catalog
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.errors import ModelsDrifted, RelationMissing, UsageError
from walstream.models import Difference, Request, differences, read_tables, write
from walstream.models.tables import Found

T = TypeVar("T")

app = typer.Typer(
    help="Write pydantic models of tables, and notice when the tables have changed.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="Written by walstream models generate.")]


@app.command()
def generate(
    tables: Annotated[
        list[str], typer.Argument(metavar="TABLE...", help="schema.table, * for either part.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Instead of the standard output."),
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    *,
    narrow: Annotated[
        bool,
        typer.Option(
            "--narrow",
            help="Leave out what few tables hold: infinity and other dates that Python has no"
            " object for, and arrays of other dimensions than declared. Rows that hold them are"
            " then invalid.",
        ),
    ] = False,
) -> None:
    """Write pydantic models of tables, for [bold]model=[/] of a handler.

    Enums become StrEnums, composites named tuples; comments become docstrings.
    """
    request = Request(tuple(tables), narrow)
    found = _read(request, config, dsn)
    if found.missing:
        names = ", ".join(map(str, found.missing))
        raise RelationMissing(f"there is no table {names}", hint="names are case-sensitive")
    source = write(request, found)
    if output is None:
        typer.echo(source, nl=False)
        return
    _written(output, source)
    typer.echo(f"wrote {output}", err=True)


@app.command()
def check(
    file: File,
    config: ConfigFile = None,
    dsn: Dsn = None,
    *,
    diff: Annotated[bool, typer.Option("--diff", help="Show how the text would change.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare a file of models with the tables that it names; exit 78 when they differ.

    Prints each difference in words. Changes nothing.
    """
    before = _text(file)
    request = Request.of(before)
    after = write(request, _read(request, config, dsn))
    found = differences(before, after)
    if json:
        typer.echo(msgspec.json.encode({"file": str(file), "differences": found}).decode())
    else:
        _show(file, found)
    if diff and not json:
        _show_diff(file, before, after)
    if found:
        counted = "1 difference" if len(found) == 1 else f"{len(found)} differences"
        raise ModelsDrifted(
            f"{file} is not what the database gives: {counted}",
            hint=f"walstream models generate {request} -o {file}",
        )


def _show(file: Path, found: list[Difference]) -> None:
    for one in found:
        typer.echo(str(one))
    if not found:
        typer.echo(f"{file} is up to date")


def _show_diff(file: Path, before: str, after: str) -> None:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        str(file),
        "the database",
    )
    typer.echo("".join(lines), nl=False)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {_reason(error)}") from None


def _written(file: Path, source: str) -> None:
    try:
        file.write_text(source, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {_reason(error)}") from None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8"


def _read(request: Request, file: Path | None, dsn: str | None) -> Found:
    patterns = request.patterns
    return _with_catalog(file, dsn, lambda catalog: read_tables(catalog, patterns))


def _with_catalog(file: Path | None, dsn: str | None, work: Callable[[Catalog], Awaitable[T]]) -> T:
    settings = load_config(file, dsn)
    logs.configure("warning")

    async def run() -> T:
        catalog = Catalog(
            settings.postgres.catalog_dsn(), application_name=settings.postgres.application_name
        )
        try:
            return await work(catalog)
        finally:
            await catalog.close()

    return asyncio.run(run())
