"""Handlers that fail in all ways, by a script that a seed decides on, and what they write down.

They run in processes that are killed. Each handler has a journal: a file to which every phase of
every call is appended with one write, so that what is in it survives ``kill -9``. What a handler
does with a change depends on the seed, on its own name and on the change's id, and on how often it
has begun with it before, in this process or in one that is dead: a change that hangs the first time
does not hang for ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import walstream
from walstream import Change, Message, Walstream
from walstream.destinations import Item


class Phase(StrEnum):
    """How far a call is; the effect is what a handler is for."""

    BEGUN = "begun"
    EFFECT = "effect"
    DONE = "done"


class Entry(NamedTuple):
    """A line of a journal: of which process, when (monotonic seconds), and where the line ends.

    ``fault`` is what is going wrong with the call.
    """

    phase: Phase
    pid: int
    time: float
    fault: str
    ids: tuple[str, ...]
    end: int


class Fault(StrEnum):
    """What goes wrong with a call; most faults only the first time."""

    NONE = "none"
    REJECT = "reject"
    RETRY = "retry"
    FAIL_AFTER = "fail after its effect"
    HOLD = "hold"
    SLOW = "slow"
    CANCELLED = "raise CancelledError"
    CANCELLED_AFTER = "raise CancelledError after its effect"
    STOP_ITERATION = "raise StopIteration"
    CANCEL_TASK = "cancel its own task"
    HANG = "hang"
    GIVE_UP = "fail until the process ends"


COMMON: Final = (
    *[Fault.REJECT] * 3,
    *[Fault.RETRY] * 2,
    *[Fault.FAIL_AFTER] * 3,
    *[Fault.HOLD] * 2,
    *[Fault.SLOW] * 3,
    Fault.CANCELLED,
    Fault.CANCELLED_AFTER,
    Fault.STOP_ITERATION,
    Fault.HANG,
    Fault.GIVE_UP,
)

ASYNC_ONLY: Final = (Fault.CANCEL_TASK,)

ATTEMPTS: Final = 4
"""Of each handler, by the configuration."""

LIMITS: Final = {Fault.HANG: 3, Fault.GIVE_UP: 3}
"""How many changes have these faults, over all handlers and processes: each ends a process."""

HANDLERS: Final = (
    "one_async",
    "one_sync",
    "lanes_async",
    "lanes_sync",
    "lanes_in_batches",
    "batches_async",
    "batches_sync",
    "transactions_async",
    "transactions_sync",
)
"""All of them want all changes."""

LANES: Final = ("lanes_async", "lanes_sync", "lanes_in_batches")
JOBS: Final = "jobs"
"""The handler of messages."""


class Rejected(Exception):
    """Raised by the script."""


class Gate:
    """A file that somebody touches from time to time; a handler that holds waits for that."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"

    def open(self) -> None:
        """Let go all that wait."""
        self._path.touch()

    def was_opened_after(self, instant_ns: int) -> bool:
        """Whether it was opened later than that, by the clock of files."""
        return self._path.exists() and self._path.stat().st_mtime_ns > instant_ns


class Claims:
    """The changes that have one of the rare faults: files, so that later processes know them."""

    _lock = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "claims"
        self._folder.mkdir(exist_ok=True)

    def claim(self, fault: Fault, name: str, item_id: str) -> bool:
        """Whether this change of this handler is one of the few."""
        own = self._folder / f"{fault} {name} {item_id.replace('/', '-')}"
        with self._lock:
            if not own.exists() and len(list(self._folder.glob(f"{fault} *"))) < LIMITS[fault]:
                own.touch()
            return own.exists()


class Script:
    """One handler's calls: what goes wrong, and the journal."""

    def __init__(self, folder: Path, name: str, seed: int, share: float) -> None:
        """Open the journal.

        Args:
            folder: for the journal.
            name: of the handler.
            seed: decides on what goes wrong.
            share: of the changes with which something does.
        """
        self._name = name
        self._seed = seed
        self._share = share
        self._gate = Gate(folder)
        self._claims = Claims(folder)
        path = journal(folder, name)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._begun = Counter(entry.ids[0] for entry in entries(path) if entry.phase is Phase.BEGUN)

    async def play(self, items: Sequence[Item]) -> None:
        """Do what an ``async def`` handler does with these changes."""
        fault = self._begin(items)
        match fault:
            case Fault.HOLD:
                held_since = time.time_ns()
                while not self._gate.was_opened_after(held_since):  # noqa: ASYNC110 - opened by another process
                    await asyncio.sleep(0.01)
            case Fault.SLOW:
                await asyncio.sleep(0.03)
            case Fault.HANG:
                await asyncio.Event().wait()
            case Fault.CANCEL_TASK:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(1)
            case _:
                pass
        self._fail_before(fault)
        if self._name in LANES:
            await asyncio.sleep(self._duration(items))
        self._note(Phase.EFFECT, items, fault)
        self._fail_after(fault)
        self._note(Phase.DONE, items, fault)

    def play_in_thread(self, items: Sequence[Item]) -> None:
        """Do what a ``def`` handler does with these changes."""
        fault = self._begin(items)
        match fault:
            case Fault.HOLD:
                held_since = time.time_ns()
                while not self._gate.was_opened_after(held_since):
                    time.sleep(0.01)
            case Fault.SLOW:
                time.sleep(0.03)
            case Fault.HANG:
                threading.Event().wait()
            case _:
                pass
        self._fail_before(fault)
        if self._name in LANES:
            time.sleep(self._duration(items))
        self._note(Phase.EFFECT, items, fault)
        self._fail_after(fault)
        self._note(Phase.DONE, items, fault)

    def _begin(self, items: Sequence[Item]) -> Fault:
        first = items[0].id
        before = self._begun[first]
        self._begun[first] += 1
        fault = self._fault(first, before)
        self._note(Phase.BEGUN, items, fault)
        return fault

    def _fault(self, item_id: str, begun_before: int) -> Fault:
        chance = self._chance(item_id)
        if chance.random() >= self._share:
            return Fault.NONE
        own = () if self._name.endswith("_sync") else ASYNC_ONLY
        fault = chance.choice(COMMON + own)
        times = {Fault.GIVE_UP: ATTEMPTS, Fault.REJECT: chance.randrange(1, ATTEMPTS)}.get(fault, 1)
        if begun_before >= times:
            return Fault.NONE
        if fault in LIMITS and not self._claims.claim(fault, self._name, item_id):
            return Fault.NONE
        return fault

    def _fail_before(self, fault: Fault) -> None:
        match fault:
            case Fault.REJECT | Fault.GIVE_UP:
                raise Rejected
            case Fault.RETRY:
                raise walstream.Retry(delay_seconds=0.01)
            case Fault.CANCELLED:
                raise asyncio.CancelledError
            case Fault.STOP_ITERATION:
                raise StopIteration
            case _:
                pass

    def _fail_after(self, fault: Fault) -> None:
        match fault:
            case Fault.FAIL_AFTER:
                raise Rejected
            case Fault.CANCELLED_AFTER:
                raise asyncio.CancelledError
            case _:
                pass

    def _duration(self, items: Sequence[Item]) -> float:
        return self._chance(f"duration {items[0].id}").uniform(0, 0.004)

    def _chance(self, purpose: str) -> random.Random:
        return random.Random(f"{self._seed} {self._name} {purpose}")  # noqa: S311 - repeatable

    def _note(self, phase: Phase, items: Sequence[Item], fault: Fault) -> None:
        entry = [phase, os.getpid(), time.monotonic(), fault, [item.id for item in items]]
        os.write(self._file, json.dumps(entry).encode() + b"\n")


def make_stream(folder: Path, seed: int, share: float) -> Walstream:
    """Attach a handler of every kind, each with a script of its own.

    Args:
        folder: for the journals.
        seed: decides on what goes wrong.
        share: of the calls with which something does; of calls with lists three times as many.
    """
    stream = Walstream()
    options: dict[str, dict[str, Any]] = {
        "one": {},
        "lanes": {"concurrency": 6},
        "batches": {"batch": 20, "linger_seconds": 0.01},
        "transactions": {"transactions": True},
    }
    for name in HANDLERS:
        kind, _, way = name.partition("_")
        its_own = options[kind]
        if way == "in_batches":
            its_own = {"concurrency": 3, "batch": 4, "linger_seconds": 0.005}
        takes_list = "batch" in its_own or kind == "transactions"
        script = Script(folder, name, seed, share * 3 if takes_list else share)
        make = _in_thread if way == "sync" else _in_loop
        function = make(script, takes_list=takes_list)
        stream.on("public.*", name=name, **its_own)(function)
    jobs = Script(folder, JOBS, seed, share)

    @stream.on_message("jobs*", name=JOBS)
    async def run_job(message: Message) -> None:
        await jobs.play([message])

    return stream


def _in_loop(script: Script, *, takes_list: bool) -> Any:
    async def take_list(changes: list[Change]) -> None:
        await script.play(changes)

    async def take_one(change: Change) -> None:
        await script.play([change])

    return take_list if takes_list else take_one


def _in_thread(script: Script, *, takes_list: bool) -> Any:
    def take_list(changes: list[Change]) -> None:
        script.play_in_thread(changes)

    def take_one(change: Change) -> None:
        script.play_in_thread([change])

    return take_list if takes_list else take_one


def journal(folder: Path, name: str) -> Path:
    """Return where a handler's journal is."""
    return folder / f"{name}.journal"


def entries(path: Path) -> list[Entry]:
    """Read a journal."""
    found = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        phase, pid, instant, fault, ids = json.loads(line)
        found.append(Entry(Phase(phase), pid, instant, fault, tuple(ids), end))
    return found
