"""Running walstream inside of a test."""

from __future__ import annotations

import secrets
from typing import Any

from tests.postgres import Database
from walstream import Change, Summary, Walstream
from walstream.config import Config, parse


class Stream:
    """A slot of a test's database, and what has come through it.

    The slot is made at once: what is committed afterwards comes.
    """

    def __init__(self, database: Database, **config: Any) -> None:
        self.database = database
        self.slot = f"test_{secrets.token_hex(4)}"
        self.config: Config = parse(
            {"postgres": {"dsn": database.dsn}, "slot": {"name": self.slot}, **config}
        )
        self.app = Walstream()
        self.changes: list[Change] = []
        database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self.slot)

    def record(self, table: str = "*.*", *operations: str, **route: Any) -> None:
        """Keep the changes of a route in ``changes``."""

        @self.app.on(table, *operations, **route)
        async def keep(change: Change) -> None:
            self.changes.append(change)

    async def drain(self) -> Summary:
        """Stream until all that is committed by now is acknowledged."""
        if not self.app.handlers:
            self.record()
        return await self.app.run(self.config, until="now")

    def confirmed_flush_lsn(self) -> str:
        """Ask the server what it has recorded."""
        ((position,),) = self.database.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            self.slot,
        )
        return str(position)
