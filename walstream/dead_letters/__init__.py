"""Dead letters: changes that their destination would not take, and those that wait behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from walstream.dead_letters.letters import (
    DeadLetter,
    item_of,
    payload_of,
    position_of,
    typeoids_of,
)
from walstream.dead_letters.postgres import PostgresStore
from walstream.dead_letters.sqlite import SqliteStore
from walstream.dead_letters.store import DeadLetterStore, LetterQuery, StoredLetter, pages

__all__ = [
    "DeadLetter",
    "DeadLetterStore",
    "LetterQuery",
    "PostgresStore",
    "SqliteStore",
    "StoreSettings",
    "StoredLetter",
    "item_of",
    "make_store",
    "pages",
    "payload_of",
    "position_of",
    "typeoids_of",
]


class StoreSettings(Protocol):
    """What the configuration says about dead letters."""

    @property
    def store(self) -> Literal["sqlite", "postgres"]:
        """Which store."""

    @property
    def path(self) -> Path:
        """Where SQLite's file is."""

    @property
    def schema_name(self) -> str:
        """Which Postgres schema has the tables."""

    @property
    def max_letters(self) -> int:
        """How many letters there may be."""

    @property
    def max_bytes(self) -> int:
        """How many bytes all of them may have."""


def make_store(
    settings: StoreSettings, *, slot: str, dsn: str, application_name: str
) -> DeadLetterStore:
    """Return the store that the configuration names; it is not open yet.

    Args:
        settings: the section of the configuration.
        slot: whose letters.
        dsn: leads to the database of a Postgres store.
        application_name: for its connection.
    """
    if settings.store == "postgres":
        return PostgresStore(
            dsn,
            slot=slot,
            schema=settings.schema_name,
            max_letters=settings.max_letters,
            max_bytes=settings.max_bytes,
            application_name=application_name,
        )
    return SqliteStore(
        settings.path,
        slot=slot,
        max_letters=settings.max_letters,
        max_bytes=settings.max_bytes,
    )
