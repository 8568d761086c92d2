"""The protocol of one socket: what a client's messages mean, and what is answered.

No I/O and no clock: frames and the time go in, events come out. What needs no waiting is decided
here, and its answer is an event too; what takes time is an event for the driver, who lets the
client have what `joined`, `refuse_join`, `reply`, `system`, `push` and `close` write.

::

    phx_join --> Joining --> joined -------> Broadcasting, Tracking, Untracking, TokenGiven
                     |                          |
                     +-----> refuse_join        +--> close, or Left: phx_leave, or a second phx_join

Frames that cannot be read are dropped, and the socket stays, as with the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from walstream.realtime.answers import Answers
from walstream.realtime.channels import PREFIX, Channel
from walstream.realtime.events import (
    Answer,
    Broadcasting,
    Event,
    Joining,
    Left,
    Overrun,
    TokenGiven,
    Tracking,
    Untracking,
)
from walstream.realtime.joins import Join, read_join, read_token
from walstream.realtime.messages import (
    BinaryBroadcast,
    ClientMessage,
    Malformed,
    Message,
    Version,
    decode,
    decode_binary,
    decode_text_broadcast,
)
from walstream.realtime.rates import Rate
from walstream.realtime.tally import Reason, of_join

MESSAGES_SECONDS: Final = 10.0
"""Messages are counted over so long: a client may send as many at once, if it then rests."""

MAX_JOIN_BYTES: Final = 256 << 10
"""Of what a join asks for, which is kept as long as the channel."""

MAX_JOIN_VALUES: Final = 10_000
"""Of the same: small ones take much more memory than their text."""

MAX_HELD_BYTES: Final = 1_000_000
"""Of messages to channels whose join is not answered yet."""

_HELD_MESSAGE_BYTES: Final = 1_000


class ProtocolLimits(msgspec.Struct, frozen=True):
    """How much one socket may do; the presence calls are counted for each channel.

    ``max_bytes`` may come in `MESSAGES_SECONDS`: to read them costs, whatever they say.
    """

    max_channels: int = 100
    max_bytes: int = 20_000_000
    messages_per_second: int = 100
    joins_per_second: int = 100
    presence_calls: int = 5
    presence_seconds: float = 30.0


class Protocol(Answers):
    """What one socket has said, and which channels it has by that."""

    def __init__(self, version: Version, limits: ProtocolLimits | None = None) -> None:
        """Begin with no channel.

        Args:
            version: that the client asked for when it connected.
            limits: of this socket.
        """
        super().__init__(version)
        self._limits = limits or ProtocolLimits()
        self._channels: dict[str, Channel] = {}
        self._messages = Rate(
            int(self._limits.messages_per_second * MESSAGES_SECONDS), MESSAGES_SECONDS
        )
        self._bytes = Rate(self._limits.max_bytes, MESSAGES_SECONDS)
        self._joins = Rate(self._limits.joins_per_second, 1.0)
        self._held_bytes = 0
        self._to_resume: list[Channel] = []
        self._is_overrun = False
        self.refusals: Final[list[str]] = []
        """What was refused here, by reasons of `walstream.realtime.tally`; the driver takes it."""

    @property
    def channels(self) -> Mapping[str, Channel]:
        """The channels by their topics, joined or to be joined."""
        return MappingProxyType(self._channels)

    # What the client says

    def receive_text(self, data: str, now: float) -> list[Event]:
        """Take a text frame; returns what is to be done, in this order.

        Args:
            data: as it came.
            now: monotonic seconds.
        """
        return self._receive(data, now)

    def receive_bytes(self, data: bytes, now: float) -> list[Event]:
        """Take a binary frame, likewise."""
        return self._receive(data, now)

    def resume(self, now: float) -> list[Event]:
        """Return what was sent to channels before they were joined; for right after `joined`."""
        events: list[Event] = []
        while self._to_resume:
            channel = self._to_resume.pop(0)
            messages, channel.held = channel.held, []
            self._held_bytes -= sum(map(_held_bytes, messages))
            for message in messages:
                events += self._take(message, now)
        return events

    def _receive(self, data: str | bytes, now: float) -> list[Event]:
        if self._is_overrun:
            return []
        before = self.resume(now) if self._to_resume else []
        if not self._bytes.take(now, len(data)):
            return [*before, self._overrun()]
        try:
            message = self._decode(data)
        except Malformed:
            return before
        return [*before, *self._take_new(message, now)]

    def _decode(self, data: str | bytes) -> ClientMessage:
        # Version 1.0.0 has JSON in frames of either kind.
        if isinstance(data, str) or self.version is Version.V1:
            return decode(self.version, data)
        return decode_binary(data)

    def _take_new(self, message: ClientMessage, now: float) -> list[Event]:
        if isinstance(message, Message):
            match message.topic, message.event:
                case "phoenix", "heartbeat":
                    return [Answer(self._reply_to(message, None, {}, ok=True))]
                case _, "phx_join":
                    return self._join(message, now)
                case _, "phx_leave":
                    return self._leave(message)
        if message.topic in self._channels and not self._messages.take(now):
            return [self._overrun()]
        return self._take(message, now)

    def _overrun(self) -> Event:
        self._is_overrun = True
        self.refusals.append(Reason.MESSAGES)
        return Overrun("Too many messages per second")

    def _take(self, message: ClientMessage, now: float) -> list[Event]:
        channel = self._channels.get(message.topic)
        if channel is None or not (channel.is_joined or self._may_hold(message)):
            return [Answer(self._unmatched([message]))]
        if not channel.is_joined:
            # The original does nothing else for a socket until a join is answered.
            channel.held.append(message)
            self._held_bytes += _held_bytes(message)
            return []
        try:
            return self._take_joined(channel, message, now)
        except Malformed:
            return []

    # Joining and leaving

    def _join(self, message: Message, now: float) -> list[Event]:
        if not message.topic.startswith(PREFIX):
            return [Answer(self._unmatched([message]))]
        reason = self._refusal(message, now)
        try:
            join = Join() if reason else read_join(message.payload)
        except Malformed:
            return []
        events = self._replace(message.topic)
        if reason:
            self.refusals.append(of_join(reason))
            answer = self._reply_to(message, message.join_ref, {"reason": reason}, ok=False)
            return [*events, Answer(answer)]
        presence_calls = Rate(self._limits.presence_calls, self._limits.presence_seconds)
        channel = Channel(message, join, presence_calls)
        self._channels[channel.topic] = channel
        return [*events, Joining(channel)]

    def _replace(self, topic: str) -> list[Event]:
        channel = self._channels.get(topic)
        if channel is None:
            return []
        closed = self.close(channel)
        # The client for Python takes any phx_close for its own, and joins anew after each error:
        # it would be without the channel for good. Others look at the join's reference.
        told = b"" if self.version is Version.V1 else closed
        return [Left(channel), *([Answer(told)] if told else [])]

    def _refusal(self, message: Message, now: float) -> str:
        if message.topic == PREFIX:
            return "TopicNameRequired: You must provide a topic name"
        if not self._joins.take(now):
            return "ClientJoinRateLimitReached: Too many joins per second"
        if len(message.raw) > MAX_JOIN_BYTES:
            return f"InvalidJoinPayload: A join has at most {MAX_JOIN_BYTES} bytes"
        if sum(map(message.raw.count, (b",", b"[", b"{"))) > MAX_JOIN_VALUES:
            return f"InvalidJoinPayload: A join has at most {MAX_JOIN_VALUES} values"
        if len(self._channels.keys() - {message.topic}) >= self._limits.max_channels:
            return "ChannelRateLimitReached: Too many channels"
        return ""

    def _leave(self, message: Message) -> list[Event]:
        channel = self._channels.get(message.topic)
        if channel is None or not channel.is_meant_by(message):
            return [Answer(self._reply_to(message, message.join_ref, {}, ok=True))]
        reply = self.reply(channel, message.ref, {})
        return [Left(channel), Answer(reply + self.close(channel))]

    # In a channel

    def _take_joined(self, channel: Channel, message: ClientMessage, now: float) -> list[Event]:
        if isinstance(message, BinaryBroadcast):
            return [_binary_broadcasting(channel, message)]
        match message.event:
            case "broadcast":
                return self._broadcast(channel, message)
            case "presence":
                return self._presence(channel, message, now)
            case "access_token":
                return _token_given(channel, message.payload)
            case _:
                return []  # nor does the original answer what it does not know

    def _broadcast(self, channel: Channel, message: Message) -> list[Event]:
        wants_ack = channel.join.broadcast_ack
        try:
            found = decode_text_broadcast(message)
        except Malformed:
            text = "Broadcast payload must be a map with the name of an event"
            answer = self._error(channel, message, text, Reason.BROADCAST)
            return [answer] if wants_ack else []
        return [
            Broadcasting(
                channel=channel,
                ref=message.ref,
                event=found.event,
                payload=bytes(found.payload),
                is_json=True,
                metadata={},
                wants_ack=wants_ack,
            )
        ]

    def _presence(self, channel: Channel, message: Message, now: float) -> list[Event]:
        asked = message.payload
        if not isinstance(asked, dict) or "event" not in asked:
            return [Answer(self.reply(channel, message.ref, {}))]
        if not channel.presence_calls.take(now):
            self.refusals.append(Reason.PRESENCE)
            reason = "Client presence rate limit exceeded"
            told = self.system(channel, "system", "error", reason)
            return [Left(channel), Answer(told + self.close(channel))]
        event = asked["event"]
        match event.lower() if isinstance(event, str) else None:
            case "track":
                return [self._track(channel, message, asked.get("payload", {}))]
            case "untrack":
                return [Untracking(channel, message.ref)]
            case _:
                return [Answer(self.reply(channel, message.ref, {}, ok=False))]

    def _track(self, channel: Channel, message: Message, payload: Any) -> Event:
        if not isinstance(payload, dict):
            text = "Presence track payload must be a map"
            return self._error(channel, message, text, Reason.PRESENCE)
        if channel.join.presence_key == "ids":
            # A state with this key breaks the JavaScript client of everybody in the channel.
            text = "Presence key must not be ids"
            return self._error(channel, message, text, Reason.PRESENCE)
        return Tracking(channel, message.ref, payload)

    def _error(self, channel: Channel, message: Message, text: str, reason: Reason) -> Answer:
        self.refusals.append(reason)
        return Answer(self.reply(channel, message.ref, {"reason": text}, ok=False))

    def _may_hold(self, message: ClientMessage) -> bool:
        return self._held_bytes + _held_bytes(message) <= MAX_HELD_BYTES

    # What the driver answers

    def joined(self, channel: Channel, response: Mapping[str, Any]) -> bytes:
        """Accept a join; `resume` has what the client has sent meanwhile.

        Returns:
            Frames, like `refuse_join` and `close`; nothing for a channel that is gone.
        """
        if not self._has(channel):
            return b""
        channel.is_joined = True
        if channel.held:
            self._to_resume.append(channel)
        return self.reply(channel, channel.ref, response)

    def refuse_join(self, channel: Channel, reason: str) -> bytes:
        """Refuse a join; the channel is gone by that."""
        if not self._has(channel):
            return b""
        held = self._remove(channel)
        refusal = self.reply(channel, channel.ref, {"reason": reason}, ok=False)
        return refusal + self._unmatched(held)

    def close(self, channel: Channel) -> bytes:
        """End a channel; it is gone by that."""
        if not self._has(channel):
            return b""
        held = self._remove(channel)
        return self._closed(channel) + self._unmatched(held)

    def _has(self, channel: Channel) -> bool:
        return self._channels.get(channel.topic) is channel

    def _remove(self, channel: Channel) -> list[ClientMessage]:
        del self._channels[channel.topic]
        held, channel.held = channel.held, []
        self._held_bytes -= sum(map(_held_bytes, held))
        return held


def _held_bytes(message: ClientMessage) -> int:
    content = message.raw if isinstance(message, Message) else message.payload
    return _HELD_MESSAGE_BYTES + len(content)


def _binary_broadcasting(channel: Channel, message: BinaryBroadcast) -> Broadcasting:
    return Broadcasting(
        channel=channel,
        ref=message.ref,
        event=message.event,
        payload=message.payload,
        is_json=message.is_json,
        metadata=message.metadata,
        wants_ack=channel.join.broadcast_ack,
    )


def _token_given(channel: Channel, payload: Any) -> list[Event]:
    token = read_token(payload.get("access_token") if isinstance(payload, dict) else None)
    return [] if token is None else [TokenGiven(channel, token)]
