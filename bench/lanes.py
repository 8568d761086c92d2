"""``python -m bench.lanes``: how much more lanes deliver than one call after another does.

Both drain the same backlog, of rows that are all different, through a handler that waits for some
milliseconds; they take turns in beginning. Measured is from the first call to the end of the last.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec
import psycopg

from bench import workload
from walstream import Change, Config, Walstream, logs
from walstream.cluster import PrivateCluster
from walstream.lsn import Lsn

WAYS: Final = ("async", "sync")


class Measured(msgspec.Struct, frozen=True):
    """The calls that were made in a second, with one lane and with many, and their ratio."""

    way: str
    one_lane: float
    lanes: float
    ratio: float


class Clock:
    """Counts calls, from the beginning of the first to the end of the last."""

    def __init__(self, handler_seconds: float) -> None:
        self._handler_seconds = handler_seconds
        self._started = self._ended = 0.0
        self._lock = threading.Lock()
        self.calls = 0

    @property
    def rate(self) -> float:
        """How many calls there were in a second."""
        return self.calls / (self._ended - self._started)

    async def in_loop(self, _: Change) -> None:
        """Wait in the event loop."""
        self._begin()
        await asyncio.sleep(self._handler_seconds)
        self._end()

    def in_thread(self, _: Change) -> None:
        """Wait in a thread."""
        self._begin()
        time.sleep(self._handler_seconds)
        self._end()

    def _begin(self) -> None:
        self._started = self._started or time.monotonic()

    def _end(self) -> None:
        with self._lock:
            self.calls += 1
        self._ended = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print medians."""
    asked = _parser().parse_args(arguments)
    logs.configure("error")
    with (
        PrivateCluster(workload.CLUSTER_SETTINGS) as cluster,
        psycopg.connect(cluster.conninfo(), autocommit=True) as connection,
    ):
        workload.create_table(connection, asked.changes)
        with workload.slot(connection, "origin"):
            end = workload.update_rows(connection, asked.changes, 1)
            for way in WAYS:
                rounds = [
                    _round(cluster, connection, end, way, number, asked)
                    for number in range(asked.rounds)
                ]
                print(_line(rounds, asked))


def _round(
    cluster: PrivateCluster,
    connection: psycopg.Connection,
    end: Lsn,
    way: str,
    number: int,
    asked: argparse.Namespace,
) -> Measured:
    """Drain the backlog with one lane and with many, the other way round in every second round."""
    rates = {}
    for concurrency in (1, asked.lanes) if number % 2 == 0 else (asked.lanes, 1):
        with workload.slot(connection, "ours", copy_of="origin"):
            clock = Clock(asked.milliseconds / 1000)
            asyncio.run(_drain(cluster.conninfo(), end, way, clock, concurrency))
            assert clock.calls == asked.changes, f"{clock.calls} calls of {asked.changes}"
            rates[concurrency] = clock.rate
    return Measured(way, rates[1], rates[asked.lanes], rates[asked.lanes] / rates[1])


async def _drain(dsn: str, end: Lsn, way: str, clock: Clock, concurrency: int) -> None:
    config = Config.model_validate({"postgres": {"dsn": dsn}, "slot": {"name": "ours"}})
    stream = Walstream()
    handler = clock.in_loop if way == "async" else clock.in_thread
    stream.on(workload.TABLE, "update", concurrency=concurrency)(handler)
    await stream.run(config, until=str(end))


def _line(rounds: Sequence[Measured], asked: argparse.Namespace) -> str:
    one, many = median(one.one_lane for one in rounds), median(one.lanes for one in rounds)
    ratios = [one.ratio for one in rounds]
    return (
        f"{rounds[0].way} handlers of {asked.milliseconds:g} ms: one lane {one:,.0f} a second,"
        f" {asked.lanes} lanes {many:,.0f} a second; ratio: median {median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}, {len(rounds)} rounds)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lanes",
        description="Lanes against one call after another, on the same backlog.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each drains the backlog")
    parser.add_argument("--changes", type=int, default=400, help="changes in the backlog")
    parser.add_argument("--lanes", type=int, default=8, help="calls at a time")
    parser.add_argument("--milliseconds", type=float, default=10.0, help="that a call waits")
    return parser


if __name__ == "__main__":
    main()
