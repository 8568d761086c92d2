"""The file sink: whole lines, durable, of one process."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from walstream.changes import Change, Layout, Operation, Relation, Transaction
from walstream.errors import SinkFailed
from walstream.lsn import Lsn
from walstream.sinks.file import FileSink
from walstream.values import Types

LAYOUT = Layout(Relation("public", "t"), [], [], [], Types(lambda _: bytes))


def change(number: int) -> Change:
    transaction = Transaction(1, Lsn(number), Lsn(number + 1), "2026-01-01 00:00:00+00")
    return Change(Operation.TRUNCATE, LAYOUT, transaction, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.jsonl"


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


async def test_changes_are_appended_as_lines(path: Path) -> None:
    for start in (1, 3):
        sink = FileSink("f", path)
        await sink.open()
        await sink.take([change(start), change(start + 1)])
        await sink.close()
    assert ids(path) == ["0/2:1", "0/3:1", "0/4:1", "0/5:1"]


async def test_changes_are_synced_before_they_count_as_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1)])
    await sink.close()
    assert synced[-1] == path.stat().st_size


@pytest.mark.parametrize("kept", ["", '{"id":"a"}\n'])
async def test_what_a_crash_left_of_a_line_is_cut_off(path: Path, kept: str) -> None:
    """Its change was not taken, and comes again."""
    path.write_text(kept + '{"id":"torn' + "x" * 100_000)
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1)])
    await sink.close()
    assert ids(path) == [*(["a"] if kept else []), "0/2:1"]


async def test_a_failed_write_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1)])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SinkFailed, match="No space left"):
            await sink.take([change(2)])
    await sink.take([change(2)])
    await sink.close()
    assert ids(path) == ["0/2:1", "0/3:1"]


async def test_a_file_that_another_process_writes_to_is_refused(path: Path) -> None:
    first, second = FileSink("first", path), FileSink("second", path)
    await first.open()
    with pytest.raises(SinkFailed, match="another process writes to"):
        await second.open()
    assert open_descriptors(path) == 1
    await second.close()
    await first.close()
    assert open_descriptors(path) == 0


def open_descriptors(path: Path) -> int:
    return sum(one.resolve() == path for one in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("target", ["", "absent/file", "fifo"])
async def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    sink = FileSink("f", tmp_path / target)
    with pytest.raises(SinkFailed, match="sink f: ") as failed:
        await sink.open()
    assert failed.value.hint.startswith("path under [sinks.f] has to name a file, in a folder")
    await sink.close()


# ---- A take that is cancelled


async def test_a_cancelled_take_ends_before_the_next_one_begins(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines may be repeated; they are never written over those that were taken."""
    sink = FileSink("f", path)
    await sink.open()
    syncing, go_on, went_on = threading.Event(), threading.Event(), threading.Event()
    real = os.fsync

    def slow_once(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        syncing.set()
        go_on.wait(10)
        real(descriptor)
        went_on.set()

    monkeypatch.setattr(os, "fsync", slow_once)
    given_up = asyncio.create_task(sink.take([change(1)]))
    await asyncio.to_thread(syncing.wait)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    again = asyncio.create_task(sink.take([change(1), change(2), change(3)]))
    await asyncio.wait({again}, timeout=0.1)
    assert not again.done()
    go_on.set()
    await asyncio.to_thread(went_on.wait)
    await again
    await sink.take([change(4)])
    await sink.close()
    assert ids(path) == ["0/2:1", "0/2:1", "0/3:1", "0/4:1", "0/5:1"]


async def test_a_cancelled_take_that_has_not_begun_writes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileSink("f", path)
    await sink.open()
    syncing, go_on = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        syncing.set()
        go_on.wait(10)

    monkeypatch.setattr(os, "fsync", slow)
    takes = [asyncio.create_task(sink.take([change(number)])) for number in (1, 2, 3)]
    await asyncio.to_thread(syncing.wait)
    takes[1].cancel()
    await asyncio.wait({takes[1]})
    go_on.set()
    await asyncio.gather(takes[0], takes[2])
    await sink.close()
    assert ids(path) == ["0/2:1", "0/4:1"]


def test_an_fsync_that_hangs_does_not_keep_the_process_from_ending(path: Path) -> None:
    script = f"""
import asyncio, os, pathlib, threading
from tests.test_file_sink import FileSink, change
async def main():
    sink = FileSink("f", pathlib.Path({str(path)!r}))
    await sink.open()
    os.fsync = lambda _: threading.Event().wait()
    try:
        await asyncio.wait_for(sink.take([change(1)]), 0.1)
    except TimeoutError:
        await sink.close()
        print("given up")
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=20, check=True
    )
    assert (ended.stdout, ended.stderr) == (b"given up\n", b"")


# ---- A file that others touch


def rotate(path: Path) -> None:
    path.rename(path.with_suffix(".1"))


def rotate_and_create(path: Path) -> None:
    rotate(path)
    path.touch()


def copy_and_truncate(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".1"))
    os.truncate(path, 0)


def append_half_a_line(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"id":"theirs"}\n{"id":')


@pytest.mark.parametrize(
    ("touch", "reason", "kept"),
    [
        (Path.unlink, "removed", []),
        (rotate, "renamed", []),
        (rotate_and_create, "replaced", []),
        (copy_and_truncate, "truncated", []),
        (append_half_a_line, "grown", ["0/2:1", "theirs"]),
    ],
)
async def test_lines_go_to_the_end_of_what_is_at_the_path(
    path: Path, touch: Callable[[Path], None], reason: str, kept: list[str]
) -> None:
    """Nothing is written into a file without a name, and no hole is left."""
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1)])
    touch(path)
    with capture_logs() as logs:
        await sink.take([change(2)])
        await sink.take([change(3)])
    await sink.close()
    assert ids(path) == [*kept, "0/3:1", "0/4:1"]
    reopened = [entry for entry in logs if entry["event"] == "file_reopened"]
    assert [(entry["sink"], entry["path"], entry["reason"]) for entry in reopened] == [
        ("f", str(path), reason)
    ]
    if path.with_suffix(".1").exists():
        assert ids(path.with_suffix(".1")) == ["0/2:1"]
    assert open_descriptors(path) == 0


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("touch", [Path.unlink, copy_and_truncate])
async def test_a_file_touched_during_an_append_has_its_lines(
    path: Path, monkeypatch: pytest.MonkeyPatch, touch: Callable[[Path], None], call: str
) -> None:
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1)])
    real = getattr(os, call)

    def touched_before(*arguments: object) -> object:
        monkeypatch.setattr(os, call, real)
        touch(path)
        return real(*arguments)

    monkeypatch.setattr(os, call, touched_before)
    await sink.take([change(2)])
    await sink.take([change(3)])
    await sink.close()
    assert sorted(set(ids(path))) == ["0/3:1", "0/4:1"]


async def test_a_short_write_is_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1), change(2)])
    await sink.close()
    assert ids(path) == ["0/2:1", "0/3:1"]


async def test_a_failed_write_does_not_lengthen_a_truncated_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileSink("f", path)
    await sink.open()
    await sink.take([change(1), change(2)])

    def truncated_and_full(*_: object) -> int:
        os.truncate(path, 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", truncated_and_full)
        with pytest.raises(SinkFailed, match="No space left"):
            await sink.take([change(3)])
    await sink.take([change(3)])
    await sink.close()
    assert ids(path) == ["0/4:1"]


async def test_a_relative_path_stays_where_it_was(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may change the current folder."""
    monkeypatch.chdir(tmp_path)
    sink = FileSink("f", Path(path.name))
    await sink.open()
    monkeypatch.chdir("/")
    await sink.take([change(1)])
    await sink.close()
    assert ids(path) == ["0/2:1"]
