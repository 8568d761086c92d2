"""A change that a client got."""

from __future__ import annotations

import msgspec


class Delivered(msgspec.Struct, frozen=True, array_like=True):
    """Its id, as far as the client is told one, and the number of the row."""

    id: str
    row: int
