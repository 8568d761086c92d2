"""Broadcasts by HTTP: what clients of Supabase Realtime send without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest
from starlette.applications import Starlette

from tests import vitals
from tests.realtime_services import services, token
from walstream.config.live import HttpConfig
from walstream.gateway import Gateway
from walstream.gateway.app import make_app
from walstream.gateway.broadcasts import broadcast_routes
from walstream.realtime.frames import split
from walstream.realtime.messages import Version
from walstream.realtime.services import Services

PATH: Final = "/realtime/v1/api/broadcast"


class Listener:
    """Keeps what it hears."""

    wants_self = wants_presence = False

    def __init__(self, version: Version = Version.V2) -> None:
        self.version = version
        self.heard: list[Any] = []

    def send(self, frames: bytes) -> None:
        for is_text, payload in split(frames):
            content = json.loads(payload) if is_text else payload
            if isinstance(content, dict):
                content = [None, content["ref"], *(content[k] for k in ("topic", "event"))]
                content.append(json.loads(payload)["payload"])
            self.heard.append(content)


def listening(services: Services, topic: str, *, private: bool = False) -> Listener:
    listener = Listener()
    services.rooms.enter((f"realtime:{topic}", private), listener)
    return listener


def app_of(services: Services) -> Starlette:
    return make_app(vitals.full, broadcast_routes(services))


@asynccontextmanager
async def client_of(services: Services, role: str = "anon") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(services))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers={"apikey": token(role, sub="ada")}
    ) as client:
        yield client


def heard(topic: str, event: str, payload: Any) -> list[Any]:
    said = {"type": "broadcast", "event": event, "payload": payload}
    return [None, None, f"realtime:{topic}", "broadcast", said]


def messages(*some: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"topic": "room1", "event": "x", "payload": {}} | one for one in some]}


@pytest.mark.parametrize("path", [PATH, "/api/broadcast"])
async def test_a_list_of_messages_is_heard_in_the_channels(path: str) -> None:
    realtime = services()
    one, two = listening(realtime, "room1"), listening(realtime, "room2")
    body = messages({"payload": {"a": 1}}, {"topic": "room2", "payload": None}, {"event": "y"})
    async with client_of(realtime) as client:
        answer = await client.post(path, json=body, params={"apikey": "x", "vsn": "2.0.0"})
    assert (answer.status_code, answer.content) == (202, b"")
    assert one.heard == [heard("room1", "x", {"a": 1}), heard("room1", "y", {})]
    assert two.heard == [heard("room2", "x", None)]


async def test_one_message_is_heard_in_the_channel_of_the_address() -> None:
    realtime = services()
    listener = listening(realtime, "room1")
    async with client_of(realtime) as client:
        answer = await client.post(f"{PATH}/room1/events/cursor-pos", content=b'{"x": 1.50}')
    assert answer.status_code == 202
    assert listener.heard == [heard("room1", "cursor-pos", {"x": 1.5})]


async def test_bytes_are_heard_as_they_are() -> None:
    realtime = services()
    listener = listening(realtime, "room1")
    old = Listener(Version.V1)
    realtime.rooms.enter(("realtime:room1", False), old)
    headers = {"Content-Type": "application/octet-stream"}
    async with client_of(realtime) as client:
        path = f"{PATH}/room1/events/x"
        answer = await client.post(path, content=b"\x00{\xff", headers=headers)
        assert answer.status_code == 202
        for path in (f"{PATH}/{'t' * 247}/events/x", f"{PATH}/room1/events/{'é' * 124}"):
            answer = await client.post(path, content=b"\x00", headers=headers)
            assert answer.status_code == 422, path
            assert "more than 246 bytes" in answer.json()["error"]
    assert listener.heard == [b"\x04\x0e\x01\x00\x00realtime:room1x\x00{\xff"]
    assert old.heard == []


@pytest.mark.parametrize(
    ("topic", "event"), [("a/b", "c/d"), ("a b?", "#%2F"), ("é😀", "events"), ("..", "ü")]
)
async def test_names_are_what_the_client_escaped(topic: str, event: str) -> None:
    realtime = services()
    listener = listening(realtime, topic)
    quoted = [
        "".join(f"%{byte:02X}" for byte in name.encode()) for name in (topic, event)
    ]  # all of it, so that no client takes a name for a part of the path
    raw = f"{PATH}/{quoted[0]}/events/{quoted[1]}"
    http = HttpConfig(listen="127.0.0.1:0")
    async with Gateway.open(http, vitals.full, lambda: broadcast_routes(realtime)) as gateway:
        status = await _post_raw(gateway.address, raw, b"[1]")
    assert status == 202
    assert listener.heard == [heard(topic, event, [1])]


async def _post_raw(address: str, target: str, body: bytes) -> int:
    """Send a path exactly as it is written."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
        f"apikey: {token('anon')}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    status = (await reader.read()).split(b" ", 2)[1]
    writer.close()
    await writer.wait_closed()
    return int(status)


async def test_private_channels_want_the_right_to_write() -> None:
    realtime = services()
    own, other = (listening(realtime, f"user:{name}", private=True) for name in ("ada", "bob"))
    public = listening(realtime, "user:ada")
    async with client_of(realtime, "authenticated") as client:
        path = f"{PATH}/user:ada/events/x?private=true"
        assert (await client.post(path, json={})).status_code == 202
        answer = await client.post(PATH, json=messages({}, {"topic": "user:bob", "private": True}))
        assert answer.status_code == 403
        assert "messages[1].topic: the role 'authenticated' may not write" in answer.json()["error"]
        path = f"{PATH}/user:bob/events/x?private=true"
        assert (await client.post(path, json={})).status_code == 403
    async with client_of(realtime, "service_role") as client:
        assert (await client.post(path, json={"by": "service"})).status_code == 202
    assert own.heard == [heard("user:ada", "x", {})]
    assert other.heard == [heard("user:bob", "x", {"by": "service"})]
    assert public.heard == []


async def test_public_channels_may_be_closed() -> None:
    realtime = services(public_channels=False)
    listener = listening(realtime, "room1")
    async with client_of(realtime, "service_role") as client:
        answer = await client.post(PATH, json=messages({}))
        assert answer.status_code == 403
        assert "private channels" in answer.json()["error"]
    assert listener.heard == []


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"headers": {"apikey": token("anon")}}, 202),
        ({"headers": {"x-api-key": token("anon")}}, 202),
        ({"headers": {"Authorization": f"Bearer {token('anon')}"}}, 202),
        ({"params": {"apikey": token("anon")}}, 202),
        ({"headers": {"apikey": "x", "Authorization": f"Bearer {token('anon')}"}}, 202),
        ({"headers": {"apikey": token("anon"), "Authorization": "Bearer x"}}, 401),
        ({"headers": {"apikey": token("anon", exp=1)}}, 401),
        ({"headers": {"apikey": token("nobody")}}, 403),
        ({"headers": {"apikey": "x"}}, 401),
        ({}, 401),
    ],
)
async def test_senders_are_asked_who_they_are(given: dict[str, Any], status: int) -> None:
    realtime = services()
    listener = listening(realtime, "room1")
    transport = httpx.ASGITransport(app_of(realtime))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post(PATH, json=messages({}), **given)
    assert answer.status_code == status
    assert len(listener.heard) == (status == 202)
    assert status == 202 or answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"messages":{}}',
        b'{"messages":[{"topic":"a","event":"x"}]}',
        b'{"messages":[{"topic":"","event":"x","payload":1}]}',
        b'{"messages":[{"topic":"a","event":"","payload":1}]}',
        b'{"messages":[{"topic":1,"event":"x","payload":1}]}',
        b'{"messages":[{"topic":"%b","event":"x","payload":1}]}' % (b"a" * 1025),
        b'{"messages":[{"topic":"room1","event":"x","payload":1},{"topic":"room1"}]}',
        b'{"messages":[{"topic":"room1","event":"x","payload":%b1%b}]}' % (b"[" * 500, b"]" * 500),
        b'{"messages":%b%b}' % (b"[" * 100_000, b"]" * 100_000),
        b'{"messages":[{"topic":"room1","event":"x","payload":"\xff"}]}',
    ],
)
async def test_what_is_no_list_of_messages_is_refused_and_nothing_is_said(body: bytes) -> None:
    realtime = services()
    listener = listening(realtime, "room1")
    async with client_of(realtime) as client:
        answer = await client.post(PATH, content=body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]
    assert listener.heard == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"{", "the body is no list of messages in JSON"),
        (b"[]", "the body: found array; allowed: object"),
        (b"{}", "messages: is missing"),
        (b'{"messages":{}}', "messages: found object; allowed: array"),
        (b'{"messages":[1]}', "messages[0]: found int; allowed: object"),
        (b'{"messages":[{"event":"x","payload":1}]}', "messages[0].topic: is missing"),
        (
            b'{"messages":[{"topic":"a","event":7777,"payload":1}]}',
            "messages[0].event: found int; allowed: str",
        ),
        (
            b'{"messages":[{"topic":"a","event":"x","payload":1,"private":"mine"}]}',
            "messages[0].private: found str; allowed: bool | null",
        ),
    ],
)
async def test_a_refused_list_is_told_what_is_missing_or_wrong(body: bytes, error: str) -> None:
    async with client_of(services()) as client:
        answer = await client.post(PATH, content=body)
    assert answer.status_code == 422
    assert answer.json()["error"] == error


@pytest.mark.parametrize("body", [b"", b"{", b"{}x", b"\xff", b"[" * 100_000, b"NaN"])
async def test_a_message_that_is_no_json_is_refused(body: bytes) -> None:
    realtime = services()
    async with client_of(realtime) as client:
        answer = await client.post(f"{PATH}/room1/events/x", content=body)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("rest", ["room1", "room1/events", "room1/events/", "/events/x", "a/b/c/d"])
async def test_other_paths_are_not_answered(rest: str) -> None:
    async with client_of(services()) as client:
        answer = await client.post(f"{PATH}/{rest}", json={})
        assert answer.status_code in (404, 422)
        assert (await client.get(PATH)).status_code == 405


async def test_nothing_is_answered_unless_it_is_wanted() -> None:
    async with client_of(services(enabled=False)) as client:
        assert (await client.post(PATH, json=messages({}))).status_code == 404


async def test_sizes_and_rates_are_bounded() -> None:
    realtime = services(max_broadcast_bytes=1000, max_frame_bytes=3000, messages_per_second=5)
    listener = listening(realtime, "room1")
    large = "x" * 1000
    async with client_of(realtime) as client:
        one = f"{PATH}/room1/events/x"
        assert (await client.post(one, json=large)).status_code == 413
        assert (await client.post(PATH, json=messages({"payload": large}))).status_code == 413
        assert (await client.post(PATH, json=messages({"payload": large * 9}))).status_code == 413
        too_many = await client.post(PATH, json=messages(*[{}] * 6))
        assert too_many.status_code == 422
        assert too_many.json()["error"] == "messages: found 6; allowed: 5"
        assert "realtime.messages_per_second" in too_many.json()["hint"]
        assert listener.heard == []
        assert (await client.post(PATH, json=messages(*[{}] * 5))).status_code == 202
        answer = await client.post(one, json={})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert answer.json()["error"] == "Too many requests"
    async with client_of(realtime, "service_role") as client:
        assert (await client.post(one, json={})).status_code == 202
    assert len(listener.heard) == 6


async def test_broadcasts_are_not_stored() -> None:
    async with client_of(services(), "service_role") as client:
        for query in ("persist=true", "persist[ttl]=60"):
            answer = await client.post(f"{PATH}/a/events/x?private=true&{query}", json={})
            assert answer.status_code == 422
            assert "not stored" in answer.json()["error"]
        for persist in (True, {"ttl": 60}):
            answer = await client.post(PATH, json=messages({}, {"persist": persist}))
            assert answer.status_code == 422
            assert answer.json()["error"] == "messages[1].persist: broadcasts are not stored here"
        for kept in (False, None):
            assert (await client.post(PATH, json=messages({"persist": kept}))).status_code == 202


async def test_pages_of_listed_origins_may_send() -> None:
    realtime = services()
    http = HttpConfig(listen="127.0.0.1:0", cors_origins=["https://app.example.org"])
    asked = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "apikey,authorization,content-type,x-client-info",
    }
    async with (
        Gateway.open(http, vitals.full, lambda: broadcast_routes(realtime)) as gateway,
        httpx.AsyncClient(base_url=f"http://{gateway.address}") as client,
    ):
        answer = await client.options(PATH, headers=asked)
        allowed = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert answer.status_code == 204
        assert set(asked["Access-Control-Request-Headers"].split(",")) <= set(allowed)
        headers = {"Origin": asked["Origin"], "apikey": token("anon")}
        answer = await client.post(PATH, json=messages({}), headers=headers)
    assert answer.status_code == 202
    assert answer.headers["Access-Control-Allow-Origin"] == asked["Origin"]
