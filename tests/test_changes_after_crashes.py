"""A reader that resumes by id gets every change once, whatever becomes of the process."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import httpx
import psycopg
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, events_of
from tests.postgres import wait_until
from walstream.testing import Database

SEED: Final = 4711
PAUSE_SECONDS: Final = 0.003


class Writer:
    """Commits rows in a thread, one or some in a transaction, until the block ends."""

    def __init__(self, dsn: str) -> None:
        self.committed = 0
        self._dsn = dsn
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        sizes = random.Random(SEED)  # noqa: S311 - not for secrets
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._ended.wait(PAUSE_SECONDS):
                rows = sizes.choice((1, 1, 1, 2, 30))
                first = self.committed + 1
                connection.execute(
                    "INSERT INTO events SELECT n FROM generate_series(%s::int, %s::int) n",
                    (first, first + rows - 1),
                )
                self.committed += rows


class Reader:
    """Reads in a thread, and comes back with its last id whenever the stream is cut."""

    def __init__(self, address: str) -> None:
        self.got: list[int] = []
        self.resets = 0
        self.last_id = ""
        self._url = f"http://{address}/changes?table=public.events"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._read()
            except httpx.HTTPError:
                self._ended.wait(0.01)

    def _read(self) -> None:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        with httpx.stream("GET", self._url, headers=headers, timeout=1.0) as response:
            if response.status_code != httpx.codes.OK:
                self._ended.wait(0.02)
                return
            for event in events_of(self._lines(response)):
                self.last_id = event.id or self.last_id
                if event.name == "insert":
                    self.got.append(event.content["row"]["id"])
                elif event.name == "reset":
                    self.resets += 1

    def _lines(self, response: httpx.Response) -> Iterator[str]:
        """Read lines, of those that came whole."""
        for line in response.iter_lines():
            if self._ended.is_set():
                return
            yield line


def survive(folder: Path, database: Database, kills: int, *, durable: bool) -> None:
    """Kill it again and again; at the end compare what was committed with what was read."""
    database.execute("CREATE TABLE events (id int PRIMARY KEY)")
    command_line = CommandLine(folder)
    port = free_port()
    command_line.write(
        "walstream.toml",
        f"""
[postgres]
dsn = "{database.dsn}"
[slot]
name = "{slot_name()}"
create = true
[http]
listen = "127.0.0.1:{port}"
[[routes]]
table = "*.*"
to = "live"
[sinks.live]
type = "live"
[journal]
path = "journal.sqlite3"
durable = {json.dumps(durable)}
[live]
heartbeat_seconds = 0.2
{ANYBODY}
""",
    )
    moments = random.Random(SEED)  # noqa: S311 - as above
    process = start(command_line)
    try:
        command_line.wait_for("streaming")
        with Reader(f"127.0.0.1:{port}") as reader:
            wait_until(lambda: reader.last_id, 20)
            with Writer(database.dsn) as writer:
                for _ in range(kills):
                    time.sleep(moments.uniform(0.0, 0.3))  # any moment is as good as another
                    seen = len(reader.got)
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    process = start(command_line)
                    wait_until(lambda seen=seen: len(reader.got) > seen, 30)  # type: ignore[misc]
            wait_until(lambda: len(reader.got) >= writer.committed, 30)
    finally:
        process.kill()
        process.wait()
    assert reader.got == list(range(1, writer.committed + 1))
    assert reader.resets == 0


def start(command_line: CommandLine) -> subprocess.Popen[bytes]:
    with (command_line.folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "walstream", "run"],
            cwd=command_line.folder,
            env=command_line.environment,
            stderr=log,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.timeout(120)
@pytest.mark.parametrize("durable", [True, False])
def test_a_reader_misses_nothing_over_kills(
    durable: bool,  # noqa: FBT001 - a parameter
    database: Database,
    tmp_path: Path,
) -> None:
    """Neither does it get anything twice."""
    survive(tmp_path, database, 3, durable=durable)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_reader_misses_nothing_over_two_hundred_kills(database: Database, tmp_path: Path) -> None:
    """At random moments."""
    survive(tmp_path, database, 200, durable=True)
