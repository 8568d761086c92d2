"""Who may enter private channels, and who may say something there: nobody, unless it is said.

The rules of the configuration add up: one that lets somebody in is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from walstream.access.readers import Reader
from walstream.config.realtime import RealtimeConfig
from walstream.topic_patterns import TopicPattern


class _Rule(msgspec.Struct, frozen=True):
    pattern: TopicPattern
    read: frozenset[str]
    write: frozenset[str]


class Topics:
    """The rules for private channels."""

    def __init__(self, config: RealtimeConfig) -> None:
        self._rules: Sequence[_Rule] = [
            _Rule(TopicPattern.parse(one.topic), frozenset(one.read), frozenset(one.write))
            for one in config.private
        ]

    def may_read(self, reader: Reader, name: str) -> bool:
        """Whether somebody may be in a channel and get what is said there.

        Args:
            reader: who that is.
            name: of the channel, without ``realtime:``.
        """
        return any(
            reader.role in rule.read and rule.pattern.fits(name, reader.claims)
            for rule in self._rules
        )

    def may_write(self, reader: Reader, name: str) -> bool:
        """Whether somebody may broadcast in a channel, and be present there."""
        return any(
            reader.role in rule.write and rule.pattern.fits(name, reader.claims)
            for rule in self._rules
        )
