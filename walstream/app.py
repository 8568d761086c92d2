"""``Walstream``: where handlers are attached, and what ``walstream run handlers:stream`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from walstream import config as configuration
from walstream import logs
from walstream.config import Config, RouteSpec
from walstream.daemon import Daemon, Summary
from walstream.delivery import Handler, HandlerFunction

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
        self.handlers: list[tuple[RouteSpec, Handler]] = []
        self._daemon: Daemon | None = None

    def on(  # noqa: PLR0913 - a route's parts, each by its name
        self,
        table: str,
        *operations: str,
        where: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        mask: Mapping[str, str] | None = None,
        leaving: bool = False,
        name: str = "",
    ) -> Callable[[Function], Function]:
        """Attach a function to the changes of a table.

        ``async def`` functions run in the event loop, others in a thread. A function may be
        attached several times. Handlers are called in commit order, one after another; one that
        raises is called again, and in the end stops the stream with the slot before the change's
        transaction.

        Args:
            table: ``schema.table``; ``*`` stands for all, for either part.
            operations: any of ``insert``, ``update``, ``delete``, ``truncate``; none means all.
            where: a filter such as ``status=eq.active,amount=gte.10``. Truncates have no row: with
                a filter they come only when named among the operations.
            include: the columns to see; None for all.
            exclude: columns not to see.
            mask: how to disguise columns: ``null``, ``redact``, ``keep-last-N``, ``hash``.
            leaving: see also updates whose old row passes the filter and whose new row does not,
                with ``change.leaving`` set. Needs REPLICA IDENTITY FULL.
            name: what logs and metrics call the handler; the function's name without it.

        Raises:
            ConfigError: with one sentence for each mistake.
        """
        spec = RouteSpec.declared(
            name or f"handler of {table}",
            table=table,
            operations=list(operations) or None,
            where=where,
            columns={
                "include": None if include is None else list(include),
                "exclude": list(exclude),
                "mask": dict(mask or {}),
            },
            leaving=leaving,
        )

        def attach(function: Function) -> Function:
            self.handlers.append((spec, Handler(function, name=name)))
            return function

        return attach

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
        self._daemon = Daemon(config, self.handlers, until=until)
        try:
            return await self._daemon.run()
        finally:
            self._daemon = None

    def stop(self) -> None:
        """End `run`: finish the transaction that is being delivered, confirm, return."""
        if self._daemon is not None:
            self._daemon.stop()
