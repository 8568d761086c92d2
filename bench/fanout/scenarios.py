"""Who subscribes to what, and what each subscriber must get."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

import msgspec

from bench import workload


class Scenario(msgspec.Struct, frozen=True):
    """Some subscribers, and what is wished for.

    With ``is_shared`` all of them get every change; otherwise each asks for a conversation of its
    own by an equality filter, and the changes go round the conversations. ``events_per_second`` is
    the target: what all clients together get.
    """

    name: str
    subscribers: int
    is_shared: bool
    events_per_second: float

    @property
    def conversations(self) -> int:
        """How many there are in the rows that are written."""
        return 1 if self.is_shared else self.subscribers

    @property
    def events_per_change(self) -> int:
        """How many clients get each change."""
        return self.subscribers if self.is_shared else 1

    @property
    def changes_per_second(self) -> float:
        """The target, in changes."""
        return self.events_per_second / self.events_per_change

    def targets(self) -> list[str]:
        """Return the path and query that each subscriber asks for."""
        return [
            "/changes?" + urlencode([("table", workload.TABLE), *self._filter(subscriber)])
            for subscriber in range(self.subscribers)
        ]

    def rows_of(self, subscriber: int, rows: range) -> range:
        """Return those of the rows written that one subscriber must get, in order."""
        if self.is_shared:
            return rows
        first = rows.start + (subscriber - rows.start) % self.subscribers
        return range(first, rows.stop, self.subscribers)

    def _filter(self, subscriber: int) -> list[tuple[str, str]]:
        if self.is_shared:
            return []
        return [("where", f"conversation_id=eq.conversation-{subscriber}")]


SCENARIOS: Final = (
    Scenario("500 filters", 500, is_shared=False, events_per_second=3_000.0),
    Scenario("5,000 filters", 5_000, is_shared=False, events_per_second=2_000.0),
    Scenario("500 alike", 500, is_shared=True, events_per_second=150_000.0),
)

P99_MILLISECONDS: Final = 50.0
"""The target for the time from commit to client, at a tenth of the rate."""

TARGETED_PART: Final = 0.1

PACED_PARTS: Final = (TARGETED_PART, 1.0)
"""At the whole rate it is shown that it can be kept up."""
