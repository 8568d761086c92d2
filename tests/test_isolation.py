"""One handler that fails, hangs or is cancelled: what becomes of the others, and of the slot."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests import stages
from tests.oracle import Twins
from tests.postgres import Database, async_wait_until, wait_until
from tests.streaming import Stream
from walstream import Change, Lsn
from walstream.cluster import ServerPrograms
from walstream.daemon import Daemon
from walstream.errors import EX_TEMPFAIL, HandlerFailed

MAX_IN_FLIGHT: Final = 500
BATCH_MESSAGES: Final = 1000
"""What one read of the socket brings at most; so much is handed over beyond the limit."""

STILL_CALLS: Final = 30
"""So often the failing handler is called, about a second long, and nothing else happens."""

PATIENT: Final = {"attempts": 10**6, "backoff_seconds": 0.01, "max_backoff_seconds": 0.05}

STUCK: Final = """
import time
from pathlib import Path
from walstream import Change, Walstream

stream = Walstream()
here = Path(__file__).parent

def note(name: str, change: Change) -> None:
    with (here / name).open("a") as file:
        file.write(change.id + "\\n")

@stream.on("public.items", name="stuck", {options})
{way} hold(change: Change) -> None:
    if (here / "hang").exists() and change.row["id"] == 3:
        {hang}
    note("stuck.seen", change)

@stream.on("public.items", name="other")
async def take(change: Change) -> None:
    note("other.seen", change)
"""

HANG_IN_LOOP: Final = "await __import__('asyncio').sleep(600)"
HANG_IN_THREAD: Final = "time.sleep(600)"
KINDS: Final = ("async", "sync", "lanes")


@pytest.fixture
def items(database: Database) -> Database:
    """A database with one table."""
    database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    return database


async def test_a_handler_that_fails_holds_up_the_others_at_the_bound_only(items: Database) -> None:
    """Then nothing more is read and memory stays as it is; once it is mended all go on."""
    stream = Stream(items, handlers=PATIENT, stream={"max_in_flight_changes": MAX_IN_FLIGHT})
    failing: list[Change] = []
    taken: dict[str, list[int]] = {"failing": [], "other": [], "lanes": []}
    mended = False

    @stream.app.on("public.items", name="failing")
    async def fail(change: Change) -> None:
        failing.append(change)
        if not mended:
            message = "not yet"
            raise RuntimeError(message)
        taken["failing"].append(change.row["id"])

    @stream.app.on("public.items", name="other")
    async def take(change: Change) -> None:
        taken["other"].append(change.row["id"])

    @stream.app.on("public.items", name="lanes", concurrency=4)
    def take_in_lanes(change: Change) -> None:
        taken["lanes"].append(change.row["id"])

    for first in range(0, 30_000, 100):
        items.execute(f"INSERT INTO items SELECT generate_series({first}, {first + 99})")
    async with stream:
        # The others have taken all that was handed over: what is in flight is the failing one's.
        await full(stream, lambda left: len(taken["other"]) == len(taken["lanes"]) == left)
        before, resident = {name: len(ids) for name, ids in taken.items()}, resident_bytes()
        read, calls = process_of(stream).summary().changes, len(failing)
        await async_wait_until(lambda: len(failing) >= calls + STILL_CALLS)
        assert process_of(stream).summary().changes == read
        assert before == {name: len(ids) for name, ids in taken.items()}
        assert before["other"] == before["lanes"] <= MAX_IN_FLIGHT + BATCH_MESSAGES
        assert resident_bytes() - resident < 4 << 20
        assert {change.id for change in failing} == {failing[0].id}
        assert Lsn.parse(stream.confirmed_flush_lsn()) < failing[0].end_lsn
        mended = True
        summary = await stream.drain()
    assert taken["failing"] == taken["other"] == list(range(30_000))
    assert sorted(taken["lanes"]) == taken["other"]
    retries = {one.name: one.retries for one in summary.destinations}
    assert retries == {"failing": len(failing) - 30_000, "other": 0, "lanes": 0}


async def test_what_is_beyond_a_row_that_is_held_is_bounded_too(items: Database) -> None:
    """Other lanes go on while one is held, and with them what would come again after a crash."""
    stream = Stream(items, stream={"max_in_flight_changes": MAX_IN_FLIGHT})
    gate, taken = asyncio.Event(), []

    @stream.app.on("public.items", concurrency=4)
    async def hold(change: Change) -> None:
        if change.row["id"] == 0:
            await gate.wait()
        taken.append(change.id)

    for first in range(0, 20_000, 100):
        items.execute(f"INSERT INTO items SELECT generate_series({first}, {first + 99})")
    async with stream:
        await full(stream, lambda left: left == 1)
        beyond = len(taken)
        gate.set()
        await stream.drain()
    assert beyond <= MAX_IN_FLIGHT + BATCH_MESSAGES


async def test_a_stop_leaves_no_change_out_before_one_that_is_delivered(items: Database) -> None:
    """A transaction that another handler has begun is not delivered past one that nobody has."""
    stream = Stream(items)
    gate = asyncio.Event()
    slow: list[int] = []
    fast: list[int] = []

    @stream.app.on("public.items", name="slow")
    async def hold(change: Change) -> None:
        slow.append(change.row["id"])
        await gate.wait()

    @stream.app.on("public.items", where="id=eq.3", name="fast")
    async def take(change: Change) -> None:
        fast.append(change.row["id"])

    for number in (1, 2, 3):
        items.execute(f"INSERT INTO items VALUES ({number})")
    stream.start()
    await async_wait_until(lambda: fast == [3])
    await stop_while_held(stream, gate)
    assert slow == list(range(1, len(slow) + 1))
    await stream.drain()
    assert list(dict.fromkeys(slow)) == [1, 2, 3]


async def test_a_stop_leaves_no_change_of_a_lane_out(database: Database) -> None:
    """One transaction has begun in one lane; in another lane it waits behind one that has not."""
    database.execute("CREATE TABLE items (id int PRIMARY KEY, version int)")
    stream = Stream(database)
    gate = asyncio.Event()
    seen: list[tuple[int, int]] = []

    @stream.app.on("public.items", concurrency=2)
    async def hold(change: Change) -> None:
        seen.append((change.row["id"], change.row["version"]))
        if change.row["id"] == 1:
            await gate.wait()

    database.execute("INSERT INTO items VALUES (1, 1)")
    database.execute("UPDATE items SET version = 2")
    database.execute("BEGIN; INSERT INTO items VALUES (2, 0); UPDATE items SET version = 3; COMMIT")
    stream.start()
    await async_wait_until(lambda: (2, 0) in seen)
    await stop_while_held(stream, gate)
    versions = [version for row, version in seen if row == 1]
    assert versions == list(range(1, len(versions) + 1))
    await stream.drain()
    assert list(dict.fromkeys(version for row, version in seen if row == 1)) == [1, 2, 3]


async def raise_cancelled() -> None:
    raise asyncio.CancelledError


async def cancel_own_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(5)


async def leave_own_task_cancelled() -> None:
    """As libraries did before Task.uncancel: the cancellation is caught, and counts on."""
    try:
        await cancel_own_task()
    except asyncio.CancelledError:
        message = "a time is over"
        raise TimeoutError(message) from None


async def return_with_own_task_cancelled() -> None:
    """The cancellation comes at the next await, which is not the handler's any more."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    message = "the next await is not ours"
    raise TimeoutError(message)


async def await_a_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(5))
    task.cancel()
    await task


@pytest.mark.parametrize(
    "cancel",
    [
        raise_cancelled,
        cancel_own_task,
        leave_own_task_cancelled,
        return_with_own_task_cancelled,
        await_a_cancelled_task,
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"concurrency": 2}, {"batch": 2}, {"transactions": True}],
    ids=["one", "lanes", "batches", "transactions"],
)
async def test_a_cancellation_of_a_handlers_own_is_a_failure_like_any_other(
    items: Database, cancel: Callable[[], Any], options: dict[str, Any]
) -> None:
    """It is called again, and the next changes come."""
    stream = Stream(items)
    begun: list[int] = []
    taken: list[int] = []

    @stream.app.on("public.items", name="cancels", **options)
    async def take(argument: Any) -> None:
        ids = [one.row["id"] for one in (argument if isinstance(argument, list) else [argument])]
        again = ids[0] in begun
        begun.extend(ids)
        if 2 in ids and not again:
            await cancel()
        taken.extend(ids)

    for number in range(1, 7):
        items.execute(f"INSERT INTO items VALUES ({number})")
    await stream.drain(timeout_seconds=5)
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("options", [{}, {"concurrency": 2}, {"batch": 2}])
async def test_what_a_thread_raises_is_a_failure_like_any_other(
    items: Database, error: type[BaseException], options: dict[str, Any]
) -> None:
    stream = Stream(items)
    begun: list[int] = []
    taken: list[int] = []

    @stream.app.on("public.items", name="raises", **options)
    def take(argument: Any) -> None:
        ids = [one.row["id"] for one in (argument if isinstance(argument, list) else [argument])]
        again = ids[0] in begun
        begun.extend(ids)
        if 2 in ids and not again:
            raise error
        taken.extend(ids)

    for number in range(1, 7):
        items.execute(f"INSERT INTO items VALUES ({number})")
    await stream.drain(timeout_seconds=5)
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]


async def test_a_lane_that_fails_for_good_does_not_wait_for_the_others_attempts(
    items: Database,
) -> None:
    stream = Stream(items, handlers={"attempts": 1, "backoff_seconds": 60.0})
    others: list[int] = []

    @stream.app.on("public.items", attempts=100, where="id=gt.1", concurrency=2, name="others")
    async def fail_often(change: Change) -> None:
        others.append(change.row["id"])
        message = "again and again"
        raise RuntimeError(message)

    @stream.app.on("public.items", where="id=eq.1", concurrency=2, name="first")
    async def fail(change: Change) -> None:
        await async_wait_until(lambda: bool(others))
        message = "for good"
        raise RuntimeError(message)

    items.execute("INSERT INTO items VALUES (1), (2)")
    with pytest.raises(HandlerFailed, match="first"):
        await stream.drain(timeout_seconds=10)


async def test_a_stuck_handler_makes_the_stream_unready_until_it_moves(items: Database) -> None:
    stream = Stream(items, stream={"stuck_after_seconds": 0.2})
    gate = asyncio.Event()

    @stream.app.on("public.items")
    async def hold(change: Change) -> None:
        await gate.wait()

    assert not stream.app.is_ready
    running = asyncio.create_task(stream.app.run(stream.config))
    await async_wait_until(lambda: stream.app.is_ready)
    items.execute("INSERT INTO items VALUES (1)")
    await async_wait_until(lambda: not stream.app.is_ready)
    assert not running.done()
    gate.set()
    await async_wait_until(lambda: stream.app.is_ready)
    stream.app.stop()
    await running
    assert not stream.app.is_ready


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(
    "kind", [("async def", ""), ("def", ""), ("async def", "concurrency=3")], ids=KINDS
)
def test_a_stuck_handler_frees_the_slot_for_another_process(
    items: Database,
    server_programs: ServerPrograms,
    tmp_path: Path,
    kind: tuple[str, str],
    log_format: str,
) -> None:
    """The log says what holds where; exit 75; the process that waits for the slot takes over."""
    way, options = kind
    hang = HANG_IN_THREAD if way == "def" else HANG_IN_LOOP
    (tmp_path / "handlers.py").write_text(STUCK.format(way=way, hang=hang, options=options))
    (tmp_path / "hang").touch()
    with Twins(items, server_programs, tmp_path, routes=(), app="handlers:stream") as twins:
        limits = {"stuck_after_seconds": 0.5, "release_after_seconds": 3.0}
        configured = stages.settings(twins._config.read_text(), stream=limits)
        twins._config.write_text(f'{configured}\n[log]\nformat = "{log_format}"\n')
        for number in range(1, 7):
            items.execute(f"INSERT INTO items VALUES ({number})")
        first = twins.start()
        wait_until(lambda: "handler_stuck" in twins.log.read_text() or has_ended(first))
        told = twins.log.read_text()
        (tmp_path / "hang").unlink()
        second = twins.start("--until", twins.now())
        assert first.wait(timeout=30) == EX_TEMPFAIL, twins.log.read_text()
        twins.finish(second)
    if log_format == "json":
        assert_tells_where(told, tmp_path, way)
    else:
        assert str(tmp_path / "handlers.py") in told
    for name in ("stuck", "other"):
        seen = (tmp_path / f"{name}.seen").read_text().split()
        assert len(set(seen)) == 6
        if not options:
            assert list(dict.fromkeys(seen)) == sorted(set(seen), key=stages.end_lsn)


def assert_tells_where(told: str, folder: Path, way: str) -> None:
    lines = [json.loads(line) for line in told.splitlines()]
    stuck = next(line for line in lines if line["event"] == "handler_stuck")
    assert (stuck["level"], stuck["destination"]) == ("error", "stuck")
    assert stuck["key"] == "public.items [3]"
    assert stuck["change"].endswith(":1")
    assert stuck["frames"][0].startswith(f"{folder / 'handlers.py'}:")
    assert " hold" in stuck["frames"][0]
    assert way == "def" or "sleep" in stuck["frames"][-1]


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


async def stop_while_held(stream: Stream, gate: asyncio.Event) -> None:
    """Stop, and let the call that is held return only when the stop is under way."""
    stopping = asyncio.create_task(stream.stop())
    process = process_of(stream)
    await async_wait_until(lambda: process._delivery._flow.halt)
    gate.set()
    await stopping


async def full(stream: Stream, is_still: Callable[[int], bool]) -> None:
    """Wait until nothing more is read, and what is left in flight is what nobody will take."""
    await async_wait_until(lambda: stream._life is not None and stream._life._process is not None)
    delivery = process_of(stream)._delivery
    await async_wait_until(lambda: delivery.is_full and is_still(delivery.in_flight), 60.0)


def process_of(stream: Stream) -> Daemon:
    life = stream._life
    assert life is not None
    assert life._process is not None
    return life._process


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
