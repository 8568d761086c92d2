"""``python -m bench.journal``: what the journal costs a change, written and read again.

The changes are updates of the benchmark's row under REPLICA IDENTITY FULL, decoded from the records
that wal2json writes for them, once as `bench.workload` fills the table and once with contents of
random words, which compress less. They are appended in batches while the event loop is watched: how
long it was blocked is the GIL held by the writing thread.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from walstream.changes import Change, Layout
from walstream.decoder import Decoder, UnknownLayout
from walstream.journal import Journal
from walstream.loaders import TextLoaders
from walstream.lsn import Lsn
from walstream.values import Types

_COLUMNS: Final = {
    "id": 20,
    "conversation_id": 25,
    "author": 25,
    "content": 25,
    "status": 25,
    "amount": 1700,
    "created_at": 1184,
    "updated_at": 1184,
}
CONTENTS: Final = ("as in bench", "random words")
_TRANSACTION_CHANGES: Final = 100
_WORDS: Final = 3000
_READ_CHANGES: Final = 5000
_WATCHED: Final = 50
_TICK_SECONDS: Final = 0.001


class Measured(msgspec.Struct, frozen=True):
    """Microseconds and bytes are those of one change.

    ``cpu_microseconds`` is that of the whole process, ``blocked_milliseconds`` the longest that the
    event loop did not come to run.
    """

    contents: str
    durable: bool
    batch_changes: int
    microseconds: float
    cpu_microseconds: float
    blocked_milliseconds: float
    bytes: float
    read_microseconds: float
    cached_microseconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    asked = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measured = [
            asyncio.run(measure(Path(folder), Batches(batch, contents), asked, durable=durable))
            for contents in CONTENTS
            for durable in (False, True)
            for batch in asked.batch_changes
        ]
    if asked.json:
        print(msgspec.json.format(msgspec.json.encode(measured), indent=2).decode())
        return
    names = ("µs", "CPU µs", "blocked ms", "bytes", "read µs", "cached µs")
    print(f"{'contents':14}{'durable':>8}{'batch':>7}" + "".join(f"{name:>11}" for name in names))
    for one in measured:
        contents, durable, batch, *figures = msgspec.structs.astuple(one)
        cells = "".join(f"{figure:11.2f}" for figure in figures)
        print(f"{contents:14}{durable!s:>8}{batch:>7}{cells}")
    print("of one change; target: at most 5 µs to append in batches of 500")


async def measure(
    folder: Path, batches: Batches, asked: argparse.Namespace, *, durable: bool
) -> Measured:
    """Append and read with a new journal."""
    path = folder / f"{batches.contents}-{durable}-{batches.changes}"
    journal = Journal(path, max_bytes=asked.max_bytes, max_age_seconds=1e9, durable=durable)
    await journal.open("bench")
    rounds = max(asked.changes // batches.changes, 1)
    await journal.append(batches.next())
    seconds, cpu, most_bytes = 0.0, 0.0, 0
    for _ in range(rounds):
        batch = batches.next()
        started, used = time.perf_counter(), _cpu_seconds()
        await journal.append(batch)
        seconds += time.perf_counter() - started
        cpu += _cpu_seconds() - used
        most_bytes = max(most_bytes, journal.vitals().bytes)
    watch = Watch()
    for batch in [batches.next() for _ in range(_WATCHED)]:
        async with watch:
            await journal.append(batch)
    assert most_bytes <= asked.max_bytes, most_bytes
    kept = journal.vitals()
    read = [await _read_microseconds(journal) for _ in range(2)]
    await journal.close()
    count = rounds * batches.changes
    return Measured(
        contents=batches.contents,
        durable=durable,
        batch_changes=batches.changes,
        microseconds=seconds / count * 1e6,
        cpu_microseconds=cpu / count * 1e6,
        blocked_milliseconds=watch.longest * 1e3,
        bytes=kept.bytes / kept.changes,
        read_microseconds=read[0],
        cached_microseconds=read[1],
    )


class Batches:
    """Makes batches of changes, each behind those before it."""

    def __init__(self, changes: int, contents: str) -> None:
        self.changes = changes
        self.contents = contents
        self._decoder = Decoder()
        self._random = random.Random(7)  # noqa: S311 - nothing is secret
        letters = "abcdefghijklmnopqrstuvwxyz"
        self._words = [
            "".join(self._random.choices(letters, k=self._random.randint(2, 9)))
            for _ in range(_WORDS)
        ]
        self._number = self._row = 0
        self._types = Types(TextLoaders())

    def next(self) -> list[Change]:
        """Make the next batch."""
        return list(self._made())

    def _made(self) -> Iterator[Change]:
        left = self.changes
        while left:
            count = min(left, _TRANSACTION_CHANGES)
            self._number += 1
            lsn, end = Lsn(self._number * 1000), Lsn(self._number * 1000 + 500)
            begun = {"xid": self._number, "timestamp": self._time(), "lsn": str(lsn)}
            self._decode({"action": "B", **begun, "nextlsn": str(end)})
            for _ in range(count):
                change = self._decode(self._update())
                assert isinstance(change, Change)
                yield change
            self._decode({"action": "C", "nextlsn": str(end)})
            left -= count

    def _decode(self, fields: dict[str, object]) -> object:
        record = msgspec.json.encode(fields)
        try:
            return self._decoder.decode(record)
        except UnknownLayout as question:
            key, names, typeoids = question.key, question.names, question.typeoids
            self._decoder.learn(
                Layout(question.relation, names, typeoids, key, self._types, columns=_COLUMNS)
            )
        return self._decoder.decode(record)

    def _update(self) -> dict[str, object]:
        self._row += 1
        row = self._row
        content = f"message number {row}"
        if self.contents != CONTENTS[0]:
            content = " ".join(self._random.choices(self._words, k=8))
        created = "2026-11-22 11:02:03.405060+00"
        old = [row, f"conversation-{row % 1000}", "ada", content, "queued", row / 100]
        return {
            "action": "U",
            "schema": "public",
            "table": "messages",
            "columns": _columns([*old[:4], "sent", old[5], created, self._time()]),
            "identity": _columns([*old, created, created]),
            "pk": [{"name": "id", "typeoid": 20}],
        }

    def _time(self) -> str:
        """Return the time of day at so many updates a second as Postgres does."""
        return f"2026-11-22 12:{self._row // 1_200_000:02}:{self._row // 20_000 % 60:02}.405060+00"


def _columns(values: list[object]) -> list[dict[str, object]]:
    pairs = zip(_COLUMNS.items(), values, strict=True)
    return [{"name": name, "value": value, "typeoid": oid} for (name, oid), value in pairs]


class Watch:
    """Notices how long the event loop does not come to run."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK_SECONDS)
            late = time.perf_counter() - before - _TICK_SECONDS
            self.longest = max(self.longest, late)


async def _read_microseconds(journal: Journal) -> float:
    """Read some of what there is, as much as is remembered, and return the time of a change."""
    started = time.perf_counter()
    count = 0
    async for piece in journal.read(journal.begins, journal.position):
        count += len(piece)
        if count >= _READ_CHANGES:
            break
    return (time.perf_counter() - started) / count * 1e6


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.journal", description=__doc__)
    parser.add_argument("--changes", type=int, default=200_000, help="appended in each round")
    parser.add_argument("--batch-changes", type=int, nargs="+", default=[500, 50])
    parser.add_argument("--max-bytes", type=int, default=16 << 20, help="so that it is trimmed")
    parser.add_argument("--folder", help="where the journals are made")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    main()
