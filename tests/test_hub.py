"""The hub gives each client what it would get if every change were looked at for it alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hubs import COLUMNS, TYPES, FakeCatalog, Sent, layout
from walstream.access import Grant, Reader, Sight
from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.filters import Literal, parse
from walstream.live import compiled
from walstream.live import hub as hub_module
from walstream.live.clients import Client, End
from walstream.live.encodings import JSON_LINES, Encoding
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.literals import Literals
from walstream.live.sink import LiveSink
from walstream.live.streams import Beginning, serve
from walstream.live.subscriptions import Subscription, named_columns
from walstream.live.views import View, literals_of
from walstream.lsn import Lsn
from walstream.offline import read_offline
from walstream.positions import Position
from walstream.projection import Mask, Projection
from walstream.realtime.encodings import ChannelEncoding
from walstream.realtime.frames import split
from walstream.realtime.messages import Version
from walstream.router import ALL_OPERATIONS, TablePattern

ROOT: Final = Relation("public", "root")
LAYOUTS: Final = (layout("one"), layout("two", key=()), layout("three", ROOT))


class SlowLiterals(Literals):
    """Gives way whenever something is compiled, as if the catalog were asked."""

    async def normalise(self, literals: Iterable[Literal], layout: Layout) -> dict[Literal, str]:
        await asyncio.sleep(0)
        return await super().normalise(literals, layout)


# What can happen

_HIDING: Final = Projection(exclude=["owner"])
_MASKING: Final = Projection(mask={"owner": Mask.parse("redact")})
_CONDITIONS: Final = (None, "owner=eq.x", "size=gt.1", "or(owner.eq.x,size.eq.2)", "owner=not.eq.x")
_FILTERS: Final = (
    *_CONDITIONS,
    "size=eq.1,owner=eq.x",
    "owner=in.(x,y)",
    "owner=is.null",
    "owner=match.^[xy]$",
)


def _where(text: str | None) -> Any:
    return None if text is None else parse(text)


grants = st.builds(
    lambda table, projection, where: Grant(
        TablePattern.parse(table), Sight(table, projection, _where(where))
    ),
    st.sampled_from(["public.one", "public.root", "*.*", "*.*", "*.*"]),
    st.sampled_from([None, None, _HIDING, _MASKING]),
    st.sampled_from([None, None, *_CONDITIONS]),
)
readers = st.builds(
    lambda some: Reader("reader", grants=tuple(some)), st.lists(grants, min_size=1, max_size=2)
)
subscriptions = st.builds(
    lambda table, operations, where, columns, leaving, told, with_key: Subscription(
        TablePattern.parse(table),
        operations or ALL_OPERATIONS,
        explicit=bool(operations),
        where=_where(where),
        columns=columns,
        leaving=leaving,
        tells_departure=told,
        with_key=with_key,
    ),
    st.sampled_from(["public.one", "public.root", "public.*", "public.*"]),
    st.one_of(
        st.just(frozenset[Operation]()),
        st.sets(st.sampled_from(sorted(ALL_OPERATIONS))).map(frozenset),
    ),
    st.sampled_from(_FILTERS),
    st.sampled_from([None, None, frozenset({"id"}), frozenset({"owner", "size"})]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
rows = st.fixed_dictionaries(
    {
        "id": st.integers(1, 3),
        "owner": st.sampled_from(["x", "y", "z", None]),
        "size": st.integers(0, 3),
    }
)
ALL: Final = Reader("reader", grants=(Grant(TablePattern.parse("*.*"), Sight("*.*")),))


def wants(table: str = "public.one", where: str | None = None) -> list[Subscription]:
    return [Subscription(TablePattern.parse(table), where=_where(where))]


MakeChange = Callable[[int], Change]


def _sent(row: dict[str, Any] | None) -> list[Column] | None:
    if row is None:
        return None
    return [
        Column(name, msgspec.Raw(msgspec.json.encode(value)), COLUMNS[name])
        for name, value in row.items()
    ]


@st.composite
def changes(draw: st.DrawFn) -> MakeChange:
    """A change that is made when its place is known; some rows are sent in part."""
    operation = draw(st.sampled_from(sorted(ALL_OPERATIONS)))
    shape = draw(st.sampled_from(LAYOUTS))
    new: dict[str, Any] | None = draw(rows)
    old: dict[str, Any] | None = draw(rows)
    unchanged: tuple[str, ...] = ()
    if operation in (Operation.DELETE, Operation.TRUNCATE):
        new = None
    if operation in (Operation.INSERT, Operation.TRUNCATE):
        old = None
    if old is not None and draw(st.booleans()):
        old = {name: old[name] for name in shape.key}
    if new is not None and operation is Operation.UPDATE and draw(st.integers(0, 3)) == 0:
        unchanged = ("owner",)
        del new["owner"]

    def make(number: int) -> Change:
        # Two changes in each transaction.
        transaction = Transaction(number, Lsn(number // 2), Lsn(100 + number // 2), "2026-01-01")
        return Change(
            operation, shape, transaction, number % 2 + 1, _sent(new), _sent(old), unchanged
        )

    return make


steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.lists(changes(), min_size=1, max_size=8)),
        st.tuples(
            st.just("come"),
            st.tuples(readers, st.lists(subscriptions, min_size=1, max_size=3), st.integers(0, 12)),
        ),
        st.tuples(
            st.just("come"), st.tuples(st.just(ALL), st.just(wants("public.*")), st.integers(0, 12))
        ),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.tuples(st.just("turn"), st.integers(1, 4)),
    ),
    min_size=3,
    max_size=25,
)


# What must come of it


def seen(cohort_of: Client, change: Change) -> bytes | None:
    """What one client gets of one change, by the rules alone."""
    cohort = cohort_of.cohort
    for subscription in cohort.subscriptions:
        covered = (change.layout.relation, *change.layout.ancestors)
        if not any(subscription.pattern.covers(relation) for relation in covered):
            continue
        sight = cohort.reader.sight(change.layout)
        if sight is None or not all(map(sight.reads, named_columns(subscription))):
            continue
        literals = literals_of(subscription, sight, change.layout)
        texts = {one: read_offline(one, TYPES) or "" for one in literals}
        view = View(subscription, sight, change.layout, texts)
        look = view.look(change)
        if look is not None:
            return cohort.encoding.form.write(view, change, look).strip()
    return None


def expected(
    client: Client, published: Iterable[Change], after: Position
) -> list[tuple[Position, bytes]]:
    found = []
    for change in published:
        frame = seen(client, change)
        if Position.of(change) > after and frame is not None:
            found.append((Position.of(change), frame))
    return found


def verify(client: Client, sent: Sent, published: Sequence[Change], after: Position) -> None:
    """Go through what came: all that is to come, once, in order, but for what a reset tells of."""
    due = expected(client, published, after)
    for line in sent.lines:
        note = json.loads(line)
        if "event" not in note:
            assert due
            assert line == due.pop(0)[1]
        elif note["event"] == "reset":
            position = Position.parse(note["position"])
            due = [one for one in due if one[0] > position]
    if client.end is not End.LEFT:
        assert not due


class Scenario:
    """A hub, and who comes and goes."""

    def __init__(self, kept: int) -> None:
        self.hub = Hub(FakeCatalog(), Recent(kept, 1 << 30))
        self.sink = LiveSink("live", self.hub)
        self.published: list[Change] = []
        self.clients: list[tuple[Client, Sent, Position, asyncio.Task[Any]]] = []

    async def run(self, script: Sequence[tuple[str, Any]]) -> None:
        await self.sink.begin(Lsn(1), "rules")
        for what, argument in script:
            match what:
                case "publish":
                    await self.publish(argument)
                case "come":
                    self.come(*argument)
                case "leave" if self.clients:
                    self.clients[argument % len(self.clients)][0].finish(End.LEFT)
                case "turn":
                    for _ in range(argument):
                        await asyncio.sleep(0)
        await self.settle()
        for client, sent, after, _ in self.clients:
            verify(client, sent, self.published, after)
        for client, *_ in self.clients:
            client.finish(End.LEFT)
        await asyncio.gather(*(task for *_, task in self.clients))
        assert_is_empty(self.hub)

    async def publish(self, made: Sequence[MakeChange]) -> None:
        first = len(self.published)
        some = [make(first + number) for number, make in enumerate(made)]
        self.published += some
        await self.sink.take(some)

    def come(
        self,
        reader: Reader,
        wanted: Sequence[Subscription],
        back: int,
        encoding: Encoding = JSON_LINES,
    ) -> None:
        """Come with what was published some changes ago."""
        place = len(self.published) - back
        begin = Position.of(self.published[place - 1]) if place > 0 else self.hub.history.begins
        sent = Sent()
        client = Client(self.hub.cohort(wanted, reader, encoding), sent, 1 << 30)
        beginning = Beginning(begin)
        if begin < self.hub.history.begins:
            beginning = Beginning(self.hub.position, "trimmed")
        task = asyncio.create_task(serve(self.hub, client, beginning, 60))
        self.clients.append((client, sent, begin, task))

    async def settle(self) -> None:
        """Wait until all that are not leaving have come."""
        for client, *_, task in self.clients:
            while client.end is None and client not in client.cohort.clients:
                assert not task.done()
                await asyncio.sleep(0)


def assert_is_empty(hub: Hub) -> None:
    """Nobody is there, and nothing is left of who was."""
    assert hub.client_count == 0
    assert not hub._cohorts
    for index in hub.compiled._indexes.values():
        assert not index._groups
        for found in (*index._found.values(), index._leaving):
            assert not found.scanned
            assert not found.by_column


@pytest.fixture(autouse=True)
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is published by itself, and there is room for two layouts of three."""
    monkeypatch.setattr(hub_module, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "MAX_LAYOUTS", 2)
    monkeypatch.setattr(hub_module, "Literals", SlowLiterals)


@given(steps, st.sampled_from([3, 10_000]))
@settings(max_examples=200, deadline=None)
def test_each_client_gets_what_it_alone_would_get(
    script: Sequence[tuple[str, Any]], kept: int
) -> None:
    """Whoever comes by replay at whatever moment, whoever leaves, however little is kept."""
    asyncio.run(Scenario(kept).run(script))


def inserts(count: int, shape: Layout = LAYOUTS[0]) -> list[MakeChange]:
    def make(number: int) -> Change:
        transaction = Transaction(number, Lsn(number), Lsn(100 + number), "2026-01-01")
        return Change(
            Operation.INSERT, shape, transaction, 1, _sent({"id": number, "owner": "x", "size": 1})
        )

    return [make] * count


async def test_two_hundred_that_come_and_leave_at_once_leave_nothing() -> None:
    """With a filter each, while changes are published."""
    scenario = Scenario(10_000)
    await scenario.sink.begin(Lsn(1), "rules")
    await scenario.publish(inserts(20))

    async def visit(number: int) -> None:
        scenario.come(ALL, wants(where=f"size=eq.{number % 50}"), number % 30)
        client, *_, task = scenario.clients[-1]
        for _ in range(number % 13):
            await asyncio.sleep(0)
        client.finish(End.LEFT)
        await task

    visits = [visit(number) for number in range(200)]
    await asyncio.gather(*visits, scenario.publish(inserts(50)))
    assert_is_empty(scenario.hub)
    assert scenario.hub.ended[End.LEFT] == 200


async def test_who_is_cancelled_leaves_too() -> None:
    """The server cancels what answers when it ends."""
    scenario = Scenario(10)
    await scenario.sink.begin(Lsn(1), "rules")
    scenario.come(ALL, wants(), 0)
    await scenario.settle()
    task = scenario.clients[0][-1]
    task.cancel()
    await asyncio.wait([task])
    assert_is_empty(scenario.hub)


async def test_who_does_not_read_is_cut_and_others_are_not() -> None:
    """What waits for it stays within its bound, and it is told why."""
    scenario = Scenario(10_000)
    await scenario.sink.begin(Lsn(1), "rules")
    scenario.come(ALL, wants(), 0)
    unread = Sent(is_read=False)
    slow = Client(scenario.hub.cohort(wants(), ALL, JSON_LINES), unread, 2000)
    task = asyncio.create_task(serve(scenario.hub, slow, Beginning(scenario.hub.position), 60))
    scenario.clients.append((slow, unread, scenario.hub.position, task))
    await scenario.settle()
    await scenario.publish(inserts(100))
    await task
    assert slow.end is End.SLOW
    assert json.loads(unread.lines[-1]) == {"event": "end", "reason": "slow"}
    assert scenario.hub.ended[End.SLOW] == 1
    client, sent, after, _ = scenario.clients[0]
    verify(client, sent, scenario.published, after)
    assert len(sent.lines) == 100


def test_what_is_kept_in_memory_is_bounded() -> None:
    """Old rows count, too, whether they have been looked at or not."""

    async def keep() -> int:
        recent = Recent(10_000, 100_000)
        old = msgspec.Raw(
            msgspec.json.encode([{"name": "x", "value": "y" * 10_000, "typeoid": 25}])
        )
        for number in range(1, 100):
            transaction = Transaction(number, Lsn(number), Lsn(number), "2026-01-01")
            await recent.append(
                [Change(Operation.UPDATE, LAYOUTS[0], transaction, 1, _sent({"id": 1}), old)]
            )
        pieces = [piece async for piece in recent.read(recent.begins, recent.position)]
        return sum(map(len, pieces))

    assert asyncio.run(keep()) < 10


def test_a_time_before_all_that_is_kept_is_not_known() -> None:
    """With nothing kept no time is: there may have been something."""

    def time(day: str) -> datetime:
        return datetime.fromisoformat(f"{day}T00:00:00+00:00")

    async def ask() -> list[Position | None]:
        recent = Recent(10, 1 << 20)
        await recent.interrupt(Lsn(5))
        answers = [await recent.position_before(time("2020-01-01"))]
        for number, day in ((10, "2026-01-01"), (11, "2026-01-03")):
            transaction = Transaction(number, Lsn(number), Lsn(number), f"{day} 00:00:00+00")
            await recent.append([Change(Operation.TRUNCATE, LAYOUTS[0], transaction, 1)])
        days = ("2025-12-31", "2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")
        return answers + [await recent.position_before(time(day)) for day in days]

    first, second = Position(Lsn(10), 1), Position(Lsn(11), 1)
    assert asyncio.run(ask()) == [None, None, None, first, first, second]


async def test_the_first_subscription_that_keeps_a_change_counts() -> None:
    """Also when it is found by a value, and a later one is not."""
    scenario = Scenario(10)
    await scenario.sink.begin(Lsn(1), "rules")
    pattern = TablePattern.parse("public.one")
    first = Subscription(pattern, where=_where("owner=eq.x"), columns=frozenset({"id"}))
    scenario.come(ALL, [first, Subscription(pattern)], 0)
    await scenario.settle()
    await scenario.publish(inserts(1))
    client, sent, after, _ = scenario.clients[0]
    verify(client, sent, scenario.published, after)
    assert [json.loads(line)["row"] for line in sent.lines] == [{"id": 0}]
    client.finish(End.LEFT)


async def test_a_channel_is_told_all_its_bindings_that_see_a_change() -> None:
    """Live and from the history; also of those that ask for the same, which have ids of their own.

    A client that gets less calls back less.
    """
    scenario = Scenario(10)
    await scenario.sink.begin(Lsn(1), "rules")
    everything, some = wants("public.one")[0], wants("public.one", "size=eq.1")[0]
    asked = [some, everything, wants("public.two")[0], everything]
    encoding = ChannelEncoding(Version.V2, "realtime:room", (4, 3, 2, 1))
    scenario.come(ALL, asked, 0, encoding)
    await scenario.settle()
    await scenario.publish(inserts(1))
    scenario.come(ALL, asked, 1, encoding)
    await scenario.settle()
    for client, sent, *_ in scenario.clients:
        ((_, text),) = split(b"".join(sent.pieces))
        assert json.loads(text)[4]["ids"] == [4, 3, 1]
        client.finish(End.LEFT)
    await asyncio.gather(*(task for *_, task in scenario.clients))
    assert_is_empty(scenario.hub)
