"""What configuration and application make: routes, and the way to their destinations.

Built here is everything that needs no connection yet; the daemon streams to it, a replay delivers
letters to it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias, assert_never

import msgspec

from walstream.access.row_security import RowSecurity
from walstream.catalog import Catalog
from walstream.config import (
    Config,
    FileSinkConfig,
    MessageSpec,
    RouteSpec,
    SinkConfig,
    StdoutSinkConfig,
    WebhookSinkConfig,
)
from walstream.config.live import LiveSinkConfig
from walstream.connection import SystemIdentity
from walstream.dead_letters import DeadLetterStore, make_store
from walstream.delivery import Delivery, Limits
from walstream.destinations import Destination, Handler, Sink, since_of
from walstream.errors import ConfigError, UsageError
from walstream.journal import Journal
from walstream.live.history import History, Recent
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink, history_of
from walstream.parking import Parking
from walstream.policy import OnFailure
from walstream.router import MessageRoute, Route, Router
from walstream.sinks.envelopes import Packing
from walstream.sinks.file import FileOptions, FileSink
from walstream.sinks.stdout import StdoutSink
from walstream.tracing import start_tracing
from walstream.transactional import TransactionalTarget

AnyRoute: TypeAlias = Route | MessageRoute
Attached: TypeAlias = tuple[RouteSpec | MessageSpec, Handler]
"""A handler, and what it was attached to."""


class Assembly:
    """Routes, handlers, sinks, the databases of transactional handlers, and the catalog."""

    def __init__(
        self,
        config: Config,
        handlers: Sequence[Attached] = (),
        *,
        sinks: Sequence[tuple[RouteSpec, Sink]] = (),
        replaying: bool = False,
        before: Assembly | None = None,
    ) -> None:
        """Build everything that needs no connection.

        Args:
            config: what to do.
            handlers: what was attached to the application.
            sinks: destinations besides those of the configuration.
            replaying: what will be delivered are dead letters.
            before: what this one takes the place of; what both have in common is used on.

        Raises:
            UsageError: nothing is routed anywhere.
            ConfigError: a route cannot be made.
        """
        self._config = config
        self.catalog = Catalog(
            config.postgres.catalog_dsn,
            application_name=f"{config.postgres.application_name} catalog"[:63],
        )
        if before is not None:
            self.catalog = before.catalog
        self._configured = {
            name: self._sink_again(name, sink, before) for name, sink in config.sinks.items()
        }
        self.sinks = [sink for _, sink in self._configured.values()]
        self.sinks += [sink for _, sink in sinks]
        self.router = make_router(
            config, handlers, sinks=sinks, by_name={sink.name: sink for sink in self.sinks}
        )
        self.targets: dict[Destination, TransactionalTarget]
        if before is not None:
            self.targets = before.targets
            return
        self.targets = _targets(config, [handler for _, handler in handlers], replaying=replaying)

    @property
    def live(self) -> LiveSink | None:
        """The sink that clients are behind, if there is one."""
        return next((sink for sink in self.sinks if isinstance(sink, LiveSink)), None)

    def live_routes(self) -> list[Route]:
        """List the routes that lead to it."""
        return [route for route in self.router.routes if route.destination is self.live]

    def live_history(self, identity: SystemIdentity) -> str:
        """Say under which rules changes are kept for clients (`history_of`)."""
        config = self._config
        origin = f"{config.slot.name}@{identity.systemid} {identity.timeline}"
        return history_of(origin, self.live_routes(), config.masking.secret())

    def _sink_again(
        self, name: str, config: SinkConfig, before: Assembly | None
    ) -> tuple[SinkConfig, Sink]:
        kept = None if before is None else before.kept(name, config)
        return config, kept or _sink(name, config, self._config, self.catalog)

    def kept(self, name: str, config: SinkConfig) -> Sink | None:
        """Return the sink of that name, if it was made of the same configuration."""
        its_config, sink = self._configured.get(name, (None, None))
        return sink if its_config == config else None

    @property
    def routes(self) -> list[AnyRoute]:
        """Those of changes, then those of messages."""
        return _all_routes(self.router)

    def parking(self) -> Parking | None:
        """Return where dead letters go, when a route has them."""
        if any(route.policy.on_failure is OnFailure.DEAD_LETTER for route in self.routes):
            return Parking(letters_of(self._config))
        return None

    def delivery(self, parking: Parking | None) -> Delivery:
        """Return the way to all destinations."""
        config, stream = self._config, self._config.stream
        trace = None
        if config.tracing.enabled:
            dsn = config.postgres.catalog_dsn()
            trace = start_tracing(slot=config.slot.name, dsn=dsn).traced
        return Delivery(
            dict.fromkeys(route.destination for route in self.routes),
            Limits(
                stream.max_in_flight_changes,
                stream.max_in_flight_bytes,
                stream.stuck_after_seconds,
                stream.drain_seconds,
            ),
            parking=parking,
            targets=self.targets,
            wait_until_visible=self.catalog.hold_until_visible,
            show_error_messages=config.log.error_messages,
            trace=trace,
        )


def make_router(
    config: Config,
    handlers: Sequence[Attached],
    *,
    sinks: Sequence[tuple[RouteSpec, Sink]] = (),
    by_name: Mapping[str, Sink] | None = None,
) -> Router:
    """Make the routes of a stream.

    Args:
        config: with the routes to sinks.
        handlers: what was attached to the application.
        sinks: destinations besides those of the configuration.
        by_name: the sinks of the configuration; None where nothing is delivered.

    Raises:
        UsageError: nothing is routed anywhere.
        ConfigError: a route cannot be made.
    """
    masking_key, defaults, own = config.masking.secret(), config.handlers, config.own_tables()
    to_sinks: list[tuple[RouteSpec, str, Sink | None]]
    to_sinks = [(spec, sink.name, sink) for spec, sink in sinks]
    to_sinks += [
        (spec, spec.name or f"routes[{index}]", None if by_name is None else by_name[spec.to])
        for index, spec in enumerate(config.routes)
    ]
    to_handlers = [
        (spec, handler.name, handler) for spec, handler in handlers if isinstance(spec, RouteSpec)
    ]
    router = Router(
        [
            _with_patience(spec.route(name, destination, masking_key, defaults, own))
            for spec, name, destination in (*to_handlers, *to_sinks)
        ],
        [
            spec.route(handler.name, handler, defaults)
            for spec, handler in handlers
            if isinstance(spec, MessageSpec)
        ],
    )
    _verify_routes(_all_routes(router))
    return router


def _with_patience(route: Route) -> Route:
    """Let the route to clients be tried until it works: a change that is left out is a gap."""
    if not isinstance(route.destination, LiveSink):
        return route
    policy = msgspec.structs.replace(
        route.policy, attempts=sys.maxsize, deadline_seconds=None, on_failure=OnFailure.STOP
    )
    return msgspec.structs.replace(route, policy=policy)


def needs_everything(router: Router) -> bool:
    """Whether the server must be asked for all changes, whatever else could be pushed down to it.

    What a transactional handler has recorded must mean the same under other routes.
    """
    return any(map(_is_transactional, _all_routes(router)))


def _all_routes(router: Router) -> list[AnyRoute]:
    return [*router.routes, *router.message_routes]


def letters_of(config: Config, slot: str | None = None) -> DeadLetterStore:
    """Return the store that the configuration names, for its slot or another one.

    Raises:
        ConfigError: a ``dsn_file`` cannot be read.
    """
    section = config.dead_letters
    dsn = ""
    if section.store == "postgres":
        dsn = section.own_dsn() or config.postgres.catalog_dsn()
    return make_store(
        section,
        slot=slot or config.slot.name,
        dsn=dsn,
        application_name=f"{config.postgres.application_name} dead letters"[:63],
    )


def _sink(name: str, config: SinkConfig, settings: Config, catalog: Catalog) -> Sink:
    match config:
        case StdoutSinkConfig():
            return StdoutSink(name)
        case FileSinkConfig():
            return FileSink(
                name,
                config.path,
                FileOptions(
                    fsync=config.fsync,
                    fsync_seconds=config.fsync_seconds,
                    max_bytes=config.max_bytes,
                    max_age_seconds=config.max_age_seconds,
                    keep=config.keep,
                    compress=config.compress,
                ),
            )
        case WebhookSinkConfig():
            return _webhook(name, config, settings.slot.name)
        case LiveSinkConfig():
            return LiveSink(name, Hub(catalog, _history(settings), _row_security(settings)))
        case _:
            assert_never(config)


def _row_security(settings: Config) -> RowSecurity | None:
    section = settings.access.row_security
    if not settings.access.asks_row_security:
        return None
    return RowSecurity(
        lambda: section.own_dsn() or settings.postgres.catalog_dsn(),
        application_name=f"{settings.postgres.application_name} row security"[:63],
        max_connections=section.max_connections,
        timeout_seconds=section.timeout_seconds,
    )


def _history(settings: Config) -> History:
    live, journal = settings.live, settings.journal
    if journal.path is not None:
        return Journal(
            journal.path,
            max_bytes=journal.max_bytes,
            max_age_seconds=journal.max_age_seconds,
            durable=journal.durable,
        )
    return Recent(live.recent_changes, live.recent_bytes)


def _webhook(name: str, config: WebhookSinkConfig, slot: str) -> Sink:
    try:
        from walstream.sinks.webhook import (  # noqa: PLC0415 - few need httpx
            WebhookOptions,
            WebhookSink,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"sinks.{name}: a webhook needs the package {error.name}, which is not installed"],
            hint='pip install "walstream[webhook]"',
        ) from None
    return WebhookSink(
        name,
        WebhookOptions(
            url=config.url.get_secret_value(),
            headers={key: value.get_secret_value() for key, value in config.headers.items()},
            read_keys=lambda: config.signing_keys(name),
            packing=Packing(
                format=config.format,
                source=config.source or f"/walstream/{slot}",
                max_changes=config.max_changes,
                max_request_bytes=config.max_request_bytes,
            ),
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            max_retry_after_seconds=config.max_retry_after_seconds,
            proxy=None if config.proxy is None else config.proxy.get_secret_value(),
            ca_file=config.ca_file,
            verify=config.verify,
            allow_private_redirects=config.allow_private_redirects,
        ),
    )


def _verify_routes(routes: Sequence[AnyRoute]) -> None:
    """Refuse no routes at all, and routes of one name where something is kept under the name."""
    if not routes:
        raise UsageError(
            "nothing is routed anywhere",
            hint="name handlers (module:name), or write a [[routes]] into the configuration file",
        )
    names = [route.name for route in routes]
    problems = [
        f"{route.name}: {names.count(route.name)} routes have this name, and dead letters, what a"
        " transactional handler records, and how far one with since is, are kept by it; give each"
        " a name of its own"
        for route in routes
        if names.count(route.name) > 1 and _keeps_something(route)
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _keeps_something(route: AnyRoute) -> bool:
    return (
        _is_transactional(route)
        or route.policy.on_failure is OnFailure.DEAD_LETTER
        or since_of(route.destination) is not None
    )


def _is_transactional(route: AnyRoute) -> bool:
    destination = route.destination
    return isinstance(destination, Handler) and destination.options.transactional is not None


def _targets(
    config: Config, handlers: Sequence[Handler], *, replaying: bool
) -> dict[Destination, TransactionalTarget]:
    return {
        handler: TransactionalTarget(
            handler.options.transactional,
            slot=config.slot.name,
            route=handler.name,
            application_name=config.postgres.application_name,
            replaying=replaying,
        )
        for handler in handlers
        if handler.options.transactional is not None
    }
