"""A burst of changes is published no faster than it is sent to those who read."""

from __future__ import annotations

import asyncio

from tests.hubs import READER, FakeCatalog
from walstream.changes import Change
from walstream.live.clients import Client, End
from walstream.live.encodings import JSON_LINES
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink
from walstream.live.subscriptions import Subscription
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.router import TablePattern
from walstream.testing import insert
from walstream.testing.changes import new_transaction

QUEUE_BYTES = 1 << 18
CHANGES = 1000


class Connection:
    """Takes a piece in each turn of the event loop; or, once nobody reads it, nothing more."""

    def __init__(self, *, is_read: bool) -> None:
        self.is_read = is_read
        self.pieces: list[bytes] = []
        self.sent: list[bytes] = []

    @property
    def waiting_bytes(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def is_behind(self) -> bool:
        return self.is_read and bool(self.pieces)

    def write(self, piece: bytes) -> None:
        self.pieces.append(piece)

    async def moved(self) -> None:
        await asyncio.sleep(0)
        self.sent.append(self.pieces.pop(0))

    async def room(self) -> None:
        while self.pieces:
            await self.moved()

    def drop(self) -> None:
        self.pieces.clear()


def burst() -> list[Change]:
    """More than may wait for a client, in one transaction."""
    transaction = new_transaction()
    row = {"id": 1, "content": "x" * 500}
    return [insert("public.notes", row, transaction=transaction) for _ in range(CHANGES)]


async def publish_to(*connections: Connection) -> list[Client]:
    """Publish a burst to clients with these connections."""
    hub = Hub(FakeCatalog(), Recent(CHANGES, 1 << 30))
    sink = LiveSink("live", hub)
    await sink.begin(Lsn(1), "rules")
    wanted = [Subscription(TablePattern.parse("public.notes"))]
    cohort = hub.cohort(wanted, READER, JSON_LINES)
    clients = [Client(cohort, one, QUEUE_BYTES) for one in connections]
    for client in clients:
        assert hub.join(client, await hub.compiled.prepare(cohort))
    changes = burst()
    assert Position.of(changes[0]) > hub.position
    await asyncio.wait_for(sink.take(changes), 10)
    return clients


async def test_a_burst_larger_than_the_queue_cuts_off_nobody_who_reads() -> None:
    connections = [Connection(is_read=True) for _ in range(3)]
    clients = await publish_to(*connections)
    assert [client.end for client in clients] == [None] * 3
    for connection in connections:
        assert b"".join(connection.sent).count(b"\n") == CHANGES


async def test_who_does_not_read_is_not_waited_for() -> None:
    reading, idle = Connection(is_read=True), Connection(is_read=False)
    clients = await publish_to(idle, reading)
    assert [client.end for client in clients] == [End.SLOW, None]
    assert idle.waiting_bytes == 0
    assert b"".join(reading.sent).count(b"\n") == CHANGES
