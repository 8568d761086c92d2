"""How far handlers have got what is kept, that were attached with history (``since=``).

These rows stay when the changes are forgotten: a handler that has caught up does not begin again.
"""

from __future__ import annotations

import sqlite3
from typing import Final, NamedTuple

from walstream.positions import Position

ATTACHED_TABLE: Final = """
    CREATE TABLE attached (
        stream TEXT NOT NULL,
        route TEXT NOT NULL,
        position TEXT NOT NULL,
        is_done INTEGER NOT NULL,
        PRIMARY KEY (stream, route)
    ) WITHOUT ROWID
"""


class Attachment(NamedTuple):
    """Up to where a handler has taken what is kept, and whether that was all it was to get."""

    position: Position
    is_done: bool


def load_attachment(connection: sqlite3.Connection, stream: str, route: str) -> Attachment | None:
    """Return how far a handler is; None when it was never attached.

    Raises:
        ValueError: it cannot be read.
    """
    rows = connection.execute(
        "SELECT position, is_done FROM attached WHERE stream = ? AND route = ?", [stream, route]
    ).fetchall()
    return Attachment(Position.parse(rows[0][0]), bool(rows[0][1])) if rows else None


def save_attachment(
    connection: sqlite3.Connection, stream: str, route: str, attachment: Attachment
) -> None:
    """Write down how far a handler is."""
    connection.execute(
        "INSERT OR REPLACE INTO attached VALUES (?, ?, ?, ?)",
        [stream, route, str(attachment.position), attachment.is_done],
    )
