"""Clients that others have made read the stream, and go on where they were.

They are curl, httpx-sse, and the package eventsource of Node.

What each does by itself it does here: EventSource comes back alone, with the id of its last event;
the two others are started again with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias
from urllib.parse import urlencode

import httpx
import httpx_sse
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, Event, LiveService, events_of, live_service
from tests.node_packages import skip
from tests.postgres import wait_until
from tests.proxy import Direction, Proxy
from walstream.testing import Database

NOTES: Final = ("streaming", "position", "reset", "end")
RETRY_SECONDS: Final = 0.05
SCHEMA: Final = """
CREATE TABLE orders (id int PRIMARY KEY, note text);
CREATE TABLE others (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY);
"""
OFTEN: Final = f"""
[live]
heartbeat_seconds = 0.05
retry_seconds = 0.05
[journal]
path = "journal.db"
{ANYBODY}
"""
"""Heartbeats and positions come between, and whoever is cut comes back soon."""


class StockClient(ABC):
    """Reads in a thread until the block ends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.events: list[Event] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def last_id(self) -> str:
        return next((event.id for event in reversed(self.events) if event.id), "")

    @property
    def rows(self) -> list[int]:
        """The ids of the rows that came, in their order."""
        changes = [event for event in self.events if event.name not in NOTES]
        assert {event.name for event in changes} <= {"insert"}
        return [event.content["row"]["id"] for event in changes]

    def wait_for_note(self, name: str, *, times: int = 1) -> None:
        wait_until(lambda: [one.name for one in self.events].count(name) >= times)

    def wait_for_rows(self, count: int) -> None:
        wait_until(lambda: len(self.rows) >= count, 30)

    def _read(self) -> None:
        while not self._stopped.wait(RETRY_SECONDS):
            with contextlib.suppress(httpx.HTTPError):
                for event in self.connection():
                    self.events.append(event)
                    if self._stopped.is_set():
                        return

    @abstractmethod
    def connection(self) -> Iterator[Event]:
        """Read until the connection ends."""

    @abstractmethod
    def stop(self) -> None:
        """End what would not end by itself."""


class _Program(StockClient):
    """A program that prints what it reads."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._process: subprocess.Popen[str] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What to start."""

    def lines(self) -> Iterator[str]:
        with subprocess.Popen(self.command(), stdout=subprocess.PIPE, text=True) as process:
            self._process = process
            if self._stopped.is_set():
                process.kill()
            assert process.stdout is not None
            for line in process.stdout:
                yield line.rstrip("\n")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()


class Curl(_Program):
    """``curl -N``."""

    def command(self) -> list[str]:
        header = ["-H", f"Last-Event-ID: {self.last_id}"] if self.last_id else []
        return ["curl", "-N", "--silent", *header, self.url]

    def connection(self) -> Iterator[Event]:
        return events_of(self.lines())


class HttpxSse(StockClient):
    """httpx-sse, as its README has it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._socket: socket.socket | None = None

    def connection(self) -> Iterator[Event]:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        with (
            httpx.Client(timeout=5, trust_env=False) as client,
            httpx_sse.connect_sse(client, "GET", self.url, headers=headers) as source,
        ):
            self._socket = source.response.extensions["network_stream"].get_extra_info("socket")
            if self._stopped.is_set():
                return
            for one in source.iter_sse():
                yield Event(one.event, one.id, one.data)

    def stop(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


class NodeEventSource(_Program):
    """The package eventsource; it comes back by itself, so it is started once."""

    folder: Path

    def command(self) -> list[str]:
        return ["node", str(self.folder / "read.mjs"), self.url]

    def connection(self) -> Iterator[Event]:
        for line in self.lines():
            yield Event(**json.loads(line))


MakeClient: TypeAlias = Callable[[str], StockClient]


@pytest.fixture(params=["curl", "httpx-sse", "eventsource"])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    match request.param:
        case "curl":
            if shutil.which("curl") is None:
                skip("needs curl")
            return Curl
        case "httpx-sse":
            return HttpxSse
        case _:
            NodeEventSource.folder = request.getfixturevalue("node_folder")
            return NodeEventSource


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Stands between clients and walstream, wherever that listens."""
    with Proxy("host=127.0.0.1 port=1", is_postgres=False) as proxy:
        yield proxy


def lead(proxy: Proxy, service: LiveService) -> None:
    url = httpx.URL(service.url)
    proxy.lead_to(f"host={url.host} port={url.port}")


def address(proxy: Proxy, **more: str) -> str:
    query = urlencode({"table": "public.orders", "where": "note=eq.seen", **more})
    return f"http://127.0.0.1:{proxy.port}/changes?{query}"


class Writer:
    """Inserts rows that are seen, with others between them that are not."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.count = 0

    def write(self, count: int, *, per_transaction: int = 1) -> None:
        ids = iter(range(self.count + 1, self.count + count + 1))
        while some := list(islice(ids, per_transaction)):
            self._database.execute(
                "WITH o AS (INSERT INTO others DEFAULT VALUES)"
                " INSERT INTO orders SELECT i * s, CASE s WHEN 1 THEN 'seen' ELSE 'not' END"
                " FROM unnest(%s::int[]) i, (VALUES (1), (-1)) v (s)",
                some,
            )
        self.count += count

    @property
    def expected(self) -> list[int]:
        return list(range(1, self.count + 1))


@pytest.fixture
def writer(database: Database) -> Writer:
    database.execute(SCHEMA)
    return Writer(database)


def test_a_connection_that_is_cut_loses_and_doubles_nothing(
    make_client: MakeClient, proxy: Proxy, writer: Writer, database: Database, tmp_path: Path
) -> None:
    """Between events, in the middle of one, and while nothing can be reached."""
    with live_service(CommandLine(tmp_path), database.dsn, slot_name(), more=OFTEN) as service:
        lead(proxy, service)
        with make_client(address(proxy)) as client:
            client.wait_for_note("streaming")
            writer.write(20)
            client.wait_for_rows(20)
            for count_bytes in (1, 700, 4321, 54321):
                proxy.cut_after(count_bytes, direction=Direction.TO_CLIENT)
                writer.write(200, per_transaction=7)
                client.wait_for_rows(writer.count)
            proxy.refuse()
            proxy.cut()
            writer.write(1000, per_transaction=50)
            proxy.restore()
            writer.write(5)
            client.wait_for_rows(writer.count)
            client.wait_for_note("position")
            assert client.rows == writer.expected
            assert {"reset", "failed", "message"}.isdisjoint(one.name for one in client.events)
            assert [one.name for one in client.events].count("streaming") > 3


def test_a_restart_of_walstream_loses_and_doubles_nothing(
    make_client: MakeClient, proxy: Proxy, writer: Writer, database: Database, tmp_path: Path
) -> None:
    """Also for who comes back before the stream has begun again."""
    slot, folder = slot_name(), CommandLine(tmp_path)
    with make_client(address(proxy)) as client:
        for times in (1, 2):
            with live_service(folder, database.dsn, slot, more=OFTEN) as service:
                lead(proxy, service)
                client.wait_for_note("streaming", times=times)
                writer.write(50)
                client.wait_for_rows(writer.count)
            client.wait_for_note("end", times=times)
            writer.write(500, per_transaction=20)
        with live_service(folder, database.dsn, slot, more=OFTEN) as service:
            lead(proxy, service)
            client.wait_for_rows(writer.count)
            assert client.rows == writer.expected
            assert {"reset", "failed", "message"}.isdisjoint(one.name for one in client.events)


def test_who_was_away_for_too_long_is_told(
    make_client: MakeClient, proxy: Proxy, writer: Writer, database: Database, tmp_path: Path
) -> None:
    """And goes on from there."""
    with live_service(CommandLine(tmp_path), database.dsn, slot_name(), more=OFTEN) as service:
        lead(proxy, service)
        with make_client(address(proxy, since="0/1:1")) as client:
            client.wait_for_note("reset")
            writer.write(3)
            client.wait_for_rows(3)
            (reset,) = (one for one in client.events if one.name == "reset")
            assert reset.id
            assert reset.content["position"] == reset.id
            assert client.rows == writer.expected
