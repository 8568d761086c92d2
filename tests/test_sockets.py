"""WebSockets: stock clients, and clients that do not behave; each gets its bound."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest
import structlog
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import connect as connect_client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.frames import Frame, masked, read_frame
from tests.serving import Streams, clients, connect, get, heartbeat, port_of, serving
from walstream.gateway import Gateway, inbox, shared, socket_connection, stalls
from walstream.gateway import sockets as gateway_sockets
from walstream.gateway.socket_connection import SocketConnection
from walstream.gateway.sockets import Socket, open_socket, refuse
from walstream.gateway.streams import Ended
from walstream.realtime.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    binary_frame,
    text_frame,
)

Waits = Callable[..., Awaitable[Any]]

MAX_BYTES: Final = 1 << 17
LATE_SECONDS: Final = 0.05
PATH: Final = "/socket?apikey=sb_secret_key"
HANDSHAKE: Final = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)


class Sockets:
    """An endpoint that echoes, and whose sockets the test writes to."""

    def __init__(self) -> None:
        self.open: list[Socket] = []
        self.heard: list[str | bytes] = []
        self.ended: list[Ended] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.may_take = asyncio.Event()
        self.may_take.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_answer.wait()
        if b"apikey" not in scope["query_string"]:
            await refuse(scope, receive, send, 401, {"error": "API key is missing"})
            return
        if b"fail" in scope["query_string"]:
            raise ValueError("early")
        async with open_socket(scope, receive, send, max_bytes=MAX_BYTES) as socket:
            self.open.append(socket)
            while (message := await socket.receive()) is not None:
                self.heard.append(message)
                await self._answer(socket, message)
                await self.may_take.wait()
            self.ended.append(await socket.ended())

    async def _answer(self, socket: Socket, message: str | bytes) -> None:
        if message == "bye":
            await socket.close(4000, "as asked for")
        elif message == "fail":
            raise ValueError("late")
        elif message != "quiet":
            socket.write(echo(message))


def echo(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return text_frame(message.encode())
    return binary_frame(message)


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """Events of all levels, whatever level another test has left."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(0))
    with structlog.testing.capture_logs() as events:
        yield events
    structlog.configure(**before)


def refusals(logged: list[Any]) -> list[str]:
    return [one["reason"] for one in logged if one["event"] == "http_refused"]


@asynccontextmanager
async def serving_sockets(endpoint: ASGIApp, **http: Any) -> AsyncIterator[Gateway]:
    more = [WebSocketRoute("/socket", endpoint)]
    async with serving(Streams(), more=more, **http) as gateway:
        yield gateway


def client_of(gateway: Gateway, path: str = PATH, **options: Any) -> Any:
    return connect_client(f"ws://127.0.0.1:{port_of(gateway)}{path}", **options)


async def opened(
    gateway: Gateway, early: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a socket by hand."""
    reader, writer = await connect(gateway, get(PATH, *HANDSHAKE) + early)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
    return reader, writer


async def goodbye(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Read up to the close frame, and the end behind it."""
    while (frame := await read_frame(reader)).opcode != CLOSE:
        pass
    assert await reader.read() == b""
    return int.from_bytes(frame.payload[:2]), frame.payload[2:].decode()


def sockets_of(gateway: Gateway) -> list[SocketConnection]:
    return [one for one in gateway.server._connections() if isinstance(one, SocketConnection)]


def closes(code: int) -> Frame:
    return Frame(CLOSE, code.to_bytes(2))


# ---- Stock clients


async def test_messages_of_both_kinds_come_and_go(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        async with client_of(gateway) as client:
            for message in ("one", b"\x00two", "", "ü" * 1000, b"x" * MAX_BYTES):
                await client.send(message)
                assert await client.recv() == message
            await (await client.ping("are you there"))
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
        assert client.close_code == 1000


async def test_many_frames_are_one_write_and_keep_their_order(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway, client_of(gateway) as client:
        await async_wait_until(lambda: sockets.open)
        several = b"".join(text_frame(b"%d" % number) for number in range(100))
        sockets.open[0].write(several)
        sockets.open[0].write(text_frame(b"100"))
        assert [int(await client.recv()) for _ in range(101)] == list(range(101))


async def test_the_endpoint_closes_with_a_code_and_a_reason(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway, client_of(gateway) as client:
        await client.send("one")
        await client.send("bye")
        assert await client.recv() == "one"
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert (client.close_code, client.close_reason) == (4000, "as asked for")
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
        await async_wait_until(lambda: not gateway.server._connections())


async def test_an_endpoint_that_fails_is_told_as_1011_or_500_and_logged(logged: list[Any]) -> None:
    async with serving_sockets(Sockets()) as gateway:
        async with client_of(gateway) as client:
            await client.send("fail")
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert client.close_code == 1011
        with pytest.raises(InvalidStatus) as refused:
            await client_of(gateway, PATH + "&fail").__aenter__()
        assert refused.value.response.status_code == 500
    failed = [one["error"] for one in logged if one["event"] == "http_failed"]
    assert [one.partition(" ")[0] for one in failed] == ["ValueError", "ValueError"]


async def test_what_was_said_before_leaving_is_heard(async_wait_until: Waits) -> None:
    sockets = Sockets()
    sockets.may_take.clear()
    async with serving_sockets(sockets) as gateway:
        _, writer = await opened(gateway)
        writer.write(masked(TEXT, b"quiet") * 200)
        writer.close()
        await async_wait_until(lambda: sockets.heard)
        sockets.may_take.set()
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
    assert sockets.heard == ["quiet"] * 200


# ---- Refusals


async def test_a_refusal_is_an_answer_of_http() -> None:
    async with serving_sockets(Sockets()) as gateway:
        for path, status in (
            ("/socket", 401),
            ("/nowhere", 404),
            ("/echo", 404),
            ("/metrics", 404),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await client_of(gateway, path).__aenter__()
            response = refused.value.response
            assert response.status_code == status
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "error" in json.loads(response.body)


@pytest.mark.parametrize(
    ("method", "version", "headers"),
    [
        ("GET", "1.1", HANDSHAKE[:2]),
        ("GET", "1.1", (*HANDSHAKE[:2], HANDSHAKE[3])),
        ("GET", "1.1", (*HANDSHAKE[:3], "Sec-WebSocket-Version: 8")),
        ("GET", "1.1", (*HANDSHAKE, HANDSHAKE[2])),
        ("POST", "1.1", HANDSHAKE),
        ("GET", "1.0", HANDSHAKE),
    ],
)
async def test_a_bad_handshake_gets_400_and_json(
    method: str, version: str, headers: tuple[str, ...]
) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        request = get(PATH, *headers, version=version).replace(b"GET", method.encode())
        reader, _ = await connect(gateway, request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert set(json.loads(body)) == {"error", "hint"}
    assert not sockets.open


@pytest.mark.parametrize(("does", "status"), [("websocket.close", 403), ("websocket.accept", 500)])
async def test_an_endpoint_answers_by_what_there_is_for_it(
    does: str, status: int, logged: list[Any]
) -> None:
    async def endpoint(_scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": does})

    async with serving_sockets(_Endpoint(endpoint)) as gateway:
        with pytest.raises(InvalidStatus) as refused:
            await client_of(gateway).__aenter__()
        assert refused.value.response.status_code == status
    failed = [one for one in logged if one["event"] == "http_failed"]
    assert len(failed) == (status == 500)


async def test_an_endpoint_can_wait_for_a_client_that_leaves_before_its_answer() -> None:
    gone = asyncio.get_running_loop().create_future()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        assert (await receive())["type"] == "websocket.disconnect"
        async with open_socket(scope, _nothing, send, max_bytes=MAX_BYTES) as socket:
            socket.write(text_frame(b"to nobody"))
            assert await socket.receive() is None
            gone.set_result(await socket.ended())

    async with serving_sockets(_Endpoint(endpoint)) as gateway:
        _, writer = await connect(gateway, get(PATH, *HANDSHAKE))
        writer.close()
        assert await gone == Ended.GONE


async def _nothing() -> Message:
    raise AssertionError


class _Endpoint:
    """Starlette takes a function for one of its own kind."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def test_pages_of_other_origins_are_refused_unless_listed() -> None:
    async with serving_sockets(Sockets(), cors_origins=["https://App.example"]) as gateway:
        own = f"http://127.0.0.1:{port_of(gateway)}"
        for origin in (None, own, "https://app.example"):
            async with client_of(gateway, origin=origin):
                pass
        for origin in ("https://evil.example", "null", "https://app.example.evil"):
            with pytest.raises(InvalidStatus) as refused:
                await client_of(gateway, origin=origin).__aenter__()
            assert refused.value.response.status_code == 403
            assert "cors_origins" in json.loads(refused.value.response.body)["hint"]
    async with (
        serving_sockets(Sockets(), cors_origins=["*"]) as gateway,
        client_of(gateway, origin="https://anybody.example"),
    ):
        pass


async def test_another_host_is_refused() -> None:
    async with serving_sockets(Sockets()) as gateway:
        request = get(PATH, *HANDSHAKE).replace(b"localhost", b"evil.example")
        reader, _ = await connect(gateway, request)
        assert (await reader.read()).startswith(b"HTTP/1.1 421 ")


async def test_a_connection_that_spoke_http_before_can_become_a_socket() -> None:
    async with serving_sockets(Sockets()) as gateway:
        reader, writer = await connect(gateway, get("/echo"))
        body = await reader.readuntil(b"}")
        assert body.startswith(b"HTTP/1.1 200 ")
        writer.write(get(PATH, *HANDSHAKE) + masked(TEXT, b"early") + masked(TEXT, b"words"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert await read_frame(reader) == (TEXT, b"early")
        assert await read_frame(reader) == (TEXT, b"words")


async def test_a_socket_asked_for_before_an_answer_is_not_given() -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        reader, _ = await connect(gateway, get("/stream") + get(PATH, *HANDSHAKE))
        with contextlib.suppress(ConnectionError):
            assert b" 101 " not in await reader.read()
    assert not sockets.open


# ---- Clients that do not behave


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x03abc", 1002),
        (masked(0x3), 1002),
        (masked(0x0, b"a"), 1002),
        (masked(PING, b"x" * 126), 1002),
        (masked(CLOSE, b"\x00"), 1002),
        (masked(TEXT, b"\xff"), 1007),
        (masked(BINARY, b"x" * (MAX_BYTES + 1)), 1009),
        (b"\x82\xff" + (1 << 62).to_bytes(8) + b"mask", 1009),
        (masked(TEXT, b"x" * MAX_BYTES, fin=False) + masked(0x0, b"x"), 1009),
    ],
)
async def test_what_cannot_be_read_ends_the_connection_with_a_code(
    sent: bytes, code: int, async_wait_until: Waits
) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        reader, writer = await opened(gateway)
        writer.write(masked(TEXT, b"before"))
        assert await read_frame(reader) == (TEXT, b"before")
        writer.write(masked(TEXT, b"quiet") + sent + masked(TEXT, b"behind"))
        assert (await goodbye(reader))[0] == code
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
        writer.write(b"x" * 100)
        writer.close()
        await async_wait_until(lambda: not gateway.server._connections())
    assert sockets.heard == ["before", "quiet"]


async def test_fragments_and_pings_between_them_are_one_message() -> None:
    async with serving_sockets(Sockets()) as gateway:
        reader, writer = await opened(gateway)
        sent = masked(TEXT, b"a\xc3", fin=False) + masked(PING, b"1") + masked(0x0, b"\xa4")
        for at in range(len(sent)):
            writer.write(sent[at : at + 1])
            await writer.drain()
        assert await read_frame(reader) == (PONG, b"1")
        assert await read_frame(reader) == (TEXT, "aä".encode())


async def test_a_close_is_answered_with_its_code() -> None:
    async with serving_sockets(Sockets()) as gateway:
        for payload in (b"\x03\xe8", b"\x0f\xa1bye", b""):
            reader, writer = await opened(gateway)
            writer.write(masked(CLOSE, payload))
            assert await read_frame(reader) == (CLOSE, payload[:2])
            assert await reader.read() == b""


async def test_a_flood_of_frames_that_say_nothing_is_closed_and_holds_up_nobody(
    logged: list[Any],
) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway, client_of(gateway) as other:
        for flood in (
            masked(PING) * 50_000,
            masked(PONG) * 50_000,
            masked(TEXT, fin=False) + masked(0x0, fin=False) * 50_000,
        ):
            reader, writer = await opened(gateway)
            async with heartbeat() as late:
                writer.write(flood)
                assert (await goodbye(reader))[0] == 1008
                await other.send("here")
                assert await other.recv() == "here"
            assert max(late) < LATE_SECONDS
    assert len(refusals(logged)) == 3


async def test_messages_wait_while_nobody_takes_them(async_wait_until: Waits) -> None:
    sockets = Sockets()
    sockets.may_take.clear()
    async with serving_sockets(sockets) as gateway:
        _, writer = await opened(gateway)
        message = masked(TEXT, b"quiet")
        writer.write(message * (16 << 20 >> 3))
        await async_wait_until(lambda: sockets.heard)
        (connection,) = sockets_of(gateway)
        await async_wait_until(lambda: not connection.transport.is_reading())
        assert connection._socket is not None
        box = connection._socket.inbox
        assert len(box._messages) <= inbox.MAX_WAITING
        assert len(box._incoming._buffer) < 1 << 20
        async with heartbeat() as late:
            sockets.may_take.set()
            await async_wait_until(lambda: len(sockets.heard) > 10_000)
        assert max(late) < LATE_SECONDS


async def test_a_client_that_reads_nothing_is_cut_whatever_it_sends(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.1)
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        _, writer = await opened(gateway)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await async_wait_until(lambda: sockets.open)
        socket = sockets.open[0]
        while not socket.is_over:
            if socket.waiting_bytes < 1 << 20:
                socket.write(binary_frame(b"x" * 100_000))
            writer.write(masked(PING, b"x" * 100))
            await asyncio.sleep(0.001)
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
    assert refusals(logged) == ["the answer is not fetched"]


async def test_pongs_for_one_that_reads_nothing_do_not_grow(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        reader, writer = await opened(gateway)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await async_wait_until(lambda: sockets.open)
        socket = sockets.open[0]
        socket.write(binary_frame(b"x" * (16 << 20)))
        await async_wait_until(lambda: sockets_of(gateway)[0]._is_paused)
        before = socket.waiting_bytes
        for number in range(500):
            writer.write(masked(PING, b"%d" % number))
        writer.write(masked(TEXT, b"quiet"))
        await async_wait_until(lambda: sockets.heard)
        assert socket.waiting_bytes <= before
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await read_frame(reader)).opcode == BINARY
        assert await read_frame(reader) == (PONG, b"499")


async def test_a_client_that_says_nothing_is_asked_and_cut(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(socket_connection, "PING_SECONDS", 0.05)
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway, client_of(gateway) as lively:
        reader, _ = await opened(gateway)
        assert await read_frame(reader) == (PING, b"")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
        await lively.send("here")
        assert await lively.recv() == "here"
    assert refusals(logged) == ["the client is not heard of any more"]


async def test_a_message_that_does_not_come_to_its_end_is_cut(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(socket_connection, "PING_SECONDS", 0.05)
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        _, writer = await opened(gateway)
        writer.write(masked(TEXT, b"x" * 100)[:50])
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
    assert refusals(logged) == ["a message took too long"]


async def test_an_answer_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(socket_connection, "REQUEST_SECONDS", 0.05)
    sockets = Sockets()
    sockets.may_answer.clear()
    async with serving_sockets(sockets) as gateway:
        reader, _ = await connect(gateway, get(PATH, *HANDSHAKE))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        sockets.may_answer.set()
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
    assert refusals(logged) == ["the answer took too long"]


async def test_who_leaves_without_a_goodbye_is_known_to_have_gone(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        for leave in (asyncio.StreamWriter.close, _abort, asyncio.StreamWriter.write_eof):
            _, writer = await opened(gateway)
            leave(writer)
            await async_wait_until(lambda: not gateway.server._connections())
        await async_wait_until(lambda: len(sockets.ended) == 3)
    assert set(sockets.ended) == {Ended.GONE}


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def test_a_goodbye_that_is_not_returned_is_waited_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits
) -> None:
    for module in (gateway_sockets, socket_connection):
        monkeypatch.setattr(module, "LINGER_SECONDS", 0.05)
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        reader, writer = await opened(gateway)
        writer.write(masked(TEXT, b"bye"))
        assert await read_frame(reader) == (CLOSE, b"\x0f\xa0as asked for")
        writer.write(masked(TEXT, b"more"))
        await async_wait_until(lambda: not gateway.server._connections())
        # Nor is it waited for one that fetches nothing.
        _, mute = await opened(gateway)
        mute.transport.pause_reading()  # type: ignore[attr-defined]
        await async_wait_until(lambda: len(sockets.open) == 2)
        sockets.open[1].write(binary_frame(b"x" * (16 << 20)))
        mute.write(masked(TEXT, b"bye"))
        await async_wait_until(lambda: not gateway.server._connections())
    assert sockets.heard == ["bye", "bye"]


async def test_nothing_is_left_of_a_client_for_the_garbage_collector(
    async_wait_until: Waits,
) -> None:
    sockets = Sockets()
    left: list[weakref.ref[Any]] = []
    async with serving_sockets(sockets) as gateway:
        gc.disable()
        try:
            reader, writer = await connect(gateway)
            await async_wait_until(gateway.server._connections)
            left.append(weakref.ref(gateway.server._connections()[0]))
            writer.write(get(PATH, *HANDSHAKE))
            await reader.readuntil(b"\r\n\r\n")
            await async_wait_until(lambda: sockets.open)
            left += [weakref.ref(sockets_of(gateway)[0]), weakref.ref(sockets.open[0])]
            writer.write(masked(TEXT, b"one") + masked(PING) + masked(CLOSE))
            await goodbye(reader)
            await async_wait_until(lambda: sockets.ended)
            sockets.open.clear()
            await async_wait_until(lambda: not any(one() for one in left))
        finally:
            gc.enable()


# ---- Many


THOUSAND: Final = """
import selectors, socket, sys
port, request, size = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
every = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]
for one in every:
    one.sendall(request)
for one in every:
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += one.recv(1)
print("opened", flush=True)
heard = set()
for one in every:
    frame = b""
    while len(frame) < size:
        frame += one.recv(size - len(frame))
    heard.add(frame)
print(len(heard), flush=True)
for one in every:
    one.close()
print("closed", flush=True)
sys.stdin.read()
"""


async def test_a_thousand_connect_at_once_and_hold_up_nobody(async_wait_until: Waits) -> None:
    sockets = Sockets()
    frame = text_frame(b"for all of you")
    request = get(PATH, *HANDSHAKE).decode()
    async with (
        serving_sockets(sockets) as gateway,
        clients(THOUSAND, port_of(gateway), request, len(frame)) as line,
        heartbeat() as late,
    ):
        assert await line() == "opened\n"
        assert len(sockets.open) == 1000
        for socket in sockets.open:
            socket.write(frame)
        assert await line() == "1\n"
        assert await line() == "closed\n"
        await async_wait_until(lambda: len(sockets.ended) == 1000)
        await async_wait_until(lambda: not gateway.server._connections())
        assert max(late) < 2 * LATE_SECONDS  # they all speak, and leave, in one turn of the loop


async def test_sockets_cannot_take_the_place_of_health_and_metrics(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(shared, "RESERVED", 2)
    sockets = Sockets()
    async with serving_sockets(sockets, max_connections=3) as gateway:
        held = [await opened(gateway) for _ in range(3)]
        with pytest.raises(InvalidStatus) as refused:
            await client_of(gateway).__aenter__()
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["Retry-After"]
        async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as client:
            for path in ("/health/live", "/metrics"):
                assert (await client.get(path)).status_code == 200
        held[0][1].close()
        await async_wait_until(lambda: sockets.ended)
        await async_wait_until(lambda: len(gateway.server._connections()) == 2)
        async with client_of(gateway):
            pass
    assert [one["log_level"] for one in logged if one["event"] == "http_full"] == ["warning"]


# ---- The end


async def test_at_the_end_clients_are_told_to_come_back(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving_sockets(sockets))
        client = await stack.enter_async_context(client_of(gateway))
        reader, _ = await opened(gateway)  # it does not say goodbye
        _, writer = await opened(gateway)  # it reads nothing
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await async_wait_until(lambda: len(sockets.open) == 3)
        for socket in sockets.open[:2]:
            socket.write(text_frame(b"last"))
        sockets.open[2].write(binary_frame(b"x" * (16 << 20)))
        sockets.may_answer.clear()
        late, _ = await connect(gateway, get(PATH, *HANDSHAKE))
        await async_wait_until(lambda: len(sockets_of(gateway)) == 4)
        before = time.monotonic()
        await gateway.server.close()
        assert time.monotonic() - before < 1.5
        assert await client.recv() == "last"
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == 1012
        assert await read_frame(reader) == (TEXT, b"last")
        assert await read_frame(reader) == closes(1012)
        assert (await late.read()).startswith(b"HTTP/1.1 503 ")
        sockets.may_answer.set()
        await async_wait_until(lambda: sockets.ended == [Ended.CLOSING] * 3)
        assert not gateway.server._connections()
        await async_wait_until(lambda: not gateway.server._state.tasks)


# ---- Logs


async def test_neither_addresses_nor_messages_are_logged(
    logged: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving_sockets(Sockets()) as gateway:
        async with client_of(gateway) as client:
            await client.send("a secret word")
            await client.recv()
            await client.send("fail")
            with pytest.raises(ConnectionClosed):
                await client.recv()
        for path in ("/nowhere?apikey=sb_secret_key", PATH + "&fail"):
            with pytest.raises(InvalidStatus):
                await client_of(gateway, path).__aenter__()
        reader, writer = await opened(gateway)
        writer.write(masked(TEXT, b"a secret word\xff"))
        assert (await goodbye(reader))[0] == 1007
    told = "".join(capfd.readouterr()) + repr(logged)
    assert "http_failed" in told
    assert "secret" not in told


# ---- Garbage


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


FRAMES: Final = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.builds(
            masked,
            st.integers(0, 15),
            st.one_of(st.binary(max_size=130), st.text(max_size=40).map(str.encode)),
            fin=st.booleans(),
        ),
        max_size=6,
    ).map(b"".join),
)


def test_garbage_of_one_client_is_of_no_effect_on_another(
    loop: asyncio.AbstractEventLoop, logged: list[Any]
) -> None:
    sockets = Sockets()

    async def throw(gateway: Gateway, other: Any, garbage: bytes, size: int) -> None:
        reader, writer = await opened(gateway)
        for at in range(0, len(garbage), size):
            writer.write(garbage[at : at + size])
            await asyncio.sleep(0)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        await other.send("here")
        assert await other.recv() == "here"
        writer.close()

    async def run() -> None:
        async with serving_sockets(sockets) as gateway, client_of(gateway) as other:

            @settings(
                max_examples=150,
                deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture],
            )
            @given(garbage=FRAMES, size=st.integers(1, 300))
            def try_it(garbage: bytes, size: int) -> None:
                pending.append((garbage, size))

            pending: list[tuple[bytes, int]] = []
            try_it()
            for garbage, size in pending:
                await throw(gateway, other, garbage, size)

    loop.run_until_complete(run())
    assert not [one for one in logged if one["event"] == "http_failed"]


# ---- Other servers


@asynccontextmanager
async def uvicorn_of(sockets: Sockets, async_wait_until: Waits) -> AsyncIterator[int]:
    app = Starlette(routes=[WebSocketRoute("/socket", sockets)])
    config = uvicorn.Config(app, port=0, ws="websockets-sansio", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    await async_wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def test_another_server_serves_the_same(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with uvicorn_of(sockets, async_wait_until) as port:
        address = f"ws://127.0.0.1:{port}"
        async with connect_client(address + PATH) as client:
            for message in ("one", b"\x00two", ""):
                await client.send(message)
                assert await client.recv() == message
            sockets.open[0].write(text_frame(b"a") + binary_frame(b"b") + text_frame(b"c"))
            assert [await client.recv() for _ in range(3)] == ["a", b"b", "c"]
            await client.send("bye")
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (4000, "as asked for")
        async with connect_client(address + PATH) as client:
            await client.send("x" * (MAX_BYTES + 1))
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert client.close_code == 1009
        with pytest.raises(InvalidStatus) as refused:
            await connect_client(address + "/socket").__aenter__()
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body) == {"error": "API key is missing"}
        await async_wait_until(lambda: sockets.ended == [Ended.GONE] * 2)


async def test_a_server_that_cannot_answer_by_http_closes() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await refuse({"type": "websocket"}, receive, send, 401, {"error": "who?"})
    assert sent == [{"type": "websocket.close"}]
