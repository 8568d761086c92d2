"""What no client may do to others, and what may not be lost, on the seams between the parts."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from starlette.types import Message
from structlog.testing import capture_logs

from tests.hubs import FakeCatalog, Sent
from tests.postgres import async_wait_until
from tests.test_sieves import Place
from walstream.access import Gate
from walstream.access.readers import Reader
from walstream.catalog import Catalog
from walstream.changes import Relation
from walstream.config.access import AccessConfig
from walstream.config.live import LiveConfig
from walstream.config.realtime import RealtimeConfig
from walstream.gateway.notices import tell_failed
from walstream.gateway.sockets import ThroughSocket
from walstream.live import sieves
from walstream.live.clients import Client, End
from walstream.live.encodings import JSON_LINES
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.requests import AT_ONCE
from walstream.live.streams import Beginning, begin_at, serve
from walstream.patterns import linear_expression
from walstream.positions import BEGINNING
from walstream.realtime.frames import split, text_frame
from walstream.realtime.messages import Version
from walstream.realtime.protocol import MAX_JOIN_VALUES, Protocol
from walstream.realtime.rooms import Rooms
from walstream.realtime.services import Services
from walstream.realtime.topics import Topics
from walstream.realtime.visits import Visit

TOPIC: Final = "realtime:room"
NOTES: Final = {"event": "*", "schema": "public", "table": "notes"}


class FakeSocket:
    """Says what it is told to say, and keeps what it gets until that is fetched."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.closed: int | None = None
        self.waiting_bytes = 0
        self.is_behind = False
        self.is_read = True
        self._said: deque[str] = deque()
        self._news = asyncio.Event()
        self._fetched = asyncio.Event()

    def say(self, *message: object) -> None:
        self._said.append(json.dumps(message))
        self._news.set()

    async def receive(self) -> str | None:
        while not self._said:
            if self.closed is not None:
                return None
            self._news.clear()
            await self._news.wait()
        return self._said.popleft()

    def write(self, piece: bytes) -> None:
        self.heard += [json.loads(payload) for _, payload in split(piece)]
        self.waiting_bytes += 0 if self.is_read else len(piece)

    async def moved(self) -> None:
        """Never wait: `is_behind` is false."""

    def drop(self) -> None:
        """Keep what was written, to be looked at."""

    async def room(self) -> None:
        """Have room only when all is fetched."""
        while self.waiting_bytes:
            self._fetched.clear()
            await self._fetched.wait()

    def fetch(self) -> None:
        self.waiting_bytes = 0
        self._fetched.set()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        del reason
        self.closed = code
        self._news.set()

    def events(self, name: str) -> list[Any]:
        return [one[4] for one in self.heard if one[3] == name]

    async def join(self, **config: Any) -> Any:
        """Join a channel; return the payload of the reply."""
        self.say("1", "1", TOPIC, "phx_join", {"config": config})
        await async_wait_until(lambda: self.events("phx_reply"))
        return self.events("phx_reply")[0]


def make_services(hub: Hub | None = None, **realtime: Any) -> Services:
    access = AccessConfig.model_validate(
        {"anonymous_role": "anybody", "roles": {"anybody": {"tables": [{"table": "*.*"}]}}}
    )
    config = RealtimeConfig(enabled=True, **realtime)
    return Services(lambda: hub, Gate(access), Rooms(config), Topics(config), config, LiveConfig())


@asynccontextmanager
async def visiting(services: Services) -> AsyncIterator[FakeSocket]:
    socket = FakeSocket()
    reader = Reader("anybody")
    visit = Visit(services, Protocol(Version.V2), socket, reader=reader, token=None)
    running = asyncio.create_task(visit.run())
    try:
        yield socket
    finally:
        await socket.close()
        await running


# What is not lost


async def test_a_join_is_refused_while_the_database_cannot_say_what_is_visible() -> None:
    """Clients join again by themselves; a channel without its changes they would take for good."""
    catalog = Catalog("host=127.0.0.1 port=1 connect_timeout=1", application_name="tests")
    hub = Hub(catalog, Recent(10, 1000))
    hub.has_begun = True
    async with visiting(make_services(hub)) as socket:
        reply = await socket.join(postgres_changes=[NOTES])
        assert reply["status"] == "error"
        assert reply["response"]["reason"].startswith("UnknownErrorOnChannel: the database")


async def test_a_join_is_refused_while_it_cannot_be_told_where_it_begins() -> None:
    class Away(Catalog):
        async def table(self, relation: Any) -> Any:
            del relation

    catalog = Away("host=127.0.0.1 port=1 connect_timeout=1", application_name="tests")
    hub = Hub(catalog, Recent(10, 1000))
    hub.has_begun = True
    hub.requests.visible = everything  # type: ignore[method-assign, assignment]
    async with visiting(make_services(hub)) as socket:
        reply = await socket.join(postgres_changes=[{**NOTES, "since": "1/0:1"}])
        assert reply["status"] == "error"
        assert reply["response"]["reason"].startswith("UnknownErrorOnChannel: the database")


async def everything(*_: object) -> AsyncIterator[object]:
    yield object()


async def test_a_large_message_that_is_on_its_way_does_not_make_a_client_slow() -> None:
    """Such as the state of a large room, behind which other messages come."""
    services = make_services()
    async with visiting(services) as socket:
        await socket.join(broadcast={"self": True}, presence={"enabled": False})
        socket.is_read = False
        large = {"type": "broadcast", "event": "large", "payload": "x" * 2_500_000}
        small = {**large, "event": "small", "payload": "x"}
        socket.say("1", "2", TOPIC, "broadcast", large)
        for _ in range(3):
            socket.say("1", "2", TOPIC, "broadcast", small)
        await async_wait_until(lambda: len(socket.events("broadcast")) == 4 or socket.closed)
        assert socket.closed is None
        for _ in range(2):
            socket.say("1", "2", TOPIC, "broadcast", {**large, "payload": "x" * 700_000})
        socket.say("1", "2", TOPIC, "broadcast", small)
        await async_wait_until(lambda: socket.closed is not None)
        assert services.refusals.counts["slow"] == 1
        assert socket.closed == 1013


class Missed:
    """Three pieces that somebody has missed."""

    position = BEGINNING

    def __init__(self, *_: object) -> None:
        """Whoever it is for."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield text_frame(b'["1",null,"realtime:room","piece",{}]')


async def test_channels_that_read_what_they_missed_wait_for_room_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All at once would be more than may wait for a client that is not slow."""
    monkeypatch.setattr("walstream.live.streams.Missed", Missed)
    hub = Hub(Catalog("host=127.0.0.1 port=1", application_name="tests"), Recent(10, 1000))
    hub.has_begun = True
    socket = FakeSocket()
    socket.is_read = False
    cohort = hub.cohort([], Reader("anybody"), JSON_LINES)
    clients = [Client(cohort, socket, 1000) for _ in range(20)]
    beginning = Beginning(BEGINNING)
    serving = [asyncio.create_task(serve(hub, one, beginning, 60)) for one in clients]
    for pieces in range(1, 61):
        await async_wait_until(lambda: socket.waiting_bytes)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(socket.events("piece")) == pieces
        socket.fetch()
    for client in clients:
        client.finish(End.LEFT)
    await asyncio.gather(*serving)


async def test_who_is_to_be_served_by_a_sink_that_was_closed_meanwhile_is_sent_away() -> None:
    """Clients come back, and ask for what is there then."""
    place = Place()
    await place.begin()
    beginning = await begin_at(place.hub, None)
    await place.sink.close()
    cohort = place.hub.cohort([], Reader("anybody"), JSON_LINES)
    client = Client(cohort, Sent(), 1000)
    async with asyncio.timeout(5):
        await serve(place.hub, client, beginning, 60)
    assert client.end is End.CLOSING


async def test_a_client_that_has_gone_before_the_goodbye_is_no_error() -> None:
    """ASGI servers raise OSError for what is sent to such a one."""

    async def send(_: Message) -> None:
        raise OSError

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await ThroughSocket(receive, send, 1000).close()


# What does not cost others


class Busy:
    """A member of a room that takes its time."""

    version = Version.V2
    wants_self = wants_presence = False

    def __init__(self) -> None:
        self.got = 0

    def send(self, frames: bytes) -> None:
        self.got += len(frames) > 0
        ends = time.perf_counter() + 0.002
        while time.perf_counter() < ends:
            pass


async def test_who_says_much_at_once_leaves_the_loop_to_others() -> None:
    services, member = make_services(), Busy()
    services.rooms.enter((TOPIC, False), member)
    async with visiting(services) as socket:
        await socket.join(presence={"enabled": False})
        for _ in range(100):
            message = {"type": "broadcast", "event": "x", "payload": {}}
            socket.say("1", "2", TOPIC, "broadcast", message)
        turns = 0
        while member.got < 100:
            await asyncio.sleep(0)
            turns += 1
    assert turns > 20


async def test_a_join_of_countless_bindings_is_refused_without_reading_them() -> None:
    async with visiting(make_services()) as socket:
        reply = await socket.join(postgres_changes=[NOTES] * 201)
        assert reply["status"] == "error"
        assert reply["response"]["reason"].startswith("Too many postgres_changes: 201 ")


async def test_a_join_of_countless_values_is_refused() -> None:
    """They would take twenty times the memory of their text, as long as the channel is there."""
    async with visiting(make_services()) as socket:
        reply = await socket.join(postgres_changes=[{**NOTES, "x": [[]] * MAX_JOIN_VALUES}])
        assert reply["status"] == "error"
        assert reply["response"]["reason"].startswith("InvalidJoinPayload: A join has at most")


async def test_a_table_whose_name_cannot_be_is_not_asked_for() -> None:
    hub = Hub(Catalog("host=127.0.0.1 port=1", application_name="tests"), Recent(10, 1000))
    hub.has_begun = True
    async with visiting(make_services(hub)) as socket:
        reply = await socket.join(postgres_changes=[{**NOTES, "table": "a\0b"}])
        assert reply["status"] == "ok"
        await async_wait_until(lambda: socket.events("system"))
        assert "Please check Realtime is enabled" in socket.events("system")[0]["message"]


def test_long_ranges_cost_little_when_case_is_ignored() -> None:
    linear_expression("[!-\U00018000]", fold_case=True)  # what characters there are is known now
    began = time.process_time()
    matches = linear_expression("[!-\U00018000]" * 39, fold_case=True)
    assert time.process_time() - began < 1.0
    assert matches("Ä" * 39)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("[k-l]", "kKlL", "jJmM\u212a"),
        ("[\u03b1-\u03c9]", "\u03b1\u0391\u03c2\u03a3\u03c3\u03a9", "aA"),
        ("[\u2100-\u212a]", "\u2126\u212ak\u03c9", "aAK\u03a9"),
        ("[!-\U00018000]", "aÄ\u212a\uff21\U00010400", "\U0001e900 "),
    ],
)
def test_a_range_has_what_its_characters_stand_for(
    pattern: str, matching: str, others: str
) -> None:
    matches = linear_expression(pattern, fold_case=True)
    assert [one for one in matching + others if matches(one)] == list(matching)


async def test_large_rows_that_wait_for_an_answer_are_bounded_by_their_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And counted down by each that is sent."""
    monkeypatch.setattr(sieves, "MAX_WAITING_BYTES", 2000)
    place = Place()
    await place.begin()
    client = await place.client()
    for number in range(20):
        await place.insert(number)
        await async_wait_until(lambda: [number] in place.oracle.asked)  # noqa: B023
    assert client.end is None
    place.oracle.may_answer.clear()
    await place.insert(*range(20, 30))
    await async_wait_until(lambda: client.end is End.SLOW)
    place.oracle.may_answer.set()
    await place.end()


class AskedAtOnce(FakeCatalog):
    """Counts who waits for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = self.most = self.asked = 0

    async def table(self, relation: Relation) -> None:
        del relation
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(0)
        self.waiting -= 1
        self.asked += 1


async def test_clients_who_ask_for_much_are_few_in_the_line_before_the_catalog() -> None:
    """The stream stands in the same one."""
    catalog = AskedAtOnce()
    hub = Hub(catalog, Recent(10, 1000))
    hub.has_begun = True
    bindings = [{**NOTES, "table": f"t{number}"} for number in range(20)]
    async with visiting(make_services(hub)) as socket:
        for number in range(50):
            config = {"config": {"postgres_changes": bindings}}
            socket.say("1", "1", f"{TOPIC}{number}", "phx_join", config)
        await async_wait_until(lambda: len(socket.events("phx_reply")) == 50)
    assert catalog.most <= AT_ONCE
    assert catalog.asked <= AT_ONCE * len(bindings)


def test_what_fails_in_a_task_of_a_socket_is_told_by_its_place_and_not_by_its_text() -> None:
    async def fail() -> None:
        raise ValueError("secret")

    async def serve_a_socket() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    with capture_logs() as logged:
        try:
            asyncio.run(serve_a_socket())
        except* ValueError as group:
            tell_failed(group)
    [told] = logged
    assert told["error"].startswith("ValueError at test_realtime_review.py:")
    assert "secret" not in str(told)
