"""A TCP proxy between walstream and Postgres that does to connections what networks do.

    with Proxy(database.dsn) as proxy:
        config = ... proxy.dsn(database.dsn) ...
        proxy.cut(Which.REPLICATION)

It lives in a thread with an event loop of its own: its methods may be called from any thread, also
from one that runs another loop, and return when it is done. What lasts (`stall`, `trickle`,
`delay`, `refuse`) holds for the connections that are there and for new ones, until the next of them
or `restore` is called. What is done at once (`cut`, `half_close`, `cut_after`) concerns those that
are there; new ones pass.

From a connection's startup packet it knows whether it is one for replication. To another server
than Postgres, with ``is_postgres`` false, all connections are ordinary ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import Enum, Flag, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")

LOOPBACK: Final = "127.0.0.1"
PIECE_BYTES: Final = 1 << 16
CALL_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0

Address: TypeAlias = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


class Which(Enum):
    """Connections that something is done to."""

    ALL = auto()
    REPLICATION = auto()
    ORDINARY = auto()

    def includes(self, *, replication: bool) -> bool:
        """Whether a connection of that kind is meant."""
        return self is Which.ALL or (self is Which.REPLICATION) == replication


class Direction(Flag):
    """Which way bytes go."""

    TO_SERVER = auto()
    TO_CLIENT = auto()
    BOTH = TO_SERVER | TO_CLIENT


class Connection(NamedTuple):
    """A connection of a client, as it is now; bytes are those that were passed on."""

    replication: bool
    application_name: str
    to_server_bytes: int
    to_client_bytes: int


@dataclass(frozen=True)
class Manner:
    """How bytes pass that go a way: not at all, one by one, late, or at once."""

    which: Which = Which.ALL
    direction: Direction = Direction.BOTH
    stalls: bool = False
    pause_seconds: float | None = None
    delay_seconds: float = 0.0

    def concerns(self, direction: Direction, *, replication: bool) -> bool:
        return direction in self.direction and self.which.includes(replication=replication)


PASS: Final = Manner()


class Proxy:
    """Listens on a free port of 127.0.0.1 while the block runs, and passes on to a server."""

    def __init__(self, dsn: str, *, is_postgres: bool = True) -> None:
        """Choose the server.

        Args:
            dsn: a connection string that leads to it, by TCP or a Unix socket.
            is_postgres: whether connections begin with a startup packet.
        """
        self.port = 0
        self.is_postgres = is_postgres
        self._server = _address(dsn)
        self._manner = PASS
        self._links: list[_Link] = []
        self._listener: socket.socket | None = None
        self._cut_next: _Budget | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def dsn(self, for_dsn: str) -> str:
        """Return a connection string that differs in that it leads through the proxy."""
        given = {name: str(value) for name, value in conninfo_to_dict(for_dsn).items() if value}
        given.pop("hostaddr", None)
        # The startup packet is to be read, and pieces are to be cut where the test says.
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        return make_conninfo("", **{**given, **plain, "host": LOOPBACK, "port": str(self.port)})

    def lead_to(self, dsn: str) -> None:
        """From now on pass new connections to another server."""
        self._server = _address(dsn)

    @property
    def connections(self) -> list[Connection]:
        """The clients' connections, oldest first, those that wait for the server among them."""
        return self._call(self._look())

    def restore(self) -> None:
        """Pass everything at once again, and take new connections."""
        self._call(self._behave(PASS))

    def stall(self, which: Which = Which.ALL, direction: Direction = Direction.BOTH) -> None:
        """Let nothing pass, and leave the connections open; new ones are taken and get no answer.

        What comes meanwhile passes afterwards.
        """
        self._call(self._behave(Manner(which, direction, stalls=True)))

    def trickle(
        self,
        pause_seconds: float = 0.0,
        which: Which = Which.ALL,
        direction: Direction = Direction.BOTH,
    ) -> None:
        """Let one byte pass at a time, each in a packet of its own, and pause after it."""
        self._call(self._behave(Manner(which, direction, pause_seconds=pause_seconds)))

    def delay(
        self,
        seconds: float,
        which: Which = Which.ALL,
        direction: Direction = Direction.BOTH,
    ) -> None:
        """Hold each piece for a time before it passes, and read no further meanwhile."""
        self._call(self._behave(Manner(which, direction, delay_seconds=seconds)))

    def refuse(self) -> None:
        """Take no new connections: nobody listens. Those that are there pass."""
        self._call(self._behave(PASS, listening=False))

    def cut(self, which: Which = Which.ALL) -> int:
        """Reset connections on both sides; return how many there were."""
        return self._call(self._cut(which))

    def half_close(
        self, direction: Direction = Direction.TO_CLIENT, which: Which = Which.ALL
    ) -> int:
        """End one direction, whose receiver sees the end, and leave the other one; return how many.

        What the sender still sends that way is dropped, and it is not told.
        """
        return self._call(self._half_close(direction, which))

    def cut_after(
        self,
        count_bytes: int,
        which: Which = Which.ALL,
        direction: Direction = Direction.TO_CLIENT,
    ) -> None:
        """Cut each connection when so many more bytes have passed one way.

        When there is none it is the next one. What is in front of the cut arrives: with a message
        that is longer, a part of it.
        """
        self._call(self._cut_after(_Budget(count_bytes, which, direction)))

    # In the loop of the proxy

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    async def _listen(self) -> None:
        if self._listener is not None:
            return
        self._listener = socket.create_server((LOOPBACK, self.port), backlog=64)
        self._listener.settimeout(0)
        self.port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            listener, self._listener = self._listener, None
            self._loop.remove_reader(listener)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # whoever came has gone again
        client.settimeout(0)
        link = _Link(self, client)
        self._links.append(link)
        link.running = self._loop.create_task(self._run(link))

    async def _run(self, link: _Link) -> None:
        try:
            await link.run()
        finally:
            self._forget(link)

    def _forget(self, link: _Link) -> None:
        link.close()
        if link in self._links:
            self._links.remove(link)

    async def connect(self) -> socket.socket:
        """Open a connection to the server.

        Raises:
            OSError: it does not take it.
        """
        address = self._server
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        server = socket.socket(family)
        server.settimeout(0)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._loop.sock_connect(server, address)
        except BaseException:
            server.close()
            raise
        return server

    async def leave(self, direction: Direction, *, replication: bool) -> Manner:
        """Return how bytes are to pass, once they may pass at all."""
        while True:
            manner = self._manner
            if not manner.concerns(direction, replication=replication):
                return PASS
            if not manner.stalls:
                return manner
            await self._changed.wait()

    def budget(self, *, replication: bool) -> _Budget | None:
        """Return how soon a new connection is to be cut."""
        budget = self._cut_next
        if budget is None or not budget.which.includes(replication=replication):
            return None
        self._cut_next = None
        return budget

    async def wait(self, seconds: float) -> None:
        """Pause, unless the manner changes meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _behave(self, manner: Manner, *, listening: bool = True) -> None:
        self._manner = manner
        self._changed.set()
        self._changed = asyncio.Event()
        await (self._listen() if listening else self._stop_listening())

    async def _look(self) -> list[Connection]:
        return [link.view() for link in self._links]

    def _chosen(self, which: Which) -> list[_Link]:
        return [link for link in self._links if which.includes(replication=link.replication)]

    async def _cut(self, which: Which) -> int:
        chosen = self._chosen(which)
        for link in chosen:
            link.reset()
            await self._end_link(link)
        return len(chosen)

    async def _half_close(self, direction: Direction, which: Which) -> int:
        chosen = [link for link in self._chosen(which) if link.server is not None]
        for link in chosen:
            link.shut(direction)
        return len(chosen)

    async def _cut_after(self, budget: _Budget) -> None:
        chosen = self._chosen(budget.which)
        for link in chosen:
            link.budget = _Budget(budget.left_bytes, budget.which, budget.direction)
        self._cut_next = None if chosen else budget

    async def _close(self) -> None:
        await self._stop_listening()
        for link in list(self._links):
            await self._end_link(link)

    async def _end_link(self, link: _Link) -> None:
        await link.end()
        self._forget(link)  # it may be so new that it has not begun


@dataclass
class _Budget:
    """How much may pass until a connection is cut."""

    left_bytes: int
    which: Which
    direction: Direction


class _Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.replication = False
        self.budget: _Budget | None = None
        self.running: asyncio.Task[None] | None = None
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._application_name = ""
        self._passed = {Direction.TO_SERVER: 0, Direction.TO_CLIENT: 0}
        self._shut = Direction(0)

    def view(self) -> Connection:
        return Connection(
            self.replication,
            self._application_name,
            self._passed[Direction.TO_SERVER],
            self._passed[Direction.TO_CLIENT],
        )

    async def run(self) -> None:
        """Pass bytes until both sides have ended, or one is gone."""
        try:
            packet = await self._startup_packet() if self._proxy.is_postgres else b""
            self.budget = self._proxy.budget(replication=self.replication)
            await self._proxy.leave(Direction.TO_SERVER, replication=self.replication)
            self.server = await self._proxy.connect()
            _make_prompt(self.client, self.server)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._flow(self.client, self.server, Direction.TO_SERVER, packet))
                group.create_task(self._flow(self.server, self.client, Direction.TO_CLIENT))
        except (OSError, ExceptionGroup):
            self.reset()  # whoever is still there sees what the other side saw

    async def end(self) -> None:
        assert self.running is not None
        await _end(self.running)

    def reset(self) -> None:
        """Close in a way that the other side sees as a reset."""
        for side in (self.client, self.server):
            if side is not None and side.fileno() >= 0 and side.family != socket.AF_UNIX:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self.client.close()
        if self.server is not None:
            self.server.close()

    def shut(self, direction: Direction) -> None:
        """End a direction for its receiver."""
        self._shut |= direction
        for way, receiver in (
            (Direction.TO_SERVER, self.server),
            (Direction.TO_CLIENT, self.client),
        ):
            if way in direction and receiver is not None:
                with contextlib.suppress(OSError):
                    receiver.shutdown(socket.SHUT_WR)

    async def _startup_packet(self) -> bytes:
        """Read the first packet: its length, the protocol's version, and names and values."""
        packet = await self._exactly(4)
        packet += await self._exactly(struct.unpack("!i", packet)[0] - 4)
        texts = [text.decode(errors="replace") for text in packet[8:].split(b"\0")]
        parameters = dict(zip(texts[::2], texts[1::2], strict=False))
        asked = parameters.get("replication", "false")
        self.replication = asked not in {"false", "off", "no", "0"}
        self._application_name = parameters.get(
            "application_name", parameters.get("fallback_application_name", "")
        )
        return packet

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await self._loop.sock_recv(self.client, count - len(data))
            if not piece:
                raise ConnectionResetError("the client went before it had said who it is")
            data += piece
        return data

    async def _flow(
        self,
        source: socket.socket,
        target: socket.socket,
        direction: Direction,
        data: bytes = b"",
    ) -> None:
        while data or (data := await self._loop.sock_recv(source, PIECE_BYTES)):
            await self._pass(data, target, direction)
            data = b""
        await self._proxy.leave(direction, replication=self.replication)
        self.shut(direction)

    async def _pass(self, data: bytes, target: socket.socket, direction: Direction) -> None:
        while data:
            manner = await self._proxy.leave(direction, replication=self.replication)
            if manner.delay_seconds:
                await self._proxy.wait(manner.delay_seconds)
            length = len(data) if manner.pause_seconds is None else 1
            await self._send(data[:length], target, direction)
            data = data[length:]
            if manner.pause_seconds is not None:
                await asyncio.sleep(manner.pause_seconds)

    async def _send(self, data: bytes, target: socket.socket, direction: Direction) -> None:
        if direction in self._shut:
            return
        budget = self.budget
        if budget is not None and direction in budget.direction:
            data = data[: budget.left_bytes]
            budget.left_bytes -= len(data)
        await self._loop.sock_sendall(target, data)
        self._passed[direction] += len(data)
        if budget is not None and budget.left_bytes <= 0:
            raise ConnectionResetError("cut as the test wished")


def _address(dsn: str) -> Address:
    given = conninfo_to_dict(dsn)
    host, port = str(given.get("hostaddr") or given.get("host") or LOOPBACK), given.get("port")
    if host.startswith("/"):
        return str(Path(host, f".s.PGSQL.{port or 5432}"))
    return host, int(port or 5432)


def _make_prompt(*sides: socket.socket) -> None:
    """Let pieces leave as they are, not collected into larger ones."""
    for side in sides:
        if side.family != socket.AF_UNIX:
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
