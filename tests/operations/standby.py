"""A hot standby of a private cluster, to be promoted."""

from __future__ import annotations

from typing import Final

from tests.postgres import Database, wait_until
from walstream.cluster import PrivateCluster, _lines
from walstream.lsn import Lsn

CATCH_UP_SECONDS: Final = 20.0

_STATE_LINE: Final = 8


class Standby(PrivateCluster):
    """Made by pg_basebackup, and streaming from the primary until it is promoted.

    It has the primary's roles and databases, and none of its slots.
    """

    def __init__(self, primary: PrivateCluster) -> None:
        settings = {
            **primary.settings,
            "primary_conninfo": primary.conninfo(),
            "wal_retrieve_retry_interval": "100ms",
        }
        super().__init__(settings, loopback=True, programs=primary.programs)
        self.password = primary.password
        self._primary = primary

    def catch_up(self, position: str) -> None:
        """Wait until all up to a position is here."""
        target = Lsn.parse(position)
        with Database(self.conninfo()) as database:

            def is_replayed() -> bool:
                [(replayed,)] = database.execute("SELECT pg_last_wal_replay_lsn()::text")
                return Lsn.parse(replayed) >= target

            wait_until(is_replayed, CATCH_UP_SECONDS)

    def promote(self) -> None:
        """Make it a primary, on a timeline of its own."""
        with Database(self.conninfo()) as database:
            assert database.execute("SELECT pg_promote()") == [(True,)]

    def _make_data(self) -> None:
        self._run(
            self.programs.path("pg_basebackup"),
            f"--dbname={self._primary.conninfo()}",
            f"--pgdata={self.data}",
            "--checkpoint=fast",
            "--no-sync",
        )
        self._write("standby.signal", "")

    def _is_ready(self) -> bool:
        """A hot standby's word is another one (miscadmin.h)."""
        lines = _lines(self.data / "postmaster.pid")
        is_standby = len(lines) >= _STATE_LINE and lines[7].strip() == "standby"
        return super()._is_ready() or (is_standby and lines[0] == str(self.pid))

    def _set_password(self) -> None:
        """It is the primary's: nothing can be written here."""
