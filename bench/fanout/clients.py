"""A process that is many clients at once, each with a connection of its own.

It shares the cores with what it measures, so it does as little as can be done: what it reads is
counted where it lies in the one buffer. It talks with ``bench.fanout.crowd`` by lines of JSON.
"""

from __future__ import annotations

import gc
import re
import select
import socket
import sys
import time
from collections import deque
from typing import Final

import msgspec

from bench.fanout.delivered import Delivered
from bench.fanout.speeches import SPEECHES, Speech
from bench.processes import cpu_seconds

BUFFER_BYTES: Final = 1 << 20
CONNECTING: Final = 64
"""So many connections are begun at once at most; a server's backlog is bounded."""

SIGN_SECONDS: Final = 10.0

_HEADERS_END: Final = b"\r\n\r\n"
_DIGITS: Final = re.compile(rb"\d+")

STALL_SECONDS: Final = 20.0
"""After so much silence nothing will come any more."""


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Ask for each of the targets with a connection of its own; answered when all stream."""

    host: str
    port: int
    speech: str
    targets: list[str]


class Expect(msgspec.Struct, frozen=True, tag=True):
    """Count anew; answered by `Counting`, and by `Arrived` when so many have come, or none comes.

    With ``is_timed`` it notes when each comes, with ``is_kept`` it keeps them to be read at the
    end.
    """

    events: int
    is_timed: bool = False
    is_kept: bool = False
    rest_seconds: float = 0.0


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Tell what each client has got."""


class Connected(msgspec.Struct, frozen=True):
    """All clients stream."""

    seconds: float


class Counting(msgspec.Struct, frozen=True):
    """What comes from now on counts."""


class Arrived(msgspec.Struct, frozen=True):
    """When the last event came (monotonic clock), and what that took since it was expected."""

    nanoseconds: int
    events: int
    received_bytes: int
    cpu_seconds: float
    reads: int


class Collected(msgspec.Struct, frozen=True):
    """What each client has got since it was expected.

    ``last_rows`` are the numbers of the last rows, -1 for none. ``times`` pairs rows with when they
    came. ``kept`` has all that each client got. ``failures`` tells of clients that were cut off.
    """

    counts: list[int]
    last_rows: list[int]
    times: list[tuple[int, int]]
    kept: list[list[Delivered]]
    failures: list[str]


class _Client:
    """One connection, and what has come by it."""

    __slots__ = ("count", "head", "kept", "last", "socket", "streams", "tail", "target")

    def __init__(self, host: str, port: int, target: str) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.settimeout(0)
        self.socket.connect_ex((host, port))
        self.target = target
        self.streams = False
        self.head = b""
        self.tail = b""
        self.count = 0
        self.last = b""
        self.kept = bytearray()


class Clients:
    """All connections of the process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._clients: list[_Client] = []
        self._by_descriptor: dict[int, _Client] = {}
        self._buffer = bytearray(BUFFER_BYTES)
        self._failures: list[str] = []
        self._events = self._bytes = self._reads = 0
        self._expected = Expect(0)
        self._speech: Speech = SPEECHES["events"]
        self._address = ("", 0)
        self._signed = 0.0
        self._times: list[tuple[int, int]] = []

    def connect(self, order: Connect) -> Connected:
        """Begin a few connections at a time."""
        started = time.monotonic()
        self._speech, self._address = SPEECHES[order.speech], (order.host, order.port)
        waiting = deque(order.targets)
        streaming = 0
        while streaming < len(order.targets):
            while waiting and len(self._clients) - streaming < CONNECTING:
                self._begin(_Client(order.host, order.port, waiting.popleft()))
            ready = self._epoll.poll(STALL_SECONDS)
            assert ready, f"{len(order.targets) - streaming} clients got no answer"
            for descriptor, event in ready:
                streaming += self._greet(self._by_descriptor[descriptor], event)
        return Connected(time.monotonic() - started)

    def expect(self, order: Expect) -> Arrived:
        """Count from 0 until all have come."""
        self._poll(0)  # what is no event that counts, such as a heartbeat
        self._expected, self._times = order, []
        self._events = self._bytes = self._reads = 0
        for client in self._clients:
            client.count, client.last = 0, b""
            client.kept.clear()
        _say(Counting())
        used_before = cpu_seconds()
        arrived = self._read_all()
        return Arrived(arrived, self._events, self._bytes, cpu_seconds() - used_before, self._reads)

    def collect(self) -> Collected:
        """Read what is there, if more has come than was expected, and tell what each has got."""
        self._poll(0)
        kept = self._clients if self._expected.is_kept else []
        return Collected(
            counts=[client.count for client in self._clients],
            last_rows=[_number(client.last) for client in self._clients],
            times=self._times,
            kept=[self._speech.read(client.head, bytes(client.kept)) for client in kept],
            failures=self._failures,
        )

    def _begin(self, client: _Client) -> None:
        self._clients.append(client)
        self._by_descriptor[client.socket.fileno()] = client
        self._epoll.register(client.socket, select.EPOLLOUT)

    def _greet(self, client: _Client, event: int) -> bool:
        """Send the request or read the head; return whether the client streams from now on."""
        speech = self._speech
        if event & select.EPOLLOUT:
            client.socket.sendall(speech.opening(*self._address, client.target))
            self._epoll.modify(client.socket, select.EPOLLIN)
            return False
        if client.streams:
            self._read(client)
            return False
        received = client.socket.recv(BUFFER_BYTES)
        client.tail += received
        assert received, f"no stream: {client.tail[:300]!r}"
        if (answer := speech.answer(client.tail, client.target)) is not None:
            client.socket.sendall(answer)
            return False
        head, _, body = client.tail.partition(_HEADERS_END)
        if speech.streaming not in body or not body.endswith(speech.begun):
            return False
        client.streams, client.head, client.tail = True, head + b"\r\n", b""
        return True

    def _read_all(self) -> int:
        """Return when the last one came."""
        expected = self._expected.events
        arrived = time.monotonic_ns()
        while self._events < expected and not self._failures:
            self._sign()
            before = self._bytes
            self._poll(STALL_SECONDS)
            if self._expected.rest_seconds:
                time.sleep(self._expected.rest_seconds)
            if self._bytes == before:
                self._failures.append("nothing comes any more")
            arrived = time.monotonic_ns()
        return arrived

    def _sign(self) -> None:
        """Show that the clients are there, where that is expected."""
        now = time.monotonic()
        if self._speech.sign and now - self._signed > SIGN_SECONDS:
            self._signed = now
            for client in self._by_descriptor.values():
                client.socket.send(self._speech.sign)

    def _poll(self, seconds: float) -> None:
        clients, read = self._by_descriptor, self._read
        for descriptor, _ in self._epoll.poll(seconds, len(clients) + 1):
            if descriptor in clients:
                read(clients[descriptor])

    def _read(self, client: _Client) -> None:
        buffer, tail, speech = self._buffer, client.tail, self._speech
        if tail:
            # The rest of an event: put behind what has come of it already.
            length = len(tail)
            buffer[:length] = tail
            received = client.socket.recv_into(memoryview(buffer)[length:])
            end = length + received
        else:
            end = received = client.socket.recv_into(buffer)
        if not received:
            self._fail(client, "cut off")
            return
        self._bytes += received
        self._reads += 1
        if self._expected.is_kept:
            client.kept += memoryview(buffer)[end - received : end]
        if buffer.endswith(speech.whole, 0, end):
            client.tail = b""
        else:
            last = speech.whole[-1]
            found = buffer.rfind(last, 0, end)
            whole = 0 if found < 0 else found + len(last)
            client.tail = bytes(memoryview(buffer)[whole:end])
            end = whole
        self._count(client, end)

    def _count(self, client: _Client, end: int) -> None:
        """Count the events in the buffer, which are whole up to the end."""
        buffer, speech = self._buffer, self._speech
        count = buffer.count(speech.change, 0, end)
        if not count:
            if found := speech.cuts(bytes(buffer[:end])):
                self._fail(client, found[0])
            return
        client.count += count
        self._events += count
        last = buffer.rfind(speech.row, 0, end) + len(speech.row)
        client.last = bytes(buffer[last : last + 20])
        if self._expected.is_timed:
            now = time.monotonic_ns()
            rows = speech.row_number.findall(buffer, 0, end)
            self._times += [(int(row), now) for row in rows]

    def _fail(self, client: _Client, why: str) -> None:
        self._failures.append(why)
        del self._by_descriptor[client.socket.fileno()]
        self._epoll.unregister(client.socket)
        client.socket.close()


def main() -> None:
    """Do what the lines of the standard input say, until there are no more."""
    orders = msgspec.json.Decoder(Connect | Expect | Collect)
    clients = Clients()
    gc.disable()  # nothing here refers to itself
    for line in iter(sys.stdin.buffer.readline, b""):
        match orders.decode(line):
            case Connect() as order:
                _say(clients.connect(order))
            case Expect() as order:
                _say(clients.expect(order))
            case Collect():
                _say(clients.collect())


def _say(answer: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _number(text: bytes) -> int:
    found = _DIGITS.match(text)
    return -1 if found is None else int(found[0])


if __name__ == "__main__":
    main()
