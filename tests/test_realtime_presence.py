"""Presence through sockets: everybody comes to know the same, and nobody holds others up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final, NamedTuple, Self

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests import vitals
from tests.phoenix_presence import JavaScriptPresence, PythonPresence
from tests.postgres import async_wait_until
from tests.realtime_services import services, token
from walstream.config.live import HttpConfig
from walstream.gateway import Gateway
from walstream.gateway.realtime import realtime_routes
from walstream.realtime.messages import Version
from walstream.realtime.services import Services

TOPIC: Final = "realtime:room1"


@asynccontextmanager
async def serving(realtime: Services) -> AsyncIterator[str]:
    """Serve the channels; yields the address to connect to."""
    http = HttpConfig(listen="127.0.0.1:0")
    async with Gateway.open(http, vitals.full, lambda: realtime_routes(realtime)) as gateway:
        yield f"ws://{gateway.address}/realtime/v1/websocket?apikey={token('anon')}"


class Heard(NamedTuple):
    """A message of the server."""

    ref: str | None
    event: str
    payload: Any


class Client:
    """A socket in one channel; it keeps what it hears as it came."""

    def __init__(self, version: Version, connection: ClientConnection) -> None:
        self.version = version
        self.connection = connection
        self.texts: list[str | bytes] = []
        self._refs = 0
        self._join_ref = ""
        self._hearing = asyncio.create_task(self._hear())

    async def _hear(self) -> None:
        try:
            async for text in self.connection:
                self.texts.append(text)
        except ConnectionClosed:
            pass

    async def say(self, event: str, payload: Any) -> str:
        """Send a message; return its ref."""
        self._refs += 1
        ref = str(self._refs)
        if event == "phx_join":
            self._join_ref = ref
        if self.version is Version.V2:
            message: Any = [self._join_ref, ref, TOPIC, event, payload]
        else:
            message = {
                "topic": TOPIC,
                "event": event,
                "payload": payload,
                "ref": ref,
                "join_ref": self._join_ref,
            }
        await self.connection.send(json.dumps(message))
        return ref

    async def join(self, key: str = "", **presence: Any) -> str:
        return await self.say("phx_join", {"config": {"presence": {"key": key, **presence}}})

    async def track(self, payload: Any) -> str:
        return await self.say(
            "presence", {"type": "presence", "event": "track", "payload": payload}
        )

    async def untrack(self) -> None:
        await self.say("presence", {"type": "presence", "event": "untrack"})

    async def close(self) -> None:
        await self.connection.close()
        await self._hearing

    @property
    def heard(self) -> list[Heard]:
        return list(map(self._read, self.texts))

    def _read(self, text: str | bytes) -> Heard:
        message = json.loads(text)
        if self.version is Version.V2:
            _, ref, _, event, payload = message
            return Heard(ref, event, payload)
        return Heard(message["ref"], message["event"], message["payload"])

    async def reply(self, ref: str) -> Any:
        """Wait for the answer to a message."""

        def replies() -> list[Any]:
            found = [self._read(text) for text in self.texts if "phx_reply" in str(text)]
            return [one.payload for one in found if one.ref == ref]

        await async_wait_until(replies, timeout_seconds=60.0)
        return replies()[0]

    async def comes_to(self, count: int) -> None:
        """Wait until so many messages have come."""
        await async_wait_until(lambda: len(self.texts) >= count)

    def metas(self) -> dict[str, list[dict[str, Any]]]:
        """What the stock client of this version makes of it."""
        presence = JavaScriptPresence() if self.version is Version.V2 else PythonPresence()
        for _, event, payload in self.heard:
            if event == "presence_state":
                presence.on_state(payload)
            elif event == "presence_diff":
                presence.on_diff(payload)
        return presence.metas


class Crowd:
    """Opens sockets, and closes what is left of them."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._clients: list[Client] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    async def client(self, version: Version = Version.V2) -> Client:
        address = f"{self._address}&vsn={version}"
        connection = await connect(address, compression=None, max_size=None)
        client = Client(version, connection)
        self._clients.append(client)
        return client


async def test_members_see_each_other_come_change_and_go() -> None:
    async with serving(services()) as address, Crowd(address) as crowd:
        ada, bob = await crowd.client(), await crowd.client(Version.V1)
        await ada.join("ada")
        await bob.join("bob")
        assert await ada.reply(await ada.track({"n": 1})) == {"status": "ok", "response": {}}
        await bob.track({"n": 2})
        await ada.track({"n": 3})
        await async_wait_until(lambda: {"ada", "bob"} <= bob.metas().keys())
        await async_wait_until(
            lambda: ada.metas() == bob.metas() and ada.metas()["ada"][0]["n"] == 3
        )
        assert "phx_ref_prev" in bob.metas()["ada"][0]
        second = await crowd.client()
        await second.join("ada")
        await second.track({"n": 4})
        await async_wait_until(lambda: [one["n"] for one in bob.metas().get("ada", [])] == [3, 4])
        await ada.close()
        await async_wait_until(lambda: [one["n"] for one in bob.metas().get("ada", [])] == [4])
        await second.untrack()
        await async_wait_until(lambda: list(bob.metas()) == ["bob"])
        assert second.metas() == bob.metas()


async def test_who_gives_no_key_gets_one_and_who_does_not_look_is_seen() -> None:
    async with serving(services()) as address, Crowd(address) as crowd:
        seen, looking = await crowd.client(), await crowd.client()
        await seen.join(enabled=False)
        await looking.join()
        await seen.track({"n": 1})
        await async_wait_until(looking.metas)
        [key] = looking.metas()
        assert len(key) == 36
        assert [one.event for one in seen.heard] == ["phx_reply", "phx_reply"]


@pytest.mark.parametrize("payload", [None, 1, "x", [1], True])
async def test_a_payload_that_is_no_map_is_refused(payload: Any) -> None:
    async with serving(services()) as address, Crowd(address) as crowd:
        client = await crowd.client()
        await client.join("k")
        answer = await client.reply(await client.track(payload))
        assert answer["status"] == "error"
        assert answer["response"] == {"reason": "Presence track payload must be a map"}
        await client.track({})
        await async_wait_until(client.metas)


async def test_what_is_too_large_is_refused_and_disturbs_nobody() -> None:
    async with serving(services()) as address, Crowd(address) as crowd:
        large, other = await crowd.client(), await crowd.client(Version.V1)
        refused = await large.reply(await large.join("k" * 1_000_000))
        assert refused["response"]["reason"].startswith("InvalidJoinPayload")
        await large.join("k" * 100_000)
        await other.join("other")
        answer = await large.reply(await large.track({}))
        assert answer["response"]["reason"].startswith("Track message size exceeded")
        answer = await other.reply(await other.track({"u": "x" * 100_000}))
        assert answer["response"]["reason"].startswith("Track message size exceeded")
        await other.track({})
        await async_wait_until(lambda: list(large.metas()) == list(other.metas()) == ["other"])


async def test_a_member_who_does_not_read_holds_nobody_up() -> None:
    realtime = services(messages_per_second=1000)
    async with serving(realtime) as address, Crowd(address) as crowd:
        stuck, speaker, listener = [await crowd.client() for _ in range(3)]
        for one in (stuck, speaker, listener):
            await one.join("k")
            await one.comes_to(2)
        stuck.connection.transport.pause_reading()
        payload = {"type": "broadcast", "event": "x", "payload": "x" * 200_000}
        for count in range(100):
            await speaker.say("broadcast", payload)
            await listener.comes_to(3 + count)
        await async_wait_until(lambda: realtime.vitals().sockets == 2)  # it is cut off
        stuck.connection.transport.resume_reading()


@pytest.mark.parametrize(
    ("members", "seconds"),
    [
        (40, 10.0),
        pytest.param(1_000, 60.0, marks=[pytest.mark.soak, pytest.mark.timeout(300)]),
    ],
)
async def test_all_who_come_and_go_at_random_know_the_same_in_the_end(
    members: int, seconds: float
) -> None:
    random = Random(members)  # noqa: S311 - nothing is secret
    realtime = services(presence_calls=1000)
    async with serving(realtime) as address, Crowd(address) as crowd:
        there: list[Client] = []
        for number in range(members):
            client = await crowd.client(random.choice(list(Version)))
            there.append(client)
            await client.join(f"k{number * 2 // 3}")
            await client.track({"n": number})
        for step in range(members * 2):
            client = random.choice(there)
            chance = random.random()
            if chance < 0.5:
                await client.track({"step": step})
            elif chance < 0.8:
                await client.untrack()
            else:
                there.remove(client)
                await client.close()
        last = await crowd.client()
        # Sockets are read side by side: what others have said has to have been done before.
        done = [(client, await client.track({"is_done": True})) for client in there]
        await asyncio.gather(*(client.reply(ref) for client, ref in done))
        await last.join("last")
        await last.track({"is_last": True})
        there.append(last)
        await async_wait_until(
            lambda: all("is_last" in str(client.texts[-1]) for client in there),
            timeout_seconds=seconds,
        )
        assert realtime.vitals().presences == sum(map(len, last.metas().values()))
        for client in random.sample(there, min(len(there), 50)):
            assert client.metas() == last.metas()
