"""Clients that do not behave, thousands of them: each gets its bound, and the loop beats on."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import resource
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import httpx
import pytest
import structlog
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.serving import (
    FAREWELL,
    Streams,
    clients,
    connect,
    get,
    heartbeat,
    port_of,
    serving,
)
from walstream.gateway import Gateway, listening, server, shared, stalls
from walstream.gateway import connection as http_connection
from walstream.gateway import streams as gateway_streams
from walstream.gateway.rounds import Rounds
from walstream.gateway.streams import Ended

LATE_SECONDS: Final = 0.05
"""A heartbeat may be so late while clients misbehave."""

PIECE: Final = b"id: 1\nevent: insert\ndata: " + b"x" * 300 + b"\n\n"

Waits = Callable[..., Awaitable[Any]]


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


async def read_head(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\r\n\r\n")).decode()


def unchunk(data: bytes) -> bytes:
    """The body, which must be complete."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        if not length:
            assert data == b"\r\n"
            return body
        data = data[length + 2 :]


# ---- Streams


async def test_what_is_written_reaches_the_client_at_once_and_in_order(
    async_wait_until: Waits,
) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        head = await read_head(reader)
        assert head.startswith("HTTP/1.1 200 OK\r\n")
        assert "transfer-encoding: chunked" in head
        await async_wait_until(lambda: streams.open)
        streams.open[0].write(b"one;")
        streams.open[0].write(b"")
        streams.open[0].write(b"two;")
        assert await reader.readexactly(13) == b"8\r\none;two;\r\n"
        streams.open[0].write(b"three")
        streams.leave.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"5\r\nthree\r\n0\r\n\r\n"
        writer.write(get("/echo", "Connection: close"))  # the connection is kept
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_of_http_1_0_gets_the_body_as_it_is(async_wait_until: Waits) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream", version="1.0"))
        head = await read_head(reader)
        assert "chunked" not in head
        await async_wait_until(lambda: streams.open)
        streams.open[0].write(b"one;")
        assert await reader.readexactly(4) == b"one;"
        streams.open[0].write(b"two;")
        streams.leave.set()
        assert await reader.read() == b"two;"
        writer.close()


async def test_head_has_no_body_and_ends() -> None:
    streams = Streams()
    async with serving(streams) as gateway, httpx.AsyncClient() as client:
        for path in ("stream", "echo?size=2000", "health/live"):
            answer = await client.head(f"http://{gateway.address}/{path}")
            assert (answer.status_code, answer.content) == (200, b"")
    assert streams.ended == [Ended.GONE]


class _Plain:
    """Streams as any ASGI application does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body"})


async def test_a_stream_outlives_the_deadline_of_requests(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(http_connection, "REQUEST_SECONDS", 0.05)
    streams = Streams()

    async with serving(streams, more=[Route("/plain", _Plain())]) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        # The deadline of the stream's own request would be over with that of this one.
        slow, slow_writer = await connect(gateway, b"GET /stream HTTP/1.1\r\n")
        assert await slow.read() == b""
        slow_writer.close()
        writer.write(get("/echo"))  # pipelined: it waits, and is no reason to cut the stream
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{gateway.address}/plain")).text == "." * 20
        streams.open[0].write(PIECE)
        assert await reader.readuntil(b"\n\n\r\n")
        streams.leave.set()
        assert await reader.readuntil(b"HTTP/1.1 200 OK")
        writer.close()
    assert refusals(logged) == ["the request took too long"]


async def test_a_client_that_leaves_ends_its_stream(async_wait_until: Waits) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        for abort in (False, True):
            reader, writer = await connect(gateway, get("/stream"))
            await read_head(reader)
            if abort:
                linger = b"\x01\0\0\0\0\0\0\0"
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
            writer.close()
            await async_wait_until(lambda: not gateway.server._state.connections)
        assert streams.ended == [Ended.GONE] * 2
        stream = streams.open[0]
        stream.write(PIECE)
        assert (stream.is_over, stream.waiting_bytes) == (True, 0)
        await stream.room()
        await async_wait_until(lambda: not gateway.server._state.tasks)


async def test_what_a_client_does_not_fetch_waits_and_is_counted(
    async_wait_until: Waits,
) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        stream = streams.open[0]
        sent = 0
        while stream.waiting_bytes < 1 << 20:
            stream.write(PIECE * 100)
            sent += len(PIECE) * 100
            await asyncio.sleep(0)
        [connection] = gateway.server._connections()
        in_transport = connection.transport.get_write_buffer_size()
        assert in_transport < 3 * gateway_streams.HIGH_BYTES
        room = asyncio.create_task(stream.room())
        stream.drop()
        assert stream.waiting_bytes == in_transport
        assert not room.done()
        stream.write(FAREWELL)
        streams.leave.set()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await reader.read(1 << 16)
        body = unchunk(data)
        await room
        # Whole pieces only, and what was dropped is missing.
        whole, rest = divmod(len(body), len(PIECE))
        assert body == PIECE * whole + FAREWELL
        assert rest == len(FAREWELL)
        assert len(body) < sent
        writer.close()


async def test_a_client_that_catches_up_has_missed_nothing(async_wait_until: Waits) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)

        async def produce() -> None:
            for number in range(20_000):
                streams.open[0].write(b"%0200d\n" % number)
                await streams.open[0].room()
            streams.leave.set()

        producing = asyncio.create_task(produce())
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await reader.read(1 << 14)
        await producing
        assert unchunk(data) == b"".join(b"%0200d\n" % number for number in range(20_000))
        writer.close()


async def test_a_client_that_never_reads_is_cut_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.1)
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        mute = socket.create_connection(("127.0.0.1", port_of(gateway)))
        mute.sendall(get("/stream"))
        await async_wait_until(lambda: len(streams.open) == 2)
        async with heartbeat() as late:
            received = 0
            while not streams.open[1].is_over:
                if streams.open[1].waiting_bytes < 1 << 20:
                    streams.open[1].write(PIECE * 100)
                streams.open[0].write(PIECE)
                received += len(await reader.read(1 << 16))
        assert max(late) < LATE_SECONDS
        assert received
        await async_wait_until(lambda: streams.ended == [Ended.GONE])
        assert refusals(logged) == ["the answer is not fetched"]
        mute.close()
        writer.close()


async def test_a_slow_reader_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.1)
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        streams.open[0].write(b"x" * (8 << 20))
        began = time.monotonic()
        received = 0
        while time.monotonic() - began < 0.4:
            received += len(await reader.read(1 << 15))
            await asyncio.sleep(0.005)
        assert received
        assert not streams.open[0].is_over
        writer.close()


async def test_streams_are_told_when_the_server_closes_and_it_takes_less_than_a_second(
    async_wait_until: Waits, logged: list[Any]
) -> None:
    streams = Streams()
    async with contextlib.AsyncExitStack() as opened:
        gateway = await opened.enter_async_context(serving(streams))
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        mute, mute_writer = await connect(gateway, get("/stream"))
        await read_head(mute)
        mute_writer.transport.pause_reading()  # type: ignore[attr-defined]
        streams.open[1].write(b"x" * (16 << 20))
        await async_wait_until(
            lambda: any(
                isinstance(one, http_connection.Connection) and one.flow.write_paused
                for one in gateway.server._connections()
            )
        )
        before = time.monotonic()
    assert time.monotonic() - before < 1
    assert streams.ended == [Ended.CLOSING] * 2
    assert unchunk(await reader.read()) == FAREWELL
    assert "http_failed" not in {one["event"] for one in logged}
    writer.close()
    mute_writer.close()


async def test_gzip_is_readable_after_each_piece(async_wait_until: Waits) -> None:
    streams = Streams(compress=True)
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream", "Accept-Encoding: br, gzip;q=0.5"))
        head = await read_head(reader)
        assert "content-encoding: gzip" in head
        assert "vary: accept-encoding" in head
        inflate = zlib.decompressobj(31)
        for number in range(3):
            streams.open[0].write(PIECE * 10)
            if number == 2:
                streams.leave.set()
            size = int(await reader.readuntil(b"\r\n"), 16)
            assert size < len(PIECE)
            assert inflate.decompress(await reader.readexactly(size)) == PIECE * 10
            await reader.readexactly(2)
        end = unchunk(await reader.readuntil(b"\r\n0\r\n\r\n"))
        assert inflate.decompress(end) + inflate.flush() == b""
        assert inflate.eof
        writer.close()
    for accept in ("identity", "gzip;q=0", "br", "gzip;q=x", "*;q=0"):
        async with serving(Streams(compress=True)) as gateway:
            reader, writer = await connect(gateway, get("/stream", f"Accept-Encoding: {accept}"))
            assert "content-encoding" not in await read_head(reader)
            writer.close()


async def test_a_piece_that_is_none_harms_its_own_stream_only(async_wait_until: Waits) -> None:
    streams = Streams()
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with serving(streams) as gateway:
        both = [await connect(gateway, get("/stream")) for _ in range(2)]
        for reader, _ in both:
            await read_head(reader)
        streams.open[0].write("text")  # type: ignore[arg-type]
        streams.open[1].write(b"bytes")
        assert await both[1][0].readexactly(10) == b"5\r\nbytes\r\n"
        assert isinstance(told[0]["exception"], TypeError)
        streams.open[1].write(b"more")
        assert await both[1][0].readexactly(9) == b"4\r\nmore\r\n"
        for _, writer in both:
            writer.close()


class Written:
    """Stands for a stream that takes some time."""

    def __init__(self, log: list[float], seconds: float) -> None:
        self._log = log
        self._seconds = seconds

    def flush(self) -> None:
        end = time.thread_time() + self._seconds
        while time.thread_time() < end:
            pass
        self._log.append(time.perf_counter())


async def test_rounds_give_way_to_the_loop_and_rest_when_they_took_long(
    async_wait_until: Waits,
) -> None:
    rounds = Rounds(asyncio.get_running_loop())
    log: list[float] = []
    many: list[Any] = [Written(log, 0.0005) for _ in range(60)]
    async with heartbeat() as late:
        for one in many:
            rounds.add(one)
        await async_wait_until(lambda: len(log) == 60)
        ended = log[-1]
        for one in many:
            rounds.add(one)
        await async_wait_until(lambda: len(log) == 120)
    assert log[60] - ended > 0.02
    assert max(late) < 0.02


# ---- Many at once

CROWD: Final = """
import select, socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
request = b"GET /stream HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"
poll, by = select.epoll(), {}
for _ in range(count):
    one = socket.socket()
    one.setblocking(False)
    try:
        one.connect(("127.0.0.1", port))
    except BlockingIOError:
        pass
    by[one.fileno()] = one
    poll.register(one.fileno(), select.EPOLLOUT)
got, received = set(), 0
while by:
    for number, event in poll.poll():
        if event & select.EPOLLOUT:
            by[number].send(request)
            poll.modify(number, select.EPOLLIN)
            continue
        data = by[number].recv(1 << 16)
        if not data:
            poll.unregister(number)
            by.pop(number).close()
            continue
        received += len(data)
        if number not in got:
            got.add(number)
            if len(got) == count:
                print("connected", flush=True)
print(received, flush=True)
"""


async def test_a_thousand_clients_that_connect_at_once_do_not_hold_up_the_loop(
    async_wait_until: Waits,
) -> None:
    streams = Streams()
    async with (
        serving(streams) as gateway,
        clients(CROWD, port_of(gateway), 1000) as line,
        heartbeat() as late,
    ):
        assert await line() == "connected\n"
        assert len(streams.open) == 1000
        for _ in range(20):
            for stream in streams.open:
                stream.write(PIECE)
            await asyncio.sleep(0.005)
        await async_wait_until(lambda: not any(one.waiting_bytes for one in streams.open))
        assert max(late) < LATE_SECONDS
        streams.leave.set()
        await async_wait_until(lambda: not gateway.server._state.tasks)
        for connection in gateway.server._connections():
            connection.transport.close()
        assert int(await line()) > 1000 * 20 * len(PIECE)


async def test_streams_cannot_take_the_place_of_health_and_metrics(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits, logged: list[Any]
) -> None:
    monkeypatch.setattr(shared, "RESERVED", 2)
    streams = Streams()
    async with serving(streams, max_connections=3) as gateway:
        held = [await connect(gateway, get("/stream")) for _ in range(3)]
        for reader, _ in held:
            await read_head(reader)
        held += [await connect(gateway) for _ in range(5)]  # they ask for nothing
        async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as client:
            answer = await client.get("/echo")
            assert answer.status_code == 503
            assert answer.json()["error"] == "too many clients are connected"
            assert answer.headers["retry-after"]
            for path in ("/health/live", "/health/ready", "/metrics"):
                assert (await client.get(path)).status_code == 200
            held[0][1].close()
            await async_wait_until(lambda: streams.ended)
            assert (await client.get("/echo")).status_code == 200
        assert len(streams.ended) == 1
        for _, writer in held[1:]:
            writer.close()
    told = [one for one in logged if one["event"] == "http_full"]
    assert [(one["log_level"], one["max_connections"]) for one in told] == [("warning", 3)]


def test_the_limit_of_open_files_is_raised_as_far_as_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = {"now": (1024, 4096)}

    def set_limit(_: int, new: tuple[int, int]) -> None:
        limits["now"] = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert listening.allow_connections(500) == 500
    assert limits["now"] == (1024, 4096)
    assert listening.allow_connections(2000) == 2000
    assert limits["now"] == (2000 + listening.OTHER_FILES, 4096)
    assert listening.allow_connections(10_000) == 4096 - listening.OTHER_FILES
    assert limits["now"] == (4096, 4096)


async def test_it_says_when_not_so_many_connections_can_be_had(
    monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(server, "allow_connections", lambda wanted: min(wanted, 100))
    async with serving(Streams(), max_connections=200):
        pass
    [told] = [one for one in logged if one["event"] == "http_connections_limited"]
    assert (told["log_level"], told["max_connections"], told["allowed"]) == ("warning", 200, 36)


async def test_connections_have_the_options_of_long_streams(async_wait_until: Waits) -> None:
    async with serving(Streams()) as gateway:
        _, writer = await connect(gateway)
        await async_wait_until(gateway.server._connections)
        taken = gateway.server._connections()[0].transport.get_extra_info("socket")
        for level, name, value in listening._CONNECTION_OPTIONS:
            if hasattr(socket, name):
                assert taken.getsockopt(level, getattr(socket, name)) == value, name
        writer.close()


# ---- Requests that are none


LARGE: Final = """
import socket, sys, time
one = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
one.sendall(b"GET /echo HTTP/1.1\\r\\nHost: localhost\\r\\n")
header = b"X-Header: " + b"x" * 8182 + b"\\r\\n"
sent = 0
try:
    for _ in range(10 << 20 >> 13):
        one.sendall(header)
        sent += len(header)
except OSError:
    pass
answer = b""
try:
    while data := one.recv(1 << 16):
        answer += data
except OSError:
    pass
print(sent, answer[:12].decode())
"""


async def test_ten_megabytes_of_headers_are_refused_and_do_not_hold_up_the_loop(
    logged: list[Any],
) -> None:
    async with serving(Streams()) as gateway:
        async with clients(LARGE, port_of(gateway)) as line, heartbeat() as late:
            told = await line()
        assert told.endswith("HTTP/1.1 431\n")
        assert max(late) < LATE_SECONDS
    assert refusals(logged) == ["the head of the request is too large"]


@pytest.mark.parametrize("size", [1, 100, 5000, 1 << 20])
async def test_large_heads_are_refused_however_they_come(size: int) -> None:
    async with serving(Streams()) as gateway:
        for padding, status in ((15_000, b"200"), (18_000, b"431"), (100_000, b"431")):
            reader, writer = await connect(gateway)
            request = get("/echo", "Connection: close", "X: " + "x" * padding)
            if size == 1 and padding == 100_000:
                continue
            for start in range(0, len(request), size):
                writer.write(request[start : start + size])
                if size > 1:
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                answer = await reader.read()
                assert answer[9:12] == status, (padding, answer)
            writer.close()


async def test_many_small_headers_and_a_long_address_are_large_too() -> None:
    async with serving(Streams()) as gateway:
        for request in (
            get("/echo", *["a: b"] * 10_000),
            get("/echo?" + "x" * 20_000),
        ):
            reader, writer = await connect(gateway, request)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 431 ")
            body = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert set(body) == {"error", "hint"}
            writer.close()


async def test_bodies_are_bounded(logged: list[Any]) -> None:
    async with serving(Streams()) as gateway:
        async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as client:
            body = b"x" * shared.BODY_BYTES
            assert (await client.post("/echo", content=body)).json()["body"] == len(body)
        reader, writer = await connect(
            gateway,
            b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n",
        )
        writer.write(b"x" * (3 << 20))
        assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
        writer.close()
    assert "http_failed" not in {one["event"] for one in logged}
    assert "the body is too large" in refusals(logged)


async def test_a_body_that_nobody_wants_does_not_hold_the_connection(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits
) -> None:
    monkeypatch.setattr(http_connection, "LINGER_SECONDS", 0.05)
    async with serving(Streams()) as gateway:
        reader, writer = await connect(
            gateway,
            b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(ConnectionError):
            while gateway.server._state.connections:
                writer.write(b"1\r\nx\r\n")
                await asyncio.sleep(0.001)
        writer.close()


async def test_half_requests_are_given_up_and_do_not_hold_up_the_loop(
    monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    """Slowloris: many connections, each with a byte now and then."""
    monkeypatch.setattr(http_connection, "REQUEST_SECONDS", 0.3)
    halves = (
        b"",
        b"\r\n",
        b"G",
        b"GET /echo HTTP/1.1\r\nHost: loc",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab",
        get("/health/live") + b"GET /he",
    )
    async with serving(Streams()) as gateway:
        async with heartbeat() as late:
            open_ = [await connect(gateway, half) for half in halves * 10]
            while gateway.server._state.connections:
                for _, writer in open_:
                    if not writer.transport.is_closing():
                        writer.write(b"x")
                await asyncio.sleep(0.05)
            async with httpx.AsyncClient() as client:
                for _ in range(3):
                    answer = await client.get(f"http://{gateway.address}/health/live")
                    assert answer.status_code == 200
        assert max(late) < LATE_SECONDS
        for _, writer in open_:
            writer.close()


async def test_requests_behind_one_another_are_bounded() -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream") + get("/echo") * 2000)
        with contextlib.suppress(ConnectionError):
            assert (await reader.read()).count(b"HTTP/1.1") <= 1
        assert not gateway.server._state.connections
        writer.close()


async def test_unknown_methods_and_upgrades_are_answered_by_http() -> None:
    async with serving(Streams()) as gateway:
        for request, status in (
            (b"BREW /echo HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
            (b"PROPFIND /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"405"),
            (get("/echo", "Connection: Upgrade", "Upgrade: websocket"), b"400"),
            (get("/echo", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), b"200"),
            (b"GET /echo HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
            (get("/echo", "Host: other", "Connection: close"), b"400"),
            (get("/%ff%00", "Connection: close"), b"404"),
            (get("/\u00e9", "Connection: close"), b"400"),
        ):
            reader, writer = await connect(gateway, request)
            answer = await reader.read()
            assert answer[9:12] == status, request
            writer.close()


async def test_a_connection_is_kept_for_the_next_request_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Waits
) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.1)
    async with serving(Streams()) as gateway:
        reader, writer = await connect(gateway)
        for _ in range(3):
            writer.write(get("/echo"))
            head = await read_head(reader)
            length = int(re.findall(r"content-length: (\d+)", head)[0])
            assert json.loads(await reader.readexactly(length)) == {"body": 0, "filling": ""}
        assert len(gateway.server._state.connections) == 1
        assert await reader.read() == b""
        writer.close()


async def test_nonsense_in_the_middle_of_a_stream_cuts_it_and_is_no_answer(
    async_wait_until: Waits,
) -> None:
    streams = Streams()
    async with serving(streams) as gateway:
        reader, writer = await connect(gateway, get("/stream"))
        await read_head(reader)
        writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await async_wait_until(lambda: streams.ended == [Ended.GONE])
        writer.close()


async def test_answers_of_json_are_compressed_when_they_are_large() -> None:
    async with serving(Streams()) as gateway:
        for size, compressed in ((10, False), (5000, True), (1 << 18, True)):
            reader, writer = await connect(
                gateway, get(f"/echo?size={size}", "Accept-Encoding: gzip", "Connection: close")
            )
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert (b"content-encoding: gzip" in head) == compressed
            assert f"content-length: {len(body)}".encode() in head
            assert len(json.loads(gzip.decompress(body) if compressed else body)["filling"]) == size
            writer.close()


async def test_the_server_closes_although_thousands_stream() -> None:
    streams = Streams()
    async with contextlib.AsyncExitStack() as opened:
        gateway: Gateway = await opened.enter_async_context(serving(streams))
        line = await opened.enter_async_context(clients(CROWD, port_of(gateway), 2000))
        assert await line() == "connected\n"
        before = time.thread_time()
        await gateway.server.close()
        assert time.thread_time() - before < 0.6
        assert not gateway.server._state.connections
        # All were told.
        assert int(await line()) > 2000 * len(FAREWELL)
