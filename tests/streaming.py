"""Running walstream inside of a test, with the configuration that it has without any."""

from __future__ import annotations

from typing import Any

from tests.postgres import Database
from walstream.testing import HandlerStream


class Stream(HandlerStream):
    """A slot of a test's database; handlers that raise are called again."""

    def __init__(self, database: Database, **config: Any) -> None:
        super().__init__(database, **{"handlers": {"attempts": 5}, **config})
        self.database = database

    def confirmed_flush_lsn(self) -> str:  # type: ignore[override]
        """Ask the server what it has recorded, as it prints it."""
        return str(super().confirmed_flush_lsn())
