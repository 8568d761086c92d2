"""How the process is: what `/metrics`, `/health`, systemd and the logs tell, taken at one moment.

Nothing here asks a clock or the server: the daemon puts a `Vitals` together when somebody wants to
know, from what the parts of the path count anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from walstream.changes import Operation, Relation
from walstream.lsn import ZERO, Lsn
from walstream.positions import BEGINNING, Position
from walstream.summary import DestinationSummary, RouteSummary


class Phase(StrEnum):
    """What the process is at.

    ``connecting`` includes looking at the server and the slot. ``standing_by`` waits for a slot
    that another process streams from, ``waiting`` for the next attempt to connect.
    """

    CONNECTING = "connecting"
    STANDING_BY = "standing_by"
    STREAMING = "streaming"
    WAITING = "waiting"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Standstill:
    """Since when nothing has moved although there is work."""

    def __init__(self) -> None:
        self._progress: object = None
        self._since = 0.0

    def seconds(self, now: float, progress: object, *, has_work: bool) -> float:
        """Return how long the progress has been the same.

        Args:
            now: monotonic seconds.
            progress: anything that changes when something moves.
            has_work: whether it should be moving.
        """
        if not has_work or progress != self._progress:
            self._progress, self._since = progress, now
        return now - self._since


class Outcome(StrEnum):
    """What became of a change before its destinations: kept by a route, or by none."""

    ROUTED = "routed"
    DROPPED = "dropped"


class ChangeCount(msgspec.Struct, frozen=True):
    """So many changes of a relation and operation had this outcome."""

    relation: Relation
    operation: Operation
    outcome: Outcome
    count: int


class LostCount(msgspec.Struct, frozen=True):
    """Updates or deletes that Postgres could not send, for lack of a replica identity."""

    table: str
    operation: str
    count: int


class CallTimes(msgspec.Struct, frozen=True):
    """How long a destination's calls took: how many within each bound, and all in all.

    ``counts`` has one more than `CALL_SECONDS_BOUNDS`: those that took longer than the last.
    """

    counts: tuple[int, ...] = ()
    total_seconds: float = 0.0


CALL_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""The upper bounds of the buckets that the lengths of calls are counted in, in seconds."""


class DestinationVitals(DestinationSummary, frozen=True):
    """What became of what was handed to a destination, how long it took, and what waits."""

    waiting: int = 0
    held_seconds: float = 0.0
    calls: CallTimes = CallTimes()


class SlotVitals(msgspec.Struct, frozen=True):
    """What the server last said of the slot; None for what its version does not tell.

    ``spilled_bytes`` is what the walsender wrote to disk because ``logical_decoding_work_mem`` did
    not hold it, since the slot's statistics were reset. ``age_seconds`` is how long ago it said so.
    """

    confirmed_flush_lsn: Lsn = ZERO
    restart_lsn: Lsn | None = None
    wal_status: str | None = None
    lag_bytes: int | None = None
    retained_wal_bytes: int | None = None
    safe_wal_size_bytes: int | None = None
    spilled_transactions: int | None = None
    spills: int | None = None
    spilled_bytes: int | None = None
    age_seconds: float = 0.0


class JournalVitals(msgspec.Struct, frozen=True):
    """The journal: how much is in it, and whether it can be written to.

    ``bytes`` is what its files take. Times are those of commits; ``oldest_seconds`` is how long ago
    the oldest was. ``appended`` counts changes since the process began. ``failure`` says why the
    last attempt to write failed; nothing when it did not.
    """

    bytes: int = 0
    changes: int = 0
    oldest_time: datetime | None = None
    newest_time: datetime | None = None
    oldest_seconds: float | None = None
    begins: Position = BEGINNING
    appended: int = 0
    durable: bool = False
    failure: str = ""


class RowSecurityVitals(msgspec.Struct, frozen=True):
    """What was asked of the server's row security.

    ``asked`` counts rows, once for each reader that they are asked for, ``hidden`` those of them
    that were not shown, ``failed`` questions without an answer.
    """

    questions: int = 0
    asked: int = 0
    hidden: int = 0
    failed: int = 0


class LiveVitals(msgspec.Struct, frozen=True):
    """The clients by HTTP.

    ``cohorts`` counts those that see different things. A change is published once and sent to each
    client that sees it. ``ended`` counts streams by why they ended.
    """

    clients: int = 0
    cohorts: int = 0
    published_changes: int = 0
    sent_changes: int = 0
    ended: Mapping[str, int] = {}
    row_security: RowSecurityVitals | None = None


class RealtimeVitals(msgspec.Struct, frozen=True):
    """The clients of Supabase Realtime.

    A socket has channels; a room is a channel's topic, with all who are in it. ``presences`` are
    those who let others see them. A broadcast is taken once and sent to each who is there.
    ``refusals`` counts what was refused, or ended, by why (`walstream.realtime.tally`).
    """

    sockets: int = 0
    channels: int = 0
    rooms: int = 0
    presences: int = 0
    broadcasts: int = 0
    sent_broadcasts: int = 0
    refusals: Mapping[str, int] = {}


class Vitals(msgspec.Struct, frozen=True):
    """The process at one moment.

    ``stalled_seconds`` is how long changes have not got through although there is work, and
    ``stalled_because`` says what holds them up; 0 and nothing when all is well. ``lag_seconds`` is
    the age of the oldest committed change that is not acknowledged, as far as it is known.
    ``heartbeat_seconds`` is how long the last heartbeat was under way, from here to the server's
    WAL and back; None without heartbeats, and before the first.
    ``is_ready`` says that changes get through, ``is_alive`` that a restart would not help.
    """

    phase: Phase
    phase_seconds: float
    slot_name: str
    is_ready: bool
    is_alive: bool
    reason: str = ""
    stalled_seconds: float = 0.0
    stalled_because: str = ""
    received_lsn: Lsn = ZERO
    flush_lsn: Lsn = ZERO
    server_lsn: Lsn = ZERO
    lag_bytes: int = 0
    lag_seconds: float = 0.0
    in_flight_changes: int = 0
    in_flight_bytes: int = 0
    in_flight_transactions: int = 0
    transactions: int = 0
    changes_received: int = 0
    messages: int = 0
    sessions: int = 0
    reconnects: Mapping[str, int] = {}
    reloads: int = 0
    reloads_refused: int = 0
    dead_letters: int | None = None
    slot: SlotVitals | None = None
    changes: tuple[ChangeCount, ...] = ()
    lost: tuple[LostCount, ...] = ()
    routes: tuple[RouteSummary, ...] = ()
    destinations: tuple[DestinationVitals, ...] = ()
    heartbeat_seconds: float | None = None
    live: LiveVitals | None = None
    realtime: RealtimeVitals | None = None
    journal: JournalVitals | None = None
