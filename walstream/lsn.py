"""Positions in the write-ahead log."""

from __future__ import annotations

import re
from typing import Final, Self

_TEXT: Final = re.compile(r"\A([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")
_LIMIT: Final = 1 << 64


class Lsn(int):
    """A log sequence number: a byte position in the write-ahead log.

    It is an ``int``, so positions compare and subtract (the difference is in bytes), and it prints
    as PostgreSQL's ``pg_lsn`` does: two hexadecimal numbers without leading zeros, the upper and
    the lower 32 bits (PostgreSQL documentation, 8.20 pg_lsn Type).
    """

    __slots__ = ()

    def __new__(cls, position: int) -> Self:
        """Wrap a byte position.

        Raises:
            ValueError: it does not fit into an unsigned 64-bit number.
        """
        if not 0 <= position < _LIMIT:
            message = f"a position is a number of 64 bits, not {position}"
            raise ValueError(message)
        return super().__new__(cls, position)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form that PostgreSQL prints, such as ``16/B374D848``.

        Raises:
            ValueError: the text is not two hexadecimal numbers of up to eight digits with ``/``
                between them.
        """
        matched = _TEXT.match(text)
        if matched is None:
            message = f"{text!r} is not an LSN; one looks like 16/B374D848"
            raise ValueError(message)
        return cls(int(matched[1], 16) << 32 | int(matched[2], 16))

    def __str__(self) -> str:
        """Print as ``pg_lsn`` does."""
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        """Print for a debugger."""
        return f"Lsn({str(self)!r})"


ZERO: Final = Lsn(0)
"""``0/0`` is no position: in START_REPLICATION it stands for that of the slot itself."""
