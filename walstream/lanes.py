"""Which of the changes that wait may be delivered now: per key in order, otherwise in parallel.

A lane is what one key makes: changes whose keys conflict are handed out one after another, in the
order in which they came. A change with two keys waits for both of its lanes and holds up both. A
change that is about a whole table waits for all lanes, and all that comes later waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final, Generic, TypeVar

from walstream.keys import WHOLE_TABLE, Key

T = TypeVar("T")


class Entry(Generic[T]):
    """One item between `Lanes.add` and `Lanes.done`; ``blockers`` are those right before it."""

    __slots__ = ("blockers", "followers", "is_handed_out", "item", "keys", "number")

    def __init__(self, item: T, keys: Sequence[Key], number: int) -> None:
        self.item = item
        self.keys = keys
        self.number = number
        self.blockers = 0
        self.followers: list[Entry[T]] = []
        self.is_handed_out = False

    @property
    def is_barrier(self) -> bool:
        """Whether the item is about a whole table."""
        return any(values == WHOLE_TABLE for _, values in self.keys)


class Lanes(Generic[T]):
    """Items that wait, and items that are handed out and not done."""

    def __init__(self) -> None:
        self._ready: deque[Entry[T]] = deque()
        self._last: dict[Key, Entry[T]] = {}
        self._behind: deque[Entry[T]] = deque()  # a barrier that waits, and all after it
        self._inside = 0
        self._barrier_inside = False
        self._added = 0
        self._handed_out = 0

    def __len__(self) -> int:
        """Count what was added and is not done."""
        return self._inside + len(self._behind)

    @property
    def ready(self) -> int:
        """How many items wait for nothing but to be handed out."""
        return len(self._ready)

    @property
    def waiting(self) -> int:
        """How many items are not handed out."""
        return len(self) - self._handed_out

    def add(self, item: T, keys: Sequence[Key]) -> None:
        """Let an item wait for those before it that it conflicts with."""
        self._added += 1
        entry = Entry(item, keys, self._added)
        if self._behind or self._barrier_inside or entry.is_barrier:
            self._behind.append(entry)
            self._advance()
        else:
            self._enter(entry)

    def take(self, limit: int = 1) -> list[Entry[T]]:
        """Hand out up to ``limit`` items, in the order in which they came.

        Items of one lane may be handed out together: whoever takes them keeps their order.
        """
        taken: list[Entry[T]] = []
        while self._ready and len(taken) < limit:
            found: Entry[T] | None = self._ready.popleft()
            while found is not None:
                found.is_handed_out = True
                taken.append(found)
                found = _next_in_lane(found) if len(taken) < limit else None
        taken.sort(key=_number)
        self._handed_out += len(taken)
        return taken

    def done(self, entries: Iterable[Entry[T]]) -> None:
        """Let go of items that were handed out: what waited for them alone is ready."""
        for entry in entries:
            self._inside -= 1
            self._handed_out -= 1
            self._barrier_inside = False
            for key in entry.keys:
                if self._last.get(key) is entry:
                    del self._last[key]
            for follower in entry.followers:
                follower.blockers -= 1
                if not follower.blockers and not follower.is_handed_out:
                    self._ready.append(follower)
        self._advance()

    def _enter(self, entry: Entry[T]) -> None:
        self._inside += 1
        for key in entry.keys:
            last = self._last.get(key)
            if last is not None and last is not entry:
                last.followers.append(entry)
                entry.blockers += 1
            self._last[key] = entry
        if not entry.blockers:
            self._ready.append(entry)

    def _advance(self) -> None:
        """Let in what stands behind a barrier, or the barrier itself when all before it is done."""
        behind = self._behind
        while behind and not self._barrier_inside:
            if behind[0].is_barrier:
                if self._inside:
                    return
                self._barrier_inside = True
                self._inside += 1
                self._ready.append(behind.popleft())
            else:
                self._enter(behind.popleft())


def _next_in_lane(entry: Entry[T]) -> Entry[T] | None:
    """Return what waits for this entry and for nothing else."""
    for follower in entry.followers:
        if follower.blockers == 1:
            return follower
    return None


_number: Final = attrgetter("number")
