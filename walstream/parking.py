"""Changes that a route could not deliver, and those of the same rows that must wait behind them.

The store decides what is parked, in one transaction: another process may be replaying. What is
remembered here only saves asking it about rows that never had a letter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

from walstream.changes import Change
from walstream.dead_letters.letters import DeadLetter, payload_of
from walstream.dead_letters.store import DeadLetterStore, LetterQuery, StoredLetter
from walstream.destinations import Item
from walstream.keys import WHOLE_TABLE, Key

Part: TypeAlias = tuple[str, Item, tuple[Key, ...]]
"""Of what is parked or put aside at once: the route, the change as it sees it, and its keys."""


class Parking:
    """The dead-letter store as delivery sees it."""

    def __init__(self, store: DeadLetterStore) -> None:
        self._store = store
        self._blocked: defaultdict[str, defaultdict[str, set[bytes]]] = defaultdict(
            lambda: defaultdict(set)
        )

    async def open(self) -> None:
        """Open the store, and learn for which rows it has letters.

        Raises:
            DeadLetterStoreFailed: it cannot be read.
        """
        await self._store.open()
        for route, key in await self._store.blocked():
            self._remember(route, [key])

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    async def count(self) -> int:
        """Ask the store how many letters there are, of whatever route.

        Raises:
            DeadLetterStoreFailed: it cannot be read.
        """
        letters, _ = await self._store.size()
        return letters

    async def letters(self, query: LetterQuery) -> list[StoredLetter]:
        """Return letters in the order of the stream, without their changes.

        Raises:
            DeadLetterStoreFailed: they cannot be read.
        """
        return await self._store.select(query, payloads=False)

    @property
    def is_used(self) -> bool:
        """Whether any route may have letters."""
        return bool(self._blocked)

    def has_letters(self, route: str) -> bool:
        """Whether a route may have letters."""
        return route in self._blocked

    def may_block(self, route: str, keys: Iterable[Key]) -> bool:
        """Whether `park` has to be asked about a change of these keys."""
        tables = self._blocked.get(route)
        if tables is None:
            return False
        for table, values in keys:
            known = tables.get(table)
            if known and (values == WHOLE_TABLE or values in known or WHOLE_TABLE in known):
                return True
        return False

    async def park(self, parts: Sequence[Part]) -> bool:
        """Keep changes behind the letters of their rows: all of them, when one has to wait there.

        False when none has any more: then none is kept.

        Raises:
            DeadLettersFull: there is no room for them.
            DeadLetterStoreFailed: the store cannot take them.
        """
        letters = [_letter(*part, parked=True) for part in parts]
        if not any(await self._store.park(letters, together=True)):
            for route, _, keys in parts:
                self._forget(route, keys)
            return False
        for route, _, keys in parts:
            self._remember(route, keys)
        return True

    async def put_aside(
        self, parts: Sequence[Part], attempts: int, error: str, traceback: str
    ) -> None:
        """Keep changes that were not delivered, all or none; durable when this returns.

        Raises:
            DeadLettersFull: there is no room for them.
            DeadLetterStoreFailed: the store cannot take them.
        """
        await self._store.add(
            [
                _letter(*part, attempts=attempts, error=error, traceback=traceback, parked=False)
                for part in parts
            ]
        )
        for route, _, keys in parts:
            self._remember(route, keys)

    def _remember(self, route: str, keys: Iterable[Key]) -> None:
        for table, values in keys:
            self._blocked[route][table].add(values)

    def _forget(self, route: str, keys: Iterable[Key]) -> None:
        """The store has no letter that conflicts with these keys, of the whole table either."""
        tables = self._blocked[route]
        for table, values in keys:
            left = set() if values == WHOLE_TABLE else tables[table] - {values, WHOLE_TABLE}
            if left:
                tables[table] = left
            else:
                tables.pop(table, None)
        if not tables:
            del self._blocked[route]


def _letter(  # noqa: PLR0913 - the parts of a letter
    route: str,
    item: Item,
    keys: tuple[Key, ...],
    *,
    parked: bool,
    attempts: int = 0,
    error: str = "",
    traceback: str = "",
) -> DeadLetter:
    now = datetime.now(UTC)
    return DeadLetter(
        route=route,
        change_id=item.id,
        operation=item.operation if isinstance(item, Change) else None,
        relation=item.relation if isinstance(item, Change) else None,
        keys=keys,
        payload=payload_of(item),
        attempts=attempts,
        error=error,
        traceback=traceback,
        parked=parked,
        first_failed_at=None if parked else now,
        stored_at=now,
    )
