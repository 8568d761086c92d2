"""Journals for tests: changes made by numbers, and a process that writes until it is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.journal import Journal, JournalReader
from walstream.loaders import TextLoaders
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.values import Types

TIME: Final = datetime(2026, 1, 31, 12, tzinfo=UTC)
HISTORY: Final = "slot@1 rules"

_TYPES: Final = Types(TextLoaders())


def layout_of(table: str = "orders", types: Types = _TYPES, content: int = 25) -> Layout:
    names, typeoids = ["id", "content"], [20, content]
    columns = dict(zip(names, typeoids, strict=True))
    return Layout(Relation("public", table), names, typeoids, ["id"], types, columns=columns)


ORDERS: Final = layout_of()


def time_of(number: int) -> datetime:
    return TIME + timedelta(seconds=number)


def transaction_of(number: int, time: datetime | None = None) -> Transaction:
    timestamp = str(time_of(number) if time is None else time)
    return Transaction(number, Lsn(number * 100 - 10), Lsn(number * 100), timestamp)


def change_of(
    number: int,
    ordinal: int = 1,
    *,
    layout: Layout = ORDERS,
    content: str = "",
    transaction: Transaction | None = None,
) -> Change:
    """The insert of a row whose id is the number of its transaction."""
    columns = [
        Column("id", msgspec.Raw(b"%d" % number), 20),
        Column("content", msgspec.Raw(msgspec.json.encode(content)), 25),
    ]
    transaction = transaction or transaction_of(number)
    return Change(Operation.INSERT, layout, transaction, ordinal, columns)


def changes_of(first: int, last: int, size_bytes: int = 0) -> list[Change]:
    """One change for each number; with a size, contents that cannot be compressed below it."""
    letters = random.Random(first)  # noqa: S311 - nothing is secret
    contents = (
        letters.randbytes(size_bytes * 3 // 8).hex() if size_bytes else "" for _ in iter(int, 1)
    )
    return [change_of(number, content=next(contents)) for number in range(first, last + 1)]


def position_of(number: int, ordinal: int = 1) -> Position:
    return Position(Lsn(number * 100), ordinal)


def numbers_of(changes: Sequence[Change]) -> list[int]:
    return [change.xid for change in changes]


def journal_at(path: Path, **options: Any) -> Journal:
    """A journal that nobody would find too small or its changes too old."""
    defaults: dict[str, Any] = {"max_bytes": 1 << 26, "max_age_seconds": 1e9, "durable": False}
    return Journal(path, **defaults | options)


async def read_all(journal: Journal | JournalReader) -> list[Change]:
    """All that can be read."""
    if isinstance(journal, Journal):
        begins, position = journal.begins, journal.position
    else:
        state = await journal.state()
        begins, position = state.begins, state.position
    return [change async for piece in journal.read(begins, position) for change in piece]


class Writers:
    """Starts processes that append, print the number of the last change, and are killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, path: Path, *, lines: int, seconds: float, durable: bool) -> int:
        """Let one write so many batches, and so long, and kill it; return what it was told last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path} {int(durable)}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        last = 0
        for _ in range(lines):
            last = int(self._process.stdout.readline())
        # Not to wait for something: the moment is to be any.
        asyncio.run(asyncio.sleep(seconds))
        os.kill(pid, signal.SIGKILL)
        while (line := self._process.stdout.readline()) != "killed\n":
            assert line.strip().isdigit(), line
            last = int(line)
        return last


@contextmanager
def writers() -> Iterator[Writers]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.journals"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as process:
        try:
            yield Writers(process)
        finally:
            process.kill()


async def write_on(path: Path, *, durable: bool) -> None:
    """Append until the end; the bound lets old ones go all the time."""
    journal = journal_at(path, max_bytes=1 << 20, durable=durable)
    await journal.open(HISTORY)
    pick = random.Random()  # noqa: S311 - nothing is secret
    while True:
        first = journal.position.end_lsn // 100 + 1
        last = first + pick.choice([0, 0, 5, 200])
        await journal.append(changes_of(first, last, pick.choice([0, 100, 2000])))
        print(last, flush=True)  # noqa: T201 - it is read
        if not pick.randrange(10):
            await journal.cover(journal.position.end_lsn)


def main() -> None:
    """For each line fork a process that writes; say when it has been killed."""
    for line in sys.stdin:
        path, durable = line.split()
        pid = os.fork()
        if not pid:
            asyncio.run(write_on(Path(path), durable=durable == "1"))
        print(pid, flush=True)  # noqa: T201 - it is read
        os.waitpid(pid, 0)
        print("killed", flush=True)  # noqa: T201 - it is read


if __name__ == "__main__":
    main()
