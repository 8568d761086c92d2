"""``walstream replay``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer

from walstream import logs
from walstream.cli.options import ConfigFile, Dsn, load_config
from walstream.cli.routing import App, load_handlers
from walstream.cli.streaming import leave
from walstream.config import RouteSpec, StdoutSinkConfig
from walstream.errors import UsageError, WalstreamError
from walstream.journal_replay import HistoryReplay, HistoryReport, Wish
from walstream.moments import FROM_BEGINNING, Moment, parse_moment
from walstream.positions import BEGINNING
from walstream.service import run_until_signal

_WHICH = "Which changes"


def replay(  # noqa: PLR0913 - one for each option
    app: App = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    *,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="HANDLER_OR_SINK", help="Where to: a handler or a sink, by its name. Needed."
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="2h|ID|LSN|TIME",
            help="What was committed since then; behind a change's id, or behind all that ended at"
            " an LSN. A time without a zone is one of UTC.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    until: Annotated[
        str,
        typer.Option(
            metavar="now|ID|LSN|TIME",
            help="Up to there: with this id, with all that ended at this LSN, or what was committed"
            " before this time.",
            rich_help_panel=_WHICH,
        ),
    ] = "now",
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEMA.TABLE",
            help="Of this table, or of its partitions; may be repeated.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    operation: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--operation",
            "--operations",
            metavar="OPERATION",
            help="insert, update, delete or truncate; may be repeated, or several with commas.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="FILTER",
            help="Such as status=eq.active,amount=gte.10.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    from_beginning: Annotated[
        bool,
        typer.Option(
            "--from-beginning", help="All that is in the journal.", rich_help_panel=_WHICH
        ),
    ] = False,
    accept_gap: Annotated[
        bool,
        typer.Option(
            "--accept-gap",
            help="Begin where the journal does when it does not go back to --since.",
            rich_help_panel=_WHICH,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be delivered, and call nobody.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")] = False,
) -> None:
    """Deliver what is in the journal again, to one handler or sink.

    It goes through the route of the handler or sink: its table, operations, filter and columns, its
    attempts, and what is done with a change that fails. The changes are those that the routes to
    the live sink have kept, masked as these say.

    It works beside a running walstream, which is not disturbed, and without one; the slot is not
    touched. The database is asked only for values of filters that nobody else can read, and by
    handlers with visible=True. Transactional handlers are refused: they have recorded what they
    got.

    Exits 0 when all is delivered, or was skipped or kept as a dead letter as the route says; 75
    when the handler or sink failed; 78 when the journal does not go back to --since. SIGINT or
    SIGTERM finishes what is being delivered, and the summary tells where to go on from; a second
    one exits at once.
    """
    if to is None:
        raise UsageError("replay to whom?", hint="--to names a handler or a sink")
    settings = load_config(config, dsn)
    logs.configure(settings.log.level, settings.log.format)
    begin, asked = _begin(since, from_beginning=from_beginning)
    wish = Wish(
        to=to,
        since=begin,
        asked=asked,
        until=None if until == "now" else _moment("--until", until),
        selection=_selection(table or [], operation or [], where),
        accept_gap=accept_gap,
        is_dry=dry_run,
    )
    replaying = HistoryReplay(settings, load_handlers(settings, app), wish)
    # Where the sink is the standard output, changes go there.
    err = isinstance(settings.sinks.get(to), StdoutSinkConfig)
    try:
        asyncio.run(run_until_signal(replaying, replaying.run))
    except WalstreamError as failure:
        report = replaying.report()
        if report.changes:
            _print(report, as_json=json, is_dry=dry_run, err=err)
        leave(replaying, failure)
        raise
    _print(replaying.report(), as_json=json, is_dry=dry_run, err=err)
    leave(replaying)


def _begin(since: str | None, *, from_beginning: bool) -> tuple[Moment, str]:
    if (since is None) is not from_beginning:
        message = (
            "--since goes without --from-beginning" if from_beginning else "replay since when?"
        )
        hint = "--since 2h, an id, an LSN or a time; or --from-beginning for all that there is"
        raise UsageError(message, hint=hint)
    if since is None:
        return BEGINNING, FROM_BEGINNING
    return _moment("--since", since), since


def _moment(option: str, text: str) -> Moment:
    try:
        return parse_moment(text)
    except ValueError as error:
        message = f"{option}: {error}"
        raise UsageError(message) from None


def _selection(
    tables: list[str], operations: list[str], where: str | None
) -> tuple[RouteSpec, ...]:
    """Make a route of the options for each table; none when nothing is asked for."""
    if not (tables or operations or where):
        return ()
    names = [name.strip() for text in operations for name in text.split(",")]
    return tuple(
        RouteSpec.declared("options", table=table, operations=names or None, where=where)
        for table in tables or ["*.*"]
    )


def _print(report: HistoryReport, *, as_json: bool, is_dry: bool, err: bool) -> None:
    if as_json:
        described: dict[str, Any] = msgspec.structs.asdict(report)
        typer.echo(msgspec.json.encode(described).decode(), err=err)
        return
    read = f"of {report.changes} changes behind {report.begin}"
    if is_dry:
        typer.echo(f"{report.to}: {report.kept} would be delivered {read}", err=err)
    else:
        typer.echo(f"{report.to}: {', '.join(_outcomes(report))} {read}", err=err)
    if report.absent:
        what = f"{report.absent} do not carry a column that a filter reads, and were left out"
        typer.echo(what, err=err)
    if report.lacking:
        what = f"not all of {', '.join(report.lacking)} is in the journal"
        typer.echo(f"{what}: the routes to the live sink do not keep it", err=err)
    if not is_dry:
        rest = "nothing is left" if report.is_done else f"go on with --since {report.position}"
        typer.echo(f"up to {report.position}; {rest}", err=err)


def _outcomes(report: HistoryReport) -> list[str]:
    counts = {
        "delivered": report.delivered,
        "skipped": report.skipped,
        "kept as dead letters": report.dead_lettered,
        "parked behind dead letters": report.parked,
    }
    return [f"{count} {what}" for what, count in counts.items() if count or what == "delivered"]
