"""The process that is measured: walstream with one filter and one async handler."""

from __future__ import annotations

import asyncio
import time

import msgspec

from bench.processes import cpu_seconds, peak_mib, read_job, write_result
from bench.workload import FILTER, TABLE
from walstream import Change, Config, Walstream, logs

STARTED = time.monotonic()
"""From here on the modules are loaded."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take everything up to a position, and end when it is acknowledged."""

    dsn: str
    slot: str
    until: str


class Timing(msgspec.Struct, frozen=True, tag=True):
    """Take so many changes, and write down when the handler gets each."""

    dsn: str
    slot: str
    changes: int


class Drained(msgspec.Struct, frozen=True):
    """What a `Drain` took, from the first attempt to connect to the last position acknowledged.

    ``loaded_at`` is when the process was ready to connect (monotonic seconds).
    """

    loaded_at: float
    seconds: float
    cpu_seconds: float
    peak_mib: float
    delivered: int


class Arrivals(msgspec.Struct, frozen=True):
    """When the handler was called, in nanoseconds of the monotonic clock, by the row's id."""

    nanoseconds: dict[int, int]


def main() -> None:
    """Do the job."""
    logs.configure("warning")
    job = read_job(Drain | Timing)  # type: ignore[arg-type]  # a union is a type to msgspec
    match job:
        case Drain():
            write_result(asyncio.run(drain(job)))
        case Timing():
            write_result(asyncio.run(time_arrivals(job)))


async def drain(job: Drain) -> Drained:
    """Stream to a handler that touches one column of the row."""
    stream = Walstream()

    @stream.on(TABLE, "update", where=FILTER)
    async def read_content(change: Change) -> None:
        change.row["content"]

    used_before, started = cpu_seconds(), time.monotonic()
    summary = await stream.run(_config(job.dsn, job.slot), until=job.until)
    return Drained(
        loaded_at=STARTED,
        seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds() - used_before,
        peak_mib=peak_mib(),
        delivered=summary.delivered,
    )


async def time_arrivals(job: Timing) -> Arrivals:
    """Stream to a handler that looks at the clock."""
    stream = Walstream()
    arrivals: dict[int, int] = {}

    @stream.on(TABLE, "update", where=FILTER)
    async def note(change: Change) -> None:
        now = time.monotonic_ns()
        arrivals[change.row["id"]] = now
        if len(arrivals) == job.changes:
            stream.stop()

    await stream.run(_config(job.dsn, job.slot))
    return Arrivals(arrivals)


def _config(dsn: str, slot: str) -> Config:
    return Config.model_validate({"postgres": {"dsn": dsn}, "slot": {"name": slot}})


if __name__ == "__main__":
    main()
