"""The file sink: whole lines, durable, of one process."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

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
        with pytest.raises(OSError, match="No space left"):
            await sink.take([change(2)])
    await sink.take([change(2)])
    await sink.close()
    assert ids(path) == ["0/2:1", "0/3:1"]


async def test_a_file_that_another_process_writes_to_is_refused(path: Path) -> None:
    first, second = FileSink("first", path), FileSink("second", path)
    await first.open()
    with pytest.raises(SinkFailed, match="another process writes to"):
        await second.open()
    await second.close()
    await first.close()


@pytest.mark.parametrize("target", ["", "absent/file", "fifo"])
async def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    sink = FileSink("f", tmp_path / target)
    with pytest.raises(SinkFailed, match="sink f: "):
        await sink.open()
    await sink.close()
