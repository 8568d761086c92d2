"""The application of the demonstration: a small chat product, at the pace of people."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import cycle
from typing import Final

import msgspec
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from walstream.demo.screen import show_application
from walstream.lsn import Lsn

TABLES: Final = """
CREATE TABLE messages_v2 (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    conversation_id text NOT NULL,
    author text NOT NULL,
    content text NOT NULL,
    is_read boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TYPE reminder_status AS ENUM ('waiting', 'due', 'done');
CREATE TABLE reminders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner text NOT NULL,
    title text NOT NULL,
    status reminder_status NOT NULL DEFAULT 'waiting'
);
CREATE TABLE user_interactions (
    user_name text NOT NULL,
    message_id bigint NOT NULL REFERENCES messages_v2,
    kind text NOT NULL
);
CREATE UNIQUE INDEX one_reaction ON user_interactions (user_name, message_id);
"""


_NOBODY: Final = ""


class Statement(msgspec.Struct, frozen=True):
    """SQL, and the handler whose filter its rows pass; none when no handler wants them."""

    sql: bytes
    parameters: tuple[str, ...] = ()
    wanted_by: str = _NOBODY


class Scene(msgspec.Struct, frozen=True):
    """One transaction of the application, in words and in SQL."""

    told: str
    statements: tuple[Statement, ...]
    commits: bool = True

    def __str__(self) -> str:
        """Say also why no handler will hear of it, if none will."""
        if not self.commits:
            return f"{self.told} (rolled back)"
        wanted = any(statement.wanted_by for statement in self.statements)
        return self.told if wanted else f"{self.told} (filtered)"


class Tally(msgspec.Struct):
    """What was committed, and how much of it each handler has to get."""

    transactions: int = 0
    rolled_back: int = 0
    changes: int = 0
    wanted: Counter[str] = msgspec.field(default_factory=Counter)


class Application:
    """Plays the scenes, over and over, and keeps count of what it commits."""

    def __init__(self, connection: AsyncConnection[TupleRow]) -> None:
        """Write through a connection in autocommit mode."""
        self._connection = connection
        self.tally = Tally()

    async def work(self, seconds: float, stopped: asyncio.Event) -> None:
        """Play until the time is over or it is stopped, and the scene that has begun to its end."""
        now = asyncio.get_running_loop().time
        end = now() + seconds
        for scene, pause_seconds in zip(cycle(_SCENES), cycle(_PAUSES_SECONDS), strict=False):
            if now() >= end or stopped.is_set():
                return
            await self._play(scene)
            await _pause(min(pause_seconds, end - now()), stopped)

    async def position(self) -> Lsn:
        """Return a position that all that was committed so far lies before."""
        cursor = await self._connection.execute("SELECT pg_current_wal_flush_lsn()::text")
        (position,) = await cursor.fetchone() or ("0/0",)
        return Lsn.parse(position)

    async def _play(self, scene: Scene) -> None:
        show_application(str(scene))
        written: Counter[str] = Counter()
        async with self._connection.transaction(force_rollback=not scene.commits):
            for statement in scene.statements:
                cursor = await self._connection.execute(statement.sql, statement.parameters or None)
                written[statement.wanted_by] += cursor.rowcount
        self._count(scene, written)

    def _count(self, scene: Scene, written: Counter[str]) -> None:
        tally = self.tally
        if not scene.commits:
            tally.rolled_back += 1
            return
        tally.transactions += 1
        tally.changes += written.total()
        del written[_NOBODY]
        tally.wanted += written


async def _pause(seconds: float, stopped: asyncio.Event) -> None:
    """Wait, at most until it is stopped."""
    try:
        async with asyncio.timeout(seconds):
            await stopped.wait()
    except TimeoutError:
        pass


_PAUSES_SECONDS: Final = (0.4, 0.2, 0.5, 0.15, 0.3)
"""People are not a metronome."""


def _says(place: str, author: str, content: str) -> Statement:
    return Statement(
        b"INSERT INTO messages_v2 (conversation_id, author, content) VALUES (%s, %s, %s)",
        (place, author, content),
        "new_message" if place == "kitchen" else _NOBODY,
    )


def _message(place: str, author: str, content: str) -> Scene:
    return Scene(f"{author} writes in the {place}", (_says(place, author, content),))


def _reacts(user: str, kind: str) -> Statement:
    return Statement(
        b"INSERT INTO user_interactions SELECT %s, max(id), %s FROM messages_v2"
        b" ON CONFLICT DO NOTHING",
        (user, kind),
    )


def _takes_back(user: str) -> Statement:
    return Statement(
        b"DELETE FROM user_interactions WHERE user_name = %s", (user,), "reaction_gone"
    )


def _plans(owner: str, title: str) -> Statement:
    return Statement(b"INSERT INTO reminders (owner, title) VALUES (%s, %s)", (owner, title))


_FALLS_DUE: Final = Statement(
    b"UPDATE reminders SET status = 'due' WHERE status = 'waiting'", (), "reminder_due"
)
_IS_DONE: Final = Statement(b"UPDATE reminders SET status = 'done' WHERE status = 'due'")
_IS_READ: Final = Statement(b"UPDATE messages_v2 SET is_read = true WHERE NOT is_read")

_SCENES: Final = (
    _message("kitchen", "Ada", "Did anyone feed the cat?"),
    _message("garden", "Cem", "The tomatoes are ripe."),
    Scene("Ben wants to be reminded", (_plans("Ben", "buy cat food"),)),
    _message("kitchen", "Ben", "I did. She says I did not."),
    Scene("Ada likes that", (_reacts("Ada", "like"),)),
    Scene("a reminder falls due", (_FALLS_DUE,)),
    Scene("Ada takes her like back", (_takes_back("Ada"),)),
    Scene(
        "Ben writes in the kitchen",
        (_says("kitchen", "Ben", "This is never sent."),),
        commits=False,
    ),
    Scene("the reminder is done", (_IS_DONE,)),
    Scene(
        "Dana writes two messages in one transaction",
        (
            _says("kitchen", "Dana", "There is a can left."),
            _says("kitchen", "Dana", "There was."),
        ),
    ),
    Scene("everybody reads", (_IS_READ,)),
    _message("garden", "Ada", "I bring the basket."),
    Scene("Ben and Cem laugh", (_reacts("Ben", "laugh"), _reacts("Cem", "laugh"))),
    Scene("Ada wants to be reminded", (_plans("Ada", "water the tomatoes"),)),
    _message("kitchen", "Cem", "Who closes the window? It rains."),
    Scene("a reminder falls due", (_FALLS_DUE,)),
    Scene("Ada throws the plan away", (Statement(b"DELETE FROM reminders"),), commits=False),
    _message("kitchen", "Ada", "Closed."),
    Scene("Ben and Cem take it back", (_takes_back("Ben"), _takes_back("Cem"))),
    Scene("the reminder is done", (_IS_DONE,)),
)
