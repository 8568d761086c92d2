"""What configuration and application make: routes, and the way to their destinations.

Built here is everything that needs no connection yet; the daemon streams to it, a replay delivers
letters to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, assert_never

from walstream.catalog import Catalog
from walstream.config import (
    Config,
    FileSinkConfig,
    MessageSpec,
    RouteSpec,
    SinkConfig,
    StdoutSinkConfig,
)
from walstream.dead_letters import DeadLetterStore, make_store
from walstream.delivery import Delivery, Limits
from walstream.destinations import Destination, Handler, Sink
from walstream.errors import ConfigError, UsageError
from walstream.parking import Parking
from walstream.policy import OnFailure
from walstream.router import MessageRoute, Route, Router
from walstream.sinks.file import FileSink
from walstream.sinks.stdout import StdoutSink
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
    ) -> None:
        """Build everything that needs no connection.

        Args:
            config: what to do.
            handlers: what was attached to the application.
            sinks: destinations besides those of the configuration.
            replaying: what will be delivered are dead letters.

        Raises:
            UsageError: nothing is routed anywhere.
            ConfigError: a route cannot be made.
        """
        self._config = config
        self.sinks = [_sink(name, sink) for name, sink in config.sinks.items()]
        self.sinks += [sink for _, sink in sinks]
        self.router = make_router(
            config, handlers, sinks=sinks, by_name={sink.name: sink for sink in self.sinks}
        )
        self.catalog = Catalog(
            config.postgres.catalog_dsn(),
            application_name=f"{config.postgres.application_name} catalog"[:63],
        )
        self.targets = _targets(config, [handler for _, handler in handlers], replaying=replaying)

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
        stream = self._config.stream
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
            show_error_messages=self._config.log.error_messages,
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
            spec.route(name, destination, masking_key, defaults, own)
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


def _sink(name: str, config: SinkConfig) -> Sink:
    match config:
        case StdoutSinkConfig():
            return StdoutSink(name)
        case FileSinkConfig():
            return FileSink(name, config.path)
        case _:
            assert_never(config)


def _verify_routes(routes: Sequence[AnyRoute]) -> None:
    """Refuse no routes at all, and routes of one name where something is kept under the name."""
    if not routes:
        raise UsageError(
            "nothing is routed anywhere",
            hint="name handlers (module:name), or write a [[routes]] into the configuration file",
        )
    names = [route.name for route in routes]
    problems = [
        f"{route.name}: {names.count(route.name)} routes have this name, and dead letters and what"
        " a transactional handler records are kept by it; give each a name of its own"
        for route in routes
        if names.count(route.name) > 1 and _keeps_something(route)
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _keeps_something(route: AnyRoute) -> bool:
    return _is_transactional(route) or route.policy.on_failure is OnFailure.DEAD_LETTER


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
