"""The process that commits at an even pace while latency is measured."""

from __future__ import annotations

import time

import msgspec
import psycopg

from bench.processes import read_job, write_result

ROUND_TRIPS = 500
"""How many empty statements are timed for comparison, before the first commit."""


class Pace(msgspec.Struct, frozen=True):
    """Update rows 1 to ``commits``, one in a transaction, ``per_second`` of them a second."""

    dsn: str
    commits: int
    per_second: float


class Written(msgspec.Struct, frozen=True):
    """When each COMMIT was sent, in nanoseconds of the monotonic clock, by the row's id.

    ``commit_seconds`` is how long each COMMIT took, ``round_trip_seconds`` a statement that does
    nothing, and ``per_second`` the pace that was kept.
    """

    nanoseconds: dict[int, int]
    commit_seconds: list[float]
    round_trip_seconds: list[float]
    per_second: float


def main() -> None:
    """Do the job."""
    job = read_job(Pace)
    with psycopg.connect(job.dsn) as connection:
        write_result(_write(connection, job))


def _write(connection: psycopg.Connection, job: Pace) -> Written:
    round_trips = _round_trips(connection)
    sent: dict[int, int] = {}
    took: list[float] = []
    started = time.monotonic()
    for row in range(1, job.commits + 1):
        _sleep_until(started + row / job.per_second)
        connection.execute("UPDATE public.messages SET status = 'sent' WHERE id = %s", [row])
        sent[row] = time.monotonic_ns()
        connection.commit()
        took.append((time.monotonic_ns() - sent[row]) / 1e9)
    per_second = job.commits / (time.monotonic() - started)
    return Written(sent, took, round_trips, per_second)


def _round_trips(connection: psycopg.Connection) -> list[float]:
    connection.autocommit = True
    took = []
    for _ in range(ROUND_TRIPS):
        started = time.monotonic()
        connection.execute("SELECT")
        took.append(time.monotonic() - started)
    connection.autocommit = False
    return took


def _sleep_until(moment: float) -> None:
    rest = moment - time.monotonic()
    if rest > 0:
        time.sleep(rest)


if __name__ == "__main__":
    main()
