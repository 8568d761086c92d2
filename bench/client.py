"""The process that is measured: walstream with one filter and one async handler."""

from __future__ import annotations

import asyncio
import time

import msgspec

from bench.processes import cpu_seconds, peak_mib, read_job, write_result
from bench.workload import FILTER, TABLE
from walstream import Change, Config, Walstream, logs


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take everything up to a position, and end when it is acknowledged."""

    until: str


class Timing(msgspec.Struct, frozen=True, tag=True):
    """Take so many changes, and write down when the handler gets each."""

    changes: int


class Job(msgspec.Struct, frozen=True):
    """What to do with which slot of which server."""

    dsn: str
    slot: str
    task: Drain | Timing


class Drained(msgspec.Struct, frozen=True):
    """What a `Drain` took, from the first attempt to connect to the last position acknowledged.

    ``started`` is when that attempt was made (monotonic seconds), ``cpu_seconds`` user and system
    time since then, ``peak_mib`` the highest resident memory of the process, modules included.
    """

    started: float
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
    job = read_job(Job)
    config = Config.model_validate({"postgres": {"dsn": job.dsn}, "slot": {"name": job.slot}})
    match job.task:
        case Drain(until):
            write_result(asyncio.run(drain(config, until)))
        case Timing(changes):
            write_result(asyncio.run(time_arrivals(config, changes)))


async def drain(config: Config, until: str) -> Drained:
    """Stream to a handler that touches one column of the row."""
    stream = Walstream()

    @stream.on(TABLE, "update", where=FILTER)
    async def read_content(change: Change) -> None:
        change.row["content"]

    used_before, started = cpu_seconds(), time.monotonic()
    summary = await stream.run(config, until=until)
    return Drained(
        started=started,
        seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds() - used_before,
        peak_mib=peak_mib(),
        delivered=summary.delivered,
    )


async def time_arrivals(config: Config, changes: int) -> Arrivals:
    """Stream to a handler that looks at the clock."""
    stream = Walstream()
    arrivals: dict[int, int] = {}

    @stream.on(TABLE, "update", where=FILTER)
    async def note(change: Change) -> None:
        now = time.monotonic_ns()
        arrivals[change.row["id"]] = now
        if len(arrivals) == changes:
            stream.stop()

    await stream.run(config)
    return Arrivals(arrivals)


if __name__ == "__main__":
    main()
