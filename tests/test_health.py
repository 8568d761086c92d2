"""``/health/ready`` tells the truth: no ten seconds after changes cease to get through, else yes.

What lasts longer than `STALLED_SECONDS` is a standstill here, but for those that test the default.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until
from tests.proxy import Direction, Proxy, Which
from walstream import Change, Walstream, config
from walstream.config import RouteSpec
from walstream.daemon import Daemon
from walstream.destinations import Sink

STALLED_SECONDS: Final = 0.6
LIMIT_SECONDS: Final = 10.0
"""The promise."""

Answer = tuple[bool, dict[str, Any]]


async def ask(client: httpx.AsyncClient, word: str = "ready") -> Answer:
    """What it answers; without an answer it is a no."""
    try:
        answer = await client.get(f"/health/{word}")
    except httpx.TransportError:
        return False, {}
    return answer.status_code == 200, answer.json()


async def becomes(client: httpx.AsyncClient, *, ready: bool) -> dict[str, Any]:
    """Wait for a yes, or for a no within the promised time; return what it says."""

    async with asyncio.timeout(20 if ready else LIMIT_SECONDS):
        while True:
            answer, body = await ask(client)
            if answer is ready:
                return body
            await asyncio.sleep(0.02)


class Service:
    """A process's daemon, asked by HTTP."""

    def __init__(self, port: int, daemon: Daemon) -> None:
        self.daemon = daemon
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=2)

    async def ask(self, word: str = "ready") -> Answer:
        return await ask(self.client, word)

    async def is_ready(self) -> bool:
        return (await self.ask())[0]

    async def becomes_ready(self) -> None:
        await becomes(self.client, ready=True)

    async def becomes_unready(self) -> dict[str, Any]:
        """Wait for a no, and return what it says."""
        return await becomes(self.client, ready=False)

    async def stays_ready_while(self, condition: Callable[[], Any]) -> int:
        """Ask as long as the condition holds; return how often."""
        asked = 0
        while condition():
            ready, body = await self.ask()
            assert ready, body
            assert (await self.ask("live"))[0]  # or a watchdog would kill it
            asked += 1
            await asyncio.sleep(0.02)
        return asked


@asynccontextmanager
async def serving(
    database: Database,
    app: Walstream,
    *,
    slot: str = "",
    dsn: str = "",
    sinks: Sequence[tuple[RouteSpec, Sink]] = (),
    **sections: Any,
) -> AsyncIterator[Service]:
    """Run a daemon; at the end it is killed, as nobody waits for what is stuck."""
    port = free_port()
    stream = {"stalled_after_seconds": STALLED_SECONDS, "reconnect_seconds": 0.1}
    content = {
        "postgres": {"dsn": dsn or database.dsn},
        "slot": {"name": slot or make_slot(database)},
        "http": {"listen": f"127.0.0.1:{port}"},
        "handlers": {"attempts": 10_000, "backoff_seconds": 0.05, "max_backoff_seconds": 0.1},
        **sections,
        "stream": {**stream, **sections.get("stream", {})},
    }
    daemon = Daemon(config.parse(content), app.handlers, sinks=sinks)
    task = asyncio.create_task(daemon.run())
    service = Service(port, daemon)
    try:
        yield service
    finally:
        daemon.crash()
        task.cancel()
        await asyncio.wait({task})
        await service.client.aclose()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def make_slot(database: Database) -> str:
    name = f"health_{database.name[-8:]}_{os.urandom(2).hex()}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    return name


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
    return database


def add(database: Database, first: int = 1, last: int | None = None) -> None:
    database.execute(f"INSERT INTO orders SELECT generate_series({first}, {last or first}), 'x'")


class Taker:
    """A handler that takes everything at once."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.app = Walstream()
        self.app.on("public.orders", name="taker")(self.take)

    async def take(self, change: Change) -> None:
        self.ids.append(change.row["id"])


# ---- Not connected


async def test_no_while_the_server_does_not_answer_at_the_start(orders: Database) -> None:
    with Proxy(orders.dsn) as proxy:
        proxy.stall()
        async with serving(orders, Taker().app, dsn=proxy.dsn(orders.dsn)) as service:
            await async_wait_until(lambda: proxy.connections)
            assert (await service.becomes_unready())["phase"] == "connecting"
            assert (await service.ask("live"))[0]
            proxy.restore()
            await service.becomes_ready()


async def test_no_while_the_server_cannot_be_reached(orders: Database) -> None:
    with Proxy(orders.dsn) as proxy:
        async with serving(orders, Taker().app, dsn=proxy.dsn(orders.dsn)) as service:
            await service.becomes_ready()
            proxy.refuse()
            proxy.cut()
            body = await service.becomes_unready()
            assert body["phase"] in ("waiting", "connecting")
            assert body["reason"]
            assert orders.name not in str(body)
            assert (await service.ask("live"))[0]
            proxy.restore()
            await service.becomes_ready()


async def test_no_while_another_process_streams_from_the_slot(orders: Database) -> None:
    slot, taker = make_slot(orders), Taker()
    stream = {"standby_poll_seconds": 0.1}
    async with serving(orders, taker.app, slot=slot, stream=stream) as standby:
        await standby.becomes_ready()
    async with serving(orders, Taker().app, slot=slot) as active:
        await active.becomes_ready()
        async with serving(orders, taker.app, slot=slot, stream=stream) as standby:
            await async_wait_until(lambda: standby.daemon.vitals().phase == "standing_by")
            body = await standby.becomes_unready()
            assert body["phase"] == "standing_by"
            assert slot in body["reason"]
            assert (await standby.ask("live"))[0]
            assert await active.is_ready()
            active.daemon.stop()
            await standby.becomes_ready()


async def test_no_while_it_stops(orders: Database) -> None:
    app, entered, leave = Walstream(), asyncio.Event(), asyncio.Event()

    @app.on("public.orders")
    async def hold(change: Change) -> None:
        entered.set()
        await leave.wait()

    async with serving(orders, app) as service:
        add(orders)
        await entered.wait()
        assert await service.is_ready()
        service.daemon.stop()
        assert (await service.becomes_unready())["phase"] == "stopping"
        assert (await service.ask("live"))[0]
        leave.set()


# ---- Connected, and nothing moves


async def test_no_while_a_handler_is_stuck(orders: Database) -> None:
    app, leave = Walstream(), asyncio.Event()

    @app.on("public.orders", name="holder")
    async def hold(change: Change) -> None:
        await leave.wait()

    async with serving(orders, app, stream={"stuck_after_seconds": 2}) as service:
        await service.becomes_ready()
        add(orders, 1, 10)
        body = await service.becomes_unready()
        assert body["phase"] == "streaming"
        assert "holder" in body["stalled_because"]
        assert body["stalled_seconds"] >= STALLED_SECONDS - 0.1
        assert (await service.ask("live"))[0]
        await async_wait_until(lambda: not service.daemon.vitals().is_alive)
        assert not (await service.ask("live"))[0]
        leave.set()
        await service.becomes_ready()
        assert (await service.ask("live"))[0]


async def test_no_while_a_handler_is_stuck_in_a_thread(orders: Database) -> None:
    app, leave = Walstream(), threading.Event()

    @app.on("public.orders", name="holder")
    def hold(change: Change) -> None:
        leave.wait(30)

    async with serving(orders, app) as service:
        add(orders)
        await service.becomes_ready()
        body = await service.becomes_unready()
        assert "holder" in body["stalled_because"]
        leave.set()
        await service.becomes_ready()


async def test_no_while_one_of_several_handlers_is_stuck(orders: Database) -> None:
    taker, leave = Taker(), asyncio.Event()

    @taker.app.on("public.orders", name="holder")
    async def hold(change: Change) -> None:
        await leave.wait()

    async with serving(orders, taker.app) as service:
        add(orders)
        await async_wait_until(lambda: taker.ids)
        body = await service.becomes_unready()
        assert "holder" in body["stalled_because"]
        add(orders, 2, 100)  # others go on
        await async_wait_until(lambda: len(taker.ids) == 100)
        assert not await service.is_ready()
        leave.set()
        await service.becomes_ready()


async def test_no_while_one_key_of_a_concurrent_handler_is_stuck(orders: Database) -> None:
    app, leave, others = Walstream(), asyncio.Event(), []

    @app.on("public.orders", concurrency=4, name="lanes")
    async def hold(change: Change) -> None:
        if change.row["id"] == 1:
            await leave.wait()
        others.append(change.row["id"])

    async with serving(orders, app) as service:
        add(orders, 1, 50)
        await async_wait_until(lambda: len(others) == 49)
        assert "lanes" in (await service.becomes_unready())["stalled_because"]
        leave.set()
        await service.becomes_ready()


async def test_no_while_a_handler_fails_again_and_again(orders: Database) -> None:
    app, is_well = Walstream(), False

    @app.on("public.orders", name="failing")
    async def fail(change: Change) -> None:
        if not is_well:
            raise ValueError("the secret")

    async with serving(orders, app) as service:
        await service.becomes_ready()
        add(orders)
        body = await service.becomes_unready()
        assert "failing" in body["stalled_because"]
        assert "secret" not in str(body)
        is_well = True
        await service.becomes_ready()


class FailingSink:
    """Takes nothing while the disk is full."""

    name = "full"

    def __init__(self) -> None:
        self.is_full = True

    async def open(self) -> None:
        pass

    async def take(self, changes: Sequence[Change]) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")

    async def close(self) -> None:
        pass


async def test_no_while_a_sink_fails(orders: Database) -> None:
    sink = FailingSink()
    routes = [(RouteSpec.declared("orders", table="public.orders"), sink)]
    async with serving(orders, Walstream(), sinks=routes) as service:
        await service.becomes_ready()
        add(orders)
        assert "full" in (await service.becomes_unready())["stalled_because"]
        sink.is_full = False
        await service.becomes_ready()


async def test_no_while_the_target_of_a_transactional_handler_is_away(orders: Database) -> None:
    orders.execute("CREATE TABLE done (id int)")
    with Proxy(orders.dsn) as proxy:
        app = Walstream()

        @app.on("public.orders", name="exactly", transactional=proxy.dsn(orders.dsn))
        async def take(change: Change, connection: Any) -> None:
            await connection.execute("INSERT INTO done VALUES (%s)", [change.row["id"]])

        async with serving(orders, app) as service:
            add(orders)
            await async_wait_until(lambda: orders.execute("SELECT 1 FROM done"))
            assert await service.is_ready()
            proxy.stall()
            add(orders, 2)
            assert "exactly" in (await service.becomes_unready())["stalled_because"]
            proxy.restore()
            await service.becomes_ready()


async def test_no_while_the_catalog_does_not_answer_what_a_table_looks_like(
    orders: Database,
) -> None:
    taker = Taker()
    with Proxy(orders.dsn) as proxy:
        async with serving(orders, taker.app, dsn=proxy.dsn(orders.dsn)) as service:
            await service.becomes_ready()
            proxy.stall(Which.ORDINARY)
            add(orders)
            body = await service.becomes_unready()
            assert body["stalled_because"] or body["reason"]
            assert taker.ids == []
            proxy.restore()
            await service.becomes_ready()
            await async_wait_until(lambda: taker.ids)


# ---- Connected, and the server says nothing


@pytest.fixture
def soon_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a silent server after half a second, and wait for its answer as long."""
    monkeypatch.setattr("walstream.stream.WATCH_SECONDS", 0.1)
    monkeypatch.setattr("walstream.stream.ASK_SECONDS", 0.5)
    monkeypatch.setattr("walstream.health.ANSWER_SECONDS", 1.0)


async def test_no_while_the_network_swallows_what_the_server_sends(
    orders: Database, soon_suspicious: None
) -> None:
    with Proxy(orders.dsn) as proxy:
        async with serving(orders, Taker().app, dsn=proxy.dsn(orders.dsn)) as service:
            await service.becomes_ready()
            proxy.stall(Which.REPLICATION, Direction.TO_CLIENT)
            assert "server" in (await service.becomes_unready())["stalled_because"]
            proxy.restore()
            await service.becomes_ready()


async def test_no_within_ten_seconds_by_default_when_the_network_swallows_everything(
    orders: Database,
) -> None:
    taker = Taker()
    with Proxy(orders.dsn) as proxy:
        dsn, stream = proxy.dsn(orders.dsn), {"stalled_after_seconds": 5}
        async with serving(orders, taker.app, dsn=dsn, stream=stream) as service:
            await service.becomes_ready()
            proxy.stall(Which.REPLICATION)
            body = await service.becomes_unready()
            assert "server" in body["stalled_because"]
            assert (await service.ask("live"))[0]
            proxy.restore()
            await service.becomes_ready()
            add(orders)
            await async_wait_until(lambda: taker.ids)


@contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_no_while_the_walsender_is_stopped(
    private_cluster: StartCluster, soon_suspicious: None
) -> None:
    cluster = private_cluster()
    with Database(cluster.conninfo()) as database:
        database.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
        async with serving(database, Taker().app) as service:
            await service.becomes_ready()
            ((pid,),) = database.execute("SELECT active_pid FROM pg_replication_slots")
            with paused(pid):
                assert "server" in (await service.becomes_unready())["stalled_because"]
            await service.becomes_ready()


async def test_no_within_ten_seconds_by_default_when_a_handler_is_stuck(orders: Database) -> None:
    app, leave = Walstream(), asyncio.Event()

    @app.on("public.orders")
    async def hold(change: Change) -> None:
        await leave.wait()

    async with serving(orders, app, stream={"stalled_after_seconds": 5}) as service:
        await service.becomes_ready()
        add(orders)
        assert "hold has held change" in (await service.becomes_unready())["stalled_because"]
        leave.set()


BLOCKING: Final = """
import time
from pathlib import Path
from walstream import Change, Walstream

stream = Walstream()

@stream.on("public.orders")
async def block(change: Change) -> None:
    while not Path("go_on").exists():
        time.sleep(0.01)
"""


async def test_no_answer_while_a_handler_blocks_the_event_loop(
    orders: Database, tmp_path: Path
) -> None:
    port = free_port()
    (tmp_path / "handlers.py").write_text(BLOCKING)
    (tmp_path / "walstream.toml").write_text(
        f"""
        handlers = {{ app = "handlers:stream" }}
        http = {{ listen = "127.0.0.1:{port}" }}
        [postgres]
        dsn = "{orders.dsn}"
        [slot]
        name = "{make_slot(orders)}"
        """
    )
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
        [sys.executable, "-m", "walstream", "run"], cwd=tmp_path
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=0.5) as client:
            await becomes(client, ready=True)
            add(orders)
            await becomes(client, ready=False)
            (tmp_path / "go_on").touch()
            await becomes(client, ready=True)
    finally:
        process.terminate()
        assert process.wait(20) == 0


# ---- Yes


async def test_yes_while_there_is_nothing_to_do(orders: Database, soon_suspicious: None) -> None:
    async with serving(orders, Taker().app) as service:
        await service.becomes_ready()
        until = time.monotonic() + 3  # longer than it takes to suspect the server
        assert await service.stays_ready_while(lambda: time.monotonic() < until) > 10


@pytest.mark.parametrize("in_thread", [False, True])
async def test_yes_while_a_handler_is_slow_and_moves(orders: Database, *, in_thread: bool) -> None:
    app, taken = Walstream(), 0

    async def plod(change: Change) -> None:
        nonlocal taken
        await asyncio.sleep(STALLED_SECONDS / 4)
        taken += 1

    def plod_in_thread(change: Change) -> None:
        nonlocal taken
        time.sleep(STALLED_SECONDS / 4)
        taken += 1

    app.on("public.orders")(plod_in_thread if in_thread else plod)
    async with serving(orders, app, stream={"stuck_after_seconds": 1}) as service:
        await service.becomes_ready()
        add(orders, 1, 15)
        assert await service.stays_ready_while(lambda: taken < 15) > 5


async def test_yes_while_a_large_transaction_comes_in(orders: Database) -> None:
    taker = Taker()
    async with serving(orders, taker.app, stream={"stalled_after_seconds": 2}) as service:
        await service.becomes_ready()
        add(orders, 1, 150_000)
        assert await service.stays_ready_while(lambda: len(taker.ids) < 150_000) > 2


async def test_yes_while_a_batch_waits_to_be_full(orders: Database) -> None:
    app, batches = Walstream(), []

    @app.on("public.orders", batch=10, linger_seconds=STALLED_SECONDS * 3)
    async def take(changes: list[Change]) -> None:
        batches.append(len(changes))

    async with serving(orders, app) as service:
        await service.becomes_ready()
        add(orders)
        assert await service.stays_ready_while(lambda: not batches) > 5


async def test_yes_while_a_dead_letter_waits_in_its_store(orders: Database, tmp_path: Path) -> None:
    app, called = Walstream(), 0

    @app.on("public.orders", attempts=1, on_failure="dead_letter")
    async def fail(change: Change) -> None:
        nonlocal called
        called += 1
        raise ValueError

    store = {"path": str(tmp_path / "letters.sqlite3")}
    async with serving(orders, app, dead_letters=store) as service:
        await service.becomes_ready()
        add(orders)
        await async_wait_until(lambda: called)
        until = time.monotonic() + 2 * STALLED_SECONDS
        await service.stays_ready_while(lambda: time.monotonic() < until)


async def test_yes_while_others_write_what_no_route_wants(orders: Database) -> None:
    orders.execute("CREATE TABLE others (id int)")
    async with serving(orders, Taker().app) as service:
        await service.becomes_ready()
        until = time.monotonic() + 2 * STALLED_SECONDS
        while time.monotonic() < until:
            orders.execute("INSERT INTO others SELECT generate_series(1, 100)")
            assert await service.is_ready()


async def test_it_tells_a_standstill_to_who_asks_for_the_first_time(orders: Database) -> None:
    """Nobody asks before; and then once is enough."""
    app, entered, leave = Walstream(), asyncio.Event(), asyncio.Event()

    @app.on("public.orders")
    async def hold(change: Change) -> None:
        entered.set()
        await leave.wait()

    async with serving(orders, app) as service:
        add(orders)
        await entered.wait()
        await asyncio.sleep(STALLED_SECONDS + 0.2)
        assert not await service.is_ready()
        leave.set()
