"""The time from a commit to the call of the handler."""

from __future__ import annotations

import time
from statistics import median, quantiles
from typing import Final

import msgspec
import psycopg

from bench import workload
from bench.client import Arrivals, Timing
from bench.processes import Worker
from bench.writer import Pace, Written
from walstream.cluster import PrivateCluster

COMMITS_PER_SECOND: Final = 500

_SLOT: Final = "latency"


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from just before the writer sends COMMIT to the first line of the handler.

    Both processes read the monotonic clock of the same machine; the first change, for which
    walstream asks the catalog about the table, counts like any other. ``commit_milliseconds`` is
    what COMMIT takes the writer, ``round_trip_milliseconds`` a statement that does nothing.
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
    with workload.slot(connection, _SLOT):
        client = Worker("bench.client", Timing(dsn, _SLOT, changes=commits))
        while not workload.is_streaming(connection, _SLOT):
            time.sleep(0.01)
        written = Worker("bench.writer", Pace(dsn, commits, COMMITS_PER_SECOND)).result(Written)
        arrivals = client.result(Arrivals)
    return _latency(written, arrivals)


def _latency(written: Written, arrivals: Arrivals) -> Latency:
    assert arrivals.nanoseconds.keys() == written.nanoseconds.keys(), "a commit did not arrive"
    milliseconds = [
        (arrivals.nanoseconds[row] - sent) / 1e6 for row, sent in written.nanoseconds.items()
    ]
    return Latency(
        commits=len(milliseconds),
        commits_per_second=written.per_second,
        p50_milliseconds=median(milliseconds),
        p99_milliseconds=quantiles(milliseconds, n=100)[98],
        maximum_milliseconds=max(milliseconds),
        commit_milliseconds=median(written.commit_seconds) * 1e3,
        round_trip_milliseconds=median(written.round_trip_seconds) * 1e3,
    )
