"""What a client is in, or wants to be in."""

from __future__ import annotations

from typing import Final

from walstream.realtime.joins import Join
from walstream.realtime.messages import ClientMessage, Message
from walstream.realtime.rates import Rate

PREFIX: Final = "realtime:"
"""Of every topic; the name of the channel follows."""


class Channel:
    """A topic from one ``phx_join`` on; the next join of the same topic is another channel."""

    def __init__(self, message: Message, join: Join, presence_calls: Rate) -> None:
        """Begin with what the join says; it is not answered yet."""
        self.topic: Final = message.topic
        self.name: Final = message.topic.removeprefix(PREFIX)
        self.ref: Final = message.ref
        self.join_ref: Final = message.join_ref
        self.join: Final = join
        self.is_joined = False
        self.presence_calls: Final = presence_calls
        self.held: list[ClientMessage] = []
        """What has come before the join was answered."""

    def is_meant_by(self, message: Message) -> bool:
        """Whether a message is to this channel, and not to an earlier one of the topic."""
        return None in (message.join_ref, self.join_ref) or message.join_ref == self.join_ref
