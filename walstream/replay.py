"""Dead letters delivered again: in the order of the stream, through the same delivery.

Letters go to their routes' destinations as they are attached now: with their lanes, batches, whole
transactions, models and attempts. A letter that is delivered is removed at once. One that fails
again stays, and so do those behind it.

Order is kept per route and key. So what is asked for takes with it the letters before it that are
about the same rows, and those behind it: as long as one is left, the daemon parks what comes for
its rows. Only when the last one is removed does the daemon deliver to these rows again; so the
store is looked into once more after each round. What waits behind other rows' letters too, as a
truncate does, stays as long as they do.

A replay that is killed has lost nothing. What it had delivered and not yet removed is delivered
again by the next one, unless the handler is transactional: then it is recognised.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import groupby
from typing import Final

import msgspec

from walstream.acknowledger import Acknowledger, Ticket
from walstream.assembly import AnyRoute, Assembly, Attached, letters_of
from walstream.config import Config
from walstream.dead_letters import (
    DeadLetterStore,
    LetterQuery,
    StoredLetter,
    item_of,
    pages,
    typeoids_of,
)
from walstream.dead_letters.bounds import HeldUp
from walstream.dead_letters.store import Place, Verify
from walstream.destinations import Destination, Handler, Item
from walstream.errors import DeadLetterStoreFailed, SinkFailed
from walstream.flow import Handed
from walstream.keys import Key
from walstream.lsn import ZERO
from walstream.parking import Parking, Part
from walstream.policy import OnFailure

FETCHED_LETTERS: Final = 100
"""So many are read with their changes at a time."""

SETTLED_LETTERS: Final = 1000
"""Not more are removed in one transaction of the store."""

WATCH_SECONDS: Final = 1.0


class RouteReport(msgspec.Struct, frozen=True):
    """What became of one route's letters.

    ``delivered`` are gone, ``failed`` were tried and failed again. ``left`` are those that are
    here, of all that were to be delivered, with ``failed`` among them, and ``blocked`` their keys.
    ``added`` were not asked for: they were before or behind others that are about the same rows.
    ``reason`` says why none was tried.
    """

    route: str
    delivered: int = 0
    failed: int = 0
    left: int = 0
    added: int = 0
    blocked: tuple[Key, ...] = ()
    reason: str = ""

    def __repr__(self) -> str:
        """Print how many keys are blocked: they hold values of rows."""
        return (
            f"RouteReport({self.route} delivered={self.delivered} failed={self.failed}"
            f" left={self.left} added={self.added} blocked={len(self.blocked)}"
            f" reason={self.reason!r})"
        )


class Unit(Ticket):
    """Letters that go together: of a handler of whole transactions all those of one; else one."""

    __slots__ = ("is_kept", "letters")

    def __init__(self, letters: Sequence[StoredLetter]) -> None:
        super().__init__(ZERO)
        self.closed = True
        self.letters = letters
        self.is_kept = False

    @property
    def place(self) -> Place:
        """Where in the stream it begins."""
        return self.letters[0].place

    def holds_up(self, held_up: HeldUp) -> None:
        """Let it hold up others."""
        for stored in self.letters:
            held_up.add(stored.letter)

    def is_held_up(self, held_up: HeldUp) -> bool:
        """Whether one of its letters is held up."""
        return any(stored.letter in held_up for stored in self.letters)

    def has_one_of(self, ids: Collection[int]) -> bool:
        """Whether one of its letters has one of these numbers."""
        return any(stored.id in ids for stored in self.letters)


class Plan(msgspec.Struct, frozen=True):
    """What of a route's letters is to be delivered, in this order, and what is left for now."""

    units: list[Unit]
    left: list[StoredLetter]

    def __repr__(self) -> str:
        """Print how many there are."""
        return f"Plan(units={len(self.units)} left={len(self.left)})"


def plan(
    letters: Sequence[StoredLetter],
    wanted: Collection[int],
    failed: Collection[int],
    touched: HeldUp,
    *,
    whole_transactions: bool = False,
) -> Plan:
    """Sort a route's letters into those to be delivered and others.

    Args:
        letters: all of the route, in the order of the stream.
        wanted: the numbers of those that were asked for.
        failed: the numbers of those that have failed in this run.
        touched: the keys of those that were delivered in this run; those to be delivered join it.
        whole_transactions: the route's handler takes these.
    """
    units = list(_units(letters, whole_transactions=whole_transactions))
    chosen = _with_those_before(units, wanted)
    to_deliver: list[Unit] = []
    left: list[StoredLetter] = []
    others = HeldUp()
    for unit in units:
        is_meant = unit in chosen or unit.is_held_up(touched)
        if is_meant and not unit.has_one_of(failed) and not unit.is_held_up(others):
            to_deliver.append(unit)
            unit.holds_up(touched)
            continue
        unit.holds_up(others)
        if is_meant:
            left += unit.letters
    return Plan(to_deliver, left)


def _units(letters: Sequence[StoredLetter], *, whole_transactions: bool) -> Iterator[Unit]:
    if not whole_transactions:
        yield from (Unit([stored]) for stored in letters)
        return
    for _, together in groupby(letters, key=lambda stored: stored.letter.position[0]):
        yield Unit(list(together))


def _with_those_before(units: Sequence[Unit], wanted: Collection[int]) -> set[Unit]:
    chosen = set()
    behind = HeldUp()
    for unit in reversed(units):
        if unit.has_one_of(wanted) or unit.is_held_up(behind):
            chosen.add(unit)
            unit.holds_up(behind)
    return chosen


class _RouteRun:
    """What is done with one route's letters in this run."""

    def __init__(self, name: str, route: AnyRoute | None, reason: str = "") -> None:
        self.name = name
        self.route = route
        self.reason = reason
        self.wanted: set[int] = set()
        self.wanted_keys: set[Key] = set()
        self.failed: set[int] = set()
        self.delivered = 0
        self.stuck: HeldUp | None = None
        """What failed in this run, and what that holds up."""
        self._meant: set[int] = set()
        self._touched = HeldUp()

    async def next_units(self, store: DeadLetterStore) -> list[Unit]:
        """Return what is to be delivered now."""
        if self.route is None:
            return []
        return (await self._plan(store)).units

    async def report(self, store: DeadLetterStore) -> RouteReport:
        """Say what became of the letters."""
        if self.route is None:
            return await self._report_untried(store)
        now = await self._plan(store)
        left = [*now.left, *(stored for unit in now.units for stored in unit.letters)]
        return RouteReport(
            route=self.name,
            delivered=self.delivered,
            failed=len(self.failed.intersection(stored.id for stored in left)),
            left=len(left),
            added=len(self._meant - self.wanted),
            blocked=tuple(dict.fromkeys(key for stored in left for key in stored.letter.keys)),
            reason=self.reason,
        )

    async def _report_untried(self, store: DeadLetterStore) -> RouteReport:
        blocked = {key for route, key in await store.blocked() if route == self.name}
        return RouteReport(
            route=self.name,
            left=await store.count(LetterQuery(ids=sorted(self.wanted))),
            blocked=tuple(sorted(self.wanted_keys & blocked)),
            reason=self.reason,
        )

    async def _plan(self, store: DeadLetterStore) -> Plan:
        letters = [stored async for stored in pages(store, LetterQuery(route=self.name))]
        found = plan(
            letters,
            self.wanted,
            self.failed,
            self._touched,
            whole_transactions=self._takes_transactions,
        )
        self._meant.update(stored.id for stored in found.left)
        self._meant.update(stored.id for unit in found.units for stored in unit.letters)
        return found

    @property
    def _takes_transactions(self) -> bool:
        destination = None if self.route is None else self.route.destination
        return isinstance(destination, Handler) and destination.options.transactions


class _Runs(Parking):
    """The routes of this run; for delivery, where letters are kept that fail again."""

    def __init__(self, store: DeadLetterStore) -> None:
        super().__init__(store)
        self.by_name: dict[str, _RouteRun] = {}
        self._handed: dict[tuple[str, str], tuple[Unit, StoredLetter]] = {}

    def hand(self, unit: Unit) -> None:
        """A unit is on its way."""
        for stored in unit.letters:
            self._handed[stored.letter.identity] = (unit, stored)

    def delivered(self, unit: Unit) -> None:
        """A unit was taken by its destination."""
        for stored in unit.letters:
            del self._handed[stored.letter.identity]

    def forget(self) -> None:
        """What is still on its way does not arrive."""
        self._handed.clear()

    @property
    def is_used(self) -> bool:
        """Whether letters may hold up others: always."""
        return True

    def has_letters(self, _: str) -> bool:
        """Whether letters of a route may hold up others: always."""
        return True

    def may_block(self, route: str, _: object) -> bool:
        """Whether a letter of the route has failed in this run."""
        return self.by_name[route].stuck is not None

    async def park(self, parts: Sequence[Part]) -> bool:
        """Leave letters behind one that has failed; they are in the store already."""
        unit, _ = self._letter(parts[0])
        stuck = self.by_name[parts[0][0]].stuck
        if stuck is None or not unit.is_held_up(stuck):
            return False
        self._keep(unit)
        return True

    async def put_aside(
        self, parts: Sequence[Part], attempts: int, error: str, traceback: str
    ) -> None:
        """Note that letters have failed again.

        Raises:
            DeadLetterStoreFailed: the store cannot note it.
        """
        for part in parts:
            unit, stored = self._letter(part)
            await self._store.failed_again(
                stored.id,
                attempts=stored.letter.attempts + attempts,
                error=error,
                traceback=traceback,
                at=datetime.now(UTC),
            )
            self.by_name[stored.letter.route].failed.add(stored.id)
            self._keep(unit)

    def _letter(self, part: Part) -> tuple[Unit, StoredLetter]:
        route, item, _ = part
        return self._handed[route, item.id]

    def _keep(self, unit: Unit) -> None:
        run = self.by_name[unit.letters[0].letter.route]
        run.stuck = run.stuck or HeldUp()
        unit.holds_up(run.stuck)
        unit.is_kept = True


class _Receipts(Acknowledger):
    """Learns what delivery has taken, and has it removed from the store."""

    def __init__(self, store: DeadLetterStore, runs: _Runs) -> None:
        super().__init__(ZERO)
        self._store = store
        self._runs = runs
        self._delivered: deque[StoredLetter] = deque()
        self._news = asyncio.Event()
        self._is_finished = False

    def take(self, ticket: Ticket, _: int = 1) -> None:
        """A unit was delivered, or is kept in the store."""
        assert isinstance(ticket, Unit)  # noqa: S101 - nothing else is handed over
        self._runs.delivered(ticket)
        if not ticket.is_kept:
            self._delivered.extend(ticket.letters)
            self._news.set()

    def finish(self) -> None:
        """Nothing more will be taken."""
        self._is_finished = True
        self._news.set()

    async def settle(self) -> None:
        """Remove what is delivered, until `finish` was called and all is removed.

        In the order in which it was taken: of the letters of a row the first ones go first.

        Raises:
            DeadLetterStoreFailed: the store cannot do it.
        """
        while self._delivered or not self._is_finished:
            if not self._delivered:
                self._news.clear()
                await self._news.wait()
                continue
            count = min(len(self._delivered), SETTLED_LETTERS)
            letters = [self._delivered.popleft() for _ in range(count)]
            settled = await self._store.settle(letters)
            for stored, is_removed in zip(letters, settled, strict=True):
                self._runs.by_name[stored.letter.route].delivered += is_removed


class Replay:
    """Delivers letters of one slot again."""

    def __init__(self, config: Config, handlers: Sequence[Attached] = ()) -> None:
        """Build everything that needs no connection.

        Args:
            config: with the store, and the routes of the file.
            handlers: what was attached to the application.

        Raises:
            UsageError: nothing is routed anywhere.
            ConfigError: a route cannot be made.
        """
        self._assembly = Assembly(config, handlers, replaying=True)
        self._store = letters_of(config)
        self._max_read_bytes = config.stream.max_in_flight_bytes
        self._runs = _Runs(self._store)
        self._delivery = self._assembly.delivery(self._runs)
        self._opened: dict[Destination, str] = {}
        self._is_stopped = False

    @property
    def is_busy(self) -> bool:
        """Whether a handler's function still runs although `run` has returned."""
        return self._delivery.is_busy

    def stop(self) -> None:
        """Finish what is being delivered, and let `run` return."""
        self._is_stopped = True
        self._delivery.begin_no_more()
        self._delivery.finish()

    async def run(
        self, query: LetterQuery, confirm: Callable[[Sequence[StoredLetter]], None]
    ) -> list[RouteReport]:
        """Deliver the letters that a query gives, and those that belong to them.

        Args:
            query: which.
            confirm: gets them before any is delivered, without their changes; it may raise.

        Returns:
            A report for each of their routes.

        Raises:
            ReplayRuns: another process replays.
            DeadLetterStoreFailed: the store cannot be used.
            WalstreamError: a destination can take nothing at all. What was delivered until then is
                removed.
        """
        async with AsyncExitStack() as opened:
            opened.callback(self._delivery.close)
            opened.push_async_callback(self._assembly.catalog.close)
            opened.push_async_callback(self._store.close)
            await self._store.open(create=False)
            verify = await opened.enter_async_context(self._store.exclusive())
            asked = [stored async for stored in pages(self._store, query)]
            confirm(asked)
            watching = asyncio.create_task(self._watch(verify))
            opened.push_async_callback(_cancelled, watching)
            await self._open(asked, opened)
            while not self._is_stopped and (units := await self._next_units()):
                await self._deliver(units, verify, watching)
            await self._forget_replayed()
            return [await run.report(self._store) for run in self._runs.by_name.values()]

    async def _watch(self, verify: Verify) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._delivery.watch(time.monotonic())
            await verify()

    # Routes and destinations

    async def _open(self, asked: Sequence[StoredLetter], opened: AsyncExitStack) -> None:
        """Find the letters' routes, and make their destinations ready."""
        for stored in asked:
            name = stored.letter.route
            if name not in self._runs.by_name:
                self._runs.by_name[name] = await self._open_route(name, opened)
            self._runs.by_name[name].wanted.add(stored.id)
            self._runs.by_name[name].wanted_keys.update(stored.letter.keys)

    async def _open_route(self, name: str, opened: AsyncExitStack) -> _RouteRun:
        found = [route for route in self._assembly.routes if route.name == name]
        if len(found) != 1:
            reason = f"{len(found)} routes have this name" if found else "there is no such route"
            return _RouteRun(name, None, reason)
        [route] = found
        destination = route.destination
        if destination not in self._opened:
            self._opened[destination] = await self._open_destination(destination, opened)
        reason = self._opened[destination]
        return _RouteRun(name, None if reason else _keeping(route), reason)

    async def _open_destination(self, destination: Destination, opened: AsyncExitStack) -> str:
        """Make it ready, or say why that cannot be."""
        if not isinstance(destination, Handler):
            try:
                await destination.open()
            except SinkFailed as error:
                return f"{error.message}; a daemon that runs has its sinks for itself"
            opened.push_async_callback(destination.close)
        elif (target := self._assembly.targets.get(destination)) is not None:
            catalog = self._assembly.catalog
            opened.push_async_callback(target.close)
            server = await catalog.server()
            systemid = await catalog.system_identifier()
            await target.open(systemid=systemid, flush_lsn=server.flush_lsn)
        return ""

    async def _forget_replayed(self) -> None:
        """Clear up in the databases of transactional handlers that have no letters any more."""
        for run in self._runs.by_name.values():
            target = None
            if run.route is not None:
                target = self._assembly.targets.get(run.route.destination)
            if target is not None and not await self._store.count(LetterQuery(route=run.name)):
                await target.forget_replayed()

    # A round

    async def _next_units(self) -> list[Unit]:
        """Return what is to be delivered now, of all routes in the order of the stream."""
        units = []
        for run in self._runs.by_name.values():
            units += await run.next_units(self._store)
        return sorted(units, key=lambda unit: unit.place)

    async def _deliver(
        self, units: Sequence[Unit], verify: Verify, watching: asyncio.Task[None]
    ) -> None:
        """Deliver; what was delivered is removed when this returns or raises.

        When letters cannot be read or removed, or another process may replay them too, only the
        calls in hand are finished.
        """
        receipts = _Receipts(self._store, self._runs)
        self._delivery.attach(receipts)
        if self._is_stopped:  # `attach` has forgotten it
            return
        settling = asyncio.create_task(receipts.settle())
        delivering = asyncio.create_task(self._delivery.run())
        others = [settling, delivering, watching]
        feeding = asyncio.create_task(self._feed(units, verify, others))
        try:
            await asyncio.wait([feeding])
            if feeding.exception() is None:
                self._delivery.finish()
                await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            self._delivery.finish(calls_only=True)
            await asyncio.wait([delivering])
        finally:
            await _cancelled(feeding)
            await _cancelled(delivering)
            receipts.finish()
            await asyncio.wait([settling])
            self._runs.forget()
        for task in (settling, delivering, feeding):
            task.result()
        if watching.done():
            watching.result()

    async def _feed(
        self, units: Sequence[Unit], verify: Verify, others: Collection[asyncio.Task[None]]
    ) -> None:
        """Hand over until all is handed over, or one of the others has ended."""
        for together in _chunks(units, self._max_read_bytes):
            await verify()
            for handed in await self._read(together):
                while self._delivery.is_full and not any(task.done() for task in others):
                    room = asyncio.create_task(self._delivery.wait_for_change())
                    await asyncio.wait([room, *others], return_when=asyncio.FIRST_COMPLETED)
                    room.cancel()
                if any(task.done() for task in others):
                    return
                self._delivery.hand(handed)

    async def _read(self, units: Sequence[Unit]) -> list[list[Handed]]:
        """Read the letters' changes; those that were dropped meanwhile are left out."""
        ids = [stored.id for unit in units for stored in unit.letters]
        found = {one.id: one for one in await self._store.select(LetterQuery(ids=ids))}
        read = []
        for unit in units:
            handed: list[Handed] = []
            here = [found[stored.id] for stored in unit.letters if stored.id in found]
            unit.letters = [_without_payload(stored) for stored in here]
            self._runs.hand(unit)
            for stored in here:
                run = self._runs.by_name[stored.letter.route]
                assert run.route is not None  # noqa: S101 - it has units
                item = await self._item(stored)
                handed.append((run.route, item, unit, len(stored.letter.payload)))
            read.append(handed)
        return read

    async def _item(self, stored: StoredLetter) -> Item:
        payload = stored.letter.payload
        try:
            await self._assembly.catalog.learn_types(typeoids_of(payload))
            return item_of(payload, self._assembly.catalog.types)
        except DeadLetterStoreFailed as error:
            error.message = f"letter {stored.id}: {error.message}"
            raise


def _keeping(route: AnyRoute) -> AnyRoute:
    """Return a route of which a change that fails stays in the store, and others go on."""
    policy = msgspec.structs.replace(route.policy, on_failure=OnFailure.DEAD_LETTER)
    return msgspec.structs.replace(route, policy=policy)


def _chunks(units: Sequence[Unit], max_bytes: int) -> Iterator[list[Unit]]:
    """Divide, not within a unit, into parts that are not much larger than can be read at once."""
    chunk: list[Unit] = []
    count = size_bytes = 0
    for unit in units:
        chunk.append(unit)
        count += len(unit.letters)
        size_bytes += sum(stored.size_bytes for stored in unit.letters)
        if count >= FETCHED_LETTERS or size_bytes >= max_bytes:
            yield chunk
            chunk, count, size_bytes = [], 0, 0
    if chunk:
        yield chunk


def _without_payload(stored: StoredLetter) -> StoredLetter:
    letter = msgspec.structs.replace(stored.letter, payload=b"", traceback="")
    return msgspec.structs.replace(stored, letter=letter)


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
