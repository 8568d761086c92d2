"""What a run has done, when it is over."""

from __future__ import annotations

import msgspec

from walstream.lsn import Lsn


class RouteSummary(msgspec.Struct, frozen=True):
    """What became of one route's changes; ``absent`` for lack of a column that its filter needs."""

    name: str
    matched: int
    filtered: int
    absent: int


class DestinationSummary(msgspec.Struct, frozen=True):
    """What became of the changes that were handed to one handler or sink.

    ``delivered`` were taken, ``skipped`` given up, ``dead_lettered`` and ``parked`` are in the
    dead-letter store, ``redelivered`` were recognised as done before by a transactional handler.
    """

    name: str
    delivered: int
    retries: int
    skipped: int
    dead_lettered: int
    parked: int
    redelivered: int


class Summary(msgspec.Struct, frozen=True):
    """What a run has done."""

    transactions: int
    changes: int
    delivered: int
    retries: int
    sessions: int
    lost: int
    flush_lsn: Lsn
    routes: tuple[RouteSummary, ...]
    destinations: tuple[DestinationSummary, ...]
