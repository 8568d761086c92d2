"""The process that is measured: walstream with one filter and one async handler."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

import msgspec
from pydantic import BaseModel

from bench.processes import cpu_seconds, peak_mib, read_job, write_result
from bench.workload import FILTER, TABLE
from walstream import Change, Config, Walstream, logs
from walstream.cli.streaming import collect_less


class Kind(StrEnum):
    """A kind of handler. Every one touches the same column of each row.

    Those that yield let the event loop run once in each call, as one does that waits for something;
    the others return at once.
    """

    ASYNC = "async def"
    YIELDING = "async def, yields"
    SYNC = "def"
    BATCH = "async def, batch=500"
    YIELDING_BATCH = "async def, yields, batch=500"
    SYNC_BATCH = "def, batch=500"
    TRANSACTIONS = "async def, transactions"
    LANES = "async def, concurrency=8"
    MODEL = "async def, model="
    VISIBLE = "async def, visible"


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take everything up to a position with one handler, and end when it is acknowledged."""

    until: str
    kind: Kind = Kind.ASYNC


class Timing(msgspec.Struct, frozen=True, tag=True):
    """Take so many changes, and write down when the handler gets each."""

    changes: int


class Posted(BaseModel):
    """A row of the table that is updated."""

    id: int
    conversation_id: str
    author: str
    content: str
    status: str
    amount: Decimal
    created_at: datetime
    updated_at: datetime


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
        case Drain(until, kind):
            write_result(asyncio.run(drain(config, until, kind)))
        case Timing(changes):
            write_result(asyncio.run(time_arrivals(config, changes)))


async def drain(config: Config, until: str, kind: Kind) -> Drained:
    """Stream to a handler that touches one column of the row."""
    stream = Walstream()
    attach(stream, kind)
    collect_less()  # as walstream run does
    used_before, started = cpu_seconds(), time.monotonic()
    summary = await stream.run(config, until=until)
    return Drained(
        started=started,
        seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds() - used_before,
        peak_mib=peak_mib(),
        delivered=summary.delivered,
    )


async def _read(change: Change) -> None:
    change.row["content"]


async def _read_and_yield(change: Change) -> None:
    change.row["content"]
    await asyncio.sleep(0)


async def _read_all_and_yield(changes: list[Change]) -> None:
    for change in changes:
        change.row["content"]
    await asyncio.sleep(0)


def _read_in_thread(change: Change) -> None:
    change.row["content"]


async def _read_all(changes: list[Change]) -> None:
    for change in changes:
        change.row["content"]


def _read_all_in_thread(changes: list[Change]) -> None:
    for change in changes:
        change.row["content"]


async def _read_model(change: Change[Posted]) -> None:
    change.row.content  # noqa: B018 - it is what is measured


_KINDS: Final[dict[Kind, tuple[Any, dict[str, Any]]]] = {
    Kind.ASYNC: (_read, {}),
    Kind.YIELDING: (_read_and_yield, {}),
    Kind.YIELDING_BATCH: (_read_all_and_yield, {"batch": 500}),
    Kind.SYNC: (_read_in_thread, {}),
    Kind.BATCH: (_read_all, {"batch": 500}),
    Kind.SYNC_BATCH: (_read_all_in_thread, {"batch": 500}),
    Kind.TRANSACTIONS: (_read_all, {"transactions": True}),
    Kind.LANES: (_read, {"concurrency": 8}),
    Kind.MODEL: (_read_model, {"model": Posted}),
    Kind.VISIBLE: (_read, {"visible": True}),
}


def attach(stream: Walstream, kind: Kind) -> None:
    """Attach a handler of a kind."""
    function, options = _KINDS[kind]
    stream.on(TABLE, "update", where=FILTER, **options)(function)


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
