"""How often something may be done."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import msgspec

MOST_KNOWN: Final = 10_000
"""So many senders are known at once; the one who came first is forgotten before there are more."""

_EPSILON: Final = 1e-9
"""Sums of parts are not exact: the last one that may be done is not to fail for that."""


class Rate(msgspec.Struct):
    """So many times within so many seconds, and again as time goes by.

    All of them may come at once; then one more every ``seconds / count``. So nobody has more than
    ``2 * count`` in any ``seconds``, and not more than ``count`` on average.
    """

    count: int
    seconds: float
    _debt: float = 0.0
    _at: float = 0.0

    def take(self, now: float, times: int = 1) -> bool:
        """Count it, if it may be done now; what may not does not count.

        Args:
            now: monotonic seconds.
            times: so many at once.
        """
        paid = (now - self._at) * self.count / self.seconds
        debt = max(0.0, self._debt - paid)
        self._debt, self._at = debt, now
        if debt + times > self.count + _EPSILON:
            return False
        self._debt += times
        return True


class Rates:
    """A rate for each of those who come by no connection of their own."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count = count
        self._seconds = seconds
        self._known: dict[Hashable, Rate] = {}

    def take(self, who: Hashable, now: float, times: int = 1) -> bool:
        """Count it for somebody, if they may do it now."""
        rate = self._known.get(who)
        if rate is None:
            if len(self._known) >= MOST_KNOWN:
                del self._known[next(iter(self._known))]
            rate = self._known[who] = Rate(self._count, self._seconds)
        return rate.take(now, times)
