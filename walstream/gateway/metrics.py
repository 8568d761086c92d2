"""``/metrics`` for Prometheus, as text or OpenMetrics.

Nothing is counted here: each scrape renders one `Vitals`, under a registry of its own, so that
several applications in one process do not meet. docs/metrics-and-health.md is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from itertools import accumulate
from typing import Final, TypeAlias

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client import exposition as text
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from walstream.errors import Unavailable
from walstream.vitals import (
    CALL_SECONDS_BOUNDS,
    CallTimes,
    LiveVitals,
    Phase,
    RealtimeVitals,
    RowSecurityVitals,
    SlotVitals,
    Vitals,
)

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_VERSION: Final = metadata.version("walstream")
"""Looked up once: each time it costs the event loop milliseconds and, in a working folder in which
files come and go, memory for what was found there (importlib.metadata keeps 128 of its findings).
"""

WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")
"""What pg_replication_slots.wal_status may say, from well to lost."""

Rows: TypeAlias = Iterable[tuple[Sequence[str], float]]
"""The values of labels after ``slot``, and the number."""


def metrics_route(vitals: Callable[[], Vitals]) -> Route:
    """Make the path; it answers GET and HEAD."""
    registry = make_registry(vitals)

    async def metrics(request: Request) -> Response:
        if _wants_openmetrics(request.headers.get("accept", "")):
            body, media_type = _openmetrics(registry), OPENMETRICS
        else:
            body, media_type = text.generate_latest(registry), TEXT
        headers = {"Content-Type": media_type, "Cache-Control": "no-store"}
        return Response(body, headers=headers)

    return Route("/metrics", metrics)


def _openmetrics(registry: CollectorRegistry) -> bytes:
    body: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
    return body


def make_registry(vitals: Callable[[], Vitals]) -> CollectorRegistry:
    """Make a registry that asks for the vitals at each collection."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(VitalsCollector(vitals))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def _wants_openmetrics(accept: str) -> bool:
    """Whether the media type is accepted; which versions and qualities are asked for is not read.

    Prometheus names it whenever it can read it.
    """
    offered = (one.partition(";") for one in accept.split(","))
    return any(
        name.strip().lower() == "application/openmetrics-text" and "q=0" not in rest.split(";")
        for name, _, rest in offered
    )


class VitalsCollector(Collector):
    """Makes metrics of the vitals of the moment."""

    def __init__(self, vitals: Callable[[], Vitals]) -> None:
        self._vitals = vitals

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, also those that have no sample now."""
        vitals = self._vitals()
        yield from _state(vitals)
        yield from _positions(vitals)
        yield from _slot(vitals)
        yield from _changes(vitals)
        yield from _destinations(vitals)
        yield from _in_flight(vitals)
        yield from _connections(vitals)
        yield from _live(vitals.live or LiveVitals(), vitals)
        yield from _realtime(vitals.realtime or RealtimeVitals(), vitals)
        yield from _journal(vitals)


def _state(vitals: Vitals) -> Iterator[Metric]:
    build = InfoMetricFamily("walstream_build", "The version that runs", labels=["slot"])
    build.add_metric([vitals.slot_name], {"version": _VERSION})
    yield build
    yield _gauges(
        vitals,
        "walstream_up_phase",
        "1 for what the process is at, 0 for all else",
        ["phase"],
        [((phase,), phase is vitals.phase) for phase in Phase],
    )
    yield _gauge(vitals, "walstream_ready", "1 when changes get through", vitals.is_ready)
    yield _gauge(vitals, "walstream_alive", "1 when a restart would not help", vitals.is_alive)
    yield _gauge(
        vitals, "walstream_phase_seconds", "How long it is in this phase", vitals.phase_seconds
    )
    yield _gauge(
        vitals,
        "walstream_stalled_seconds",
        "How long changes have not got through although there is work",
        vitals.stalled_seconds,
    )


def _positions(vitals: Vitals) -> Iterator[Metric]:
    yield _gauge(
        vitals,
        "walstream_lag_bytes",
        "WAL between the acknowledged position and the server's",
        vitals.lag_bytes,
    )
    yield _gauge(
        vitals,
        "walstream_lag_seconds",
        "Age of the oldest committed change that is not acknowledged",
        vitals.lag_seconds,
    )
    yield _gauge(
        vitals, "walstream_received_lsn_bytes", "Up to where WAL has come in", vitals.received_lsn
    )
    yield _gauge(vitals, "walstream_flush_lsn_bytes", "Up to where all is taken", vitals.flush_lsn)
    yield _gauge(
        vitals, "walstream_server_lsn_bytes", "The end of the server's WAL", vitals.server_lsn
    )


def _slot(vitals: Vitals) -> Iterator[Metric]:
    """Make metrics of what the server said of the slot; without samples where it did not say."""
    slot = vitals.slot or SlotVitals()
    yield _gauge(
        vitals,
        "walstream_confirmed_flush_lsn_bytes",
        "What the server has recorded as confirmed",
        None if vitals.slot is None else slot.confirmed_flush_lsn,
    )
    yield _gauge(
        vitals,
        "walstream_slot_age_seconds",
        "How long ago the server said what is told of the slot",
        None if vitals.slot is None else slot.age_seconds,
    )
    yield _gauge(
        vitals,
        "walstream_retained_wal_bytes",
        "WAL on the server's disk that is kept for the slot",
        slot.retained_wal_bytes,
    )
    yield _gauge(
        vitals,
        "walstream_safe_wal_size_bytes",
        "WAL that can be written before the slot may be lost",
        slot.safe_wal_size_bytes,
    )
    status = slot.wal_status
    statuses = [] if status is None else list(dict.fromkeys((*WAL_STATUSES, status)))
    yield _gauges(
        vitals,
        "walstream_wal_status",
        "1 for the state of the slot's WAL, 0 for all else",
        ["status"],
        [((one,), one == status) for one in statuses],
    )
    yield _gauge(
        vitals,
        "walstream_spilled_transactions",
        "Transactions that the walsender spilled to disk while decoding",
        slot.spilled_transactions,
    )
    yield _gauge(
        vitals,
        "walstream_spills",
        "How often the walsender spilled to disk while decoding",
        slot.spills,
    )
    yield _gauge(
        vitals,
        "walstream_spilled_bytes",
        "What the walsender spilled to disk while decoding",
        slot.spilled_bytes,
    )


def _changes(vitals: Vitals) -> Iterator[Metric]:
    yield _counter(
        vitals, "walstream_transactions_total", "Transactions received", vitals.transactions
    )
    yield _counter(
        vitals, "walstream_changes_received_total", "Changes received", vitals.changes_received
    )
    yield _counter(vitals, "walstream_messages_total", "Logical messages received", vitals.messages)
    yield _counters(
        vitals,
        "walstream_changes_total",
        "Changes by relation, operation, and whether a route kept them",
        ["schema", "table", "operation", "outcome"],
        [
            ((one.relation.schema, one.relation.name, one.operation, one.outcome), one.count)
            for one in vitals.changes
        ],
    )
    yield _counters(
        vitals,
        "walstream_route_changes_total",
        "Changes that a route kept or dropped, or lacked a column of its filter",
        ["route", "outcome"],
        _route_outcomes(vitals),
    )
    yield _counters(
        vitals,
        "walstream_lost_changes_total",
        "Changes that Postgres could not send for lack of a replica identity",
        ["table", "operation"],
        [((one.table, one.operation), one.count) for one in vitals.lost],
    )


def _route_outcomes(vitals: Vitals) -> Rows:
    """Add up routes of one name, which are allowed where nothing is kept under it."""
    outcomes: dict[tuple[str, str], int] = {}
    for route in vitals.routes:
        for outcome in ("matched", "filtered", "absent"):
            key = (route.name, outcome)
            outcomes[key] = outcomes.get(key, 0) + getattr(route, outcome)
    return outcomes.items()


def _destinations(vitals: Vitals) -> Iterator[Metric]:
    found = vitals.destinations
    yield _counters(
        vitals,
        "walstream_deliveries_total",
        "What became of the changes that were handed to a destination",
        ["destination", "outcome"],
        [
            ((one.name, outcome), getattr(one, outcome))
            for one in found
            for outcome in ("delivered", "skipped", "dead_lettered", "parked", "redelivered")
        ],
    )
    yield _counters(
        vitals,
        "walstream_retries_total",
        "Calls of a destination after the first for the same change",
        ["destination"],
        [((one.name,), one.retries) for one in found],
    )
    calls = HistogramMetricFamily(
        "walstream_handler_seconds",
        "How long calls of a destination took",
        labels=["slot", "destination"],
    )
    for one in found:
        calls.add_metric([vitals.slot_name, one.name], _buckets(one.calls), one.calls.total_seconds)
    yield calls
    yield _gauges(
        vitals,
        "walstream_held_seconds",
        "How long the call that lasts longest has lasted so far",
        ["destination"],
        [((one.name,), one.held_seconds) for one in found],
    )
    yield _gauges(
        vitals,
        "walstream_waiting_changes",
        "Changes that are handed to a destination and not taken",
        ["destination"],
        [((one.name,), one.waiting) for one in found],
    )
    yield _gauge(
        vitals, "walstream_dead_letters", "Changes in the dead-letter store", vitals.dead_letters
    )


def _buckets(calls: CallTimes) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in CALL_SECONDS_BOUNDS), "+Inf"]
    counts = calls.counts or (0,) * len(bounds)
    return list(zip(bounds, accumulate(counts), strict=True))


def _in_flight(vitals: Vitals) -> Iterator[Metric]:
    yield _gauge(
        vitals,
        "walstream_in_flight_changes",
        "Changes that are handed over and not taken",
        vitals.in_flight_changes,
    )
    yield _gauge(
        vitals, "walstream_in_flight_bytes", "The size of their records", vitals.in_flight_bytes
    )
    yield _gauge(
        vitals,
        "walstream_in_flight_transactions",
        "Transactions that have begun to come and are not acknowledged",
        vitals.in_flight_transactions,
    )


def _connections(vitals: Vitals) -> Iterator[Metric]:
    yield _counter(vitals, "walstream_sessions_total", "Streams begun", vitals.sessions)
    reasons = {kind.__name__: 0 for kind in Unavailable.__subclasses__()} | dict(vitals.reconnects)
    yield _counters(
        vitals,
        "walstream_reconnects_total",
        "Times that it went to connect again, by the name of the error",
        ["reason"],
        [((reason,), count) for reason, count in sorted(reasons.items())],
    )
    yield _counters(
        vitals,
        "walstream_reloads_total",
        "Times that the configuration was read again",
        ["outcome"],
        [(("applied",), vitals.reloads), (("refused",), vitals.reloads_refused)],
    )
    yield _gauge(
        vitals,
        "walstream_heartbeat_round_trip_seconds",
        "How long the last heartbeat was under way through the server's WAL",
        vitals.heartbeat_seconds,
    )


def _live(live: LiveVitals, vitals: Vitals) -> Iterator[Metric]:
    yield _gauge(vitals, "walstream_live_clients", "Clients that read changes", live.clients)
    yield _gauge(
        vitals, "walstream_live_cohorts", "Clients that see different things", live.cohorts
    )
    yield _counter(
        vitals,
        "walstream_live_published_changes",
        "Changes that were published to clients",
        live.published_changes,
    )
    yield _counter(
        vitals,
        "walstream_live_sent_changes",
        "Changes that were sent, to each client that sees them",
        live.sent_changes,
    )
    yield _counters(
        vitals,
        "walstream_live_ended",
        "Streams of clients that have ended, by why",
        ["reason"],
        [((reason,), count) for reason, count in live.ended.items()],
    )
    yield from _row_security(live.row_security or RowSecurityVitals(), vitals)


def _row_security(asked: RowSecurityVitals, vitals: Vitals) -> Iterator[Metric]:
    counters: list[tuple[str, str, int]] = [
        ("questions", "Questions to the server about row security", asked.questions),
        ("asked_rows", "Rows that were asked about, for each reader", asked.asked),
        ("hidden_rows", "Rows of these that were not shown", asked.hidden),
        ("failures", "Questions that the server did not answer", asked.failed),
    ]
    for name, documentation, value in counters:
        yield _counter(vitals, f"walstream_row_security_{name}", documentation, value)


def _realtime(realtime: RealtimeVitals, vitals: Vitals) -> Iterator[Metric]:
    gauges: list[tuple[str, str, int]] = [
        ("sockets", "WebSockets of clients", realtime.sockets),
        ("channels", "Channels that they are in, counted for each socket", realtime.channels),
        ("rooms", "Channels that somebody is in", realtime.rooms),
        ("presences", "Those who let others see that they are present", realtime.presences),
    ]
    for name, documentation, value in gauges:
        yield _gauge(vitals, f"walstream_realtime_{name}", documentation, value)
    yield _counter(
        vitals,
        "walstream_realtime_broadcasts_total",
        "Broadcasts that were taken, from sockets and by HTTP",
        realtime.broadcasts,
    )
    yield _counter(
        vitals,
        "walstream_realtime_sent_broadcasts_total",
        "Broadcasts that were sent, to each who is there",
        realtime.sent_broadcasts,
    )
    yield _counters(
        vitals,
        "walstream_realtime_refusals_total",
        "What was refused to clients, or ended, by why",
        ["reason"],
        [((reason,), count) for reason, count in realtime.refusals.items()],
    )


def _journal(vitals: Vitals) -> Iterator[Metric]:
    """Make metrics of the journal; without one they have no samples."""
    journal = vitals.journal
    found = [] if journal is None else [journal]
    gauges: list[tuple[str, str, list[float | None]]] = [
        ("bytes", "What the journal's files take", [one.bytes for one in found]),
        ("changes", "Changes in the journal", [one.changes for one in found]),
        ("oldest_seconds", "Age of the oldest change", [one.oldest_seconds for one in found]),
        ("failed", "1 when it could not be written to", [bool(one.failure) for one in found]),
    ]
    for name, documentation, values in gauges:
        rows = [((), value) for value in values if value is not None]
        yield _gauges(vitals, f"walstream_journal_{name}", documentation, [], rows)
    yield _counters(
        vitals,
        "walstream_journal_appended_changes_total",
        "Changes that were appended to the journal",
        [],
        [((), one.appended) for one in found],
    )


def _gauge(vitals: Vitals, name: str, documentation: str, value: float | None) -> Metric:
    return _gauges(vitals, name, documentation, [], [] if value is None else [((), value)])


def _counter(vitals: Vitals, name: str, documentation: str, value: float) -> Metric:
    return _counters(vitals, name, documentation, [], [((), value)])


def _gauges(
    vitals: Vitals, name: str, documentation: str, labels: Sequence[str], rows: Rows
) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=["slot", *labels])
    for values, number in rows:
        family.add_metric([vitals.slot_name, *values], number)
    return family


def _counters(
    vitals: Vitals, name: str, documentation: str, labels: Sequence[str], rows: Rows
) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=["slot", *labels])
    for values, number in rows:
        family.add_metric([vitals.slot_name, *values], number)
    return family
