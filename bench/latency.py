"""The time from a commit to the call of the handler."""

from __future__ import annotations

import time
from statistics import median, quantiles
from typing import Final

import msgspec
import psycopg

from bench import workload
from bench.client import Arrivals, Job, Timing
from bench.processes import Worker
from bench.writer import Pace, Written
from walstream.cluster import PrivateCluster

COMMITS_PER_SECOND: Final = 500

_SLOT: Final = "latency"


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from just before the writer sends COMMIT to the first line of the handler.

    Both processes read the monotonic clock of the same machine. Every commit counts, also the
    first, for which walstream asks the catalog about the table. ``commit_milliseconds`` is what
    COMMIT takes the writer, ``round_trip_milliseconds`` a statement that does nothing (medians).
    """

    commits: int
    commits_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float
    maximum_milliseconds: float
    commit_milliseconds: float
    round_trip_milliseconds: float


def measure(cluster: PrivateCluster, connection: psycopg.Connection, commits: int) -> Latency:
    """Commit at an even pace, one row in a transaction, while walstream streams."""
    dsn = cluster.loopback_conninfo()
    with (
        workload.slot(connection, _SLOT),
        Worker("bench.client", Job(dsn, _SLOT, Timing(commits))) as client,
    ):
        while not workload.somebody_streams(connection):
            assert client.is_running, "walstream ended before it streamed"
            time.sleep(0.01)
        with Worker("bench.writer", Pace(dsn, commits, COMMITS_PER_SECOND)) as writer:
            written = writer.result(Written)
        arrivals = client.result(Arrivals)
    return _latency(written, arrivals)


def _latency(written: Written, arrivals: Arrivals) -> Latency:
    assert arrivals.nanoseconds.keys() == written.nanoseconds.keys(), "not every commit arrived"
    milliseconds = [
        (arrivals.nanoseconds[row] - sent) / 1e6 for row, sent in written.nanoseconds.items()
    ]
    return Latency(
        commits=len(milliseconds),
        commits_per_second=written.per_second,
        p50_milliseconds=median(milliseconds),
        p99_milliseconds=quantiles(milliseconds, n=100, method="inclusive")[98],
        maximum_milliseconds=max(milliseconds),
        commit_milliseconds=median(written.commit_seconds) * 1e3,
        round_trip_milliseconds=median(written.round_trip_seconds) * 1e3,
    )
