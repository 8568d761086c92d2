"""A moment in the stream as people write it: so long ago, a time, an LSN, the id of a change."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

from walstream.positions import BEGINNING, Position

Moment: TypeAlias = Position | datetime | timedelta
"""Behind a position (`BEGINNING` for all that is kept); from a time on; from so long ago on."""

FROM_BEGINNING: Final = "beginning"

_AGO: Final = re.compile(r"(\d{1,9})\s*(s|min|m|h|d|w)", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_moment(text: str) -> Moment:
    """Read ``2h``, ``0/16274F8:3``, ``0/16274F8``, ``2026-11-22T12:00`` or ``beginning``.

    A time without a zone is one of UTC.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    if text == FROM_BEGINNING:
        return BEGINNING
    try:
        if ago := _AGO.fullmatch(text):
            return timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
        return Position.parse(text) if "/" in text else _time(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"found {text!r}; allowed: so long ago (90s, 30m, 2h, 7d), the id of a change"
            " (0/16274F8:3), an LSN, a time (2026-11-22T12:00, of UTC unless it has a zone), or"
            " beginning"
        ) from None


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
