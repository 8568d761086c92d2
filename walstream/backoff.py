"""Pauses between attempts."""

from __future__ import annotations

import random

import msgspec

_MOST_DOUBLINGS = 60


class Backoff(msgspec.Struct, frozen=True):
    """Pauses that double from ``first_seconds`` to ``longest_seconds``.

    Each is shortened by up to half by chance, so that several processes that failed together do
    not come back together.
    """

    first_seconds: float
    longest_seconds: float

    def pause_seconds(self, failures: int) -> float:
        """Return the pause after so many failures in a row, counted from 1."""
        doublings = min(failures - 1, _MOST_DOUBLINGS)  # a float has an end, an outage may not
        longest = min(self.first_seconds * 2.0**doublings, self.longest_seconds)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreading, not secrecy
