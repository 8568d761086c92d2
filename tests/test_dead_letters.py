"""Dead letters: what they hold, and what both stores promise."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import psycopg
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import StartCluster
from tests.postgres import Database
from tests.records import Records, learned_types
from tests.test_sql import run_twice
from walstream.changes import Change, Column, Layout, Message, Operation, Relation, Transaction
from walstream.dead_letters import (
    DeadLetter,
    DeadLetterStore,
    LetterQuery,
    PostgresStore,
    SqliteStore,
    StoredLetter,
    item_of,
    payload_of,
    position_of,
    typeoids_of,
)
from walstream.dead_letters import postgres as postgres_store
from walstream.dead_letters import sqlite as sqlite_store
from walstream.dead_letters.bounds import HeldUp
from walstream.dead_letters.letters import TEXT_BYTES
from walstream.errors import (
    AccessRefused,
    ConfigError,
    DatabaseUnfit,
    DeadLettersFull,
    DeadLetterStoreFailed,
    ReplayRuns,
)
from walstream.keys import NO_KEY, WHOLE_TABLE, conflict
from walstream.lsn import Lsn
from walstream.parking import Parking, Part
from walstream.projection import Mask, Projection
from walstream.values import Types

TIME: Final = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC)
TABLE: Final = "public.orders"
ALL: Final = LetterQuery()


def letter(number: int, key: bytes | int = 1, **fields: Any) -> DeadLetter:
    """A letter for the first change of the transaction that ends at a position."""
    values = b"[%d]" % key if isinstance(key, int) else key
    defaults: dict[str, Any] = {
        "route": "book",
        "change_id": f"{Lsn(number)}:1",
        "operation": Operation.UPDATE,
        "relation": Relation("public", "orders"),
        "keys": ((TABLE, values),),
        "payload": b'{"number":%d}' % number,
        "stored_at": TIME + timedelta(seconds=number),
        "attempts": 5,
        "error": "ValueError at handlers.py:12",
        "traceback": "handlers.py:12 book",
        "first_failed_at": TIME,
    }
    return DeadLetter(**{**defaults, **fields})


class MakeStore(Protocol):
    """Opens a store; a second one with the same arguments has the same letters."""

    async def __call__(self, **options: Any) -> DeadLetterStore:
        """Give ``slot``, ``max_letters``, ``max_bytes``."""


@pytest.fixture(params=["sqlite", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Makes a store that is not open."""
    dsn = request.getfixturevalue("database").dsn if kind == "postgres" else ""

    def build(**options: Any) -> DeadLetterStore:
        wanted = {"slot": "s", "max_letters": 1000, "max_bytes": 1 << 20, **options}
        if kind == "postgres":
            return PostgresStore(dsn, **wanted)
        return SqliteStore(tmp_path / "letters.sqlite3", **wanted)

    return build


@pytest.fixture
async def make(build: Callable[..., Any]) -> AsyncIterator[MakeStore]:
    stores: list[DeadLetterStore] = []

    async def make(**options: Any) -> DeadLetterStore:
        store: DeadLetterStore = build(**options)
        stores.append(store)
        await store.open()
        return store

    yield make
    for store in stores:
        await store.close()


@pytest.fixture
async def store(make: MakeStore) -> DeadLetterStore:
    return await make()


async def ids(store: DeadLetterStore, **query: Any) -> list[str]:
    """The ids of the changes of the letters that a query gives."""
    return [stored.letter.change_id for stored in await store.select(LetterQuery(**query))]


def id_of(number: int) -> str:
    return f"{Lsn(number)}:1"


# ---- The contract


async def test_what_is_added_is_there(store: DeadLetterStore) -> None:
    given = [
        letter(1),
        letter(2, key=b'["\xc3\xa9\\u0000"]', route="straße", error="E\N{SNOWMAN}"),
        letter(3, operation=None, relation=None, keys=(("jobs", NO_KEY),), payload=b"\0\xff"),
        letter(4, keys=((TABLE, b"[1]"), (TABLE, b"[2]")), relation=Relation("public", "orders_1")),
    ]
    await store.add(given)
    found = await store.select(ALL)
    assert [stored.letter for stored in found] == given
    assert [stored.id for stored in found] == sorted({stored.id for stored in found})
    assert {stored.last_failed_at for stored in found} == {TIME}
    assert await store.count(ALL) == 4
    assert await store.size() == (4, sum(one.size_bytes for one in given))


async def test_nothing_is_nothing(store: DeadLetterStore) -> None:
    await store.add([])
    assert await store.park([]) == []
    assert await store.drop([]) == 0
    assert await store.drop([17]) == 0
    assert await store.select(ALL) == []
    assert await store.blocked() == []
    assert await store.size() == (0, 0)


async def test_letters_outlive_the_store(make: MakeStore) -> None:
    first = await make()
    await first.add([letter(1)])
    await first.park([letter(2)])
    await first.close()
    second = await make()
    assert await ids(second) == [id_of(1), id_of(2)]
    assert await second.blocked() == [("book", (TABLE, b"[1]"))]


async def test_texts_that_a_database_cannot_hold_are_made_fit(store: DeadLetterStore) -> None:
    await store.add([letter(1, error="a\0b", traceback="c\udcffd")])
    [stored] = await store.select(ALL)
    assert (stored.letter.error, stored.letter.traceback) == ("a\N{REPLACEMENT CHARACTER}b", "c?d")


async def test_keys_may_be_long(store: DeadLetterStore) -> None:
    """A B-tree of Postgres refuses an entry of more than about 2,700 bytes."""
    long = b'["%b"]' % secrets.token_hex(50_000).encode()
    await store.add([letter(1, key=long)])
    assert await store.park([letter(2, key=long), letter(3, key=long[:-3] + b'"]')]) == [
        True,
        False,
    ]
    assert await ids(store, key_values=[long]) == [id_of(1), id_of(2)]


async def test_a_change_is_stored_once(store: DeadLetterStore) -> None:
    await store.add([letter(1), letter(1, error="another")])
    await store.add([letter(1, attempts=9, error="another"), letter(2)])
    [first, _] = await store.select(ALL)
    assert first.letter == letter(1)
    assert first.deliveries > 1


async def test_the_same_change_of_another_route_is_another_letter(store: DeadLetterStore) -> None:
    await store.add([letter(1), letter(1, route="mail")])
    assert await store.count(ALL) == 2


async def test_stores_of_other_slots_see_nothing(make: MakeStore) -> None:
    here, there = await make(), await make(slot="other")
    await here.add([letter(1)])
    await there.add([letter(1, error="other")])
    [stored] = await here.select(ALL)
    assert stored.letter == letter(1)
    assert await there.drop([stored.id]) == 0
    assert not await there.failed_again(stored.id, attempts=1, error="", traceback="", at=TIME)
    assert await there.settle([stored]) == [False]
    assert await here.count(ALL) == 1
    assert await there.park([letter(2)]) == [True]
    assert await here.size() == (1, letter(1).size_bytes)


async def test_a_parked_letter_that_is_tried_becomes_a_failed_one(store: DeadLetterStore) -> None:
    await store.add([letter(1)])
    assert await store.park([letter(2)]) == [True]
    await store.add([letter(2, error="tried")])
    [_, second] = await store.select(ALL)
    assert second.letter == msgspec.structs.replace(
        letter(2, error="tried"), stored_at=second.letter.stored_at
    )


async def test_a_failed_letter_is_not_parked_again(store: DeadLetterStore) -> None:
    await store.add([letter(1)])
    assert await store.park([letter(1)]) == [True]
    await store.add([letter(1, parked=True, attempts=0)])
    assert (await store.select(ALL))[0].letter == letter(1)


# ---- Parking


async def test_what_conflicts_is_parked_in_order(store: DeadLetterStore) -> None:
    await store.add([letter(1, key=1), letter(2, key=b'["a"]', route="mail")])
    asked = [
        letter(3, key=1),
        letter(4, key=2),
        letter(5, key=b'["a"]'),
        letter(6, key=1, route="mail"),
        letter(7, keys=((TABLE, b"[2]"), (TABLE, b"[1]"))),
        letter(8, key=2),
        letter(9, keys=(("public.others", b"[1]"),)),
    ]
    assert await store.park(asked) == [True, False, False, False, True, True, False]
    found = await store.select(LetterQuery(parked=True))
    assert [stored.letter.change_id for stored in found] == [id_of(n) for n in (3, 7, 8)]
    first = found[0].letter
    assert (first.attempts, first.error, first.traceback, first.first_failed_at) == (
        0,
        "",
        "",
        None,
    )
    assert first.parked
    assert found[0].last_failed_at is None


@pytest.mark.parametrize("values", [b"[1]", NO_KEY, WHOLE_TABLE])
async def test_a_whole_table_waits_for_all_and_all_wait_for_it(
    store: DeadLetterStore, values: bytes
) -> None:
    await store.add([letter(1, key=values)])
    assert await store.park([letter(2, key=WHOLE_TABLE)]) == [True]
    assert await store.park([letter(3, key=5)]) == [True]
    others = (("public.others", WHOLE_TABLE),)
    assert await store.park([letter(4, keys=others)]) == [False]


async def test_what_belongs_together_is_parked_together(store: DeadLetterStore) -> None:
    """Also what nothing holds up: a replay must not see a part of a transaction."""
    whole = [
        letter(2, key=7),
        letter(2, key=1, change_id="0/2:2"),
        letter(2, key=8, change_id="0/2:3"),
    ]
    assert await store.park(whole, together=True) == [False, False, False]
    assert await store.count(ALL) == 0
    await store.add([letter(1)])
    assert await store.park(whole, together=True) == [True, True, True]
    found = await store.select(LetterQuery(parked=True))
    assert [one.letter.change_id for one in found] == ["0/2:1", "0/2:2", "0/2:3"]
    assert {one.letter.attempts for one in found} == {0}
    assert await store.park(whole, together=True) == [True, True, True]
    assert [one.deliveries for one in await store.select(LetterQuery(parked=True))] == [2, 2, 2]


async def test_together_some_that_are_here_take_the_others_along(store: DeadLetterStore) -> None:
    await store.add([letter(2, key=7)])
    assert await store.park(
        [letter(2, key=8, change_id="0/2:2"), letter(2, key=7)], together=True
    ) == [True, True]
    assert await ids(store) == ["0/2:1", "0/2:2"]


async def test_what_is_together_and_has_no_room_is_not_parked(make: MakeStore) -> None:
    store = await make(max_letters=2)
    await store.add([letter(1)])
    with pytest.raises(DeadLettersFull):
        await store.park([letter(2), letter(2, key=8, change_id="0/2:2")], together=True)
    assert await ids(store) == [id_of(1)]


async def test_a_transaction_is_parked_in_one_step(store: DeadLetterStore) -> None:
    """A replay that comes between two steps would deliver a part of it."""
    parking = Parking(store)
    await store.add([letter(1)])
    parts: list[Part] = [
        ("book", change(2), ((TABLE, b"[1]"),)),
        ("book", Message("jobs", "", Lsn(1), change(2).transaction, 2), (("jobs", NO_KEY),)),
    ]
    steps: list[int] = []

    class Counting:
        async def park(self, *letters: Any, **options: Any) -> list[bool]:
            is_here = await store.park(*letters, **options)
            steps.append(await store.count(ALL))
            return is_here

    parking._store = Counting()  # type: ignore[assignment]
    assert await parking.park(parts)
    assert steps == [3]


async def test_an_earlier_change_that_comes_again_has_its_place(store: DeadLetterStore) -> None:
    """After a crash: a later change of its key must not be replayed before it."""
    await store.add([letter(5)])
    assert await store.park([letter(4), letter(6)]) == [True, True]
    await store.add([letter(3)])
    assert await ids(store) == [id_of(3), id_of(4), id_of(5), id_of(6)]


async def test_changes_of_a_transaction_have_an_order(store: DeadLetterStore) -> None:
    changes = ["0/5:9", "0/5:10", "0/5:11", "0/10:1", "1/0:1", "FFFFFFFF/FFFFFFFF:1"]
    await store.add([letter(5, change_id=change_id) for change_id in reversed(changes)])
    assert await ids(store) == changes


async def test_a_message_comes_after_the_transaction_that_ends_where_it_begins(
    store: DeadLetterStore,
) -> None:
    await store.add([letter(5, change_id="0/5"), letter(5), letter(6)])
    assert await ids(store) == ["0/5:1", "0/5", "0/6:1"]


async def test_a_key_is_free_when_its_letters_are_gone(store: DeadLetterStore) -> None:
    await store.add([letter(1)])
    await store.park([letter(2)])
    stored = await store.select(ALL)
    assert await store.drop([stored[0].id]) == 1
    assert await store.park([letter(3)]) == [True]
    assert await store.drop([one.id for one in await store.select(ALL)]) == 2
    assert await store.park([letter(4)]) == [False]
    assert await store.blocked() == []


async def test_blocked_names_each_key_once(store: DeadLetterStore) -> None:
    await store.add(
        [letter(1), letter(2), letter(3, key=WHOLE_TABLE), letter(4, route="mail", key=NO_KEY)]
    )
    assert sorted(await store.blocked()) == [
        ("book", (TABLE, b"")),
        ("book", (TABLE, b"[1]")),
        ("mail", (TABLE, b"*")),
    ]


# ---- Replay


async def test_failing_again_is_noted(store: DeadLetterStore) -> None:
    await store.add([letter(1)])
    await store.park([letter(2)])
    later = TIME + timedelta(days=1)
    for stored in await store.select(ALL):
        assert await store.failed_again(
            stored.id, attempts=7, error="again", traceback="there", at=later
        )
    first, second = await store.select(ALL)
    assert (first.letter.first_failed_at, first.last_failed_at) == (TIME, later)
    assert (second.letter.first_failed_at, second.last_failed_at) == (later, later)
    assert not second.letter.parked
    assert {one.letter.attempts for one in (first, second)} == {7}
    assert {one.letter.error for one in (first, second)} == {"again"}
    assert not await store.failed_again(999, attempts=1, error="", traceback="", at=later)


async def test_a_settled_letter_is_gone_unless_it_came_again(store: DeadLetterStore) -> None:
    await store.add([letter(1)])
    [stored] = await store.select(ALL)
    assert await store.park([letter(1)]) == [True]
    await store.add([letter(2)])
    [_, other] = await store.select(ALL)
    assert await store.settle([stored, other]) == [False, True]
    [stored] = await store.select(ALL)
    assert await store.settle([stored]) == [True]
    assert await store.settle([stored]) == [False], "another one has removed it"
    assert await store.settle([]) == []
    assert await store.count(ALL) == 0


# ---- The bound


async def test_a_full_store_refuses_all_of_a_call(make: MakeStore) -> None:
    store = await make(max_letters=3)
    await store.add([letter(1), letter(2, key=2)])
    with pytest.raises(DeadLettersFull, match="2 of at most 3") as caught:
        await store.add([letter(3, key=3), letter(4, key=4)])
    assert "max_letters" in caught.value.hint
    with pytest.raises(DeadLettersFull):
        await store.park([letter(5), letter(6)])
    assert await store.count(ALL) == 2
    assert await store.park([letter(5)]) == [True]
    await store.add([letter(1), letter(2)])
    assert await store.park([letter(7, key=7)]) == [False]
    assert await store.drop([(await store.select(ALL))[0].id]) == 1
    await store.add([letter(8)])


async def test_bytes_are_bounded_too(make: MakeStore) -> None:
    store = await make(max_bytes=2500)
    await store.add([letter(1, payload=b"x" * 1000), letter(2, payload=b"x" * 1000)])
    with pytest.raises(DeadLettersFull, match="at most 2500"):
        await store.add([letter(3, payload=b"x" * 1000)])
    second = await make(max_bytes=2500)
    with pytest.raises(DeadLettersFull):
        await second.park([letter(3, payload=b"x" * 1000)])


async def test_the_size_follows_what_is_written_later(store: DeadLetterStore) -> None:
    async def measured() -> tuple[int, int]:
        found = await store.select(ALL)
        sizes = [one.letter.size_bytes for one in found]
        assert [one.size_bytes for one in found] == sizes
        return len(sizes), sum(sizes)

    await store.add([letter(1, error="\N{SNOWMAN}\0")])
    await store.park([letter(2)])
    assert await store.size() == await measured()
    await store.add([letter(2, traceback="\N{SNOWMAN}" * 100)])
    assert await store.size() == await measured()
    for stored in await store.select(ALL):
        text = "\N{SNOWMAN}\0x" * stored.id
        await store.failed_again(stored.id, attempts=6, error=text, traceback=text * 9, at=TIME)
    assert await store.size() == await measured()


async def test_long_errors_and_tracebacks_are_cut(store: DeadLetterStore) -> None:
    long = "first" + "\N{SNOWMAN}" * 100_000 + "last"
    await store.add([letter(1, error=long, traceback=long), letter(2, key=2)])
    [_, second] = await store.select(ALL)
    await store.failed_again(second.id, attempts=6, error=long, traceback=long, at=TIME)
    for stored in await store.select(ALL):
        for text in (stored.letter.error, stored.letter.traceback):
            assert len(text.encode()) <= TEXT_BYTES
            assert text.startswith("first\N{SNOWMAN}")
            assert text.endswith("\N{SNOWMAN}last")
            assert "\n[...]\n" in text
    assert await store.size() == (2, sum(one.letter.size_bytes for one in await store.select(ALL)))


async def test_room_that_another_process_has_made_is_used(make: MakeStore) -> None:
    daemon, command_line = await make(max_letters=2), await make()
    for number in range(1, 20, 2):
        await daemon.add([letter(number), letter(number + 1)])
        await command_line.drop([stored.id for stored in await command_line.select(ALL)])


# ---- Queries


async def test_letters_are_found_by_what_they_are(store: DeadLetterStore) -> None:
    partition = Relation("public", "orders_2026")
    await store.add(
        [
            letter(1),
            letter(2, key=2, route="mail", operation=Operation.DELETE),
            letter(3, key=3, relation=partition, error="KeyError at x.py:1"),
            letter(4, operation=None, relation=None, keys=(("jobs", b"[1]"),)),
        ]
    )
    await store.park([letter(5)])
    first = (await store.select(ALL))[0].id
    expected: dict[tuple[int, ...], list[dict[str, Any]]] = {
        (1, 2, 3, 4, 5): [{}, {"operation": None}],
        (2,): [{"route": "mail"}, {"operation": "delete"}, {"key_values": [b"[2]"]}],
        (3,): [
            {"table": "public.orders_2026"},
            {"error": "keyERROR"},
            {"error": "x.py", "route": "book"},
        ],
        (4,): [{"operation": "message"}, {"table": "jobs"}],
        (1, 2, 3, 5): [{"table": TABLE}],
        (1, 4, 5): [{"key_values": [b"[1]", b"[17]"]}],
        (5,): [{"parked": True}, {"stored_after": TIME + timedelta(seconds=5)}],
        (1, 2, 3, 4): [{"parked": False}, {"stored_before": TIME + timedelta(seconds=5)}],
        (1, 2): [{"limit": 2}],
        (1,): [{"ids": [first, 999]}],
        (): [{"ids": []}, {"route": "x"}, {"key_values": []}, {"error": "%"}, {"table": "?"}],
    }
    for numbers, queries in expected.items():
        for query in queries:
            assert await ids(store, **query) == [id_of(number) for number in numbers], query
            assert await store.count(LetterQuery(**query)) == len(numbers)


async def test_letters_come_in_pages(store: DeadLetterStore) -> None:
    numbers = list(range(1, 24))
    random.Random(3).shuffle(numbers)  # noqa: S311 - the same each time
    for number in numbers:
        await store.add([letter(number), letter(number, route="mail")])
    found: list[StoredLetter] = []
    while page := await store.select(
        LetterQuery(limit=5, after=found[-1].place if found else None), payloads=False
    ):
        found += page
        await store.drop([page[0].id])
    assert [one.letter.change_id for one in found] == [
        id_of(number) for number in range(1, 24) for _ in range(2)
    ]
    assert {(one.letter.payload, one.letter.traceback) for one in found} == {(b"", "")}


# ---- Against a model


class Model:
    """A store as its contract is written, in a list."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            place = self._place(letter)
            if place is None:
                self.letters.append(letter)
            elif self.letters[place].parked and not letter.parked:
                self.letters[place] = letter

    def park(self, letters: Sequence[DeadLetter]) -> list[bool]:
        here = []
        for letter in letters:
            held_up = any(
                other.route == letter.route and conflict(other.keys, letter.keys)
                for other in self.letters
            )
            if self._place(letter) is None and held_up:
                self.letters.append(msgspec.structs.replace(letter, parked=True, attempts=0))
            here.append(self._place(letter) is not None)
        return here

    def park_together(self, letters: Sequence[DeadLetter]) -> list[bool]:
        meant = Model()
        meant.letters = list(self.letters)
        if not any(meant.park(letters)):
            return [False] * len(letters)
        self.add([msgspec.structs.replace(one, parked=True, attempts=0) for one in letters])
        return [True] * len(letters)

    def drop(self, identity: tuple[str, str]) -> None:
        self.letters = [one for one in self.letters if (one.route, one.change_id) != identity]

    def facts(self) -> list[tuple[Any, ...]]:
        return sorted((*one.position, one.route, one.parked, one.attempts) for one in self.letters)

    def _place(self, letter: DeadLetter) -> int | None:
        for place, other in enumerate(self.letters):
            if (other.route, other.change_id) == (letter.route, letter.change_id):
                return place
        return None


KEYS: Final = st.sampled_from([b"[1]", b"[2]", b"[3]", NO_KEY, WHOLE_TABLE])
LETTERS: Final = st.builds(
    lambda number, keys, route, parked: letter(
        number,
        keys=tuple((TABLE, values) for values in keys),
        route=route,
        parked=parked,
        attempts=0 if parked else 5,
        first_failed_at=None if parked else TIME,
    ),
    st.integers(1, 12),
    st.lists(KEYS, min_size=1, max_size=2),
    st.sampled_from(["book", "mail"]),
    st.sampled_from([False, False, True]),
)
STEPS: Final = st.lists(
    st.tuples(st.sampled_from(["add", "park", "park together"]), st.lists(LETTERS, max_size=6))
    | st.tuples(st.just("drop"), st.integers(0, 20)),
    max_size=12,
)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@given(steps=STEPS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_store_does_what_the_model_does(
    runner: asyncio.Runner, build: Callable[..., Any], steps: list[tuple[str, Any]]
) -> None:
    async def compare() -> None:
        model = Model()
        store: DeadLetterStore = build(slot=secrets.token_hex(8))
        await store.open()
        try:
            for step, argument in steps:
                found = await store.select(ALL)
                if step == "add":
                    model.add(argument)
                    await store.add(argument)
                elif step == "park":
                    assert await store.park(argument) == model.park(argument)
                elif step == "park together":
                    parked = await store.park(argument, together=True)
                    assert parked == model.park_together(argument)
                elif found:
                    dropped = found[argument % len(found)]
                    await store.drop([dropped.id])
                    model.drop((dropped.letter.route, dropped.letter.change_id))
                await self_check(store, model)
        finally:
            await store.close()

    runner.run(compare())


async def self_check(store: DeadLetterStore, model: Model) -> None:
    found = [stored.letter for stored in await store.select(ALL)]
    assert [one.position for one in found] == sorted(one.position for one in found)
    assert (
        sorted((*one.position, one.route, one.parked, one.attempts) for one in found)
        == model.facts()
    )
    assert set(await store.blocked()) == {(one.route, key) for one in found for key in one.keys}


@given(st.lists(LETTERS, max_size=20), LETTERS)
def test_what_is_held_up_is_what_conflicts(letters: list[DeadLetter], later: DeadLetter) -> None:
    held_up = HeldUp()
    for one in letters:
        held_up.add(one)
    assert (later in held_up) == any(
        one.route == later.route and conflict(one.keys, later.keys) for one in letters
    )


# ---- Two processes, and a crash


async def test_parking_and_dropping_at_once_leaves_no_gap(make: MakeStore) -> None:
    """A change is parked, or nothing before it is left; what is parked can be dropped."""
    daemon, replay = await make(), await make()
    await daemon.add([letter(1)])
    dropped: list[str] = []
    finished = asyncio.Event()

    async def drop_all() -> None:
        while not finished.is_set() or await replay.count(ALL):
            for stored in await replay.select(ALL):
                assert await replay.settle([stored]) == [True]
                dropped.append(stored.letter.change_id)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(drop_all())
        for number in range(2, 150):
            [is_parked] = await daemon.park([letter(number)])
            if not is_parked:
                assert await daemon.count(ALL) == 0
                await daemon.add([letter(number)])
        finished.set()
    assert dropped == [id_of(number) for number in range(1, 150)]


async def test_two_processes_do_not_replay_at_once(make: MakeStore) -> None:
    first, second, elsewhere = await make(), await make(), await make(slot="other")
    async with first.exclusive() as verify, elsewhere.exclusive():
        await verify()
        with pytest.raises(ReplayRuns, match="replays the dead letters of the slot s"):
            async with second.exclusive():
                pass
        await second.add([letter(1)])
    async with second.exclusive():
        assert await second.count(ALL) == 1


async def test_many_open_a_new_store_at_once(make: MakeStore) -> None:
    stores = await asyncio.gather(*[make(slot=f"slot_{number}") for number in range(8)])
    await asyncio.gather(*[store.add([letter(1)]) for store in stores])
    assert [await store.count(ALL) for store in stores] == [1] * 8


async def test_two_add_at_once_and_nothing_is_there_twice(make: MakeStore) -> None:
    first, second = await make(), await make()

    async def add(store: DeadLetterStore) -> None:
        for number in range(1, 60):
            await store.add([letter(number)])

    await asyncio.gather(add(first), add(second))
    assert await ids(first) == [id_of(number) for number in range(1, 60)]


ADDING: Final = """
import asyncio, sys
from datetime import UTC, datetime
from tests.test_dead_letters import letter
from walstream.dead_letters import PostgresStore, SqliteStore
from pathlib import Path

async def main(kind, place):
    options = dict(slot="s", max_letters=10**6, max_bytes=10**9)
    postgres = kind == "postgres"
    store = PostgresStore(place, **options) if postgres else SqliteStore(Path(place), **options)
    await store.open()
    for number in range(1, 100_000, 3):
        await store.add([letter(number + more, payload=b"x" * 5000) for more in range(3)])
        print(number, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("count", [1, 17, 120])
async def test_what_was_added_before_a_kill_is_there(
    kind: str, make: MakeStore, request: pytest.FixtureRequest, tmp_path: Path, count: int
) -> None:
    place = (
        request.getfixturevalue("database").dsn
        if kind == "postgres"
        else str(tmp_path / "letters.sqlite3")
    )
    with subprocess.Popen(  # noqa: ASYNC220 - a test may wait
        [sys.executable, "-c", ADDING, kind, place],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as process:
        assert process.stdout is not None
        returned = [int(process.stdout.readline()) for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        returned += [int(line) for line in process.stdout if line.endswith("\n")]
    store = await make(max_letters=10**6, max_bytes=10**9)
    found = await ids(store)
    assert set(found) >= {id_of(number + more) for number in returned for more in range(3)}
    assert len(found) % 3 == 0, "a call is stored whole or not at all"
    await store.add([letter(10**6)])


# ---- SQLite


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = sqlite(tmp_path / "letters.sqlite3")
    await store.open()
    yield store
    await store.close()


def sqlite(path: Path) -> SqliteStore:
    return SqliteStore(path, slot="s", max_letters=1000, max_bytes=1 << 20)


async def refused(work: Awaitable[object]) -> DeadLetterStoreFailed:
    with pytest.raises(DeadLetterStoreFailed) as caught:
        await work
    assert caught.value.hint
    return caught.value


async def test_the_file_is_for_its_owner_only(file: SqliteStore) -> None:
    await file.add([letter(1)])
    found = list(file.path.parent.glob("letters*"))
    assert len(found) > 1, "the log is there"
    assert {stat.S_IMODE(one.stat().st_mode) for one in found} == {0o600}


async def test_what_is_dropped_is_gone_from_the_file(file: SqliteStore) -> None:
    await file.add([letter(1, payload=b"a secret of a row" * 1000)])
    await file.drop([(await file.select(ALL))[0].id])
    await file.close()
    assert b"a secret of a row" not in file.path.read_bytes()
    await file.open()


async def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    error = await refused(sqlite(tmp_path / "missing" / "x").open())
    assert "missing is not there" in error.message
    assert "dead_letters.path" in error.hint


async def test_a_folder_is_no_file(tmp_path: Path) -> None:
    error = await refused(sqlite(tmp_path).open())
    assert "not a regular file" in error.message


async def test_a_store_that_is_not_there_is_not_made_to_be_read(tmp_path: Path) -> None:
    error = await refused(sqlite(tmp_path / "x").open(create=False))
    assert "no file of dead letters" in error.message
    assert not (tmp_path / "x").exists()


async def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("not a database " * 1000)
    error = await refused(sqlite(path).open())
    assert str(path) in error.message
    assert "file is not a database" in error.message
    assert path.read_text() == "not a database " * 1000


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = path.read_bytes()
    error = await refused(sqlite(path).open())
    assert "another program" in error.message
    assert path.read_bytes() == before


async def test_a_newer_file_is_refused(file: SqliteStore) -> None:
    await file.close()
    connection = sqlite3.connect(file.path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    error = await refused(file.open())
    assert "schema version 2" in error.message
    assert "later version" in error.hint


async def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """As a crash between making it and its tables leaves it."""
    path = tmp_path / "empty"
    path.touch()
    store = sqlite(path)
    await store.open(create=False)
    await store.add([letter(1)])
    await store.close()


async def test_a_damaged_file_is_told(file: SqliteStore) -> None:
    await file.add([letter(number, payload=os.urandom(3000)) for number in range(1, 100)])
    await file.close()
    content = bytearray(file.path.read_bytes())
    content[8192:] = os.urandom(len(content) - 8192)
    file.path.write_bytes(content)

    async def use() -> None:
        await file.open()
        await file.select(ALL)

    error = await refused(use())
    assert str(file.path) in error.message
    assert "sqlite3" in error.hint


async def test_a_full_disk_is_told_and_nothing_is_stored(file: SqliteStore) -> None:
    await file.add([letter(1)])
    connection = file._opened
    [(pages,)] = connection.execute("PRAGMA page_count").fetchall()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    error = await refused(file.add([letter(2), letter(3, payload=b"x" * 100_000)]))
    assert "full" in error.message
    assert "free space" in error.hint
    assert await ids(file) == [id_of(1)]


async def test_a_read_only_file_is_told(file: SqliteStore) -> None:
    file._opened.execute("PRAGMA query_only = ON")
    error = await refused(file.add([letter(1)]))
    assert "readonly" in error.message
    assert "writable" in error.hint


async def test_a_file_that_others_hold_for_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_SECONDS", 0.01)
    store = sqlite(tmp_path / "letters.sqlite3")
    await store.open()
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    error = await refused(store.add([letter(1)]))
    assert "locked" in error.message
    other.execute("ROLLBACK")
    other.close()
    await store.add([letter(1)])
    await store.close()


@pytest.mark.parametrize("after", ["removed", "replaced"])
async def test_letters_do_not_go_into_a_file_that_is_elsewhere(
    file: SqliteStore, after: str
) -> None:
    await file.add([letter(1)])
    file.path.rename(file.path.with_suffix(".away"))
    if after == "replaced":
        file.path.touch()
    error = await refused(file.add([letter(2)]))
    assert "removed or replaced" in error.message


async def test_a_store_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeadLetterStoreFailed, match="not open"):
        await sqlite(tmp_path / "x").add([letter(1)])


async def test_other_times_zones_are_the_same_time(file: SqliteStore) -> None:
    zone = datetime.fromisoformat("2026-01-31T23:00:00+11:00").tzinfo
    await file.add([letter(1, stored_at=TIME.astimezone(zone))])
    assert await ids(file, stored_after=TIME, stored_before=TIME + timedelta(microseconds=1))


async def test_a_file_that_others_may_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "letters"
    for mode, is_told in ((0o600, False), (0o640, True), (0o604, True)):
        path.touch()
        path.chmod(mode)
        with structlog.testing.capture_logs() as logs:
            store = sqlite(path)
            await store.open()
            await store.close()
        events = [(one["event"], one["log_level"], one["mode"]) for one in logs]
        expected = [("dead_letters_readable", "warning", f"{mode:04o}")] if is_told else []
        assert events == expected


async def test_a_lock_that_cannot_be_opened_is_named(file: SqliteStore) -> None:
    path = file.path.with_name(f"{file.path.name}-replay-s")
    path.mkdir()
    with pytest.raises(DeadLetterStoreFailed, match=re.escape(str(path))):
        async with file.exclusive():
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_lock_that_root_has_made_is_the_owners(file: SqliteStore) -> None:
    os.chown(file.path, 12345, 12346)
    async with file.exclusive():
        pass
    made = file.path.with_name(f"{file.path.name}-replay-s").stat()
    assert (made.st_uid, made.st_gid) == (12345, 12346)


async def test_a_lock_is_no_link(file: SqliteStore, tmp_path: Path) -> None:
    """Root would give away what it leads to."""
    target = tmp_path / "another"
    file.path.with_name(f"{file.path.name}-replay-s").symlink_to(target)
    with pytest.raises(DeadLetterStoreFailed):
        async with file.exclusive():
            pass
    assert not target.exists()


# ---- Postgres


def in_postgres(dsn: str, **options: Any) -> PostgresStore:
    return PostgresStore(dsn, **{"slot": "s", "max_letters": 1000, "max_bytes": 1 << 20, **options})


@pytest.fixture
async def table(database: Database) -> AsyncIterator[PostgresStore]:
    store = in_postgres(database.dsn, schema='Odd "na%me')
    await store.open()
    yield store
    await store.close()


def end_sessions(database: Database) -> None:
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


@pytest.mark.parametrize("schema", ["a?b", "{keys}", "a{schema}b", "}{letters", "\N{SNOWMAN}%s"])
async def test_a_schema_may_have_any_name(database: Database, schema: str) -> None:
    store = in_postgres(database.dsn, schema=schema)
    await store.open()
    await store.add([letter(1)])
    assert await ids(store, route="book", table=TABLE, key_values=[b"[1]"]) == [id_of(1)]
    assert await store.count(LetterQuery(key_values=[b"[1]"])) == 1
    await store.close()


@pytest.mark.parametrize("schema", ["", "a\0b", "x" * 64, "\N{SNOWMAN}" * 22])
def test_a_schema_that_cannot_be_is_refused(schema: str) -> None:
    with pytest.raises(ConfigError, match=r"dead_letters\.schema: found"):
        in_postgres("", schema=schema)


async def test_times_are_utc_wherever_the_server_is(database: Database) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET timezone = 'Australia/Sydney'")
    store = in_postgres(database.dsn)
    await store.open()
    await store.add([letter(1)])
    [stored] = await store.select(ALL)
    times = [stored.letter.stored_at, stored.letter.first_failed_at, stored.last_failed_at]
    assert [str(time) for time in times] == [str(TIME + timedelta(seconds=1)), str(TIME), str(TIME)]
    await store.close()


async def test_a_lost_connection_is_replaced(database: Database, table: PostgresStore) -> None:
    for number in range(1, 6):
        await table.add([letter(number)])
        end_sessions(database)
    assert await ids(table) == [id_of(number) for number in range(1, 6)]


async def test_a_replay_whose_lock_is_lost_is_told(
    database: Database, table: PostgresStore
) -> None:
    await table.open()
    async with table.exclusive() as verify:
        await verify()
        database.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'walstream' AND state = 'idle in transaction'"
        )
        with pytest.raises(DeadLetterStoreFailed, match="dead letters in the schema"):
            await verify()
    async with table.exclusive() as verify:
        await verify()
        database.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'walstream' AND state = 'idle in transaction'"
        )


async def test_a_server_that_is_gone_is_told(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    store = in_postgres(cluster.conninfo())
    await store.open()
    await store.add([letter(1)])
    cluster.stop()
    error = await refused(store.add([letter(2)]))
    assert "no connection to the server" in error.message
    cluster.start()
    await store.add([letter(2)])
    assert await ids(store) == [id_of(1), id_of(2)]
    await store.close()
    cluster.stop()
    assert "no connection" in (await refused(in_postgres(cluster.conninfo()).open())).message


async def test_a_cancelled_call_leaves_no_transaction_open(
    database: Database, table: PostgresStore
) -> None:
    await table.add([letter(1)])
    with database.connect() as other, other.transaction():
        other.execute(b'LOCK TABLE "Odd ""na%me".dead_letters')
        adding = asyncio.create_task(table.add([letter(2)]))
        await asyncio.sleep(0)
        with suppress(TimeoutError):
            await asyncio.wait_for(adding, 0.2)
    await table.add([letter(3)])
    assert id_of(3) in await ids(table)


async def test_a_lock_that_others_hold_for_long_is_told(
    database: Database, table: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "LOCK_SECONDS", 0.01)
    with database.connect() as other, other.transaction():
        other.execute(b'LOCK TABLE "Odd ""na%me".dead_letters')
        error = await refused(table.add([letter(2)]))
    assert "dead letters in the schema" in error.message
    await table.add([letter(2)])


async def test_commits_are_durable_whatever_the_database_says(database: Database) -> None:
    database.execute(
        f"ALTER DATABASE {database.name} SET synchronous_commit = off;"
        f"ALTER DATABASE {database.name} SET search_path = ''"
    )
    store = in_postgres(database.dsn)
    await store.open()
    [[setting]] = await store._rows("SELECT current_setting('synchronous_commit')", [])
    assert setting == "on"
    await store.close()


ROLE_SECRET: Final = secrets.token_hex(8)


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may do nothing but connect, also where the server wants a password."""
    name = f"Letters {secrets.token_hex(4)}"
    database.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{ROLE_SECRET}'")
    yield name
    database.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


async def test_a_role_that_may_not_make_the_tables_is_told_what_to_run(
    database: Database, role: str
) -> None:
    dsn = psycopg.conninfo.make_conninfo(database.dsn, user=role, password=ROLE_SECRET)
    store = in_postgres(dsn)
    with pytest.raises(AccessRefused, match="may not make the tables") as caught:
        await store.open()
    statement = f'CREATE SCHEMA "walstream" AUTHORIZATION "{role}"'
    assert statement in caught.value.hint
    database.execute(statement)
    await store.open()
    await store.add([letter(1)])
    await store.close()


async def test_a_role_that_may_not_use_the_tables_is_told_what_to_run(
    database: Database, role: str
) -> None:
    owner = in_postgres(database.dsn)
    await owner.open()
    await owner.close()
    store = in_postgres(
        psycopg.conninfo.make_conninfo(database.dsn, user=role, password=ROLE_SECRET)
    )
    with pytest.raises(AccessRefused, match="may not use the tables") as caught:
        await store.open()
    database.execute(caught.value.hint)
    await store.open()
    await store.add([letter(1)])
    assert await store.drop([(await store.select(ALL))[0].id]) == 1
    await store.close()


async def test_tables_that_are_not_there_are_not_made_to_be_read(database: Database) -> None:
    error = await refused(in_postgres(database.dsn).open(create=False))
    assert "no table of dead letters" in error.message
    assert database.execute("SELECT FROM pg_namespace WHERE nspname = 'walstream'") == []


async def test_newer_tables_are_refused(database: Database, table: PostgresStore) -> None:
    database.execute('UPDATE "Odd ""na%me".dead_letters_version SET version = 2')
    error = await refused(table.open())
    assert "schema version 2" in error.message


async def test_a_database_that_cannot_hold_all_texts_is_refused(
    private_cluster: StartCluster,
) -> None:
    store = in_postgres(private_cluster(encoding="LATIN1").conninfo())
    with pytest.raises(DatabaseUnfit, match="LATIN1"):
        await store.open()
    await store.close()


TABLES: Final = """
    SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity
      FROM information_schema.columns
     WHERE table_schema = 'walstream' ORDER BY table_name, ordinal_position
"""
INDEXES: Final = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'walstream' ORDER BY indexname"


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql")
async def test_the_sql_makes_the_same_tables(database: Database, role: str) -> None:
    store = in_postgres(database.dsn)
    await store.open()
    await store.close()
    made = database.execute(TABLES), database.execute(INDEXES)
    database.execute("DROP SCHEMA walstream CASCADE")
    run_twice(database.dsn, "05_dead_letters.sql", role=role)
    assert (database.execute(TABLES), database.execute(INDEXES)) == made
    for dsn in (
        database.dsn,
        psycopg.conninfo.make_conninfo(database.dsn, user=role, password=ROLE_SECRET),
    ):
        store = in_postgres(dsn)
        await store.open(create=False)
        await store.add([letter(1)])
        await store.close()


# ---- Payloads

NO_TYPES: Final = Types(lambda _: bytes)
NAMES: Final = st.text(min_size=1, max_size=8)
RELATIONS: Final = st.builds(Relation, NAMES, NAMES)
VALUES: Final = (
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
).map(msgspec.json.encode)
EXACT: Final = VALUES | st.sampled_from([b"1.50", b"1e400", b'"\\u00e9"', b"9" * 30 + b".0"])
COLUMNS: Final = st.lists(
    st.builds(
        lambda name, value, oid: Column(name, msgspec.Raw(value), oid),
        NAMES,
        EXACT,
        st.integers(1, 2**32 - 1),
    ),
    max_size=4,
)
LSNS: Final = st.integers(1, 2**64 - 1).map(Lsn)
TRANSACTIONS: Final = st.builds(
    Transaction, st.integers(0, 2**32 - 1), LSNS, LSNS, st.just("2026-01-31 12:00:00.5+00")
)
LAYOUTS: Final = st.builds(
    Layout,
    relation=RELATIONS,
    names=st.lists(NAMES, max_size=4),
    typeoids=st.lists(st.integers(1, 2**32 - 1), max_size=4),
    key=st.lists(NAMES, max_size=2),
    types=st.just(NO_TYPES),
    ancestors=st.lists(RELATIONS, max_size=2).map(tuple),
    columns=st.dictionaries(NAMES, st.integers(1, 2**32 - 1), max_size=4),
    missing=st.lists(NAMES, max_size=2).map(tuple),
    toastable=st.lists(NAMES, max_size=2).map(tuple),
    is_full=st.booleans(),
    in_catalog=st.booleans(),
    places=st.just({}).map(dict),
)
CHANGES: Final = st.builds(
    Change,
    operation=st.sampled_from(Operation),
    layout=LAYOUTS,
    transaction=TRANSACTIONS,
    ordinal=st.integers(0, 2**40),
    new_columns=st.none() | COLUMNS,
    sent_identity=st.none()
    | COLUMNS
    | COLUMNS.map(lambda one: msgspec.Raw(msgspec.json.encode(one))),
    unchanged=st.lists(NAMES, max_size=2).map(tuple),
    leaving=st.booleans(),
)
MESSAGES: Final = st.builds(
    Message,
    prefix=st.text(),
    content=st.text(),
    lsn=LSNS,
    transaction=st.none() | TRANSACTIONS,
    ordinal=st.integers(0, 2**40),
)


def plain(value: Any) -> Any:
    """All fields, down to those of columns, layout and transaction."""
    match value:
        case Change():
            fields = msgspec.structs.asdict(value)
            fields["sent_identity"] = value.identity_columns
            return {name: plain(field) for name, field in fields.items() if name[0] != "_"}
        case msgspec.Raw():
            return bytes(value)
        case list():
            return [plain(one) for one in value]
        case Layout() | Transaction() | Column() | Message():
            return {name: plain(one) for name, one in msgspec.structs.asdict(value).items()}
        case _:
            return value


@given(CHANGES | MESSAGES)
def test_a_payload_becomes_what_it_was(item: Change | Message) -> None:
    again = item_of(payload_of(item), NO_TYPES)
    assert plain(again) == plain(item)
    assert payload_of(again) == payload_of(item)
    assert again.id == item.id
    assert position_of(item.id) == position_of(again.id)


@given(CHANGES)
def test_the_types_of_a_payload_are_known(change: Change) -> None:
    columns = [*(change.new_columns or []), *(change.identity_columns or [])]
    assert typeoids_of(payload_of(change)) >= {column.typeoid for column in columns}


def test_a_message_has_no_types() -> None:
    assert typeoids_of(payload_of(Message("p", "c", Lsn(1)))) == frozenset()


def test_letters_and_messages_print_no_values() -> None:
    one = letter(1, key=b'["123-45-6789"]', payload=b'{"ssn":"123-45-6789"}', error="123-45-6789")
    message = Message("jobs", "123-45-6789", Lsn(1))
    shown = repr(one) + repr(StoredLetter(1, one)) + repr(message) + repr([message])
    assert "123-45-6789" not in shown
    assert "DeadLetter(book 0/1:1)" in shown
    assert "Message(jobs 0/1)" in shown


@pytest.mark.parametrize("payload", [b"", b"{}", b'{"version":1}', b'{"version":1,"kind":"x"}'])
def test_a_payload_that_is_none_is_told_without_its_text(payload: bytes) -> None:
    with pytest.raises(DeadLetterStoreFailed, match="cannot be read") as caught:
        item_of(payload + b" " * 7, NO_TYPES)
    assert str(len(payload) + 7) in caught.value.message


def test_a_payload_of_another_version_is_told() -> None:
    with pytest.raises(DeadLetterStoreFailed, match="version 2") as caught:
        typeoids_of(b'{"version":2,"whatever":[]}')
    assert "another version of walstream" in caught.value.hint


def test_what_is_masked_is_not_stored() -> None:
    relation = Relation("public", "t")
    layout = Layout(relation, ["id", "name"], [23, 25], ["id"], NO_TYPES)
    columns = [Column("id", msgspec.Raw(b"1"), 23), Column("name", msgspec.Raw(b'"Ann"'), 25)]
    transaction = Transaction(1, Lsn(1), Lsn(2), "2026-01-31 12:00:00+00")
    change = Change(Operation.UPDATE, layout, transaction, 1, columns, columns)
    masked = Projection(mask={"name": Mask.parse("redact")}).project(change)
    assert b"Ann" in payload_of(change)
    assert b"Ann" not in payload_of(masked)


def test_a_row_of_the_database_becomes_the_same_objects(database: Database) -> None:
    """With types that are learned anew, as at a replay."""
    database.execute(
        """
        CREATE TYPE mood AS ENUM ('sad', 'ok');
        CREATE TYPE pair AS (number numeric, moods mood[]);
        CREATE DOMAIN price AS numeric(10, 2);
        CREATE TABLE t (id int PRIMARY KEY, m mood, ms mood[], p pair, ps pair[], d price,
                        r int4range, j jsonb, b bytea, w timestamptz, n numeric, x text);
        """
    )
    records = Records(database)
    database.execute(
        """
        INSERT INTO t VALUES (1, 'ok', '{sad,NULL,ok}', '(1.50,"{ok,sad}")',
            ARRAY['(2,"{}")', NULL]::pair[], 9.90, '[1,5)', '{"a": [1.0, null]}', '\\x00ff',
            '2026-01-31 12:00:00+01', 'NaN', 'é"\\')
        """
    )
    [columns] = records.inserted()
    relation = Relation("public", "t")
    names = [column.name for column in columns]
    typeoids = [column.typeoid for column in columns]
    types = learned_types(database, typeoids)
    layout = Layout(relation, names, typeoids, ["id"], types)
    transaction = Transaction(1, Lsn(1), Lsn(2), "2026-01-31 12:00:00+00")
    change = Change(Operation.INSERT, layout, transaction, 1, columns)
    payload = payload_of(change)
    again = item_of(payload, learned_types(database, typeoids_of(payload)))
    assert isinstance(again, Change)
    assert repr(dict(again.row)) == repr(dict(change.row))
    assert again.row["ms"] == ["sad", None, "ok"]
    assert again.row["p"].moods == ["ok", "sad"]
    assert again.to_json() == change.to_json()
    records.connection.close()


# ---- The command line


class CommandLine:
    """Runs ``walstream dead-letters`` with a configuration."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        (folder / "walstream.toml").write_text(config)

    def run(self, *arguments: str, code: int = 0) -> str:
        """The output; of a command that is to fail, the error."""
        kept = {name: value for name, value in os.environ.items() if "WALSTREAM" not in name}
        done = subprocess.run(
            [sys.executable, "-m", "walstream", "dead-letters", *arguments],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(Path.cwd()), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run(*arguments, "--json").splitlines()]


@pytest.fixture
def command(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> CommandLine:
    dsn = request.getfixturevalue("database").dsn if kind == "postgres" else "host=/nowhere"
    config = f"""
        [postgres]
        dsn = "{dsn}"
        [slot]
        name = "s"
        [dead_letters]
        store = "{kind}"
        path = "letters.sqlite3"
    """
    return CommandLine(tmp_path, config)


def change(number: int) -> Change:
    layout = Layout(Relation("public", "orders"), ["id", "note"], [23, 25], ["id"], NO_TYPES)
    transaction = Transaction(7, Lsn(1), Lsn(number), "2026-01-31 12:00:00+00")
    columns = [Column("id", msgspec.Raw(b"1"), 23), Column("note", msgspec.Raw(b'"a row"'), 25)]
    return Change(Operation.INSERT, layout, transaction, 1, columns)


async def fill(store: DeadLetterStore) -> None:
    await store.add(
        [
            letter(2, payload=payload_of(change(2)), operation=Operation.INSERT),
            letter(4, key=b'["b c"]', payload=payload_of(change(4)), route="mail"),
            letter(
                5,
                change_id="0/5",
                payload=payload_of(Message("jobs", "content", Lsn(5))),
                operation=None,
                relation=None,
                keys=(("jobs", NO_KEY),),
            ),
        ]
    )
    await store.park([letter(3, payload=payload_of(change(3)))])


async def test_list_shows_letters_and_no_rows(command: CommandLine, store: DeadLetterStore) -> None:
    assert command.run("list") == "no dead letters\n"
    await fill(store)
    shown = command.run("list")
    lines = shown.splitlines()
    assert len(lines) == 6
    assert "book" in lines[1]
    assert "0/2:1" in lines[1]
    assert "public.orders [1]" in lines[1]
    assert "ValueError at handlers.py:12" in lines[1]
    assert "parked" in lines[2]
    assert lines[0].split()[-2:] == ["time", "(UTC)"]
    assert lines[1].endswith("2026-01-31 12:00:00")
    assert "jobs no key" in lines[4]
    assert lines[-1] == "4 dead letters"
    assert command.run("list", "--limit", "1").endswith("4 dead letters, 3 not shown\n")
    assert "a row" not in shown + command.run("list", "--json")


async def test_list_has_filters_and_json(command: CommandLine, store: DeadLetterStore) -> None:
    await fill(store)
    for arguments, expected in {
        (): ["0/2:1", "0/3:1", "0/4:1", "0/5"],
        ("--route", "mail"): ["0/4:1"],
        ("--table", "public.orders", "--failed"): ["0/2:1", "0/4:1"],
        ("--key", "1"): ["0/2:1", "0/3:1"],
        ("--key", "b c"): ["0/4:1"],
        ("--key", '[ "b c" ]'): ["0/4:1"],
        ("--key", "no key"): ["0/5"],
        ("--operation", "message"): ["0/5"],
        ("--parked",): ["0/3:1"],
        ("--error", "valueerror"): ["0/2:1", "0/4:1", "0/5"],
        ("--before", "2026-01-31T12:00:04"): ["0/2:1", "0/3:1"],
        ("--after", "2026-01-31T13:00:04+01:00", "--limit", "1"): ["0/4:1"],
        ("--slot", "another"): [],
    }.items():
        found = command.json("list", *arguments)
        assert [one["change"] for one in found] == expected, arguments
    first, second, third, fourth = command.json("list")
    assert first["keys"] == [{"table": "public.orders", "values": [1]}]
    assert third["keys"] == [{"table": "public.orders", "values": ["b c"]}]
    assert fourth["keys"] == [{"table": "jobs", "values": []}]
    assert (first["parked"], second["parked"]) == (False, True)


async def test_a_key_is_found_by_its_digits(command: CommandLine, store: DeadLetterStore) -> None:
    """An item of a JSON array is compared as it was sent, and none goes through a float."""
    keys = [
        b"[1.10,2]",
        b"[12345678901234567890.123]",
        b"[99999999999999999999,1]",
        b'["\xc3\xa9",1]',
    ]
    await store.add([letter(number, key=key) for number, key in enumerate(keys, 1)])
    for text, expected in {
        "[1.10, 2]": ["0/1:1"],
        "[1.1, 2]": [],
        "1.10": [],
        "12345678901234567890.123": ["0/2:1"],
        "[ 12345678901234567890.123 ]": ["0/2:1"],
        "[99999999999999999999, 1]": ["0/3:1"],
        '["\\u00e9", 1]': ["0/4:1"],
        "[": [],
        "{}": [],
    }.items():
        assert [one["change"] for one in command.json("list", "--key", text)] == expected, text


async def test_show_prints_the_change_and_the_traceback(
    command: CommandLine, store: DeadLetterStore
) -> None:
    await fill(store)
    first, *_, message = [str(stored.id) for stored in await store.select(ALL)]
    shown = command.run("show", first)
    assert '"note": "a row"' in shown
    assert shown.endswith("handlers.py:12 book\n")
    [described] = command.json("show", first)
    assert described["change"] == json.loads(change(2).to_json())
    assert described["traceback"] == "handlers.py:12 book"
    [described] = command.json("show", message)
    assert described["change"]["content"] == "content"
    assert "there is no dead letter 999" in command.run("show", "999", code=64)


async def test_drop_says_what_it_frees(command: CommandLine, store: DeadLetterStore) -> None:
    await fill(store)
    first = (await store.select(ALL))[0].id
    assert "nobody is here to ask" in command.run("drop", str(first), code=64)
    assert command.run("drop", str(first), "--yes").splitlines() == [
        "dropped 1 dead letter",
        "still held up by other letters: public.orders [1] of book",
    ]
    assert command.run(
        "drop", "--route", "book", "--table", "public.orders", "-y"
    ).splitlines() == [
        "dropped 1 dead letter",
        "free: public.orders [1] of book",
    ]
    assert "there is no dead letter" in command.run("drop", str(first), "-y", code=64)
    assert command.run("drop", "--all", "-y").startswith("dropped 2 dead letters\n")
    assert await store.count(ALL) == 0
    assert command.run("drop", "--all") == "dropped 0 dead letters\n"


async def test_nothing_is_dropped_while_a_replay_runs(
    command: CommandLine, store: DeadLetterStore
) -> None:
    """It would deliver what it has read, after newer changes of the row."""
    await fill(store)
    before = await store.count(ALL)
    async with store.exclusive():
        assert "ReplayRuns" in command.run("drop", "--all", "-y", code=75)
    assert await store.count(ALL) == before > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("drop", "-y"), "drop which letters?"),
        (("drop", "--all", "--route", "x", "-y"), "--all goes without"),
        (("list", "--operation", "upsert"), "allowed: insert, update"),
        (("list", "--before", "yesterday"), "--before: found 'yesterday'"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in CommandLine(tmp_path, "").run(*arguments, code=64)


def test_a_store_that_is_not_there_is_told(command: CommandLine) -> None:
    error = command.run("list", code=75)
    assert "DeadLetterStoreFailed: there is no" in error
    assert "walstream run makes it" in error
