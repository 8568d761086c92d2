"""A test's own slot, which can be put back to where it was."""

from __future__ import annotations

from contextlib import suppress

import psycopg

from walstream.lsn import Lsn
from walstream.testing.databases import Database, drop_slots


class RewindableSlot:
    """A slot with a copy of it that never moves, and so keeps the WAL for going back.

    A crash of the server can put a slot back likewise: Postgres writes a slot's position to disk at
    checkpoints only, and says that what is sent again is for the client to cope with.
    """

    def __init__(self, database: Database, name: str) -> None:
        """Make the slot at once: what is committed afterwards comes.

        Raises:
            psycopg.Error: it cannot be made, and nothing of it is left.
        """
        self.name = name
        self._origin = f"{name}_origin"
        self._database = database
        try:
            database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self.name)
            self._copy(self.name, self._origin)
        except BaseException:
            with suppress(psycopg.Error):  # the first error says more
                self.drop()
            raise

    def confirmed_flush_lsn(self) -> Lsn:
        """Ask the server what it has recorded.

        Raises:
            LookupError: the slot is gone.
        """
        rows = self._database.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            self.name,
        )
        if not rows:
            message = f"the slot {self.name} is gone"
            raise LookupError(message)
        return Lsn.parse(rows[0][0])

    def rewind(self, position: Lsn) -> None:
        """Put the slot back to where it was; a walsender that streams from it is sent away."""
        with self._database.connect() as connection:
            drop_slots(connection, self.name)
        self._copy(self._origin, self.name)
        self._database.execute(
            "SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", self.name, str(position)
        )

    def drop(self) -> None:
        """Drop the slot and its copy, whoever uses them."""
        with self._database.connect() as connection:
            drop_slots(connection, self.name, self._origin)

    def _copy(self, source: str, target: str) -> None:
        self._database.execute(
            "SELECT pg_copy_logical_replication_slot(%s, %s, false)", source, target
        )
