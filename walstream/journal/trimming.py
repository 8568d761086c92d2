"""``walstream journal trim``: the oldest blocks are removed, beside the process that writes.

Each transaction is short, so that one never waits long for it, and finds at its next one that there
is less.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from walstream.journal import file
from walstream.journal.blocks import microseconds
from walstream.journal.file import PAGE_BYTES, State

_STEP_BLOCKS: Final = 256
_STEP_PAGES: Final = 1024

_Last = Callable[[sqlite3.Connection, State], int | None]
"""The number of the last block that is to go, as far as it is known now."""


def trim(
    path: Path, *, keep_bytes: int | None = None, before: datetime | None = None
) -> tuple[State, State]:
    """Remove the oldest changes; all of them when nothing else is said.

    Blocks go as a whole: what is kept may be a little less than asked for, or older.

    Args:
        path: the journal's file.
        keep_bytes: so large may it be afterwards.
        before: what was committed before this time goes.

    Returns:
        Where the journal stood before, and stands now.

    Raises:
        SetupError: there is no journal.
        SinkFailed: it cannot be written to.
    """
    connection = file.connect_beside(path, write=True)
    try:
        state = file.load_state(connection)
        _remove(connection, _last_of(keep_bytes, before))
        _give_back(connection)
        return state, file.load_state(connection)
    except (sqlite3.Error, OSError, ValueError) as error:
        raise file.failed(error, path) from error
    finally:
        connection.close()


def _last_of(keep_bytes: int | None, before: datetime | None) -> _Last:
    if keep_bytes is not None:
        return lambda connection, state: _too_many(connection, state, keep_bytes)
    if before is not None:
        time = microseconds(before)
        return lambda connection, state: file.older_than(connection, state, time)
    return lambda _, state: state.next_block - 1


def _too_many(connection: sqlite3.Connection, state: State, keep_bytes: int) -> int | None:
    over = file.used_pages(connection) * PAGE_BYTES - keep_bytes
    return file.oldest_up_to(connection, state, over) if over > 0 else None


def _remove(connection: sqlite3.Connection, last_of: _Last) -> None:
    while True:
        with file.transaction(connection):
            state = file.load_state(connection)
            last = last_of(connection, state)
            [(first,)] = connection.execute("SELECT min(id) FROM blocks").fetchall()
            if last is None or first is None or first > last:
                return
            fewer = file.forget(connection, state, min(last, first + _STEP_BLOCKS - 1))
            file.save_state(connection, fewer)


def _give_back(connection: sqlite3.Connection) -> None:
    """Give free pages to the file system; what a reader still needs comes later."""
    is_done = False
    while not is_done:
        with file.transaction(connection):
            is_done = not file.release(connection, _STEP_PAGES)
    file.checkpoint(connection)
