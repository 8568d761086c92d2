"""A blocked event loop is noticed, by a thread; a process that stood still as a whole is not."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from tests.lines import Line, called, handler
from tests.postgres import Database, async_wait_until
from walstream import Walstream, config, loop_watch
from walstream.changes import Change
from walstream.loop_watch import watch_loop

AFTER_SECONDS: Final = 0.05


def block_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """What no coroutine should do."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "walstream loop watch"]


async def test_a_handler_that_blocks_the_loop_is_told_with_where_it_stands() -> None:
    async def blocking(change: Change) -> None:
        if called(change) == "b":
            block_until(lambda: logs)

    line = Line(handler(blocking))
    line.commit("a", "b", "c")
    with capture_logs() as logs, watch_loop(asyncio.get_running_loop(), AFTER_SECONDS):
        await line.deliver()
        await async_wait_until(lambda: len(logs) == 2)
    blocked, moving = logs
    assert (blocked["event"], blocked["log_level"]) == ("event_loop_blocked", "error")
    assert blocked["seconds"] >= 0
    frames = [frame.rpartition(" ") for frame in blocked["frames"]]
    assert [name for _, _, name in frames[:2]] == ["blocking", "block_until"]
    assert frames[0][0].startswith(f"{__file__}:")
    assert (moving["event"], moving["log_level"]) == ("event_loop_moves_again", "info")
    assert line.counts.delivered == 3


async def test_it_is_told_once_and_again_when_it_is_blocked_again() -> None:
    with capture_logs() as logs, watch_loop(asyncio.get_running_loop(), AFTER_SECONDS):
        for _ in range(2):
            before = len(logs)
            block_until(lambda before=before: len(logs) > before)  # type: ignore[misc]
            block_until(lambda: False, seconds=4 * AFTER_SECONDS)
            assert len(logs) == before + 1
            await async_wait_until(lambda before=before: len(logs) == before + 2)  # type: ignore[misc]
    blocked, moving = "event_loop_blocked", "event_loop_moves_again"
    assert [entry["event"] for entry in logs] == [blocked, moving] * 2


async def test_a_loop_that_is_busy_or_waits_is_not_blocked() -> None:
    with capture_logs() as logs, watch_loop(asyncio.get_running_loop(), 1.0):
        deadline = time.monotonic() + 0.6
        while time.monotonic() < deadline:
            block_until(lambda: False, seconds=0.02)
            await asyncio.sleep(0)
        await asyncio.sleep(0.6)
    assert logs == []


async def test_the_thread_ends_with_the_block_whatever_happens() -> None:
    async def fail() -> None:
        with watch_loop(asyncio.get_running_loop(), 60):
            assert len(watchers()) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert watchers() == []


async def test_what_blocks_until_the_end_is_over_then() -> None:
    with capture_logs() as logs, watch_loop(asyncio.get_running_loop(), AFTER_SECONDS):
        block_until(lambda: logs)
    assert [entry["event"] for entry in logs] == ["event_loop_blocked", "event_loop_moves_again"]


async def test_where_walstream_itself_blocks_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logs, watch_loop(asyncio.get_running_loop(), AFTER_SECONDS):
        monkeypatch.setattr(loop_watch, "_OWN", __file__)
        block_until(lambda: logs)
    assert logs[0]["frames"][0].startswith(f"{__file__}:")


@pytest.mark.parametrize(
    ("gap", "used", "was_stopped"),
    [
        (0.25, 0.0, False),  # as always
        (0.4, 0.0, False),  # a little late
        (30.0, 0.1, True),  # SIGSTOP, or a machine that slept
        (30.0, 29.0, False),  # a computation that holds Python's lock
        (30.0, 5.0, False),  # the same where others compute too
    ],
)
def test_a_process_that_stood_still_is_told_from_one_that_computes(
    gap: float, used: float, *, was_stopped: bool
) -> None:
    assert loop_watch._was_stopped(gap, used, 0.25) is was_stopped


STOPPED: Final = """
import asyncio
from walstream import logs
from walstream.loop_watch import watch_loop

async def main():
    with watch_loop(asyncio.get_running_loop(), 0.2):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, input)

logs.configure(log_format="json")
asyncio.run(main())
"""


def test_a_process_that_was_stopped_by_a_signal_logs_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            time.sleep(0.5)  # what is looked for is what time passing does
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.3)
        _, written = process.communicate("\n", timeout=10)
    assert (process.returncode, written) == (0, "")


def test_what_holds_pythons_lock_is_told_afterwards() -> None:
    """A regular expression that backtracks lets no other thread run."""

    async def main() -> None:
        with watch_loop(asyncio.get_running_loop(), AFTER_SECONDS):
            started, length = time.monotonic(), 18
            while time.monotonic() - started < 5 * AFTER_SECONDS:
                length += 1
                started = time.monotonic()
                re.match(r"(a+)+$", "a" * length + "b")
            await async_wait_until(lambda: bool(logs))

    with capture_logs() as logs:
        asyncio.run(main())
    assert logs[0]["event"] == "event_loop_blocked"


async def test_a_run_is_watched(database: Database) -> None:
    slot = f"watched_{os.urandom(4).hex()}"
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    database.execute("INSERT INTO orders VALUES (1)")
    stream = Walstream()

    def blocked() -> list[Any]:
        return [entry for entry in logs if entry["event"] == "event_loop_blocked"]

    @stream.on("public.orders")
    async def block(_: Change) -> None:
        block_until(blocked)

    settings = {
        "postgres": {"dsn": database.dsn},
        "slot": {"name": slot},
        "stream": {"stuck_after_seconds": 0.2},
    }
    with capture_logs() as logs:
        await stream.run(config.parse(settings), until="now")
    [told] = blocked()
    assert told["frames"][0].startswith(f"{__file__}:")
    assert watchers() == []
