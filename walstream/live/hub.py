"""Publishes changes to clients, and lets clients come and go without missing one.

``position`` is the last change that was published. A client is joined in one step of the event
loop, when what it has read from the history ends exactly there: so nothing lies between replay and
live, and nothing comes twice.

Publishing waits for nobody. It gives way to the rest of the process every few milliseconds, and a
client that does not keep up is given up (`Client.push`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, TypeAlias

import structlog

from walstream.catalog import Catalog, Table
from walstream.changes import Change, Layout, Relation
from walstream.errors import FilterError, SinkFailed, Unavailable
from walstream.filters import Literal, literals
from walstream.live.clients import Client, Cohort, End, Reader
from walstream.live.encodings import Encoding
from walstream.live.history import History
from walstream.live.index import Group, LayoutIndex
from walstream.live.subscriptions import RequestRefused, Subscription, named_columns
from walstream.live.views import Look, Sight, View, literals_of
from walstream.lsn import Lsn
from walstream.offline import read_offline
from walstream.positions import BEGINNING, Position
from walstream.router import Route
from walstream.values import UnknownLabel
from walstream.vitals import LiveVitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.live")

SLICE_SECONDS: Final = 0.004
"""So long changes are published before others in the event loop have their turn."""

SLICE_BYTES: Final = 1 << 16
"""So much is given to a client at once, and a change more."""

AT_ONCE: Final = 16
"""So many who wait for their turn are called at once."""

MAX_LAYOUTS: Final = 512
MAX_LITERALS: Final = 20_000
MAX_ASKED: Final = 100
"""Values of one filter that the server is asked about: the stream asks by the same connection."""

MAX_TEXT: Final = 1 << 14
"""Characters of a value: of ``1e131071`` the server makes a hundred thousand."""

TABLE_SECONDS: Final = 10.0
"""So long an answer of the catalog is good for those who subscribe."""

_Index: TypeAlias = LayoutIndex[Cohort]
_Shown: TypeAlias = dict[Hashable, bytes]
_Frames: TypeAlias = dict[Cohort, list[bytes]]

Prepared: TypeAlias = dict[Layout, list[View]]
"""A cohort's views, for each layout in the order of its subscriptions."""


class Hub:
    """Who is there, and what they see."""

    def __init__(self, catalog: Catalog, history: History) -> None:
        self.history = history
        self.position = BEGINNING
        self.beginnings = 0
        """How often what is kept began anew."""
        self.routes: Sequence[Route] = ()
        """Those that lead here: more than they keep nobody sees."""
        self.has_begun = False
        self.ended: Counter[End] = Counter()
        self.sent_changes = 0
        self.published_changes = 0
        self.turns = Turns()
        """Of those who read what they missed."""
        self._catalog = catalog
        self._clients: dict[Client, None] = {}
        self._cohorts: dict[Hashable, Cohort] = {}
        self._indexes: dict[Layout, _Index] = {}
        self._literals: dict[Literal, str] = {}
        self._tables: dict[Relation, tuple[float, Table | None]] = {}

    # Who is there

    @property
    def clients(self) -> list[Client]:
        """All who are served, those among them who still read what they missed."""
        return list(self._clients)

    @property
    def client_count(self) -> int:
        """How many they are, without those that are cut off and have not noticed it."""
        return sum(not client.has_ended() for client in self._clients)

    def enter(self, client: Client) -> None:
        """A client begins to be served; `leave` ends that."""
        self._clients[client] = None

    def vitals(self) -> LiveVitals:
        """Say how many there are, and what they got."""
        return LiveVitals(
            clients=self.client_count,
            cohorts=len(self._cohorts),
            published_changes=self.published_changes,
            sent_changes=self.sent_changes,
            ended={str(end): count for end, count in self.ended.items()},
        )

    def cohort(
        self, subscriptions: Sequence[Subscription], reader: Reader, encoding: Encoding
    ) -> Cohort:
        """Return the cohort of a client to be: an old one, or one that is not joined yet."""
        new = Cohort(subscriptions, reader, encoding)
        return self._cohorts.get(new.key, new)

    async def prepare(self, cohort: Cohort) -> Prepared:
        """Compile the cohort's views for all layouts that are indexed."""
        prepared: Prepared = {}
        turn = Turn()
        for layout in list(self._indexes):
            prepared[layout] = await self.views(cohort, layout)
            await turn.give_way()
        return prepared

    def join(self, client: Client, prepared: Prepared) -> bool:
        """Let a client have what is published from now on.

        Args:
            client: new.
            prepared: by `prepare`.

        Returns:
            Whether it is done; if not, there are layouts that were not prepared.
        """
        cohort = self._cohorts.get(client.cohort.key)
        if cohort is None:
            if any(layout not in prepared for layout in self._indexes):
                return False
            cohort = client.cohort
            self._cohorts[cohort.key] = cohort
            for layout, index in self._indexes.items():
                _enter(cohort, index, prepared[layout])
        client.cohort = cohort
        cohort.clients[client] = None
        return True

    def leave(self, client: Client) -> None:
        """Let a client go; it need not have joined."""
        self._clients.pop(client, None)
        if client.end is not None:
            self.ended[client.end] += 1
        cohort = client.cohort
        if client not in cohort.clients:
            return
        del cohort.clients[client]
        if not cohort.clients:
            del self._cohorts[cohort.key]
            for layout, views in cohort.entered.items():
                self._withdraw(cohort, layout, views)
            cohort.entered.clear()

    def _withdraw(self, cohort: Cohort, layout: Layout, views: Iterable[View]) -> None:
        index = self._indexes.get(layout)
        if index is None:
            return
        for view in views:
            key = _group_key(view, cohort)
            group = index.group(key)
            if group is not None:
                group.members.pop(cohort, None)
                if not group.members:
                    index.remove(key)

    def finish(self, end: End) -> None:
        """Let all streams end."""
        for client in self.clients:
            client.finish(end)

    # What is published

    async def begin(self, at: Lsn, history: str, *, accept_gap: bool = False) -> None:
        """A session begins: the server sends what stands behind a position.

        Args:
            at: the position of the slot.
            history: tells apart the rules under which changes are kept: slot, cluster, routes.
            accept_gap: forget what is kept of another slot or cluster.

        Raises:
            SetupError: the journal cannot be used.
        """
        await self.history.open(history, accept_gap=accept_gap)
        if at > self.history.covered:
            # Others have taken what lies between, or nothing is known yet.
            await self.history.interrupt(at)
            self.position = Position.after(at)
            self.beginnings += 1
            log.info("history_begun", position=str(self.position), clients=self.client_count)
            self._tell_reset()
        elif not self.has_begun:
            # Later on there are clients: what is kept and was not published comes again.
            self.position = max(
                self.position, self.history.position, Position.after(self.history.covered)
            )
        self.has_begun = True

    async def cover(self, lsn: Lsn) -> None:
        """Note, before it is confirmed, that all up to a position has been published."""
        if lsn > self.history.covered:
            await self.history.cover(lsn)
            self.position = max(self.position, Position.after(lsn))

    async def publish(self, changes: Sequence[Change]) -> None:
        """Let everybody who may see them have these changes, which stand behind ``position``.

        Raises:
            SinkFailed: the catalog cannot be asked; what was published is behind ``position``.
        """
        done, unknown = 0, -1
        while done < len(changes):
            await self._index(changes[done:])
            done, is_known, pushed = self._publish_slice(changes, done, lenient=unknown)
            if not is_known:
                unknown = done
                await self.renew_types()
            elif done < len(changes):
                await asyncio.sleep(0)
            for client in pushed:
                # Nobody is cut off because we publish faster than we send.
                while client.outflow.is_behind and not client.has_ended():
                    await client.outflow.moved()

    def _publish_slice(
        self, changes: Sequence[Change], begin: int, *, lenient: int
    ) -> tuple[int, bool, list[Client]]:
        """Publish for a few milliseconds, or what one write can take.

        Returns how far it came, whether labels are known, and who got something.

        Whoever cannot compare a label of the change at ``lenient`` does not see it.
        """
        frames: _Frames = {}
        deadline = time.perf_counter() + SLICE_SECONDS
        done, is_known, size = begin, True, 0
        try:
            while done < len(changes) and size < SLICE_BYTES:
                if changes[done].layout not in self._indexes:
                    break  # the bound on layouts was reached
                size += self._publish_one(changes[done], frames, strict=done != lenient)
                done += 1
                if time.perf_counter() > deadline:
                    break
        except UnknownLabel:
            is_known = False
        finally:  # what is behind `position` is not published again, whatever a later one raises
            pushed = self._push(frames)
        return done, is_known, pushed

    def _push(self, frames: _Frames) -> list[Client]:
        pushed: list[Client] = []
        for cohort, pieces in frames.items():
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self.sent_changes += len(pieces) * len(cohort.clients)
            pushed += cohort.clients
            for client in cohort.clients:
                client.push(data)
        return pushed

    def _publish_one(self, change: Change, frames: _Frames, *, strict: bool) -> int:
        """Return the bytes of the longest form of the change that somebody gets."""
        index = self._indexes.get(change.layout)
        seen: dict[Cohort, tuple[int, bytes]] = {}
        if index is not None:
            shown: _Shown = {}
            for group in index.candidates(change):
                look = look_at(group.view, change, strict=strict)
                if look is None:
                    continue
                frame = _frame(group, change, look, shown)
                for cohort, rank in group.members.items():
                    before = seen.get(cohort)
                    if before is None or rank < before[0]:
                        seen[cohort] = (rank, frame)
        for cohort, (_, frame) in seen.items():
            frames.setdefault(cohort, []).append(frame)
        self.position = Position.of(change)
        self.published_changes += 1
        return max((len(frame) for _, frame in seen.values()), default=0)

    def _tell_reset(self) -> None:
        for cohort in self._cohorts.values():
            note = self.reset_note(cohort.encoding, "interrupted")
            for client in cohort.clients:
                client.push(note)

    def reset_note(self, encoding: Encoding, reason: str) -> bytes:
        """Write that something may be missing, and where the stream goes on."""
        content = {
            "reason": reason,
            "begins": str(self.history.begins),
            "position": str(self.position),
        }
        return encoding.note("reset", content, self.position)

    # What is compiled

    async def _index(self, changes: Sequence[Change]) -> None:
        """Index the layouts that are new: all clients' views are compiled for them."""
        layouts = dict.fromkeys(change.layout for change in changes)
        new = [layout for layout in layouts if layout not in self._indexes]
        for layout in new[: MAX_LAYOUTS // 2]:
            index: _Index = LayoutIndex(layout)
            views: dict[Cohort, list[View]] = {}
            turn = Turn()
            try:
                while missing := [one for one in self._cohorts.values() if one not in views]:
                    for cohort in missing:
                        views[cohort] = await self.views(cohort, layout)
                        await turn.give_way()
            except Unavailable as error:
                message = f"the catalog cannot be asked for {layout.relation}: {error.message}"
                raise SinkFailed(message, hint=error.hint) from None
            self._make_room()
            self._indexes[layout] = index
            for cohort in self._cohorts.values():
                _enter(cohort, index, views[cohort])

    def _make_room(self) -> None:
        while len(self._indexes) >= MAX_LAYOUTS:
            oldest = next(iter(self._indexes))
            del self._indexes[oldest]
            for cohort in self._cohorts.values():
                cohort.entered.pop(oldest, None)
                cohort.views.pop(oldest, None)

    async def views(self, cohort: Cohort, layout: Layout) -> list[View]:
        """Return the cohort's views of a layout, in the order of its subscriptions.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        known = cohort.views.get(layout)
        if known is None:
            known = [
                view
                for subscription in cohort.subscriptions
                if (view := await self._view(cohort.reader, subscription, layout)) is not None
            ]
            if len(cohort.views) >= MAX_LAYOUTS:
                del cohort.views[next(iter(cohort.views))]
            cohort.views[layout] = known
        return known

    async def _view(
        self, reader: Reader, subscription: Subscription, layout: Layout
    ) -> View | None:
        covered = (layout.relation, *layout.ancestors)
        if not any(subscription.pattern.covers(relation) for relation in covered):
            return None
        sight = reader.sight(layout)
        if sight is None:
            return None
        if not all(map(sight.reads, named_columns(subscription))):
            return None  # of a partition more may be hidden than of its table, which was checked
        try:
            normalised = await self._normalise(literals_of(subscription, sight, layout), layout)
            return View(subscription, sight, layout, normalised)
        except FilterError:
            return None  # the table's types have changed since: nothing of it passes

    async def _normalise(self, literals: Iterable[Literal], layout: Layout) -> dict[Literal, str]:
        answers: dict[Literal, str] = {}
        for literal in literals:
            text = self._literals.get(literal)
            if text is None:
                text = read_offline(literal, layout.types)
            if text is None:
                text = (await self._catalog.normalise([literal], remember=False))[literal]
            if len(text) > MAX_TEXT:
                message = f"column {literal.column}: a value of {len(text)} characters"
                raise FilterError(message, hint=f"at most {MAX_TEXT} are compared with")
            if len(self._literals) >= MAX_LITERALS:
                self._literals.clear()
            answers[literal] = self._literals[literal] = text
        return answers

    async def renew_types(self) -> None:
        """Compile everything anew: an enum has got a label.

        Raises:
            SinkFailed: the catalog cannot be asked.
        """
        try:
            await self._catalog.renew_types()
        except Unavailable as error:
            raise SinkFailed(f"types cannot be asked for: {error.message}") from None
        self._indexes.clear()
        self._literals.clear()
        for cohort in self._cohorts.values():
            cohort.entered.clear()
            cohort.views.clear()

    async def is_foreign(self, position: Position) -> bool:
        """Whether a position lies beyond all that the server has written: it is of another one."""
        return (
            position > self.position and position.end_lsn > (await self._catalog.server()).flush_lsn
        )

    # What may be asked for

    async def check(self, subscriptions: Sequence[Subscription], reader: Reader) -> None:
        """Refuse what the reader may not ask for, or what cannot be read.

        Of what it may not see nothing is told, not even whether it is there.

        Raises:
            RequestRefused: with the status and the reason.
        """
        try:
            for subscription in subscriptions:
                await self._check(subscription, reader)
        except FilterError as error:
            raise RequestRefused(400, f"where: {error.message}", hint=error.hint) from None
        except Unavailable:
            raise RequestRefused(503, "the database cannot be asked at this moment") from None

    async def _check(self, subscription: Subscription, reader: Reader) -> None:
        relation = subscription.pattern.relation
        if relation is None:
            await self._check_pattern(subscription, reader)
            return
        table = await self._table(relation)
        layout = _layout_of(relation, table, self._catalog)
        sight = reader.sight(layout)
        if sight is None:
            raise RequestRefused(403, f"{relation} may not be read")
        if table is None:
            raise RequestRefused(404, f"there is no table {relation}")
        if not any(route.wants(relation, layout.ancestors) for route in self.routes):
            hint = "a [[routes]] that leads to the live sink decides what can be asked for"
            raise RequestRefused(404, f"no changes of {relation} come here", hint=hint)
        self._check_columns(subscription, sight, layout)
        await self._catalog.learn_types(layout.columns.values())
        await self._check_condition(sight, layout)
        asked = literals_of(subscription, sight, layout)
        if sum(read_offline(literal, layout.types) is None for literal in asked) > MAX_ASKED:
            message = f"where: more than {MAX_ASKED} values that only the server can read"
            raise RequestRefused(400, message, hint="write them as the server prints them")
        await self._normalise(asked, layout)

    async def _check_condition(self, sight: Sight, layout: Layout) -> None:
        """Refuse when the role's own condition does not fit; it may name what is hidden."""
        if sight.where is None:
            return
        try:
            await self._normalise(literals(sight.where, layout.columns, layout.types), layout)
        except FilterError:
            hint = "the role's condition on rows does not fit the table, or the token's claims"
            message = f"{layout.relation} may not be read"
            raise RequestRefused(403, message, hint=hint) from None

    async def _check_pattern(self, subscription: Subscription, reader: Reader) -> None:
        pattern = subscription.pattern
        for relation in await self._catalog.tables(pattern.schema, pattern.name):
            layout = _layout_of(relation, await self._table(relation), self._catalog)
            if reader.sight(layout) is not None:
                return
        raise RequestRefused(403, f"{pattern} may not be read")

    def _check_columns(self, subscription: Subscription, sight: Sight, layout: Layout) -> None:
        known = layout.columns
        projection = sight.projection
        for name in sorted(named_columns(subscription)):
            if name not in known or not sight.reads(name) or self._is_masked(name, layout):
                raise RequestRefused(403, f"where: the column {name!r} may not be read")
        for name in sorted(subscription.columns or ()):
            if name not in known or not (projection is None or projection.passes(name)):
                raise RequestRefused(403, f"columns: the column {name!r} may not be read")

    def _is_masked(self, name: str, layout: Layout) -> bool:
        """Whether no route passes the column on as it is."""
        leading = [one for one in self.routes if one.wants(layout.relation, layout.ancestors)]
        return not any(
            one.projection is None
            or (one.projection.passes(name) and name not in one.projection.masks)
            for one in leading
        )

    async def _table(self, relation: Relation) -> Table | None:
        now = time.monotonic()
        asked_at, table = self._tables.get(relation, (now - TABLE_SECONDS - 1, None))
        if now - asked_at > TABLE_SECONDS:
            table = await self._catalog.table(relation)
            if len(self._tables) >= MAX_LAYOUTS:
                self._tables.clear()
            self._tables[relation] = (now, table)
        return table


class Turns:
    """Lets all who have much to do together have a few milliseconds in a turn of the event loop."""

    def __init__(self) -> None:
        self._spent_seconds = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_called = False

    async def begin(self) -> None:
        """Wait until there is time."""
        add = self._waiting.append
        while self._spent_seconds > SLICE_SECONDS:
            waiter = asyncio.get_running_loop().create_future()
            add(waiter)
            self._call()
            await waiter
            add = self._waiting.appendleft  # who was called and came too late is the next

    def end(self, began: float) -> None:
        """Count what was done since then, by `time.perf_counter`."""
        self._spent_seconds += time.perf_counter() - began
        if self._spent_seconds > SLICE_SECONDS:
            self._call()

    def _call(self) -> None:
        if not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._is_called = False
        self._spent_seconds = 0.0
        for _ in range(min(AT_ONCE, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._call()


class Turn:
    """A few milliseconds, after which others in the event loop have theirs."""

    def __init__(self) -> None:
        self._ends = time.perf_counter() + SLICE_SECONDS

    async def give_way(self) -> None:
        """Let others go on, if it is over."""
        if time.perf_counter() > self._ends:
            await asyncio.sleep(0)
            self._ends = time.perf_counter() + SLICE_SECONDS


def _enter(cohort: Cohort, index: _Index, views: list[View]) -> None:
    """Enter a cohort into the groups of a layout."""
    for rank, view in enumerate(views):
        key = _group_key(view, cohort)
        group = index.group(key)
        if group is None:
            group = Group(view, cohort.encoding)
            index.add(key, group)
        group.members.setdefault(cohort, rank)
    cohort.entered[index.layout] = views


def _group_key(view: View, cohort: Cohort) -> Hashable:
    return view.subscription, view.sight, cohort.encoding


def look_at(view: View, change: Change, *, strict: bool) -> Look | None:
    """Say how a change is seen; with a label that is not known not at all, unless ``strict``.

    Raises:
        UnknownLabel: types must be asked for again.
    """
    try:
        return view.look(change)
    except UnknownLabel:
        if strict:
            raise
        return None


def _frame(group: Group[Cohort], change: Change, look: Look, shown: _Shown) -> bytes:
    """Write the change as it is seen, once for all that see it alike."""
    key = (group.view.shape, look, group.encoding)
    frame = shown.get(key)
    if frame is None:
        frame = shown[key] = group.encoding.frame(group.view.show(change, look))
    return frame


def _layout_of(relation: Relation, table: Table | None, catalog: Catalog) -> Layout:
    columns = () if table is None else table.columns
    return Layout(
        relation=relation,
        names=[column.name for column in columns],
        typeoids=[column.typeoid for column in columns],
        key=[] if table is None else list(table.key),
        types=catalog.types,
        ancestors=() if table is None else table.ancestors,
        columns={column.name: column.typeoid for column in columns},
        in_catalog=table is not None,
    )
