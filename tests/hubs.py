"""What a hub needs around it: layouts, a catalog that is not asked, a reader, a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from walstream.access import Grant, Reader, Sight
from walstream.catalog import Catalog
from walstream.changes import Layout, Relation
from walstream.router import TablePattern
from walstream.values import Types

TYPES: Final = Types(lambda _: lambda text: text.decode())
COLUMNS: Final = {"id": 23, "owner": 25, "size": 23}
READER: Final = Reader("anybody", grants=(Grant(TablePattern(None, None), Sight("*.*")),))
"""Who may read everything."""


def layout(name: str, *ancestors: Relation, key: Sequence[str] = ("id",)) -> Layout:
    return Layout(
        Relation("public", name),
        list(COLUMNS),
        list(COLUMNS.values()),
        list(key),
        TYPES,
        ancestors,
        columns=COLUMNS,
    )


class FakeCatalog(Catalog):
    """Is not asked."""

    def __init__(self) -> None:
        super().__init__("", application_name="")
        self.types = TYPES


class Sent:
    """A client's connection that takes everything at once, or nothing."""

    def __init__(self, *, is_read: bool = True) -> None:
        self.is_read = is_read
        self.pieces: list[bytes] = []
        self.waiting_bytes = 0

    def write(self, piece: bytes) -> None:
        self.pieces.append(piece)
        if not self.is_read:
            self.waiting_bytes += len(piece)

    def drop(self) -> None:
        self.waiting_bytes = 0

    async def room(self) -> None:
        await asyncio.sleep(0)

    @property
    def is_behind(self) -> bool:
        return False

    async def moved(self) -> None:
        """Nothing waits."""

    @property
    def lines(self) -> list[bytes]:
        return [line for line in b"".join(self.pieces).splitlines() if line]
