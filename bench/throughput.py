"""Both clients drain the same WAL, each from a slot of its own, one after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Final, Literal

import msgspec
import psycopg

from bench import workload
from bench.client import Drain, Drained, Job, Kind
from bench.processes import Usage, Worker, run_program
from walstream.cluster import PrivateCluster
from walstream.lsn import Lsn

_START: Final = re.compile(r'START_REPLICATION SLOT "(\w+)" LOGICAL \S+ \((.*)\)')
_OPTION: Final = re.compile(r""""([^"]+)" '((?:[^']|'')*)'""")


class Measures(msgspec.Struct, frozen=True):
    """What was measured, or medians of it. CPU time is the client's own, user and system."""

    pg_recvlogical_rows_per_second: float
    walstream_rows_per_second: float
    ratio: float
    pg_recvlogical_cpu_microseconds_per_row: float
    walstream_cpu_microseconds_per_row: float
    walstream_peak_mib: float


class Round(msgspec.Struct, frozen=True):
    """Both clients, one after the other; ``delivered`` counts calls of walstream's handler."""

    first: Literal["pg_recvlogical", "walstream"]
    delivered: int
    measures: Measures


class Throughput(msgspec.Struct, frozen=True):
    """All rounds over one WAL of ``rows`` updates, ``transaction_rows`` in a transaction."""

    rows: int
    transaction_rows: int
    record_bytes: float
    rounds: list[Round]
    medians: Measures


class KindMeasures(msgspec.Struct, frozen=True):
    """What one kind of handler reached, as medians; ``ratio`` is to ``async def``."""

    kind: str
    rows_per_second: float
    ratio: float
    cpu_microseconds_per_row: float
    peak_mib: float


class Startup(msgspec.Struct, frozen=True):
    """Seconds that are not about rows.

    An empty run drains a slot that holds nothing; as much is part of every round. Starting Python
    and loading the modules is not: it comes before walstream's clock starts.
    """

    walstream_load: float
    walstream_empty_run: float
    pg_recvlogical_empty_run: float


class Contest:
    """The two clients on one cluster, both connected by TCP.

    What walstream asks wal2json for is read from the server's log, pg_recvlogical is made to ask
    for the same, and the log is looked at again after every run.
    """

    def __init__(self, cluster: PrivateCluster, connection: psycopg.Connection) -> None:
        self._cluster = cluster
        self._connection = connection
        self.options: dict[str, str] = {}

    def startup(self, repetitions: int) -> Startup:
        """Let both drain nothing, and learn walstream's options from it."""
        loads, ours, theirs = [], [], []
        for _ in range(repetitions):
            with workload.slot(self._connection, "nothing"):
                started = time.monotonic()
                drained = self._walstream("nothing", workload.end_of_wal(self._connection))
                loads.append(drained.started - started)
                ours.append(drained.seconds)
            self.options = self._logged_options("nothing")
            with workload.slot(self._connection, "nothing"):
                usage = self._pg_recvlogical("nothing", workload.end_of_wal(self._connection))
                theirs.append(usage.seconds)
        return Startup(median(loads), median(ours), median(theirs))

    def measure(self, rows: int, transaction_rows: int, rounds: int) -> Throughput:
        """Write the WAL once, and let both drain it in each round; they take turns in beginning."""
        with workload.slot(self._connection, "origin"):
            end = workload.update_rows(self._connection, rows, transaction_rows)
            record_bytes = workload.record_bytes(self._connection, "origin", self.options)
            played = [self._round(number, rows, end) for number in range(rounds)]
        medians = _medians([one.measures for one in played])
        return Throughput(rows, transaction_rows, record_bytes, played, medians)

    def kinds(self, rows: int, transaction_rows: int, rounds: int) -> list[KindMeasures]:
        """Write the WAL once, and let each kind of handler drain it in each round."""
        measured: dict[Kind, list[Drained]] = {kind: [] for kind in Kind}
        with workload.slot(self._connection, "origin"):
            end = workload.update_rows(self._connection, rows, transaction_rows)
            for number in range(rounds):
                # In each round others come first: what the machine does besides hits all alike.
                kinds = list(Kind)
                for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                    drained = self._drain_ours(end, kind)
                    assert drained.delivered == rows, f"{kind}: {drained.delivered} delivered"
                    measured[kind].append(drained)
        return [_kind_measures(kind, measured, rows) for kind in Kind]

    def _round(self, number: int, rows: int, end: Lsn) -> Round:
        first: Literal["pg_recvlogical", "walstream"]
        if number % 2 == 0:
            first, theirs, ours = "pg_recvlogical", self._drain_theirs(end), self._drain_ours(end)
        else:
            first, ours, theirs = "walstream", self._drain_ours(end), self._drain_theirs(end)
        assert ours.delivered == rows, f"{ours.delivered} of {rows} rows were delivered"
        measures = Measures(
            pg_recvlogical_rows_per_second=rows / theirs.seconds,
            walstream_rows_per_second=rows / ours.seconds,
            ratio=theirs.seconds / ours.seconds,
            pg_recvlogical_cpu_microseconds_per_row=theirs.cpu_seconds / rows * 1e6,
            walstream_cpu_microseconds_per_row=ours.cpu_seconds / rows * 1e6,
            walstream_peak_mib=ours.peak_mib,
        )
        return Round(first, ours.delivered, measures)

    def _drain_theirs(self, end: Lsn) -> Usage:
        with workload.slot(self._connection, "theirs", copy_of="origin"):
            usage = self._pg_recvlogical("theirs", end)
            self._check("theirs", end)
        return usage

    def _drain_ours(self, end: Lsn, kind: Kind = Kind.ASYNC) -> Drained:
        with workload.slot(self._connection, "ours", copy_of="origin"):
            drained = self._walstream("ours", end, kind)
            self._check("ours", end)
        return drained

    def _check(self, slot: str, end: Lsn) -> None:
        """Make sure that the client did what is compared."""
        assert workload.confirmed(self._connection, slot) >= end, f"{slot} was not drained"
        assert self._logged_options(slot) == self.options, f"{slot} was drained with other options"

    def _logged_options(self, slot: str) -> dict[str, str]:
        """Return what the last client of a slot asked the output plugin for."""
        log = self._cluster.log.read_text(encoding="utf-8", errors="replace")
        listed = [options for name, options in _START.findall(log) if name == slot]
        return {name: value.replace("''", "'") for name, value in _OPTION.findall(listed[-1])}

    def _walstream(self, slot: str, end: Lsn, kind: Kind = Kind.ASYNC) -> Drained:
        job = Job(self._cluster.loopback_conninfo(), slot, Drain(until=str(end), kind=kind))
        with Worker("bench.client", job) as client:
            return client.result(Drained)

    def _pg_recvlogical(self, slot: str, end: Lsn) -> Usage:
        command = [
            self._cluster.programs.path("pg_recvlogical"),
            "--start",
            "--no-loop",
            "--file=/dev/null",
            f"--dbname={self._cluster.conninfo(host='127.0.0.1')}",
            f"--slot={slot}",
            f"--endpos={end}",
            *_arguments(self.options),
        ]
        return run_program(command, {"PGPASSWORD": self._cluster.password})


def _arguments(options: Mapping[str, str]) -> Iterator[str]:
    return (f"--option={name}={value}" for name, value in options.items())


def _kind_measures(kind: Kind, measured: Mapping[Kind, list[Drained]], rows: int) -> KindMeasures:
    ratios = [
        theirs.seconds / ours.seconds
        for theirs, ours in zip(measured[Kind.ASYNC], measured[kind], strict=True)
    ]
    return KindMeasures(
        kind=kind.value,
        rows_per_second=median(rows / drained.seconds for drained in measured[kind]),
        ratio=median(ratios),
        cpu_microseconds_per_row=median(
            drained.cpu_seconds / rows * 1e6 for drained in measured[kind]
        ),
        peak_mib=max(drained.peak_mib for drained in measured[kind]),
    )


def _medians(measured: list[Measures]) -> Measures:
    return Measures(*map(median, zip(*map(msgspec.structs.astuple, measured), strict=True)))
