"""What every sink promises, whatever it keeps changes in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import inspect
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.receiver import DROPPED, Answer, Receiver, receiving
from tests.test_delivery import Line
from walstream.catalog import Catalog
from walstream.changes import Change
from walstream.destinations import Sink
from walstream.errors import SinkFailed
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink
from walstream.sinks import stdout
from walstream.sinks.envelopes import Format, Packing
from walstream.sinks.file import FileOptions, FileSink
from walstream.sinks.stdout import StdoutSink
from walstream.sinks.webhook import WebhookOptions, WebhookSink
from walstream.testing import insert, new_transaction, routed, update

SECRET = "4111-1111-1111-1234"  # noqa: S105 - a row's value


def changes(count: int) -> list[Change]:
    """Inserts and updates of several transactions."""
    made: list[Change] = []
    while len(made) < count:
        transaction = new_transaction()
        made += [
            insert("public.t", {"id": len(made), "note": 'é\n\0 "x"'}, transaction=transaction),
            update("public.t", {"id": len(made), "note": None}, transaction=transaction),
        ]
    return made[:count]


class Bench(ABC):
    """A sink, what it has kept, and ways to make it fail."""

    sink: Sink

    @abstractmethod
    def kept(self) -> list[bytes]:
        """The changes that are there, as JSON, in their order."""

    @abstractmethod
    def fail_once(self, *, after_writing: bool) -> None:
        """Let the next take fail; some of it, or all, may have been written then."""

    @abstractmethod
    async def held(self) -> Callable[[], None]:
        """Let the next take hang, until what is returned is called."""

    @property
    def ids(self) -> list[str]:
        return [json.loads(line)["id"] for line in self.kept()]


class Writes:
    """An os.write that fails or hangs when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.write
        self._faults: list[bool] = []
        self._go_on = threading.Event()
        self._go_on.set()
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: memoryview) -> int:
        self._go_on.wait(10)
        if not self._faults:
            return self._real(descriptor, data)
        if self._faults[0]:
            self._faults[0] = False
            return self._real(descriptor, data[: len(data) * 2 // 3])
        self._faults.pop()
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_once(self, *, after_writing: bool) -> None:
        self._faults = [after_writing]

    def held(self) -> Callable[[], None]:
        self._go_on.clear()
        return self._go_on.set


class WritingBench(Bench):
    """Of a sink that writes to a file descriptor."""

    def __init__(self, sink: Sink, writes: Writes) -> None:
        self.sink = sink
        self.writes = writes

    def fail_once(self, *, after_writing: bool) -> None:
        self.writes.fail_once(after_writing=after_writing)

    async def held(self) -> Callable[[], None]:
        return self.writes.held()


class FileBench(WritingBench):
    def __init__(self, folder: Path, writes: Writes, options: FileOptions) -> None:
        super().__init__(FileSink("file", folder / "changes.jsonl", options), writes)
        self.folder = folder

    def kept(self) -> list[bytes]:
        """The rotated files by their names, then the file itself."""
        while True:
            before = sorted(self.folder.iterdir())
            with contextlib.suppress(FileNotFoundError):  # it is just being rotated
                lines = _lines_of(before)
                if sorted(self.folder.iterdir()) == before:
                    return lines


def _lines_of(files: Sequence[Path]) -> list[bytes]:
    """Of a file that is there also compressed, from the latter."""
    by_name = {file.name.removesuffix(".gz"): file for file in files if file.suffix != ".part"}
    current = by_name.pop("changes.jsonl")
    content = [
        gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for file in (*by_name.values(), current)
    ]
    return b"".join(content).splitlines()


class StdoutBench(WritingBench):
    """The standard output is a file here."""

    def __init__(self, folder: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(StdoutSink("stdout"), writes)
        self.path = folder / "out"
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        monkeypatch.setattr(stdout, "_stdout", stdout._Output(self.descriptor))

    def kept(self) -> list[bytes]:
        return self.path.read_bytes().splitlines()


class WebhookBench(Bench):
    def __init__(self, receiver: Receiver, form: Format) -> None:
        self.receiver = receiver
        packing = Packing(format=form, max_changes=4)
        self.sink = WebhookSink("webhook", WebhookOptions(url=receiver.url, packing=packing))
        self.refused: list[int] = []

    def kept(self) -> list[bytes]:
        """What was accepted; the text of each change is cut out as it was sent."""
        return [
            line
            for number, request in enumerate(self.receiver.requests)
            if number not in self.refused
            for line in _texts(request.body, request.headers["content-type"])
        ]

    def fail_once(self, *, after_writing: bool) -> None:
        if not after_writing:
            self.refused.append(len(self.receiver.requests))
        self.receiver.answers.append(DROPPED if after_writing else Answer(503))

    async def held(self) -> Callable[[], None]:
        hold = asyncio.Event()
        self.receiver.answers.append(Answer(hold=hold))
        return hold.set


class _Body(msgspec.Struct):
    changes: list[msgspec.Raw]


class _Event(msgspec.Struct):
    data: msgspec.Raw


def _texts(body: bytes, content_type: str) -> list[bytes]:
    match content_type:
        case "application/json":
            return list(map(bytes, msgspec.json.decode(body, type=_Body).changes))
        case "application/x-ndjson":
            return body.splitlines()
        case _:
            events = msgspec.json.decode(body, type=list[_Event])
            return [bytes(event.data) for event in events]


class FailingHistory(Recent):
    """What the live sink keeps, with a store that fails or hangs when it is told to."""

    def __init__(self) -> None:
        super().__init__(1000, 1 << 20)
        self.lines: list[bytes] = []
        self.failing: list[bool] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def append(self, changes: Sequence[Change]) -> None:
        await self.go_on.wait()
        fault = self.failing.pop() if self.failing else None
        if fault is not False:
            await super().append(changes)
            self.lines += [change.to_json() for change in changes]
        if fault is not None:
            raise SinkFailed("it is not to be")


class LiveBench(Bench):
    """Of the sink for clients by HTTP."""

    def __init__(self) -> None:
        self.history = FailingHistory()
        catalog = Catalog("host=nowhere", application_name="test")
        self.sink = LiveSink("live", Hub(catalog, self.history))

    def kept(self) -> list[bytes]:
        return self.history.lines

    def fail_once(self, *, after_writing: bool) -> None:
        self.history.failing = [after_writing]

    async def held(self) -> Callable[[], None]:
        self.history.go_on.clear()
        return self.history.go_on.set


class UserSink:
    """As small as a sink of one's own can be."""

    def __init__(self) -> None:
        self.name = "mine"
        self.lines: list[bytes] = []
        self.failing: list[bool] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def open(self) -> None: ...

    async def take(self, changes: Sequence[Change]) -> None:
        await self.go_on.wait()
        if self.failing:
            if self.failing.pop():
                self.lines += [change.to_json() for change in changes[:2]]
            raise SinkFailed("it is not to be")
        self.lines += [change.to_json() for change in changes]

    async def close(self) -> None: ...


class UserBench(Bench):
    def __init__(self) -> None:
        self.sink: UserSink = UserSink()

    def kept(self) -> list[bytes]:
        return self.sink.lines

    def fail_once(self, *, after_writing: bool) -> None:
        self.sink.failing = [after_writing]

    async def held(self) -> Callable[[], None]:
        self.sink.go_on.clear()
        return self.sink.go_on.set


FILES = {
    "file": FileOptions(),
    "file, interval": FileOptions(fsync="interval", fsync_seconds=0.01),
    "file, never": FileOptions(fsync="never"),
    "file, rotated": FileOptions(max_bytes=2000),
    "file, rotated by age": FileOptions(max_age_seconds=0.02, fsync="interval"),
    "file, compressed": FileOptions(max_bytes=1, compress=True, fsync="interval"),
}
FORMATS: dict[str, Format] = {
    "webhook": "json",
    "webhook, lines": "ndjson",
    "webhook, cloudevents": "cloudevents",
}


@pytest.fixture(params=["stdout", *FILES, *FORMATS, "live", "mine"])
async def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    kind = request.param
    async with contextlib.AsyncExitStack() as stack:
        made: Bench
        if kind in FORMATS:
            made = WebhookBench(await stack.enter_async_context(receiving()), FORMATS[kind])
        elif kind in FILES:
            made = FileBench(tmp_path, Writes(monkeypatch), FILES[kind])
        elif kind == "stdout":
            made = StdoutBench(tmp_path, Writes(monkeypatch), monkeypatch)
            stack.callback(os.close, made.descriptor)
        elif kind == "live":
            made = LiveBench()
        else:
            made = UserBench()
        assert isinstance(made.sink, Sink)
        await made.sink.open()
        try:
            yield made
        finally:
            await made.sink.close()


async def test_what_is_taken_is_there_in_order_and_as_its_json(bench: Bench) -> None:
    """At once, not when the sink is closed."""
    given = changes(25)
    for start in (0, 1, 11):
        end = {0: 1, 1: 11, 11: 25}[start]
        await bench.sink.take(given[start:end])
        assert bench.kept() == [change.to_json() for change in given[:end]]


async def test_nothing_is_a_batch_too(bench: Bench) -> None:
    await bench.sink.take([])
    assert bench.kept() == []


async def test_masked_values_stay_masked(bench: Bench) -> None:
    change = insert("public.t", {"id": 1, "card": SECRET})
    masked = routed(change, mask={"card": "keep-last-4"})
    assert masked is not None
    await bench.sink.take([masked])
    [line] = bench.kept()
    assert SECRET.encode() not in line
    assert json.loads(line)["row"]["card"] == "***************1234"


@pytest.mark.parametrize("after_writing", [False, True])
async def test_a_failed_take_can_be_repeated(bench: Bench, *, after_writing: bool) -> None:
    """Nothing is missing, nothing out of order; only what was written before may be twice."""
    given = changes(12)
    await bench.sink.take(given[:2])
    bench.fail_once(after_writing=after_writing)
    with pytest.raises((OSError, SinkFailed)):
        await bench.sink.take(given[2:])
    if not after_writing:
        assert bench.ids == [change.id for change in given[:2]]
    await bench.sink.take(given[2:])
    await bench.sink.take([])
    assert list(dict.fromkeys(bench.ids)) == [change.id for change in given]
    if not after_writing or isinstance(bench, FileBench):
        assert len(bench.ids) == len(given)


async def test_a_failed_take_can_come_again_one_change_at_a_time(bench: Bench) -> None:
    given = changes(9)
    bench.fail_once(after_writing=False)
    with pytest.raises((OSError, SinkFailed)):
        await bench.sink.take(given)
    for change in given:
        await bench.sink.take([change])
    assert bench.kept() == [change.to_json() for change in given]


async def test_a_take_that_is_cancelled_does_not_get_behind_the_next(bench: Bench) -> None:
    given = changes(6)
    release = await bench.held()
    given_up = asyncio.create_task(bench.sink.take(given[:3]))
    await asyncio.wait({given_up}, timeout=0.05)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    again = asyncio.create_task(bench.sink.take(given))
    release()
    await again
    assert bench.ids[-6:] == [change.id for change in given]
    assert set(bench.ids) == {change.id for change in given}


async def test_what_is_open_can_be_reopened(bench: Bench) -> None:
    """It is optional; SIGHUP asks for it."""
    given = changes(4)
    await bench.sink.take(given[:2])
    reopen: Any = getattr(bench.sink, "reopen", None)
    if reopen is not None:
        assert inspect.iscoroutinefunction(reopen)
        await reopen()
        await reopen()
    await bench.sink.take(given[2:])
    assert bench.kept() == [change.to_json() for change in given]


async def test_what_was_closed_can_be_opened_again(bench: Bench) -> None:
    """A reload that is refused does so."""
    given = changes(4)
    await bench.sink.take(given[:2])
    await bench.sink.close()
    await bench.sink.open()
    await bench.sink.take(given[2:])
    assert bench.kept() == [change.to_json() for change in given]


async def test_a_sink_that_has_failed_can_be_closed(bench: Bench) -> None:
    """The fixture does it."""
    bench.fail_once(after_writing=True)
    with pytest.raises((OSError, SinkFailed)):
        await bench.sink.take(changes(3))


async def test_changes_get_through_a_sink_that_fails_at_times(bench: Bench) -> None:
    """With the delivery around it, which tries again."""
    line = Line()
    for _ in range(4):
        line.transaction(*[bench.sink] * 5)
    bench.fail_once(after_writing=False)
    await line.deliver()
    assert bench.ids == [entry[1].id for entry in line.handed]
    assert line.acknowledger.flush_lsn == line.end
