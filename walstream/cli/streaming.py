"""``walstream run`` and ``walstream tail``."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import secrets
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import structlog
import typer

from walstream import logs
from walstream.app import Walstream
from walstream.cli.options import ConfigFile, Dsn, load_config, tell_ignored_environment
from walstream.cli.reporting import report
from walstream.config import Config, RouteSpec, TracingConfig
from walstream.config.live import HttpConfig, LiveSinkConfig
from walstream.daemon import Daemon
from walstream.destinations import Sink
from walstream.errors import EX_OK, ConfigError, OutputClosed, UsageError, WalstreamError
from walstream.recording import Recorder
from walstream.service import Stoppable, run_until_signal, serve
from walstream.sinks.limited import LimitedSink, NullSink
from walstream.sinks.stdout import StdoutSink
from walstream.sinks.terminal import TerminalSink

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.cli")


def run(
    app: Annotated[
        str | None,
        typer.Argument(
            metavar="APP",
            help="Handlers as module:name of a Walstream object, such as handlers:stream.",
        ),
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="LSN|now",
            help="Stop once all that committed before this position is acknowledged.",
        ),
    ] = None,
    *,
    accept_gap: Annotated[
        bool,
        typer.Option(
            "--accept-gap",
            help="Begin at the slot's position although the state file says that changes are"
            " missing, or were delivered that this server does not have.",
        ),
    ] = False,
) -> None:
    """Stream changes from the slot to handlers and sinks, until stopped.

    SIGINT or SIGTERM finishes the transaction in hand, confirms, and exits 0; a second one exits at
    once. SIGHUP reads the configuration again: routes, sinks and the log level are taken over while
    it streams, and files are reopened.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    settings = load_config(config, dsn)
    logs.configure(settings.log.level, settings.log.format)
    tell_ignored_environment()
    app = app or settings.handlers.app
    handlers = load_app(app).handlers if app else []
    tell_unheard(settings)
    daemon = Daemon(settings, handlers, until=until, accept_gap=accept_gap)
    collect_less()
    try:
        summary = asyncio.run(serve(daemon, lambda: load_config(config, dsn)))
    except WalstreamError as error:
        leave(daemon, error)
        raise
    log.info(
        "stopped",
        transactions=summary.transactions,
        changes=summary.changes,
        delivered=summary.delivered,
        flush_lsn=str(summary.flush_lsn),
    )
    leave(daemon)


def tail(  # noqa: PLR0913 - the options of a command
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLE", help="schema.table, * for either part; all without."),
    ] = None,
    config: ConfigFile = None,
    dsn: Dsn = None,
    operation: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--operation",
            metavar="OPERATION",
            help="insert, update, delete or truncate; may be repeated. All without.",
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help="Such as status=eq.active,amount=gte.10.")
    ] = None,
    *,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="End after so many changes.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a recording for walstream test and walstream explain, and show nothing"
            " (unless --json is given). IT HOLDS WHOLE ROWS, UNMASKED, whatever the configuration"
            " masks, and also those that --where and --operation do not show.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON lines, also on a terminal.")] = False,
) -> None:
    """Watch changes live, from now on, through a temporary slot that ends with the command.

    On a terminal the changes are laid out for people, in a pipe they are JSON lines.

    A recording ends with a whole transaction; with [bold]--limit[/] it is the one in which there
    are so many changes. Nobody else may read its file.
    """
    settings = load_config(config, dsn)
    logs.configure("warning" if settings.log.level == "info" else settings.log.level)
    settings = settings.model_copy(
        update={
            "slot": settings.slot.model_copy(
                update={"name": f"walstream_tail_{secrets.token_hex(4)}"}
            ),
            "routes": [],
            "sinks": {},
            # What the service beside it does is not done twice.
            "http": HttpConfig(),
            "tracing": TracingConfig(),
            "stream": settings.stream.model_copy(update={"heartbeat_seconds": None}),
        }
    )
    sink = _tail_sink(is_recording=record is not None, json=json)
    if limit is not None and record is None:
        sink = LimitedSink(sink, limit)
    try:
        specs = [
            RouteSpec.declared("tail", table=table, operations=operation or None, where=where)
            for table in tables or ["*.*"]
        ]
    except ConfigError as error:
        raise UsageError(error.message) from None
    with ExitStack() as opened:
        recorder = None
        if record is not None:
            recorder = opened.enter_context(Recorder(record, limit=limit))
        daemon = Daemon(
            settings,
            sinks=[(spec, sink) for spec in specs],
            temporary_slot=True,
            reconnect=False,
            recorder=recorder,
        )
        for one in (recorder, sink):
            if isinstance(one, Recorder | LimitedSink):
                one.on_full = daemon.stop
        try:
            asyncio.run(run_until_signal(daemon, daemon.run))
        except OutputClosed:  # the reader of the pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if recorder is not None:
        typer.echo(f"recorded {recorder.changes} changes in {record}", err=True)


def _tail_sink(*, is_recording: bool, json: bool) -> Sink:
    if json:
        return StdoutSink("tail")
    if is_recording:
        return NullSink("tail")
    return TerminalSink("tail") if sys.stdout.isatty() else StdoutSink("tail")


COLLECT_AFTER: Final = 5_000
"""So many more objects than before, and Python looks for cycles among the young ones.

What httpx leaves of each request is such a cycle; 20,000 would be 10 MB of them.
"""


def collect_less() -> None:
    """Let Python look for reference cycles less often; the modules are not looked at any more.

    What is in flight are thousands of small objects without cycles. With Python's own threshold of
    700 a batch of 500 changes costs 1 µs of CPU time more for each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 10, 10)


def tell_unheard(settings: Config) -> None:
    """Say that what is taken for clients by HTTP reaches nobody; a journal can be replayed."""
    has_live_sink = any(isinstance(sink, LiveSinkConfig) for sink in settings.sinks.values())
    if has_live_sink and settings.http.listen is None and settings.journal.path is None:
        log.warning("live_sink_unheard", hint="nothing listens: write listen under [http]")
    if settings.journal.path is not None and not has_live_sink:
        log.warning("journal_unused", hint='route tables to a sink of type = "live"')
    if settings.realtime.enabled and settings.http.listen is None:
        log.warning("realtime_unheard", hint="nothing listens: write listen under [http]")
    elif settings.realtime.enabled and not has_live_sink:
        log.warning("realtime_without_changes", hint='route tables to a sink of type = "live"')


def load_app(path: str) -> Walstream:
    """Import a Walstream object by ``module:name``; the current folder comes first.

    Raises:
        UsageError: there is none at the path.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        message = f"{path!r} does not name handlers"
        raise UsageError(message, hint="write module:name, such as handlers:stream")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        message = f"there is no module {error.name}"
        raise UsageError(message, hint="the current folder and PYTHONPATH are searched") from None
    except WalstreamError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's module
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}"
        message = f"the module {module_name} cannot be imported: {type(error).__name__}: {error}"
        raise UsageError(message, hint=f"it was raised at {place}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            message = f"the module {module_name} has no {name}"
            raise UsageError(message)
        found = getattr(found, part)
    if not isinstance(found, Walstream):
        message = f"{path} is a {type(found).__name__}, not a Walstream"
        raise UsageError(message)
    return found


def leave(stoppable: Stoppable, error: WalstreamError | None = None) -> None:
    """Exit here and now if a handler's function is still running: Python would wait for it."""
    if not stoppable.is_busy:
        return
    if error is not None:
        report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if error else EX_OK)
