"""Where in the stream a change stands."""

from __future__ import annotations

from typing import Final, NamedTuple, Self

from walstream.changes import Change
from walstream.lsn import ZERO, Lsn

_BEHIND_ALL: Final = (1 << 31) - 1


class Position(NamedTuple):
    """The end of a transaction, and the place in it: these compare in the order of the stream.

    It prints as ``Change.id`` does, ``0/16274F8:3``; that is the same at every redelivery.
    """

    end_lsn: Lsn
    ordinal: int

    @classmethod
    def of(cls, change: Change) -> Self:
        """Return where a change stands."""
        return cls(change.transaction.end_lsn, change.ordinal)

    @classmethod
    def after(cls, lsn: Lsn) -> Self:
        """Return what is behind all changes of transactions that ended at this LSN or before."""
        return cls(lsn, _BEHIND_ALL)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a change's id; a plain LSN stands for what is behind all that ended there.

        Raises:
            ValueError: it is neither.
        """
        lsn, colon, ordinal = text.partition(":")
        if not colon:
            return cls.after(Lsn.parse(lsn))
        if not (ordinal.isascii() and ordinal.isdigit() and int(ordinal) <= _BEHIND_ALL):
            raise ValueError(f"{text!r} is not the id of a change; one looks like 0/16274F8:3")
        return cls(Lsn.parse(lsn), int(ordinal))

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        if self.ordinal == _BEHIND_ALL:
            return str(self.end_lsn)
        return f"{self.end_lsn}:{self.ordinal}"


BEGINNING: Final = Position(ZERO, 0)
"""Before everything."""
