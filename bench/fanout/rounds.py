"""One scenario: rounds at full speed, of walstream and of its peer, and commits at an even pace."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Final

import msgspec
import psycopg

from bench.fanout.clients import Arrived
from bench.fanout.crowd import Crowd, Spoken
from bench.fanout.peer import Listening, Serve, Served
from bench.fanout.scenarios import Scenario
from bench.fanout.subject import Subject

VERIFIED_ROWS: Final = 2
"""So many rows for each subscriber, and at least `VERIFIED_AT_LEAST`, are compared one by one."""

VERIFIED_AT_LEAST: Final = 300

PEER_EVENTS: Final = 500_000
"""The peer's rounds have no more: with a write for each event they would take minutes."""

_WRITE_SQL: Final = """
    DO $$
    BEGIN
        FOR start IN {first}..{last} BY {transaction_rows} LOOP
            INSERT INTO public.messages
            SELECT i, 'conversation-' || i % {conversations}, 'ada', 'message number ' || i,
                   'sent', i, now(), now()
              FROM generate_series(start, least(start + {transaction_rows} - 1, {last})) AS i;
            COMMIT;
        END LOOP;
    END $$
"""

_INSERT_SQL: Final = """
    INSERT INTO public.messages VALUES (%s, %s, 'ada', %s, 'sent', %s, now(), now())
"""


class Effort(msgspec.Struct, frozen=True):
    """How much of everything is done: events in a round, rounds, seconds of even pace."""

    events: int
    shared_events: int
    rounds: int
    transaction_rows: list[int]
    latency_seconds: float

    def changes(self, scenario: Scenario) -> int:
        """Return how many are written in a round."""
        wanted = self.shared_events if scenario.is_shared else self.events
        return max(wanted // scenario.events_per_change, 1)


class Round(msgspec.Struct, frozen=True):
    """What was delivered in full, from just before the first row is written to the last event.

    ``written_per_second`` is how fast the rows came into the table. ``walstream_cpu_microseconds``
    and ``clients_cpu_microseconds`` are user and system time by event, ``events_per_read`` what a
    client gets at once. ``slot_lag_bytes`` is that at the last event; the slot has passed it
    ``confirmed_seconds`` later, for positions are reported once a second.
    """

    changes_per_second: float
    events_per_second: float
    written_per_second: float
    walstream_cpu_microseconds: float
    clients_cpu_microseconds: float
    event_bytes: float
    events_per_read: float
    slot_lag_bytes: float
    confirmed_seconds: float


class PeerRound(msgspec.Struct, frozen=True):
    """What asyncio alone delivers of ready-made bytes to the same clients."""

    events_per_second: float
    cpu_microseconds: float


class Throughput(msgspec.Struct, frozen=True):
    """All rounds of one size of transactions; ``ratio`` is of the medians, ours to the peer's."""

    transaction_rows: int
    changes: int
    rounds: list[Round]
    medians: Round
    peer: PeerRound
    ratio: float


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from just before an INSERT that commits is sent until a client has the event.

    ``part`` is that of the rate that is wished for. Both clocks are the monotonic one of the same
    machine. Of each change ``last_p99_milliseconds`` counts only the client that gets it last.
    """

    part: float
    commits: int
    commits_per_second: float
    p50_milliseconds: float
    p95_milliseconds: float
    p99_milliseconds: float
    maximum_milliseconds: float
    last_p99_milliseconds: float


class Memory(msgspec.Struct, frozen=True):
    """Resident memory of walstream before its clients come, with all connected, and at the end."""

    before_mib: float
    connected_mib: float
    end_mib: float
    bytes_per_subscriber: float


class Measured(msgspec.Struct, frozen=True):
    """All about one scenario. ``connect_seconds`` is until all clients stream."""

    scenario: Scenario
    connect_seconds: float
    memory: Memory
    throughput: list[Throughput]
    latencies: list[Latency]


class Rows:
    """The numbers of the rows of a table, each written once."""

    def __init__(self) -> None:
        self._next = 1

    def take(self, rows: int) -> range:
        """Return the next numbers."""
        taken = range(self._next, self._next + rows)
        self._next = taken.stop
        return taken


def measure(
    connection: psycopg.Connection, scenario: Scenario, subject: Subject, effort: Effort
) -> Measured:
    """Measure with a walstream that nobody has asked for anything yet."""
    stage = _Stage(connection, scenario, subject)
    stage.warm_up()
    before_mib = subject.resident_mib()
    with Crowd(scenario, subject.address) as crowd:
        connected_mib = subject.resident_mib()
        stage.verify(crowd)
        played = [
            (transaction_rows, stage.play(crowd, effort, transaction_rows))
            for transaction_rows in effort.transaction_rows
        ]
        latencies = [
            stage.keep_pace(crowd, part, effort.latency_seconds)
            for part in scenario.paced_parts
            if effort.latency_seconds
        ]
        end_mib = subject.resident_mib()
    grown = (connected_mib - before_mib) * (1 << 20) / scenario.subscribers
    return Measured(
        scenario=scenario,
        connect_seconds=crowd.connect_seconds,
        memory=Memory(before_mib, connected_mib, end_mib, grown),
        throughput=[
            _throughput(scenario, effort.changes(scenario), transaction_rows, rounds)
            for transaction_rows, rounds in played
        ],
        latencies=latencies,
    )


class _Stage:
    """A table that is written to, and a walstream whose clients are told of it."""

    def __init__(
        self, connection: psycopg.Connection, scenario: Scenario, subject: Subject
    ) -> None:
        self._connection = connection
        self._scenario = scenario
        self._subject = subject
        self._rows = Rows()
        connection.execute("TRUNCATE public.messages")

    def warm_up(self) -> None:
        """Let walstream load what it needs for any client."""
        few = msgspec.structs.replace(self._scenario, subscribers=10, groups=1, by_role=False)
        with Crowd(few, self._subject.address) as crowd:
            self._deliver(crowd, self._rows.take(100), is_kept=True)

    def verify(self, crowd: Crowd) -> None:
        """Compare all that each client gets of some rows."""
        rows = max(VERIFIED_ROWS * self._scenario.conversations, VERIFIED_AT_LEAST)
        self._deliver(crowd, self._rows.take(rows), is_kept=True)

    def play(self, crowd: Crowd, effort: Effort, transaction_rows: int) -> list[Round]:
        """Write as fast as the server can, in several rounds."""
        changes = effort.changes(self._scenario)
        return [
            self._round(crowd, self._rows.take(changes), transaction_rows)
            for _ in range(effort.rounds)
        ]

    def keep_pace(self, crowd: Crowd, part: float, seconds: float) -> Latency:
        """Commit one row at a time, at a part of the rate that is wished for."""
        per_second = self._scenario.changes_per_second * part
        rows = self._rows.take(max(round(per_second * seconds), 2))
        crowd.expect(rows, is_timed=True)
        started = time.monotonic()
        sent = self._commit_evenly(rows, per_second)
        kept_per_second = len(rows) / (time.monotonic() - started)
        crowd.arrived()
        return _latency(part, kept_per_second, sent, crowd.verify(rows))

    def _deliver(self, crowd: Crowd, rows: range, *, is_kept: bool) -> None:
        crowd.expect(rows, is_kept=is_kept)
        self._write(rows, transaction_rows=10)
        crowd.arrived()
        crowd.verify(rows)

    def _round(self, crowd: Crowd, rows: range, transaction_rows: int) -> Round:
        crowd.expect(rows)
        used_before, started = self._subject.cpu_seconds(), time.monotonic_ns()
        self._write(rows, transaction_rows)
        written_seconds = (time.monotonic_ns() - started) / 1e9
        arrived = crowd.arrived()
        used = self._subject.cpu_seconds() - used_before
        lag_bytes = self._subject.lag_bytes()
        confirmed_seconds = self._subject.wait_until_confirmed()
        crowd.verify(rows)
        seconds = _seconds(started, arrived)
        events = len(rows) * self._scenario.events_per_change
        return Round(
            changes_per_second=len(rows) / seconds,
            events_per_second=events / seconds,
            written_per_second=len(rows) / written_seconds,
            walstream_cpu_microseconds=used / events * 1e6,
            clients_cpu_microseconds=sum(one.cpu_seconds for one in arrived) / events * 1e6,
            event_bytes=sum(one.received_bytes for one in arrived) / events,
            events_per_read=events / sum(one.reads for one in arrived),
            slot_lag_bytes=float(lag_bytes),
            confirmed_seconds=confirmed_seconds,
        )

    def _write(self, rows: range, transaction_rows: int) -> None:
        statement = _WRITE_SQL.format(
            first=rows.start,
            last=rows.stop - 1,
            transaction_rows=transaction_rows,
            conversations=self._scenario.conversations,
        )
        self._connection.execute(statement.encode())

    def _commit_evenly(self, rows: range, per_second: float) -> dict[int, int]:
        """Return when each statement, which commits, was sent, by the row's number."""
        sent: dict[int, int] = {}
        started = time.monotonic()
        for number, row in enumerate(rows):
            conversation = f"conversation-{row % self._scenario.conversations}"
            values = [row, conversation, f"message number {row}", row]
            _sleep_until(started + number / per_second)
            sent[row] = time.monotonic_ns()
            self._connection.execute(_INSERT_SQL, values)
        return sent


def _throughput(
    scenario: Scenario, changes: int, transaction_rows: int, rounds: list[Round]
) -> Throughput:
    medians = _medians(rounds)
    peer = _play_peer(scenario, changes, transaction_rows, len(rounds))
    return Throughput(
        transaction_rows=transaction_rows,
        changes=changes,
        rounds=rounds,
        medians=medians,
        peer=peer,
        ratio=medians.events_per_second / peer.events_per_second,
    )


def _play_peer(scenario: Scenario, changes: int, transaction_rows: int, rounds: int) -> PeerRound:
    numbers = Rows()
    most = max(PEER_EVENTS // scenario.events_per_change, transaction_rows)
    peer = Spoken("bench.fanout.peer")
    try:
        with Crowd(scenario, peer.hear(Listening).address) as crowd:
            played = []
            for _ in range(rounds):
                rows = numbers.take(min(changes, most))
                crowd.expect(rows)
                peer.tell(
                    Serve(
                        rows.start,
                        rows.stop,
                        transaction_rows,
                        scenario.conversations,
                        scenario.speech,
                    )
                )
                arrived, served = crowd.arrived(), peer.hear(Served)
                crowd.verify(rows)
                events = len(rows) * scenario.events_per_change
                seconds = _seconds(served.nanoseconds, arrived)
                played.append(PeerRound(events / seconds, served.cpu_seconds / events * 1e6))
    finally:
        peer.end()
    return PeerRound(
        median(one.events_per_second for one in played),
        median(one.cpu_microseconds for one in played),
    )


def _latency(
    part: float, per_second: float, sent: dict[int, int], times: Sequence[tuple[int, int]]
) -> Latency:
    by_row = defaultdict[int, list[float]](list)
    for row, nanoseconds in times:
        by_row[row].append((nanoseconds - sent[row]) / 1e6)
    assert by_row.keys() == sent.keys(), "not every commit arrived"
    milliseconds = [one for took in by_row.values() for one in took]
    return Latency(
        part=part,
        commits=len(sent),
        commits_per_second=per_second,
        p50_milliseconds=median(milliseconds),
        p95_milliseconds=_percentile(milliseconds, 95),
        p99_milliseconds=_percentile(milliseconds, 99),
        maximum_milliseconds=max(milliseconds),
        last_p99_milliseconds=_percentile([max(took) for took in by_row.values()], 99),
    )


def _percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _seconds(started: int, arrived: list[Arrived]) -> float:
    return (max(one.nanoseconds for one in arrived) - started) / 1e9


def _sleep_until(moment: float) -> None:
    rest = moment - time.monotonic()
    if rest > 0:
        time.sleep(rest)


def _medians(rounds: list[Round]) -> Round:
    return Round(*map(median, zip(*map(msgspec.structs.astuple, rounds), strict=True)))
