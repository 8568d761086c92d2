"""What an outlet is at: the calls of its destination, and what else keeps a change.

It outlives a reload: a call that does not end when it is told to must return before its destination
is called again, through whatever outlet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import msgspec

from walstream.calls import CallClock, Caller, Slot
from walstream.destinations import Destination, Handler, HandlerOptions, Item
from walstream.outlets.items import keys_of_item, named


class Held(msgspec.Struct, frozen=True):
    """What an outlet is waiting for, and since when (monotonic seconds).

    ``key_columns`` make its key; None for the primary key.
    """

    destination: str
    item: Item
    since: float
    slot: Slot
    key_columns: tuple[str, ...] | None = None

    @property
    def change_id(self) -> str:
        """Of the first change of the call."""
        return self.item.id

    @property
    def key(self) -> str:
        """The key of the change as its route sees it, as a table and JSON."""
        keys = keys_of_item(self.item, self.key_columns)
        return ", ".join(f"{table} {values.decode()}" for table, values in keys)


class Delay(msgspec.Struct, eq=False):
    """What keeps a change besides a first call, and since when; ``note`` says what it is."""

    item: Item
    since: float
    note: str


class InHand:
    """The calls of one destination: who makes them, the tasks they run in, how long they take."""

    def __init__(self, destination: Destination, caller: Caller, concurrency: int) -> None:
        self.destination = destination
        self.options = destination.options if isinstance(destination, Handler) else HandlerOptions()
        self.caller = caller
        self.clock = CallClock()
        self.slots = [Slot(self.clock) for _ in range(concurrency)]
        self._delays: list[Delay] = []
        self._running: set[asyncio.Task[None]] = set()

    def adopt(self, before: InHand) -> None:
        """Take over calls that have not ended, and count on; ``before`` is of no use afterwards."""
        self.clock, self.slots, self._running = before.clock, before.slots, before._running
        self.caller, before.caller = before.caller, self.caller

    @property
    def is_busy(self) -> bool:
        """Whether a call goes on that does not end when it is told to."""
        return self.caller.is_busy or bool(self._running)

    @property
    def held(self) -> Held | None:
        """The call that lasts longest, if there is one."""
        busy = [slot for slot in self.slots if slot.item is not None]
        if not busy:
            return None
        slot = min(busy, key=lambda one: one.since)
        item = slot.item
        if item is None:  # its thread has just finished it
            return None
        return Held(self.destination.name, item, slot.since, slot, self.options.key)

    def stalled(self, now: float) -> tuple[float, str]:
        """Say how long it has been at the change that it has held longest, and why.

        See `Outlet.stalled`.
        """
        held = self.held
        delays = [*self._delays]
        if held is not None:
            delays.insert(0, Delay(held.item, held.since, ""))
        if not delays:
            return 0.0, ""
        delay = min(reversed(delays), key=_since)  # of a call and its attempts the latter
        seconds = max(now - delay.since, 0.0)
        kind = "handler" if isinstance(self.destination, Handler) else "sink"
        note = f" ({delay.note})" if delay.note else ""
        what = f"{kind} {self.destination.name} has held {named(delay.item)}"
        return seconds, f"{what} for {seconds:.0f} s{note}"

    @contextlib.contextmanager
    def delayed(self, item: Item, note: str, since: float | None = None) -> Iterator[Delay]:
        """Note what keeps a change while the block runs."""
        delay = Delay(item, time.monotonic() if since is None else since, note)
        self._delays.append(delay)
        try:
            yield delay
        finally:
            self._delays.remove(delay)

    async def settle(self) -> None:
        """Wait for calls of an earlier session that do not end when they are told to."""
        await self.caller.settle()
        if self._running:
            await asyncio.wait(self._running)

    def note_worker(self) -> None:
        """Note that the current task makes calls until it ends."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def clear(self) -> None:
        """Nothing is held any more."""
        for slot in self.slots:
            slot.clear()

    def clear_unless_busy(self) -> None:
        """What was cancelled is not held any more; what goes on still is."""
        if not self.caller.is_busy and self._running <= {asyncio.current_task()}:
            self.clear()


def _since(delay: Delay) -> float:
    return delay.since
