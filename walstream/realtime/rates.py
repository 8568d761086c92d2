"""How often something may be done."""

from __future__ import annotations

import msgspec


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
        if debt + times > self.count:
            return False
        self._debt += times
        return True

    def is_rested(self, now: float) -> bool:
        """Whether it is as if nothing had ever been done."""
        return self._debt <= (now - self._at) * self.count / self.seconds
