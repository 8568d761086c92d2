"""``Walstream``: where handlers are attached, and what ``walstream run handlers:stream`` runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import structlog

from walstream import config as configuration
from walstream import logs
from walstream.catalog import Catalog
from walstream.config import CallSpec, Config, MessageSpec, RouteSpec
from walstream.config.live import LiveSinkConfig
from walstream.daemon import Daemon
from walstream.destinations import Handler, HandlerFunction
from walstream.errors import SetupError, UsageError
from walstream.gateway.parts import Parts
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.parking import Parking
from walstream.replay import Replay
from walstream.summary import Summary
from walstream.typed import RowModel
from walstream.vitals import Phase, Vitals

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Function = TypeVar("Function", bound=HandlerFunction)


class Walstream:
    """The handlers of one application.

    ::

        stream = Walstream()

        @stream.on("public.messages_v2", "insert", where="conversation_id=eq.abc-123")
        async def greet(change: Change) -> None:
            print("New message:", change.row["content"])
    """

    def __init__(self) -> None:
        self.handlers: list[tuple[RouteSpec | MessageSpec, Handler]] = []
        self._mounted: list[Parts] = []
        self._daemon: Daemon | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def on(  # noqa: PLR0913 - a route's parts, each by its name
        self,
        table: str,
        *operations: str,
        where: str | None = None,
        changed: str | Sequence[str] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        mask: Mapping[str, str] | None = None,
        leaving: bool = False,
        model: type[Any] | None = None,
        batch: int | None = None,
        linger_seconds: float | None = None,
        transactions: bool = False,
        max_transaction_changes: int | None = None,
        concurrency: int = 1,
        key: str | Sequence[str] | None = None,
        visible: bool = False,
        transactional: str | None = None,
        since: str | None = None,
        attempts: int | None = None,
        deadline_seconds: float | None = None,
        on_failure: Literal["stop", "dead_letter", "skip"] | None = None,
        name: str = "",
    ) -> Callable[[Function], Function]:
        """Attach a function to the changes of a table.

        ``async def`` functions run in the event loop, others in threads. A function may be attached
        several times. Each attachment gets its changes in commit order, one after another, and
        independently of all others.

        Args:
            table: ``schema.table``; ``*`` stands for all, for either part.
            operations: any of ``insert``, ``update``, ``delete``, ``truncate``; none means all.
            where: a filter such as ``status=eq.active,amount=gte.10``. Truncates have no row: with
                a filter they come only when named among the operations.
            changed: of updates only those that gave one of these columns another value. Needs
                REPLICA IDENTITY FULL for columns outside of the key.
            include: the columns to see; None for all.
            exclude: columns not to see.
            mask: how to disguise columns: ``null``, ``redact``, ``keep-last-N``, ``hash``.
            leaving: see also updates whose old row passes the filter and whose new row does not,
                with ``change.leaving`` set. Needs REPLICA IDENTITY FULL.
            model: a pydantic model or dataclass that ``change.row`` shall be.
            batch: call with a list of at most so many changes.
            linger_seconds: how long a batch waits to be full; 0.05 without.
            transactions: call with a list of all changes of one transaction.
            max_transaction_changes: a larger transaction is refused; 10,000 without.
            concurrency: so many calls at a time; in commit order only per key.
            key: the columns that make the key; the primary key without. Dead letters go by it too.
            visible: wait until other sessions see the change's transaction.
            transactional: the connection string of a database. The function gets a connection as
                second argument, in a transaction that also records how far it is: what comes again
                is recognised, and does not reach the function.
            since: at the first start of a handler of this name deliver what is in the journal from
                then on, before anything else: so long ago (``2h``), a time, an LSN, the id of a
                change, or ``beginning`` for all that is there. Masked as routed to the live sink.
            attempts: how often it is called before ``on_failure``; the configuration's without.
            deadline_seconds: no attempt begins later than that after the first one.
            on_failure: ``stop`` the stream, keep the change as a ``dead_letter``, or ``skip`` it.
            name: what logs, dead letters and metrics call the handler; the function's name without.

        Raises:
            ConfigError: with one sentence for each mistake.
            TypeError: the function cannot be called like that, or the model is none.
        """
        where_from = name or f"handler of {table}"
        spec = RouteSpec.declared(
            where_from,
            table=table,
            operations=list(operations) or None,
            where=where,
            changed=_names(changed),
            columns={
                "include": None if include is None else list(_names(include) or ()),
                "exclude": list(_names(exclude) or ()),
                "mask": dict(mask or {}),
            },
            leaving=leaving,
            attempts=attempts,
            deadline_seconds=deadline_seconds,
            on_failure=on_failure,
        )
        calls = CallSpec.declared(
            where_from,
            batch=batch,
            linger_seconds=linger_seconds,
            transactions=transactions,
            max_transaction_changes=max_transaction_changes,
            concurrency=concurrency,
            key=_names(key),
            visible=visible,
            transactional=transactional,
            since=since,
        )
        options = calls.options(None if model is None else RowModel(model))

        def attach(function: Function) -> Function:
            self._attach(spec, Handler(function, name=name, options=options))
            return function

        return attach

    def on_message(  # noqa: PLR0913 - a route's parts, each by its name
        self,
        prefix: str,
        *,
        visible: bool = False,
        transactional: str | None = None,
        attempts: int | None = None,
        deadline_seconds: float | None = None,
        on_failure: Literal["stop", "dead_letter", "skip"] | None = None,
        name: str = "",
    ) -> Callable[[Function], Function]:
        """Attach a function to logical messages: what ``pg_logical_emit_message`` writes.

        Args:
            prefix: of the messages; with a ``*`` at its end for all that begin so.
            visible: as in `on`; for messages that belong to a transaction.
            transactional: as in `on`.
            attempts: as in `on`.
            deadline_seconds: as in `on`.
            on_failure: as in `on`.
            name: as in `on`.

        Raises:
            ConfigError: with one sentence for each mistake.
            TypeError: the function cannot be called like that.
        """
        where_from = name or f"handler of messages {prefix}"
        spec = MessageSpec.declared(
            where_from,
            prefix=prefix,
            attempts=attempts,
            deadline_seconds=deadline_seconds,
            on_failure=on_failure,
        )
        calls = CallSpec.declared(where_from, visible=visible, transactional=transactional)

        def attach(function: Function) -> Function:
            self._attach(spec, Handler(function, name=name, options=calls.options(None)))
            return function

        return attach

    def _attach(self, spec: RouteSpec | MessageSpec, handler: Handler) -> None:
        if self._daemon is not None:
            raise UsageError(
                f"{handler.name} is attached while the application runs, and would not be called",
                hint="attach all handlers first",
            )
        self.handlers.append((spec, handler))

    async def run(
        self, config: Config | Path | str | None = None, *, until: str | None = None
    ) -> Summary:
        """Stream until `stop` is called, or until a position is acknowledged.

        Args:
            config: the configuration, or the path of a file; None for ``walstream.toml`` in the
                current folder, if there is one, and the environment.
            until: an LSN, or ``now`` for where the server stands at the start.

        Raises:
            WalstreamError: what stopped the stream; connections that are lost are opened again.
        """
        if not isinstance(config, Config):
            config = configuration.load(None if config is None else Path(config))
        if not structlog.is_configured():  # by default structlog prints to the standard output
            logs.configure(config.log.level, config.log.format)
        if self._daemon is not None:
            raise UsageError("this application is running already", hint="make another Walstream")
        self._loop = asyncio.get_running_loop()
        self._daemon = Daemon(config, self.handlers, until=until)
        try:
            return await self._daemon.run()
        finally:
            for parts in self._mounted:
                await parts.close(self._daemon.drain_seconds)
            self._daemon = None

    def stop(self) -> None:
        """End `run`: finish the transactions that are being delivered, confirm, return.

        It may be called in any thread, by a ``def`` handler too.
        """
        if self._daemon is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._daemon.stop)

    def http_app(self, config: Config | Path | str | None = None) -> ASGIApp:
        """Make an ASGI application for a program of one's own: health, metrics, changes, dashboard.

        It tells of the `run` of this object in the same event loop, whose configuration then needs
        no ``http.listen``. Hosts and origins are left to the program around::

            app = Starlette(routes=[Mount("/walstream", stream.http_app("walstream.toml"))])

        Args:
            config: as for `run`, and the same.

        Raises:
            ConfigError: the configuration is wrong.
            SetupError: ``walstream[http]`` is not installed.
        """
        if not isinstance(config, Config):
            config = configuration.load(None if config is None else Path(config))
        try:
            from walstream.gateway.app import make_app  # noqa: PLC0415 - needs the extra
            from walstream.gateway.paths import make_paths  # noqa: PLC0415 - the same
        except ImportError as error:
            message = f"the module {error.name} is not installed"
            raise SetupError(message, hint='pip install "walstream[http]"') from None
        parts = Parts.of(
            config,
            vitals=self.vitals,
            hub=partial(self._hub, _hub_to_be(config)),
            letters=self._parking,
            make_replay=self._make_replay,
        )
        self._mounted.append(parts)
        return make_app(self.vitals, make_paths(parts))

    def _hub(self, to_be: Hub | None) -> Hub | None:
        return to_be if self._daemon is None else self._daemon.hub()

    def _parking(self) -> Parking | None:
        return None if self._daemon is None else self._daemon.parking

    def _make_replay(self) -> Replay:
        if self._daemon is None:
            raise UsageError("nothing runs here", hint="replay while the application runs")
        return self._daemon.make_replay()

    def vitals(self) -> Vitals:
        """Say how it is at this moment; before and after `run` it is stopped."""
        if self._daemon is None:
            stopped, slot_name = Phase.STOPPED, ""
            return Vitals(stopped, 0.0, slot_name, is_ready=False, is_alive=True)
        vitals = self._daemon.vitals()
        if vitals.realtime is None and self._mounted:
            realtime = self._mounted[-1].realtime_vitals()
            vitals = msgspec.structs.replace(vitals, realtime=realtime)
        return vitals

    @property
    def is_ready(self) -> bool:
        """Whether it streams, and changes get through."""
        return self._daemon is not None and self._daemon.is_ready


def _hub_to_be(config: Config) -> Hub | None:
    """Return what answers while nothing runs: that the stream has not begun."""
    if not any(isinstance(sink, LiveSinkConfig) for sink in config.sinks.values()):
        return None
    catalog = Catalog(config.postgres.catalog_dsn, application_name="walstream")
    return Hub(catalog, Recent(max_changes=0, max_bytes=1))


def _names(columns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    return (columns,) if isinstance(columns, str) else tuple(columns)
