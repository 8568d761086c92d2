"""Clients miss nothing when something fails on the way to them, and nobody waits for them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable

import msgspec
import pytest

from tests.hubs import READER, FakeCatalog, Sent
from tests.serving import Streams, serving
from walstream.access import Grant, Reader, Sight
from walstream.changes import Change, Layout, Relation
from walstream.filters import parse
from walstream.gateway.rounds import DirectStream
from walstream.live.clients import Client, End
from walstream.live.encodings import JSON_LINES, Encoding
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink
from walstream.live.streams import Beginning, serve
from walstream.live.subscriptions import Subscription
from walstream.live.views import Look, View
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.projection import Projection
from walstream.router import TablePattern
from walstream.testing import insert

BEGIN = Position.after(Lsn(1))
_NOTES = TablePattern.parse("public.notes")


async def until(condition: Callable[[], bool]) -> None:
    """Let others go on until something is so."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0)


def made(count: int) -> list[Change]:
    """Make inserts of one shape."""
    changes = [insert("public.notes", {"id": number}) for number in range(count)]
    return [msgspec.structs.replace(one, layout=changes[0].layout) for one in changes]


class Clients:
    """A live sink, and who reads from it."""

    def __init__(self) -> None:
        self.hub = Hub(FakeCatalog(), Recent(100_000, 1 << 30))
        self.sink = LiveSink("live", self.hub)

    def client(self, reader: Reader = READER, where: str = "", to: Encoding = JSON_LINES) -> Client:
        condition = parse(where) if where else None
        wanted = [Subscription(TablePattern.parse("public.notes"), where=condition)]
        return Client(self.hub.cohort(wanted, reader, to), Sent(), 1 << 20)

    async def joined(
        self, reader: Reader = READER, where: str = "", to: Encoding = JSON_LINES
    ) -> Client:
        client = self.client(reader, where, to)
        assert self.hub.join(client, await self.hub.compiled.prepare(client.cohort))
        return client


@pytest.fixture
async def clients() -> Clients:
    """Begin a session."""
    clients = Clients()
    await clients.sink.begin(Lsn(1), "rules")
    return clients


def lines_of(client: Client) -> list[dict[str, object]]:
    assert isinstance(client.outflow, Sent)
    return [json.loads(line) for line in client.outflow.lines]


async def test_what_was_kept_and_not_published_is_sent_by_the_next_session(
    clients: Clients,
) -> None:
    client = await clients.joined()
    changes = made(3)
    await clients.hub.history.append(changes)  # then the call was given up
    await clients.sink.begin(Lsn(1), "rules")
    await clients.sink.take(changes)
    assert len(lines_of(client)) == len(changes)


class Failing(type(JSON_LINES)):  # type: ignore[misc]
    """Cannot write one of the changes at first."""

    bad: Change | None = None

    def write(self, view: View, change: Change, look: Look) -> bytes:
        if change is self.bad:
            self.bad = None
            raise ValueError
        return bytes(super().write(view, change, look))


async def test_changes_before_one_that_cannot_be_written_are_sent(clients: Clients) -> None:
    encoding = Failing()
    client = await clients.joined(to=encoding)
    changes = made(3)
    encoding.bad = changes[1]
    with pytest.raises(ValueError):  # noqa: PT011 - made here
        await clients.sink.take(changes)
    await clients.sink.take(changes)
    assert len(lines_of(client)) == len(changes)


async def test_the_end_of_a_stream_names_no_position_that_it_has_not_come_to(
    clients: Clients,
) -> None:
    client = clients.client()
    serving_it = asyncio.create_task(
        serve(clients.hub, client, Beginning(clients.hub.position), 10)
    )
    await until(lambda: client in client.cohort.clients)
    await asyncio.sleep(0)
    client.finish(End.EXPIRED)
    await clients.sink.take(made(1))
    await serving_it
    [end] = lines_of(client)
    assert "id" not in end


async def test_who_still_reads_what_it_missed_at_the_end_is_not_told_that_it_has_got_all(
    clients: Clients,
) -> None:
    changes = made(3000)
    await clients.sink.take(changes)
    client = clients.client()
    serving_it = asyncio.create_task(serve(clients.hub, client, Beginning(BEGIN), 10))
    await until(lambda: bool(lines_of(client)))
    await clients.sink.close()
    await serving_it
    sent = lines_of(client)
    assert len(sent) < len(changes)
    assert "id" not in sent[-1]


async def test_a_filter_does_not_look_at_what_is_hidden_of_a_partition(clients: Clients) -> None:
    hiding = Sight("public.part", Projection(exclude=["secret"]))
    reader = Reader(
        "reader",
        grants=(
            Grant(TablePattern.parse("public.part"), hiding),
            Grant(TablePattern.parse("public.notes"), Sight("public.notes")),
        ),
    )
    client = await clients.joined(reader, where="secret=eq.x")
    change = insert("public.part", {"id": 1, "secret": "x"})
    part: Layout = msgspec.structs.replace(
        change.layout, ancestors=(Relation("public", "notes"),), places={}
    )
    await clients.sink.take([msgspec.structs.replace(change, layout=part)])
    assert lines_of(client) == []


async def test_many_who_read_what_they_missed_leave_the_event_loop_to_others(
    clients: Clients,
) -> None:
    await clients.sink.take(made(1000))
    reading = [clients.client() for _ in range(100)]
    tasks = [asyncio.create_task(serve(clients.hub, one, Beginning(BEGIN), 10)) for one in reading]
    late: list[float] = []
    while any(one not in one.cohort.clients for one in reading):
        before = time.perf_counter()
        await asyncio.sleep(0)
        late.append(time.perf_counter() - before)
    assert sorted(late)[-len(late) // 10] < 0.05  # all at once they took a quarter of a second
    for one in reading:
        assert len(lines_of(one)) == 1000
        one.finish(End.LEFT)
    await asyncio.gather(*tasks)


async def test_a_client_that_says_that_it_is_done_and_reads_nothing_is_not_waited_for() -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        host, _, port = gateway.address.rpartition(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(b"GET /stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await until(lambda: bool(streams.open))
            [stream] = streams.open
            assert isinstance(stream, DirectStream)
            while stream.waiting_bytes < 20_000:
                stream.write(b"x" * 8192)
                await asyncio.sleep(0.001)
            client.shutdown(socket.SHUT_WR)
            for _ in range(40):
                stream.write(b"y" * 8192)
            async with asyncio.timeout(5):
                while stream.is_behind:
                    await stream.moved()
                await stream.ended()
