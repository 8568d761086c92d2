"""Who subscribes to what, and what each subscriber must get."""

from __future__ import annotations

import time
from typing import Final
from urllib.parse import urlencode

import jwt
import msgspec

from bench import workload
from bench.fanout.frames import Wish

SECRET: Final = "only-the-benchmark-signs-its-tokens-by-this"  # noqa: S105 - of no value
"""What the tokens of subscribers are signed with."""

ANYONE: Final = "anyone"
MEMBER: Final = "member"
"""Roles: one that reads every row, and one that reads the conversation in its token."""


class Limit(msgspec.Struct, frozen=True):
    """What is wished for from commit to client, at a part of the rate."""

    part: float
    percentile: int
    milliseconds: float


class Scenario(msgspec.Struct, frozen=True):
    """Some subscribers, and what is wished for.

    They are in so many ``groups``, without a number each is one, and the changes go round the
    groups. A group asks for its changes by an equality filter, or, with ``by_role``, gets them by a
    condition of its role over its token's claims. ``events_per_second`` is the target: what all
    clients together get.
    """

    name: str
    subscribers: int
    groups: int | None
    events_per_second: float
    limit: Limit
    speech: str = "events"
    by_role: bool = False

    @property
    def conversations(self) -> int:
        """How many there are in the rows that are written."""
        return self.groups or self.subscribers

    @property
    def events_per_change(self) -> int:
        """How many clients get each change."""
        return self.subscribers // self.conversations

    @property
    def is_shared(self) -> bool:
        """Whether a change goes to many."""
        return self.events_per_change > 1

    @property
    def changes_per_second(self) -> float:
        """The target, in changes."""
        return self.events_per_second / self.events_per_change

    @property
    def paced_parts(self) -> tuple[float, ...]:
        """At which parts of the rate commits are timed; at the whole it is shown to be kept up."""
        return (self.limit.part, 1.0)

    def targets(self) -> list[str]:
        """Return what each subscriber asks for."""
        one = _path if self.speech == "events" else _wish
        return [one(self, subscriber) for subscriber in range(self.subscribers)]

    def rows_of(self, subscriber: int, rows: range) -> range:
        """Return those of the rows written that one subscriber must get, in order."""
        groups = self.conversations
        first = rows.start + (subscriber - rows.start) % groups
        return range(first, rows.stop, groups)

    def filter_of(self, subscriber: int) -> str:
        """Return the filter that a subscriber asks by; empty for none."""
        if self.by_role or self.conversations == 1:
            return ""
        return f"conversation_id=eq.{self.conversation_of(subscriber)}"

    def conversation_of(self, subscriber: int) -> str:
        """Return the one whose changes a subscriber gets."""
        return f"conversation-{subscriber % self.conversations}"


def _path(scenario: Scenario, subscriber: int) -> str:
    where = scenario.filter_of(subscriber)
    parameters = [("table", workload.TABLE), *([("where", where)] if where else [])]
    return "/changes?" + urlencode(parameters)


def _wish(scenario: Scenario, subscriber: int) -> str:
    schema, _, table = workload.TABLE.partition(".")
    binding = {"event": "*", "schema": schema, "table": table}
    where = scenario.filter_of(subscriber)
    if where:
        binding["filter"] = where
    # Where rights differ every subscriber has a channel of its own, too: nothing is shared.
    own = f"-{subscriber}" if scenario.by_role else ""
    topic = f"realtime:{scenario.conversation_of(subscriber)}{own}"
    config = {"postgres_changes": [binding], "presence": {"enabled": False}}
    join = ["1", "1", topic, "phx_join", {"config": config}]
    query = urlencode({"apikey": _token(scenario, subscriber), "vsn": "2.0.0"})
    wish = Wish(f"/realtime/v1/websocket?{query}", msgspec.json.encode(join).decode())
    return msgspec.json.encode(wish).decode()


def _token(scenario: Scenario, subscriber: int) -> str:
    claims: dict[str, object] = {"role": ANYONE, "exp": int(time.time()) + 86_400}
    if scenario.by_role:
        own = {"sub": f"user-{subscriber}", "conversation": scenario.conversation_of(subscriber)}
        claims |= {"role": MEMBER, **own}
    return jwt.encode(claims, SECRET, "HS256")


_FAST: Final = Limit(part=0.1, percentile=99, milliseconds=50.0)
_EVEN: Final = Limit(part=0.5, percentile=95, milliseconds=100.0)

SCENARIOS: Final = (
    Scenario("500 filters", 500, None, 3_000.0, _FAST),
    Scenario("5,000 filters", 5_000, None, 2_000.0, _FAST),
    Scenario("500 alike", 500, 1, 150_000.0, _FAST),
    Scenario("500 sockets alike", 500, 1, 300_000.0, _EVEN, "frames"),
    Scenario("500 sockets with filters", 500, None, 3_600.0, _EVEN, "frames"),
    Scenario("5,000 sockets by role", 5_000, 5, 50_000.0, _EVEN, "frames", by_role=True),
)
"""The last three are told as Supabase's clients are. Realtime's own SQL, on two cores of this kind,
decides 61, 36 and about 1 changes a second there."""
