"""What clients are refused is counted, by reasons that no client makes up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests import vitals
from tests.postgres import async_wait_until
from tests.realtime_services import services, token
from walstream.access.refusals import Cause, ReaderRefused
from walstream.config.live import HttpConfig
from walstream.gateway import Gateway
from walstream.gateway.broadcasts import broadcast_routes
from walstream.gateway.realtime import realtime_routes
from walstream.realtime.refusals import NOT_NOW, PRIVATE_ONLY, join_refusal, not_begun, not_readable
from walstream.realtime.services import Services
from walstream.realtime.tally import JOIN_CODES, REASONS, Reason, of_join

TOPIC: Final = "realtime:room1"


@asynccontextmanager
async def serving(realtime: Services) -> AsyncIterator[str]:
    """Serve sockets and broadcasts by HTTP; yields host and port."""
    http = HttpConfig(listen="127.0.0.1:0")

    def routes() -> list[Any]:
        return [*realtime_routes(realtime), *broadcast_routes(realtime)]

    async with Gateway.open(http, vitals.full, routes) as gateway:
        yield str(gateway.address)


@asynccontextmanager
async def client_of(realtime: Services, role: str = "anon") -> AsyncIterator[ClientConnection]:
    async with serving(realtime) as address, connect(url(address, token(role))) as client:
        yield client


def url(address: str, key: str, vsn: str = "2.0.0") -> str:
    return f"ws://{address}/realtime/v1/websocket?vsn={vsn}&apikey={key}"


async def say(client: ClientConnection, event: str, payload: object, topic: str = TOPIC) -> None:
    await client.send(json.dumps(["1", "1", topic, event, payload]))


async def join(client: ClientConnection, topic: str = TOPIC, **config: Any) -> Any:
    """Join a channel; return what the reply says."""
    await say(client, "phx_join", {"config": config}, topic)
    while True:
        *_, event, payload = json.loads(await client.recv())
        if event == "phx_reply":
            return payload


def counted(realtime: Services) -> dict[str, int]:
    return {reason: count for reason, count in realtime.refusals.counts.items() if count}


async def until_counted(realtime: Services, **expected: int) -> None:
    await async_wait_until(lambda: counted(realtime) == expected)


# ---- Which reasons there are


def test_all_reasons_are_told_from_the_beginning() -> None:
    """Otherwise nobody sees the first of a kind: a series that begins with 1 has not increased."""
    assert services().vitals().refusals == dict.fromkeys(REASONS, 0)
    assert len(set(REASONS)) == len(REASONS)


@pytest.mark.parametrize("cause", Cause)
def test_each_refusal_of_a_token_has_a_reason(cause: Cause) -> None:
    assert of_join(join_refusal(ReaderRefused(401, "no", cause=cause))) in JOIN_CODES


@pytest.mark.parametrize("text", [NOT_NOW, PRIVATE_ONLY, not_begun(8), not_readable("a: b")])
def test_each_refusal_of_a_channel_has_a_reason(text: str) -> None:
    assert of_join(text) in JOIN_CODES


@pytest.mark.parametrize("text", ["", "Unauthorised", "mine: Unauthorized", "binding: no"])
def test_anything_else_is_other(text: str) -> None:
    assert of_join(text) == Reason.OTHER


def test_every_reason_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics-and-health.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []


# ---- Where they are counted


async def test_refused_connections_are_counted_by_their_cause() -> None:
    realtime = services(refusal_seconds=0)
    async with serving(realtime) as address:
        for key in ("", token("anon") + "x", token("anon", exp=1), token("stranger")):
            with pytest.raises(InvalidStatus):
                await connect(url(address, key))
        with pytest.raises(InvalidStatus):
            await connect(url(address, token("anon"), vsn="3"))
    assert counted(realtime) == {
        "connection_missing": 1,
        "connection_signature": 1,
        "connection_expired": 1,
        "connection_forbidden": 1,
        "connection_version": 1,
    }


async def test_refused_joins_are_counted_by_their_code() -> None:
    """Those that the protocol refuses by itself, and those that it does not."""
    realtime = services(public_channels=False, max_channels=1)
    async with client_of(realtime, "service_role") as client:
        assert (await join(client))["response"]["reason"].startswith("PrivateOnly: ")
        assert (await join(client, private=True))["status"] == "error"
        assert (await join(client, "realtime:"))["status"] == "error"
    assert counted(realtime) == {"PrivateOnly": 1, "Unauthorized": 1, "TopicNameRequired": 1}


async def test_joins_beyond_the_limit_are_counted() -> None:
    realtime = services(max_channels=1)
    async with client_of(realtime) as client:
        await join(client)
        assert (await join(client, "realtime:room2"))["status"] == "error"
    assert counted(realtime) == {"ChannelRateLimitReached": 1}


async def test_bindings_that_cannot_be_had_are_counted_each() -> None:
    realtime = services()
    notes = {"event": "*", "schema": "public", "table": "notes"}
    async with client_of(realtime) as client:
        await join(client, postgres_changes=[notes, {**notes, "filter": "nonsense"}])
        await until_counted(realtime, binding=2)


async def test_a_token_that_closes_its_channel_is_counted() -> None:
    realtime = services()
    async with client_of(realtime) as client:
        await join(client)
        await say(client, "access_token", {"access_token": token("anon") + "x"})
        await until_counted(realtime, JwtSignatureError=1)


async def test_broadcasts_that_nobody_hears_are_counted() -> None:
    """A client that does not want them acknowledged is not told."""
    realtime = services(private=[{"topic": "*", "read": ["anon"]}])
    async with client_of(realtime) as client:
        await join(client, private=True)
        for payload in ({}, {"event": "x", "payload": {}}):
            await say(client, "broadcast", {"type": "broadcast", **payload})
        await until_counted(realtime, broadcast=2)
        await say(client, "presence", {"event": "track", "payload": {}})
        await until_counted(realtime, broadcast=2, presence=1)


async def test_a_channel_that_is_closed_for_its_presence_is_counted() -> None:
    realtime = services(presence_calls=1)
    async with client_of(realtime) as client:
        await join(client)
        for number in range(2):
            await say(client, "presence", {"event": "track", "payload": {"n": number}})
        await until_counted(realtime, presence=1)


async def test_a_socket_that_says_too_much_is_counted_once() -> None:
    realtime = services(messages_per_second=1)
    async with client_of(realtime) as client:
        await join(client)
        said = {"type": "broadcast", "event": "x", "payload": {}}
        await asyncio.gather(*(say(client, "broadcast", said) for _ in range(20)))
        await client.wait_closed()
        await until_counted(realtime, messages=1)


async def test_requests_to_broadcast_by_http_are_counted_when_they_are_refused() -> None:
    realtime = services()
    async with serving(realtime) as address, httpx.AsyncClient() as client:
        path = f"http://{address}/realtime/v1/api/broadcast"
        key = {"apikey": token("anon")}
        said = {"topic": "room1", "event": "x", "payload": {}}
        assert (await client.post(path, json={"messages": [said]}, headers=key)).is_success
        assert counted(realtime) == {}
        for body, headers in (({}, key), ({"messages": [said]}, {})):
            assert (await client.post(path, json=body, headers=headers)).is_client_error
    assert counted(realtime) == {"http": 2}
