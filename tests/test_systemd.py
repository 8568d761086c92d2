"""What the service manager is told, by a real datagram socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

import pytest
import structlog

from tests import vitals
from tests.postgres import Database
from tests.proxy import Proxy
from walstream.systemd import Notifier, describe, keep_telling
from walstream.vitals import Phase


class Manager:
    """The end of the socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def hear(self) -> list[str]:
        """All messages so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append(self._socket.recv(1 << 16).decode())
        return self.told

    def heard(self, beginning: str) -> int:
        """How many messages begin so."""
        return sum(one.startswith(beginning) for one in self.hear())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@walstream-test-{secrets.token_hex(4)}"
    found = Manager(str(tmp_path / "notify") if request.param == "path" else name)
    yield found
    found.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[Notifier]:
    found = Notifier(manager.address, 0.2)
    yield found
    found.close()


def test_without_a_socket_nothing_is_told() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier.is_listened_to
    for tell in (notifier.ready, notifier.reloading, notifier.reloaded, notifier.stopping):
        tell()
    notifier.status("well")
    notifier.watchdog()
    notifier.starting(30)
    notifier.close()


async def test_without_a_socket_there_is_nothing_to_keep_telling() -> None:
    async with asyncio.timeout(1):
        await keep_telling(Notifier(None), vitals.full)


def test_the_life_of_a_service_is_told_in_its_protocol(
    manager: Manager, notifier: Notifier
) -> None:
    notifier.status("connecting\nto the server")
    notifier.starting(30)
    notifier.reloading()  # not while it starts
    notifier.reloaded()
    notifier.ready()
    notifier.ready()
    notifier.reloading()
    notifier.reloaded()
    notifier.reloaded()
    notifier.watchdog()
    notifier.stopping(12.5)
    *told, reloading, again, watchdog, stopping = manager.hear()
    assert told == ["STATUS=connecting to the server", "EXTEND_TIMEOUT_USEC=30000000", "READY=1"]
    kind, since = reloading.split("\n")
    assert kind == "RELOADING=1"
    assert int(since.removeprefix("MONOTONIC_USEC=")) > 0
    assert (again, watchdog) == ("READY=1", "WATCHDOG=1")
    assert stopping == "STOPPING=1\nEXTEND_TIMEOUT_USEC=12500000"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_that_of_this_process(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert Notifier.from_environment(environment).watchdog_seconds == seconds


def test_a_socket_that_is_gone_is_logged_once_and_found_again(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "notify"))
    with structlog.testing.capture_logs() as logged:
        notifier.ready()
        notifier.status("one")
        notifier.status("two")
    assert [(one["event"], one["error"]) for one in logged] == [
        ("notify_failed", "No such file or directory")
    ]
    manager = Manager(str(tmp_path / "notify"))
    notifier.status("three")
    assert manager.hear() == ["READY=1", "STATUS=three"]
    notifier.close()
    manager.close()


def test_an_address_that_cannot_be_one_is_logged_once() -> None:
    with structlog.testing.capture_logs() as logged:
        notifier = Notifier("/" + "x" * 200)
        notifier.ready()
        notifier.status("one")
    assert [one["event"] for one in logged] == ["notify_failed"]


def test_a_manager_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    with structlog.testing.capture_logs() as logged:
        for number in range(5_000):
            notifier.status(f"number {number}")
        notifier.ready()
    assert [one["event"] for one in logged] == ["notify_failed"]
    manager.hear()
    notifier.retry()
    assert manager.hear()[-1] == "READY=1"
    notifier.close()
    manager.close()


# ---- Keeping it told


@pytest.fixture
def process() -> list[Any]:
    """How the process is: its only item may be replaced."""
    return [vitals.young()]


@pytest.fixture
async def telling(notifier: Notifier, process: list[Any]) -> Any:
    task = asyncio.create_task(keep_telling(notifier, lambda: process[0]))
    yield task
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


Wait = Callable[..., Awaitable[Any]]


async def test_it_is_ready_once_when_it_streams_for_the_first_time(
    manager: Manager, process: list[Any], telling: Any, async_wait_until: Wait
) -> None:
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") == 2)
    process[0] = vitals.young(phase=Phase.STANDING_BY)
    await async_wait_until(lambda: manager.heard("STATUS=standing by"))
    assert manager.heard("READY=1") == 0
    assert manager.heard("EXTEND_TIMEOUT_USEC=30000000") == 1
    process[0] = vitals.full()
    await async_wait_until(lambda: manager.heard("READY=1"))
    process[0] = vitals.young(phase=Phase.WAITING, reason="the server shuts down")
    await async_wait_until(lambda: manager.heard("STATUS=waiting"))
    process[0] = vitals.full()
    await async_wait_until(lambda: manager.heard("STATUS=streaming") == 2)
    assert manager.heard("READY=1") == 1


async def test_signs_of_life_end_when_it_is_not_alive(
    manager: Manager, process: list[Any], telling: Any, async_wait_until: Wait
) -> None:
    process[0] = vitals.full()
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") == 3)
    process[0] = vitals.full(is_alive=False, lag_bytes=1)
    await async_wait_until(lambda: manager.hear()[-1].startswith("STATUS="))
    given = manager.heard("WATCHDOG=1")
    process[0] = vitals.full(is_alive=False, lag_bytes=2)
    await async_wait_until(lambda: manager.hear()[-1].startswith("STATUS="))
    process[0] = vitals.full(is_alive=False, lag_bytes=3)
    before = len(manager.told)
    await async_wait_until(lambda: len(manager.hear()) > before)
    assert manager.heard("WATCHDOG=1") == given
    process[0] = vitals.full()
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") > given)


async def test_the_watchdog_gets_its_signs_in_time(
    manager: Manager, process: list[Any], telling: Any, async_wait_until: Wait
) -> None:
    loop = asyncio.get_running_loop()
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") == 1)
    before = loop.time()
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") >= 11)
    assert 0.05 <= (loop.time() - before) / 10 <= 0.2


async def test_a_status_is_told_when_it_changes(
    manager: Manager, process: list[Any], telling: Any, async_wait_until: Wait
) -> None:
    await async_wait_until(lambda: manager.heard("WATCHDOG=1") == 4)
    assert manager.heard("STATUS=") == 1


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            vitals.full(lag_seconds=0.2, lag_bytes=12_288),
            "streaming from shop, 0.2 s and 12 kB behind, 1,234 changes",
        ),
        (
            vitals.full(is_ready=False, stalled_seconds=12, stalled_because="handler orders"),
            "streaming from shop, stalled for 12 s: handler orders, 0.2 s and 14 kB behind",
        ),
        (vitals.full(lag_bytes=3 << 40), "streaming from shop, 0.2 s and 3072 GB behind"),
        (vitals.young(reason=""), "connecting, for shop, 0 changes"),
        (vitals.young(phase=Phase.STANDING_BY), "standing by: another process streams from shop"),
        (
            vitals.young(phase=Phase.WAITING, reason="ConnectionLost"),
            "waiting to connect again, for shop: ConnectionLost, 0 changes",
        ),
        (vitals.full(phase=Phase.STOPPING), "stopping, streaming from shop, 1,234 changes"),
        (vitals.full(phase=Phase.STOPPED), "stopped, was streaming from shop, 1,234 changes"),
    ],
)
def test_the_status_is_a_line_for_people(now: Any, said: str) -> None:
    assert describe(now).startswith(said)
    assert "\n" not in describe(now)


# ---- walstream run as a service

HANDLERS: Final = """
import asyncio
from pathlib import Path
from walstream import Change, Walstream

stream = Walstream()

@stream.on("public.orders", name="waiter")
async def wait(change: Change) -> None:
    while not Path("go_on").exists():
        await asyncio.sleep(0.01)
"""

CONFIGURATION: Final = """
handlers = {{ app = "handlers:stream" }}
[postgres]
dsn = "{dsn}"
[slot]
name = "{slot}"
create = true
[stream]
reconnect_seconds = 0.1
max_reconnect_seconds = 0.1
stalled_after_seconds = 0.3
stuck_after_seconds = 0.6
"""


def last_status(manager: Manager) -> str:
    return [one for one in manager.hear() if one.startswith("STATUS=")][-1]


by_path: Final = pytest.mark.parametrize("manager", ["path"], indirect=True)


@contextlib.contextmanager
def running(folder: Path, manager: Manager, dsn: str, slot: str) -> Iterator[Popen[bytes]]:
    """``walstream run`` as systemd starts it; its watchdog waits for 0.4 seconds."""
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "walstream.toml").write_text(CONFIGURATION.format(dsn=dsn, slot=slot))
    environment = {**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    environment.pop("WATCHDOG_PID", None)
    command = [sys.executable, "-m", "walstream", "run"]
    with (folder / "log").open("wb") as log:
        process = Popen(command, cwd=folder, env=environment, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@by_path
def test_a_service_is_ready_when_it_streams_and_not_before(
    manager: Manager, tmp_path: Path, database: Database, wait_until: Callable[..., Any]
) -> None:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    with Proxy(database.dsn) as proxy:
        proxy.refuse()
        slot = f"systemd_{database.name[-8:]}"
        with running(tmp_path, manager, proxy.dsn(database.dsn), slot) as process:
            wait_until(lambda: manager.heard("WATCHDOG=1") >= 3, 20)
            assert manager.heard("STATUS=")
            assert manager.heard("EXTEND_TIMEOUT_USEC=")
            assert manager.heard("READY=1") == 0
            proxy.restore()
            wait_until(lambda: manager.heard("READY=1"), 20)
            wait_until(lambda: manager.heard(f"STATUS=streaming from {slot}"))
            proxy.refuse()
            proxy.cut()
            wait_until(lambda: not last_status(manager).startswith("STATUS=streaming"))
            proxy.restore()
            wait_until(lambda: last_status(manager).startswith("STATUS=streaming"))
            assert manager.heard("READY=1") == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert manager.heard("STOPPING=1") == 1


@by_path
def test_the_watchdog_of_a_service_hears_nothing_while_a_handler_is_stuck(
    manager: Manager, tmp_path: Path, database: Database, wait_until: Callable[..., Any]
) -> None:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    slot = f"systemd_{database.name[-8:]}"
    with running(tmp_path, manager, database.dsn, slot) as process:
        wait_until(lambda: manager.heard("READY=1"), 20)
        database.execute("INSERT INTO orders VALUES (1)")
        wait_until(lambda: any("stalled for 1 s" in one for one in manager.hear()))
        signs = manager.heard("WATCHDOG=1")
        wait_until(lambda: any("stalled for 3 s" in one for one in manager.hear()))
        assert manager.heard("WATCHDOG=1") == signs
        (tmp_path / "go_on").touch()
        wait_until(lambda: manager.heard("WATCHDOG=1") > signs)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert manager.heard("STOPPING=1") == 1


@by_path
def test_a_reload_of_a_service_is_told_whether_it_is_applied_or_refused(
    manager: Manager, tmp_path: Path, database: Database, wait_until: Callable[..., Any]
) -> None:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    slot = f"systemd_{database.name[-8:]}"
    with running(tmp_path, manager, database.dsn, slot) as process:
        wait_until(lambda: manager.heard("READY=1"), 20)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.heard("READY=1") == 2)
        (tmp_path / "walstream.toml").write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.heard("READY=1") == 3)
        told = [one for one in manager.hear() if one.startswith(("READY", "RELOADING"))]
        assert [one.split("=")[0] for one in told] == [
            "READY", "RELOADING", "READY", "RELOADING", "READY",
        ]  # fmt: skip
        assert all("MONOTONIC_USEC=" in one for one in told[1::2])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
