"""The file sink's rotation, fsync policies, and what full disks and crashes leave of it."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.postgres import async_wait_until
from tests.test_delivery import Line
from tests.test_file_sink import change
from walstream.backoff import Backoff
from walstream.errors import DeliveryError, SinkFailed
from walstream.policy import FailurePolicy
from walstream.sinks import file as file_module
from walstream.sinks.file import FileOptions, FileSink
from walstream.sinks.rotation import Shelf

LINE_BYTES = len(change(1).to_json()) + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.jsonl"


def ids_in(file: Path) -> list[str]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line)["id"] for line in content.splitlines()]


def rotated(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}-*"))


def all_ids(path: Path) -> list[str]:
    return [one for file in [*rotated(path), path] for one in ids_in(file)]


def wanted(count: int) -> list[str]:
    return [change(number).id for number in range(1, count + 1)]


async def fill(sink: FileSink, count: int, *, first: int = 1) -> None:
    for number in range(first, first + count):
        await sink.take([change(number)])


# ---- By size and age


async def test_a_file_is_rotated_before_it_gets_too_large(path: Path) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=3 * LINE_BYTES))
    await sink.open()
    with capture_logs() as logs:
        await fill(sink, 8)
    await sink.close()
    assert [ids_in(file) for file in [*rotated(path), path]] == [
        wanted(8)[:3],
        wanted(8)[3:6],
        wanted(8)[6:],
    ]
    assert [entry for entry in logs if entry["event"] != "file_not_durable"] == [
        {
            "event": "file_rotated",
            "log_level": "info",
            "sink": "f",
            "path": str(path),
            "rotated": file.name,
            "bytes": 3 * LINE_BYTES,
        }
        for file in rotated(path)
    ]
    assert path.stat().st_mode & 0o777 == rotated(path)[0].stat().st_mode & 0o777


async def test_a_batch_is_not_divided(path: Path) -> None:
    """What a failed take has written could not be cut off any more."""
    sink = FileSink("f", path, FileOptions(max_bytes=2 * LINE_BYTES))
    await sink.open()
    await sink.take([change(1)])
    await sink.take([change(number) for number in range(2, 7)])
    await sink.take([change(7)])
    await sink.close()
    assert [ids_in(file) for file in [*rotated(path), path]] == [
        wanted(7)[:1],
        wanted(7)[1:6],
        wanted(7)[6:],
    ]


async def test_names_sort_by_time_also_when_the_clock_was_set_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none is used twice: an older file is never written over."""

    class Backwards(datetime):
        now_is = datetime(2026, 11, 22, 17, 40, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            cls.now_is -= timedelta(hours=1)
            return cls.now_is.astimezone(tz)

    monkeypatch.setattr(file_module, "datetime", Backwards)
    for first in (1, 4):
        sink = FileSink("f", path, FileOptions(max_bytes=1))
        await sink.open()
        await fill(sink, 3, first=first)
        await sink.close()
    assert all_ids(path) == wanted(6)
    assert [file.name for file in rotated(path)][:2] == [
        "changes-20261122T164000.000000Z.jsonl",
        "changes-20261122T164000.000001Z.jsonl",
    ]


async def test_a_quiet_file_is_rotated_when_it_is_old(path: Path) -> None:
    sink = FileSink("f", path, FileOptions(max_age_seconds=0.1))
    await sink.open()
    await sink.take([change(1)])
    await async_wait_until(lambda: rotated(path) and path.exists())
    await sink.close()
    assert len(rotated(path)) == 1
    assert path.read_bytes() == b""


async def test_a_file_of_before_a_restart_is_as_old_as_its_last_line(path: Path) -> None:
    for hours_ago, files in ((0, 0), (1, 1)):
        sink = FileSink("f", path, FileOptions(max_age_seconds=3600))
        await sink.open()
        await sink.take([change(1 + hours_ago)])
        await sink.close()
        assert len(rotated(path)) == files
        past = time.time() - 3600
        os.utime(path, (past, past))
    assert all_ids(path) == wanted(2)


# ---- What becomes of rotated files


async def test_only_so_many_rotated_files_are_kept(path: Path) -> None:
    (path.parent / "changes-of-mine.jsonl").touch()
    sink = FileSink("f", path, FileOptions(max_bytes=1, keep=2))
    await sink.open()
    await fill(sink, 6)
    await sink.close()
    assert (path.parent / "changes-of-mine.jsonl").exists()
    (path.parent / "changes-of-mine.jsonl").unlink()
    assert all_ids(path) == wanted(6)[3:]


@pytest.mark.parametrize("keep", [None, 3])
async def test_rotated_files_are_compressed(path: Path, keep: int | None) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=1, compress=True, keep=keep))
    await sink.open()
    await fill(sink, 6)
    await sink.close()
    assert {file.suffix for file in rotated(path)} == {".gz"}
    assert all_ids(path) == (wanted(6) if keep is None else wanted(6)[2:])
    assert rotated(path)[0].stat().st_mode & 0o777 == path.stat().st_mode & 0o777


async def test_what_a_crash_left_of_a_compression_is_put_right(path: Path) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=1))
    await sink.open()
    await fill(sink, 4)
    await sink.close()
    first, second, third = rotated(path)
    first.with_name(first.name + ".gz.part").write_bytes(b"torn")
    second.with_name(second.name + ".gz").write_bytes(gzip.compress(second.read_bytes()))
    third.with_name("changes-20200101T000000.000000Z.jsonl.gz.part").write_bytes(b"torn")
    third.with_name("changes-20990101T000000.000000Z.jsonl").touch()
    sink = FileSink("f", path, FileOptions(max_bytes=1, compress=True))
    await sink.open()
    await sink.close()
    assert [file.name for file in rotated(path)] == [
        f"{file.name}.gz" for file in (first, second, third)
    ]
    assert all_ids(path) == wanted(4)


async def test_a_compression_that_fails_leaves_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=1, compress=True))
    await sink.open()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr("shutil.copyfileobj", full)
        await fill(sink, 2)
        await async_wait_until(lambda: any(one["event"] == "tidying_failed" for one in logs))
    assert [file.suffix for file in rotated(path)] == [".jsonl"]
    await fill(sink, 1, first=3)
    await sink.close()
    assert [file.suffix for file in rotated(path)] == [".gz", ".gz"]
    assert all_ids(path) == wanted(3)


def test_a_reserved_name_is_neither_removed_nor_compressed(path: Path) -> None:
    """The file that is about to take its place would go with it."""
    path.touch()
    reserved = Shelf(path).reserve(datetime.now(UTC))
    Shelf(path, keep=1, compress=True).tidy()
    assert reserved.exists()
    assert rotated(path) == [reserved]


async def test_a_rotation_that_fails_is_a_take_that_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=1))
    await sink.open()
    await fill(sink, 1)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(SinkFailed, match="Permission denied"):
            await sink.take([change(2)])
    assert rotated(path) == []
    await fill(sink, 1, first=2)
    await sink.close()
    assert all_ids(path) == wanted(2)


# ---- Durability


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the operating system."""
    made: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            is_directory = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            made.append(f"{name} directory" if is_directory else name)
            return real(*arguments, **options)

        return call

    for name in ("write", "fsync", "rename"):
        monkeypatch.setattr(os, name, recorded(name))
    return made


async def test_a_rotation_is_durable_before_the_next_change_is_taken(
    path: Path, calls: list[str]
) -> None:
    sink = FileSink("f", path, FileOptions(max_bytes=1))
    await sink.open()
    calls.clear()
    await fill(sink, 2)
    await sink.close()
    assert calls == ["write", "fsync", "rename", "fsync directory", "write", "fsync"]


async def test_an_interval_syncs_soon_and_whenever_a_file_is_left(
    path: Path, calls: list[str]
) -> None:
    sink = FileSink("f", path, FileOptions(fsync="interval", fsync_seconds=0.01))
    with capture_logs() as logs:
        await sink.open()
    assert [(one["event"], one["fsync"]) for one in logs] == [("file_not_durable", "interval")]
    calls.clear()
    await fill(sink, 1)
    await async_wait_until(lambda: "fsync" in calls)
    await sink.close()
    assert calls == ["write", "fsync"]

    sink = FileSink("f", path, FileOptions(fsync="interval", fsync_seconds=60, max_bytes=1))
    await sink.open()
    calls.clear()
    await fill(sink, 2, first=2)
    await sink.close()
    assert calls == [
        *("rename", "fsync directory", "write"),
        *("fsync", "rename", "fsync directory", "write"),
        "fsync",
    ]


async def test_never_is_never(path: Path, calls: list[str]) -> None:
    sink = FileSink("f", path, FileOptions(fsync="never"))
    await sink.open()
    calls.clear()
    await fill(sink, 2)
    await sink.close()
    assert calls == ["write", "write"]


async def test_what_could_not_be_synced_later_stops_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken, so it does not come again; a second fsync would succeed and prove nothing."""
    sink = FileSink("f", path, FileOptions(fsync="interval", fsync_seconds=0.01))
    await sink.open()

    def broken(_: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise OSError(errno.EIO, "Input/output error")

    real = os.fsync
    monkeypatch.setattr(os, "fsync", broken)
    with capture_logs() as logs:
        await fill(sink, 1)
        await async_wait_until(lambda: bool(logs))
    assert [(one["event"], one["error"]) for one in logs] == [("sync_failed", "Input/output error")]
    for _ in range(2):
        with pytest.raises(DeliveryError, match="may be missing at the end of") as failed:
            await sink.take([change(2)])
        assert not isinstance(failed.value, SinkFailed)  # no policy skips it
    with pytest.raises(DeliveryError):
        await sink.close()
    assert ids_in(path) == wanted(1)


# ---- A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["/usr/bin/env", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, timeout=10, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["/usr/bin/env", "umount", str(folder)], timeout=10, check=True)


@pytest.mark.parametrize("options", [FileOptions(), FileOptions(max_bytes=8000, fsync="interval")])
async def test_changes_wait_for_room_on_a_full_disk(small_disk: Path, options: FileOptions) -> None:
    path = small_disk / "changes.jsonl"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 45_000)
    line = Line()
    line.policy = FailurePolicy(attempts=10_000, backoff=Backoff(0.005, 0.005))
    sink = FileSink("f", path, options)
    await sink.open()
    for _ in range(40):
        line.transaction(*[sink] * 5)
    with capture_logs() as logs:
        delivering = asyncio.create_task(deliver_in_small_batches(line, sink))
        await async_wait_until(lambda: len(logs) > 20)
        assert line.acknowledger.flush_lsn < line.end
        taken = all_ids(path)
        filler.unlink()
        await delivering
    await sink.close()
    assert [entry[1].id for entry in line.handed] == all_ids(path)
    assert taken == all_ids(path)[: len(taken)]
    assert any("No space left on device" in str(one.get("error")) for one in logs)


async def deliver_in_small_batches(line: Line, sink: FileSink) -> None:
    """As changes trickle in."""
    line.delivery.attach(line.acknowledger)
    running = asyncio.create_task(line.delivery.run())
    for start in range(0, len(line.handed), 5):
        line.delivery.hand(line.handed[start : start + 5])
        await async_wait_until(lambda: line.delivery.in_flight < 5)
    line.delivery.finish()
    await running
    line.delivery.close()


async def test_a_line_that_a_limit_tore_is_cut_off(path: Path) -> None:
    """Part of a write fits, and the rest does not."""
    sink = FileSink("f", path)
    await sink.open()
    await fill(sink, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(SinkFailed, match="File too large"):
            await sink.take([change(number) for number in range(3, 1003)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ids_in(path) == wanted(2)
    await sink.take([change(number) for number in range(3, 1003)])
    await sink.close()
    assert ids_in(path) == wanted(1002)


# ---- Reopening


async def test_a_quiet_file_that_was_moved_is_reopened_at_once(path: Path) -> None:
    sink = FileSink("f", path)
    await sink.open()
    await fill(sink, 1)
    path.rename(path.with_suffix(".1"))
    with capture_logs() as logs:
        await sink.reopen()
        await sink.reopen()
    assert [one["reason"] for one in logs] == ["renamed"]
    assert path.exists()
    await fill(sink, 1, first=2)
    await sink.close()
    assert (ids_in(path.with_suffix(".1")), ids_in(path)) == (wanted(2)[:1], wanted(2)[1:])


async def test_what_cannot_be_reopened_is_told_and_tried_again(path: Path) -> None:
    sink = FileSink("f", path)
    await sink.open()
    path.unlink()
    path.mkdir()
    with pytest.raises(SinkFailed, match="cannot be opened: Is a directory") as failed:
        await sink.reopen()
    assert "path under [sinks.f]" in failed.value.hint
    path.rmdir()
    await fill(sink, 1)
    await sink.close()
    assert ids_in(path) == wanted(1)


# ---- Crashes

CRASHES = """
import asyncio, json, os, pathlib, shutil, sys
from tests.test_file_sink import change
from walstream.sinks.file import FileOptions, FileSink

COUNT = 7
PATH = pathlib.Path(sys.argv[1]) / "changes.jsonl"
OPTIONS = FileOptions(max_bytes=2 * len(change(1).to_json()) + 10, compress=True)
CALLS = "open", "close", "write", "fsync", "rename", "unlink", "ftruncate", "fchmod", "dup"

def dying_at(step):
    left = step
    def wrap(name, real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":
                    real(arguments[0], arguments[1][:20])
                os._exit(9)
            return real(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))

async def work(journal, first):
    sink = FileSink("f", PATH, OPTIONS)
    await sink.open()
    for number in range(first, COUNT + 1):
        await sink.take([change(number)])
        journal(number)
    await sink.close()

def forked(step, first):
    reader, writer = os.pipe()
    real = os.write
    child = os.fork()
    if child == 0:
        try:
            if step:
                dying_at(step)
            asyncio.run(work(lambda number: real(writer, b"%d\\n" % number), first))
            os._exit(0)
        except BaseException as error:
            print(step, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as journal:
        taken = [int(line) for line in journal]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), taken

def content():
    import gzip
    files = sorted(PATH.parent.glob("changes-*"))
    assert not [file for file in files if file.name.endswith(".part")], files
    read = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
    assert all(read), files
    return [json.loads(line)["id"] for line in b"".join([*read, PATH.read_bytes()]).splitlines()]

step, status = 0, 9
while status == 9:
    step += 1
    shutil.rmtree(PATH.parent, ignore_errors=True)
    PATH.parent.mkdir()
    status, taken = forked(step, 1)
    assert status in (0, 9), status
    again, more = forked(0, len(taken) + 1)
    assert again == 0
    ids = content()
    everything = [change(number).id for number in range(1, COUNT + 1)]
    assert list(dict.fromkeys(ids)) == everything, (step, ids)
    assert len(ids) <= COUNT + 1, (step, ids)
print(step)
"""


def test_a_kill_at_any_call_loses_nothing(tmp_path: Path) -> None:
    """Before each call to the operating system in turn, and within each write."""
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path / "folder")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert int(done.stdout.split()[-1]) > 50
