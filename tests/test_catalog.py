"""What the catalog is asked for, again and again."""

from __future__ import annotations

import gc
import sys
from typing import Final

from tests.postgres import Database
from walstream.catalog import Catalog
from walstream.changes import Column, Relation
from walstream.decoder import UnknownLayout

INT4: Final = 23
ASKED: Final = 300


async def test_a_layout_that_is_gone_leaves_nothing_behind(database: Database) -> None:
    """Tables are altered for as long as the process runs."""
    names = [f"c{place}" for place in range(14)]
    database.execute(f"CREATE TABLE wide ({', '.join(f'{name} int' for name in names)})")
    columns = [Column(name, b"1", INT4) for name in names]  # type: ignore[arg-type]
    question = UnknownLayout(Relation("public", "wide"), columns, [], [], 0)
    catalog = Catalog(database.dsn, application_name="walstream test")
    try:
        gc.collect()
        before = await _blocks_after(catalog, question, 50)
        after = await _blocks_after(catalog, question, ASKED)
    finally:
        await catalog.close()
    assert after - before < ASKED


async def _blocks_after(catalog: Catalog, question: UnknownLayout, times: int) -> int:
    """Ask so often; return how many blocks of memory Python has then."""
    for _ in range(times):
        await catalog.layout(question)
    gc.collect(1)  # not everywhere: that would empty Python's lists of free objects, too
    return sys.getallocatedblocks()
