"""Traces by OpenTelemetry: a span for each call of a destination, when that is asked for.

The span is the current one while the handler or sink works, so that its own spans are children, and
instrumented clients pass the trace on. Spans hold what logs hold: names, counts, ids and types of
errors, never a row's value or an exception's text.

Where spans go is told by OpenTelemetry's own OTEL_... variables. A program that has configured a
provider keeps it.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Final

from psycopg.conninfo import conninfo_to_dict

from walstream.changes import Change, Message
from walstream.destinations import Destination, Handler, HandlerFunction, Item, Sink
from walstream.errors import SetupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import TracerProvider

_EXPORTERS: Final = "opentelemetry_traces_exporter"
"""The group of entry points under which packages offer exporters."""

_OTLP: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""The entry points of OTLP's protocols; the first one is OpenTelemetry's default."""


def start_tracing(*, slot: str, dsn: str) -> Tracing:
    """Begin to trace, with the program's provider or one made by the environment.

    Args:
        slot: where the changes come from.
        dsn: of their database.

    Raises:
        SetupError: a package is missing, or the environment names what there is not.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: F401, PLC0415
    except ImportError:
        raise SetupError(
            "tracing.enabled is true, and OpenTelemetry is not installed",
            hint='pip install "walstream[tracing]"',
        ) from None
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):  # nobody has configured one
        provider = _make_provider()
        trace.set_tracer_provider(provider)
    return Tracing(provider, slot=slot, database=str(conninfo_to_dict(dsn).get("dbname") or ""))


class Tracing:
    """Makes destinations that open a span around each of their calls."""

    def __init__(self, provider: TracerProvider, *, slot: str, database: str = "") -> None:
        """Trace with a provider.

        Args:
            provider: OpenTelemetry's, with where spans go.
            slot: where the changes come from.
            database: theirs; empty where it is not known.
        """
        from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415 - optional

        self._tracer = provider.get_tracer("walstream", version("walstream"))
        self._kind, self._failed = SpanKind.CONSUMER, StatusCode.ERROR
        self._always = {
            "messaging.system": "walstream",
            "messaging.operation.name": "deliver",
            "messaging.operation.type": "process",
            "messaging.destination.name": slot,
            "db.system.name": "postgresql",
        }
        if database:
            self._always["db.namespace"] = database

    def traced(self, destination: Destination) -> Destination:
        """Return the destination with spans around its calls; it stays as it is itself."""
        if not isinstance(destination, Handler):
            return _TracedSink(destination, self)
        handler = copy.copy(destination)
        handler.function = self._traced_function(destination)
        return handler

    def _traced_function(self, handler: Handler) -> HandlerFunction:
        function, name = handler.function, handler.name

        async def call_in_loop(sent: Item | list[Item], *connection: Any) -> Any:
            with self.span(name, sent):
                return await function(sent, *connection)

        def call_in_thread(sent: Item | list[Item], *connection: Any) -> Any:
            with self.span(name, sent):
                return function(sent, *connection)

        return call_in_loop if handler.is_async else call_in_thread

    @contextmanager
    def span(self, name: str, sent: Item | Sequence[Item]) -> Iterator[None]:
        """Open a span for a call of a destination, and let it be the current one.

        Args:
            name: of the destination.
            sent: what it is called with.
        """
        with self._tracer.start_as_current_span(
            f"deliver {name}",
            kind=self._kind,
            attributes={**self._always, "walstream.destination": name, **_attributes(sent)},
            record_exception=False,  # its text may hold a row's values
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", _type_name(error))
                span.set_status(self._failed)
                raise


class _TracedSink:
    """A sink with spans around ``take``; what only some sinks have, it has if the sink has it."""

    def __init__(self, sink: Sink, tracing: Tracing) -> None:
        self.name = sink.name
        self._sink = sink
        self._tracing = tracing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)  # ``max_changes`` and ``reopen``

    async def open(self) -> None:
        await self._sink.open()

    async def take(self, changes: Sequence[Change]) -> None:
        with self._tracing.span(self.name, changes):
            await self._sink.take(changes)

    async def close(self) -> None:
        await self._sink.close()


def _attributes(sent: Item | Sequence[Item]) -> Mapping[str, str | int]:
    """Say what a call is about; a table and an operation only when there is no other in it."""
    if isinstance(sent, Change | Message):
        return {"messaging.message.id": sent.id, **_common([sent])}
    return {"messaging.batch.message_count": len(sent), **_common(sent)}


def _common(items: Sequence[Item]) -> Mapping[str, str | int]:
    changes = [item for item in items if isinstance(item, Change)]
    found: dict[str, str | int] = {"walstream.changes": len(items)}
    if items:
        found["walstream.first_change"] = items[0].id
        found["walstream.last_change"] = items[-1].id
    named = {
        "db.collection.name": {str(relation) for relation in {one.relation for one in changes}},
        "db.operation.name": {str(operation) for operation in {one.operation for one in changes}},
        "walstream.prefix": {item.prefix for item in items if isinstance(item, Message)},
    }
    for key, names in named.items():
        if len(names) == 1:
            found[key] = names.pop()
    return found


def _type_name(error: BaseException) -> str:
    kind = type(error)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


# Where spans go


def _make_provider() -> TracerProvider:
    """Make a provider as the environment says; the SDK itself reads what it says of the rest."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    is_named = named or bool(os.environ.get("OTEL_SERVICE_NAME"))
    provider = TracerProvider(
        resource=Resource.create({} if is_named else {"service.name": "walstream"})
    )
    for exporter in _exporters():
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporters() -> list[SpanExporter]:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = os.environ.get("OTEL_TRACES_EXPORTER", "").split(",")
    wanted = [name.strip() for name in names if name.strip()] or ["otlp"]
    return [_exporter(name) for name in wanted if name != "none"]


def _exporter(name: str) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415 - optional

        # Not to the standard output, which carries data only; one line each, as logs are.
        return ConsoleSpanExporter(
            out=sys.stderr, formatter=lambda span: f"{span.to_json(indent=None)}\n"
        )
    for candidate in _otlp_exporters() if name == "otlp" else [name]:
        for entry_point in entry_points(group=_EXPORTERS, name=candidate):
            exporter: SpanExporter = entry_point.load()()
            return exporter
    raise SetupError(
        f"no package that is installed exports traces to {name}",
        hint="pip install opentelemetry-exporter-otlp-proto-http, or name another exporter in"
        " OTEL_TRACES_EXPORTER: console writes spans to stderr, none nowhere",
    )


def _otlp_exporters() -> list[str]:
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    for variable in variables:
        protocol = os.environ.get(variable, "").strip()
        if not protocol:
            continue
        if protocol not in _OTLP:
            raise SetupError(
                f"{variable} is {protocol!r}; allowed: {', '.join(_OTLP)}",
                hint="set it to the protocol of the collector that is sent to",
            )
        return [_OTLP[protocol]]
    return [*_OTLP.values()]
