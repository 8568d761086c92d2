"""A day's worth of changes in minutes: memory and journal stay within their bounds."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, LiveService
from tests.postgres import wait_until
from walstream.positions import Position
from walstream.testing import Database

CHANGES: Final = int(os.environ.get("WALSTREAM_DAY_CHANGES") or 5_000_000)
"""A day of 58 changes a second."""

TRANSACTION_ROWS: Final = 2_000
JOURNAL_BYTES: Final = 64 << 20
WARM_UP: Final = 0.1
"""The part of the changes in which memory may grow."""

FLAT_BYTES: Final = 40 << 20
READERS: Final = 3


class Reader:
    """Reads all changes in a thread, and comes back when it is cut off; counts, and keeps order."""

    def __init__(self, service: LiveService) -> None:
        self.counted = 0
        self.disorder = 0
        self.last: Position | None = None
        self._service = service
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        """Read no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            headers = {} if self.last is None else {"Last-Event-ID": str(self.last)}
            parameters = [("table", "public.events"), ("columns", "id")]
            try:
                with self._service.stream(parameters, headers=headers, seconds=2.0) as events:
                    for event in events:
                        self._note(Position.parse(event.id) if event.id else None, event.name)
                        if self._ended.is_set():
                            return
            except httpx.HTTPError:
                continue

    def _note(self, position: Position | None, name: str) -> None:
        if name == "insert":
            assert position is not None
            self.counted += 1
            self.disorder += self.last is not None and position <= self.last
        self.last = position or self.last


@contextmanager
def reading(service: LiveService) -> Iterator[Reader]:
    """Read while the block runs."""
    reader = Reader(service)
    try:
        yield reader
    finally:
        reader.end()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_day_passes_within_the_bounds(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With readers that keep up as they can; one that is cut off comes back."""
    database.execute("CREATE TABLE events (id bigint PRIMARY KEY, note text)")
    command_line = CommandLine(tmp_path)
    command_line.write(
        "walstream.toml",
        f"""
[postgres]
dsn = "{database.dsn}"
[slot]
name = "{slot_name()}"
create = true
[http]
listen = "127.0.0.1:0"
[[routes]]
table = "public.events"
to = "live"
[sinks.live]
type = "live"
[journal]
path = "journal.sqlite3"
max_bytes = {JOURNAL_BYTES}
{ANYBODY}
""",
    )
    memory: list[int] = []
    journal: list[int] = []
    with command_line.running("run") as process, ExitStack() as opened:
        service = LiveService(str(command_line.wait_for("http_listening")["address"]))
        command_line.wait_for("streaming")
        readers = [opened.enter_context(reading(service)) for _ in range(READERS)]
        wait_until(lambda: all(reader.last for reader in readers))

        def look() -> None:
            memory.append(resident_bytes(process.pid))
            journal.append(sum(file.stat().st_size for file in tmp_path.glob("journal*")))

        bounds = range(0, CHANGES + 1, TRANSACTION_ROWS)
        for first, last in pairwise(bounds):
            database.execute(
                "INSERT INTO events SELECT n, md5(n::text) || md5((n + 1)::text)"
                " FROM generate_series(%s::int, %s::int) n",
                first + 1,
                last,
            )
            look()

        def is_published() -> bool:
            look()
            return metric(service, "published_changes") >= bounds[-1]

        wait_until(is_published, 1800)  # the server writes faster than anybody reads
    warm = memory[int(len(memory) * WARM_UP) :]
    with capsys.disabled():
        print(  # noqa: T201 - who waits for minutes wants to see what came of it
            f"{bounds[-1]} changes; resident {min(warm) / 1e6:.0f} to {max(warm) / 1e6:.0f} MB;"
            f" journal at most {max(journal) / 1e6:.0f} MB; readers"
            f" {[reader.counted for reader in readers]}"
        )
    assert max(warm) - warm[0] < FLAT_BYTES
    assert max(journal) <= JOURNAL_BYTES
    assert all(reader.counted for reader in readers)
    assert not any(reader.disorder for reader in readers)


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def metric(service: LiveService, name: str) -> float:
    """Return one of the live sink's counters."""
    text = httpx.get(f"{service.url}/metrics").text
    [value] = [
        line.rpartition(" ")[2]
        for line in text.splitlines()
        if line.startswith(f"walstream_live_{name}_total{{")
    ]
    return float(value)
