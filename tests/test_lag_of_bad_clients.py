"""Clients that misbehave in crowds: how late a file sink gets what is committed meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Final, Self
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, LiveService
from tests.postgres import wait_until
from walstream.testing import Database

SECONDS: Final = 4.0
PAUSE_SECONDS: Final = 0.01
CROWD: Final = 1000
MANY: Final = 200
ROW_BYTES: Final = 2000
LATE_SECONDS: Final = 0.25
"""What of a hundred commits ninety-nine stay under, on two cores that do all of this at once."""

Misbehaviour = Callable[[ExitStack, LiveService], None]


class Commits:
    """Commits rows in a thread, one after another with pauses."""

    def __init__(self, dsn: str) -> None:
        self.committed: dict[int, float] = {}
        self._dsn = dsn
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._ended.wait(PAUSE_SECONDS):
                number = len(self.committed)
                connection.execute(
                    "INSERT INTO orders VALUES (%s, repeat('x', %s::int))", (number, ROW_BYTES)
                )
                self.committed[number] = time.time()


class Arrivals:
    """Follows the file of the other sink, and notes when each row is in it."""

    def __init__(self, path: Path) -> None:
        self.arrived: dict[int, float] = {}
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._path.exists():
            self._ended.wait(0.01)
        with self._path.open() as file:
            line = ""
            while not self._ended.is_set():
                line += file.readline()
                if line.endswith("\n"):
                    self.arrived[json.loads(line)["row"]["id"]] = time.time()
                    line = ""
                else:
                    self._ended.wait(0.001)


@contextmanager
def asking(service: LiveService, head: str) -> Iterator[socket.socket]:
    """Send a request, or some of it, and read nothing."""
    address = urlsplit(service.url)
    assert address.hostname
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(20)
        one.connect((address.hostname, address.port))
        one.sendall(head.format(host=address.netloc).encode())
        yield one


STREAM: Final = "GET /changes?table=public.orders HTTP/1.1\r\nHost: {host}\r\n\r\n"


def nobody(_opened: ExitStack, _service: LiveService) -> None:
    """What it is compared with."""


def who_never_read(opened: ExitStack, service: LiveService) -> None:
    """Ask for everything, and fetch nothing."""
    for _ in range(MANY):
        opened.enter_context(asking(service, STREAM))


def a_crowd_at_once(opened: ExitStack, service: LiveService) -> None:
    """Connect and ask as fast as one thread can."""
    for _ in range(CROWD):
        opened.enter_context(asking(service, STREAM))


def large_heads(opened: ExitStack, service: LiveService) -> None:
    """Send ten megabytes of headers each."""
    for _ in range(20):
        sending = opened.enter_context(asking(service, "GET /changes HTTP/1.1\r\n"))
        try:
            for _ in range(160):
                sending.sendall(b"x-long: " + b"y" * (1 << 16) + b"\r\n")
        except OSError:
            continue


def half_requests(opened: ExitStack, service: LiveService) -> None:
    """Begin a request, and leave it at that."""
    for _ in range(MANY):
        opened.enter_context(asking(service, "GET /changes?table=pub"))


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """A folder for the process."""
    return CommandLine(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_lag_of_others_does_not_move(
    command_line: CommandLine, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the time from each commit until a file sink beside has it."""
    told = []
    late = {}
    for number, misbehave in enumerate(
        (nobody, who_never_read, a_crowd_at_once, large_heads, half_requests)
    ):
        database.execute("DROP TABLE IF EXISTS orders")
        database.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
        seconds = measured(command_line, database, misbehave, f"changes{number}.jsonl")
        late[misbehave.__name__] = quantiles(seconds, n=100)[98]
        told.append(
            f"{misbehave.__name__}: p50 {median(seconds) * 1000:.1f} ms,"
            f" p99 {late[misbehave.__name__] * 1000:.1f} ms, max {max(seconds) * 1000:.1f} ms"
        )
    with capsys.disabled():
        print("\n".join(["", *told]))  # noqa: T201 - who waits for it wants to see the figures
    assert max(late.values()) < LATE_SECONDS, told


def measured(
    command_line: CommandLine, database: Database, misbehave: Misbehaviour, file: str
) -> list[float]:
    """Return how long each commit took to reach the file, in seconds."""
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
table = "public.orders"
to = "live"
[[routes]]
table = "public.orders"
to = "file"
[sinks.live]
type = "live"
[sinks.file]
type = "file"
path = "{file}"
fsync = "never"
{ANYBODY}
""",
    )
    with command_line.running("run") as process:
        service = LiveService(str(command_line.wait_for("http_listening")["address"]))
        command_line.wait_for("streaming")
        with (
            Arrivals(command_line.folder / file) as arrivals,
            Commits(database.dsn) as commits,
            ExitStack() as opened,
        ):
            wait_until(lambda: arrivals.arrived)
            first, begun = len(commits.committed), time.monotonic()
            misbehave(opened, service)
            wait_until(lambda: time.monotonic() - begun > SECONDS, SECONDS + 60)
            last = len(commits.committed) - 1
            wait_until(lambda: len(arrivals.arrived) > last, 30)
        process.terminate()
        process.wait(20)
    return [arrivals.arrived[one] - commits.committed[one] for one in range(first, last)]
