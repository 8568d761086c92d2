"""Made-up vitals: a process with something of everything, and one that has just begun."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from walstream.changes import Operation, Relation
from walstream.lsn import Lsn
from walstream.summary import RouteSummary
from walstream.vitals import (
    CALL_SECONDS_BOUNDS,
    CallTimes,
    ChangeCount,
    DestinationVitals,
    JournalVitals,
    LiveVitals,
    LostCount,
    Outcome,
    Phase,
    RealtimeVitals,
    RowSecurityVitals,
    SlotVitals,
    Vitals,
)

CALLS: Final = CallTimes((*range(len(CALL_SECONDS_BOUNDS)), 7), 12.5)


def full(**differs: Any) -> Vitals:
    """A process that streams, with a sample for every metric."""
    vitals = Vitals(
        phase=Phase.STREAMING,
        phase_seconds=61.5,
        slot_name="shop",
        is_ready=True,
        is_alive=True,
        received_lsn=Lsn.parse("16/B374D848"),
        flush_lsn=Lsn.parse("16/B374A000"),
        server_lsn=Lsn.parse("16/B374D848"),
        lag_bytes=14_408,
        lag_seconds=0.25,
        in_flight_changes=3,
        in_flight_bytes=900,
        in_flight_transactions=2,
        transactions=500,
        changes_received=1234,
        messages=4,
        sessions=2,
        reconnects={"ConnectionLost": 1},
        reloads=3,
        reloads_refused=1,
        dead_letters=5,
        slot=SlotVitals(
            confirmed_flush_lsn=Lsn.parse("16/B3740000"),
            restart_lsn=Lsn.parse("16/B3700000"),
            wal_status="reserved",
            retained_wal_bytes=1 << 24,
            safe_wal_size_bytes=1 << 30,
            spilled_transactions=1,
            spills=2,
            spilled_bytes=1 << 26,
            age_seconds=4.5,
        ),
        changes=(
            ChangeCount(Relation("public", "orders"), Operation.INSERT, Outcome.ROUTED, 1000),
            ChangeCount(Relation("public", "orders"), Operation.DELETE, Outcome.DROPPED, 34),
            ChangeCount(Relation("odd", 'a "b"\\\n é'), Operation.UPDATE, Outcome.ROUTED, 200),
        ),
        lost=(LostCount("public.heap", "update", 6),),
        routes=(RouteSummary("orders", 900, 90, 10), RouteSummary("orders", 1, 2, 3)),
        destinations=(
            DestinationVitals(
                "orders", 900, 8, 1, 2, 3, 4, waiting=3, held_seconds=0.5, calls=CALLS
            ),
            DestinationVitals("archive", 0, 0, 0, 0, 0, 0),
        ),
        heartbeat_seconds=0.02,
        journal=JournalVitals(
            bytes=1 << 20, changes=5000, oldest_seconds=86_400.5, appended=6000, failure="disk full"
        ),
        live=LiveVitals(
            clients=500,
            cohorts=20,
            published_changes=1000,
            sent_changes=50_000,
            ended={"left": 40, "slow": 1},
            row_security=RowSecurityVitals(questions=20, asked=80, hidden=30, failed=2),
        ),
        realtime=RealtimeVitals(
            sockets=400,
            channels=600,
            rooms=30,
            presences=90,
            broadcasts=700,
            sent_broadcasts=9000,
            refusals={"connection_expired": 3, "PrivateOnly": 2, "slow": 1},
        ),
    )
    return msgspec.structs.replace(vitals, **differs)


def young(**differs: Any) -> Vitals:
    """A process that has not connected yet."""
    vitals = Vitals(
        phase=Phase.CONNECTING,
        phase_seconds=0.1,
        slot_name="shop",
        is_ready=False,
        is_alive=True,
        reason="the server is not connected yet",
    )
    return msgspec.structs.replace(vitals, **differs)
