"""``/status.json``: the vitals as the dashboard reads them, for roles that may see them.

It names tables, routes and destinations, and holds no value of a row. Counters only grow while the
process lives; whoever asks twice has the rate, by ``at``, which is in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import metadata
from itertools import accumulate
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from walstream.access import Reader
from walstream.gateway.answers import NO_STORE, Admits, forbidden, reader_of, refusing
from walstream.live.hub import Hub
from walstream.lsn import Lsn
from walstream.vitals import (
    CALL_SECONDS_BOUNDS,
    CallTimes,
    DestinationVitals,
    JournalVitals,
    Vitals,
)

_VERSION: Final = metadata.version("walstream")
"""Looked up once: see `walstream.gateway.metrics`."""

_COUNTERS: Final = (
    *("transactions", "messages", "sessions", "reconnects"),
    *("reloads", "reloads_refused"),
)


def status_route(
    vitals: Callable[[], Vitals], hub: Callable[[], Hub | None], gate: Admits
) -> Route:
    """Make the path; it answers GET and HEAD.

    Args:
        vitals: asked once for each request, in the event loop.
        hub: with the clients; None while there is no live sink.
        gate: who may see them.
    """

    async def status(request: Request) -> Response:
        reader = await reader_of(request, gate)
        if not reader.can_see_status:
            raise forbidden(reader, "see the figures", "status")
        told = {**described(vitals()), "reach": _reach(hub()), "reader": _who(reader)}
        body = _ENCODER.encode(told)
        return Response(body, media_type="application/json", headers=NO_STORE)

    return Route("/status.json", refusing(status))


def described(vitals: Vitals) -> dict[str, Any]:
    """Return what is told, made of what JSON has; positions are text, as Postgres prints them."""
    return {
        "at": time.time(),
        "version": _VERSION,
        "slot_name": vitals.slot_name,
        "phase": vitals.phase,
        "phase_seconds": vitals.phase_seconds,
        "ready": vitals.is_ready,
        "alive": vitals.is_alive,
        "reason": vitals.reason,
        "stalled_seconds": vitals.stalled_seconds,
        "stalled_because": vitals.stalled_because,
        "positions": _named(vitals, "received_lsn", "flush_lsn", "server_lsn"),
        "lag": {"bytes": vitals.lag_bytes, "seconds": vitals.lag_seconds},
        "in_flight": {
            "changes": vitals.in_flight_changes,
            "bytes": vitals.in_flight_bytes,
            "transactions": vitals.in_flight_transactions,
        },
        "counters": {"changes": vitals.changes_received, **_named(vitals, *_COUNTERS)},
        "dead_letters": vitals.dead_letters,
        "slot": vitals.slot,
        "heartbeat_seconds": vitals.heartbeat_seconds,
        "live": vitals.live,
        "journal": None if vitals.journal is None else _journal(vitals.journal),
        "tables": [
            {
                "schema": one.relation.schema,
                "table": one.relation.name,
                "operation": one.operation,
                "outcome": one.outcome,
                "count": one.count,
            }
            for one in vitals.changes
        ],
        "lost": vitals.lost,
        "routes": vitals.routes,
        "destinations": [_destination(one) for one in vitals.destinations],
    }


def _named(vitals: Vitals, *names: str) -> dict[str, Any]:
    return {name: getattr(vitals, name) for name in names}


def _journal(journal: JournalVitals) -> dict[str, Any]:
    return msgspec.structs.asdict(journal) | {"begins": str(journal.begins)}


def _destination(one: DestinationVitals) -> dict[str, Any]:
    described = msgspec.structs.asdict(one)
    described["calls"] = {
        "count": sum(one.calls.counts),
        "seconds": one.calls.total_seconds,
        "p99_seconds": _p99(one.calls),
    }
    return described


def _p99(calls: CallTimes) -> float | None:
    """Return the bound that 99 of 100 calls stayed within; None for none, or beyond the last."""
    wanted = sum(calls.counts) * 0.99
    for bound, within in zip(CALL_SECONDS_BOUNDS, accumulate(calls.counts), strict=False):
        if wanted and within >= wanted:
            return bound
    return None


def _reach(hub: Hub | None) -> Mapping[str, Any] | None:
    """Say from where to where clients can read."""
    if hub is None:
        return None
    return {"position": str(hub.position), "begins": str(hub.history.begins)}


def _who(reader: Reader) -> Mapping[str, Any]:
    return {
        "role": reader.role,
        "can_operate": reader.can_operate,
        "expires_at": reader.expires_at,
    }


def _plain(value: object) -> object:
    if isinstance(value, Lsn):
        return str(value)
    raise NotImplementedError


_ENCODER: Final = msgspec.json.Encoder(enc_hook=_plain)
