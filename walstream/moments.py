"""A moment in the stream as people write it: so long ago, a time, an LSN, the id of a change."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, TypeAlias

from walstream.positions import BEGINNING, Position

Moment: TypeAlias = Position | datetime | timedelta
"""Behind a position (`BEGINNING` for all that is kept); from a time on; from so long ago on."""

FROM_BEGINNING: Final = "beginning"

_AGO: Final = re.compile(r"(\d{1,9})\s*(s|min|m|h|d|w)", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


class Kept(Protocol):
    """What is asked where a time begins in it: a journal."""

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later.

        None means that it does not go back so far.
        """


def parse_moment(text: str) -> Moment:
    """Read ``2h``, ``0/16274F8:3``, ``0/16274F8``, ``2026-11-22T12:00``, ``beginning``.

    A time without a zone is one of UTC.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    if text == FROM_BEGINNING:
        return BEGINNING
    if ago := _AGO.fullmatch(text):
        return timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
    try:
        return Position.parse(text) if "/" in text else _time(text)
    except ValueError:
        raise ValueError(
            f"found {text!r}; allowed: so long ago (90s, 30m, 2h, 7d), the id of a change"
            " (0/16274F8:3), an LSN, a time (2026-11-22T12:00, in UTC unless it has a zone), or"
            " beginning"
        ) from None


async def position_of(
    moment: Moment, kept: Kept, begins: Position, now: datetime
) -> Position | None:
    """Return the position behind which a moment begins; None when it is before what is kept.

    Args:
        moment: when.
        kept: the journal.
        begins: where that begins.
        now: what so long ago counts from.
    """
    if isinstance(moment, timedelta):
        return await kept.position_before(now - moment)
    if isinstance(moment, datetime):
        return await kept.position_before(moment)
    if moment == BEGINNING:
        return begins
    return None if moment < begins else moment


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
