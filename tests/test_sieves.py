"""Sieves: what waits for an answer keeps its order, is bounded, and comes once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest

from tests.hubs import FakeCatalog, Sent, layout
from tests.postgres import async_wait_until
from walstream.access import Grant, Reader, Sight
from walstream.access.readers import Persona
from walstream.changes import Change, Column, Operation, Transaction
from walstream.live import sieves
from walstream.live.clients import Client, End
from walstream.live.encodings import JSON_LINES
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink
from walstream.live.streams import begin_at, serve
from walstream.live.subscriptions import Subscription
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.router import TablePattern
from walstream.vitals import RowSecurityVitals

ASKED: Final = layout("asked")
OPEN: Final = layout("open")
PERSONA: Final = Persona("member", '{"sub":"ann"}')


class Oracle:
    """Shows rows with an even id, when it is let."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[list[int]] = []

    async def prepare(self) -> None:
        """Be ready."""

    async def visible(
        self, sight: Sight, changes: Sequence[Change], masked: frozenset[str]
    ) -> list[bool]:
        assert sight.persona is PERSONA
        assert masked == frozenset()
        self.asked.append([change.row["id"] for change in changes])
        await self.may_answer.wait()
        return [change.row["id"] % 2 == 0 for change in changes]

    def vitals(self) -> RowSecurityVitals:
        return RowSecurityVitals()

    async def close(self) -> None:
        """Say nothing any more."""


class Place:
    """A hub with its sink, and who reads from it."""

    def __init__(self) -> None:
        self.oracle = Oracle()
        self.hub = Hub(FakeCatalog(), Recent(100_000, 1 << 30), self.oracle)
        self.sink = LiveSink("live", self.hub)
        self.lsn = 100
        self.tasks: list[asyncio.Task[Position]] = []

    async def begin(self) -> None:
        await self.sink.begin(Lsn(self.lsn), "history")

    async def client(self, *, is_asked: bool = True, since: str | None = None) -> Client:
        sights = [
            Sight("public.asked", persona=PERSONA if is_asked else None),
            Sight("public.open"),
        ]
        grants = tuple(Grant(TablePattern.parse(one.table), one) for one in sights)
        asked = [Subscription(TablePattern.parse("public.*"))]
        cohort = self.hub.cohort(asked, Reader("reader", grants=grants), JSON_LINES)
        client = Client(cohort, Sent(), 1 << 20)
        serving = serve(self.hub, client, await begin_at(self.hub, since), 60.0)
        self.tasks.append(asyncio.create_task(serving))
        if since is None:
            await async_wait_until(lambda: client in client.cohort.clients)
        return client

    async def insert(self, *identities: int) -> None:
        """Insert into the one table, and into the other each time."""
        self.lsn += 10
        at = Transaction(1, Lsn(self.lsn - 1), Lsn(self.lsn), "2026-11-22 12:00:00+00")
        changes = [
            Change(Operation.INSERT, one, at, 2 * place + second, columns(identity))
            for place, identity in enumerate(identities)
            for second, one in enumerate((ASKED, OPEN))
        ]
        await self.sink.take(changes)

    async def end(self) -> None:
        await self.sink.close()
        await asyncio.gather(*self.tasks)


def columns(identity: int) -> list[Column]:
    return [Column("id", msgspec.Raw(str(identity).encode()), 23)]


def seen(client: Client) -> list[tuple[str, int]]:
    return [(one["table"], one["row"]["id"]) for one in lines(client) if "operation" in one]


def lines(client: Client) -> list[dict[str, Any]]:
    outflow = client.outflow
    assert isinstance(outflow, Sent)
    return [json.loads(line) for line in outflow.lines]


def expected(*identities: int) -> list[tuple[str, int]]:
    both = [(table, one) for one in identities for table in ("asked", "open")]
    return [(table, one) for table, one in both if table == "open" or one % 2 == 0]


async def test_what_is_asked_about_holds_back_what_comes_behind_it() -> None:
    place = Place()
    await place.begin()
    client, other = await place.client(), await place.client(is_asked=False)
    place.oracle.may_answer.clear()
    await place.insert(1, 2, 3)
    await place.insert(4)
    assert seen(client) == [], "the order is kept"
    assert len(seen(other)) == 8, "nobody else waits"
    place.oracle.may_answer.set()
    await async_wait_until(lambda: seen(client) == expected(1, 2, 3, 4))
    await place.end()


async def test_who_waits_is_told_no_position_before_its_turn() -> None:
    place = Place()
    await place.begin()
    client = await place.client()
    await place.insert(2)
    await async_wait_until(lambda: seen(client) == expected(2))
    begun = place.hub.position
    assert place.hub.reached(client) == begun
    place.oracle.may_answer.clear()
    await place.insert(4)
    assert place.hub.reached(client) == begun
    late = await place.client()
    assert place.hub.reached(late) == place.hub.position > begun
    await place.end()
    end = lines(client)[-1]
    assert (end["event"], end["id"]) == ("end", str(begun))
    assert lines(late)[-1]["id"] == str(place.hub.position)


async def test_a_client_that_comes_late_gets_nothing_twice() -> None:
    place = Place()
    await place.begin()
    first = await place.client()
    place.oracle.may_answer.clear()
    await place.insert(2)
    await place.insert(4)
    late = await place.client()
    replayed = await place.client(since="beginning")
    await place.insert(6)
    place.oracle.may_answer.set()
    await async_wait_until(lambda: seen(first) == expected(2, 4, 6))
    await async_wait_until(lambda: seen(late) == expected(6))
    await async_wait_until(lambda: seen(replayed) == expected(2, 4, 6))
    assert first.cohort is late.cohort is replayed.cohort
    await place.end()


async def test_clients_whose_sieve_is_full_are_cut_off_and_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sieves, "MAX_WAITING", 10)
    place = Place()
    await place.begin()
    client, other = await place.client(), await place.client(is_asked=False)
    await place.insert(2)
    await async_wait_until(lambda: seen(client) == expected(2))
    place.oracle.may_answer.clear()
    for _ in range(3):
        await place.insert(4, 6)
    await async_wait_until(lambda: client.end is End.SLOW)
    assert len(seen(other)) == 14
    end = {"event": "end", "reason": "slow"}
    await async_wait_until(lambda: lines(client)[-1] == end)
    place.oracle.may_answer.set()
    again = await place.client(since=lines(client)[-2]["id"])
    await async_wait_until(lambda: seen(again) == expected(4, 6) * 3)
    await place.insert(8)
    await async_wait_until(lambda: seen(again) == [*expected(4, 6) * 3, *expected(8)])
    await place.end()


async def test_all_sieves_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieves, "MAX_WAITING_TOGETHER", 3)
    place = Place()
    await place.begin()
    client = await place.client()
    place.oracle.may_answer.clear()
    await place.insert(2, 4)
    await async_wait_until(lambda: client.end is End.SLOW)
    await async_wait_until(lambda: place.hub.vitals().cohorts == 0)
    place.oracle.may_answer.set()
    again = await place.client()
    await place.insert(6)
    await async_wait_until(lambda: seen(again) == expected(6))
    await place.end()


async def test_an_interruption_forgets_what_waits() -> None:
    place = Place()
    await place.begin()
    client = await place.client()
    place.oracle.may_answer.clear()
    await place.insert(2)
    place.lsn = 500
    await place.begin()
    await place.insert(4)
    place.oracle.may_answer.set()
    await async_wait_until(lambda: seen(client) == expected(4))
    assert lines(client)[0]["event"] == "reset"
    await place.end()


async def test_nobody_is_asked_for_nobody() -> None:
    """Whoever leaves takes along what waits for it."""
    place = Place()
    await place.begin()
    client = await place.client()
    place.oracle.may_answer.clear()
    await place.insert(2)
    client.finish(End.LEFT)
    await async_wait_until(lambda: place.hub.vitals().cohorts == 0)
    await place.insert(4)
    assert place.oracle.asked == [[2]]
    await place.end()


async def test_without_somebody_to_ask_nothing_is_shown() -> None:
    place = Place()
    place.hub = Hub(FakeCatalog(), Recent(1000, 1 << 20))
    place.sink = LiveSink("live", place.hub)
    await place.begin()
    client = await place.client()
    await place.insert(2, 4)
    await async_wait_until(lambda: seen(client) == [("open", 2), ("open", 4)])
    await place.end()
