"""Who is in which channel, what they say to each other, and who is present.

A room is a channel's topic, as a public or as a private one: what is said in the one is not heard
in the other. What is said is written once for each version of the protocol, and given to everybody
at once. How a client takes it is the client's matter: nobody is waited for.

Presence is told soon after it changes, and together with all that has changed until then. In a
large room soon is later: a diff costs as much as there are members, and so does what it may take
until the next one. So a thousand who come together make some diffs, and not a thousand for each.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from walstream.config.realtime import RealtimeConfig
from walstream.realtime.messages import Version, broadcast_json, encode, encode_broadcast
from walstream.realtime.presence import Presences, Unwritable, content_of, size_of

RoomKey: TypeAlias = tuple[str, bool]
"""A topic, with ``realtime:``, and whether it is a private channel's."""

PAUSE_SECONDS_A_MEMBER: Final = 0.0001
"""After a diff, so long for each who got it, before the next one."""

LONGEST_PAUSE_SECONDS: Final = 1.0


class Member(Protocol):
    """One channel of one socket; it has a hash of its own."""

    @property
    def version(self) -> Version:
        """Of the protocol that is spoken."""

    @property
    def wants_self(self) -> bool:
        """Whether it wants its own broadcasts back."""

    @property
    def wants_presence(self) -> bool:
        """Whether it wants to know who is present.

        Who does not is told nothing: a client that has got no state keeps all diffs, for a state
        that may come with its next join, and is wrong then.
        """

    def send(self, frames: bytes) -> None:
        """Let the client have complete frames; returns at once, and raises nothing."""


class TrackRefused(Exception):
    """Somebody cannot be present with that; the text is for the client."""


class Rooms:
    """All rooms of a process; for its event loop only."""

    def __init__(self, config: RealtimeConfig) -> None:
        self._config = config
        self._rooms: dict[RoomKey, _Room] = {}
        self._refs = _refs()
        self.broadcasts = 0
        """What was said, by sockets and by HTTP."""
        self.sent_broadcasts = 0
        """How often that was given to a member."""

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def presences(self) -> int:
        """How many are present, all in all."""
        return sum(len(room.presences) for room in self._rooms.values())

    def enter(self, key: RoomKey, member: Member) -> None:
        """Let somebody hear what is said from now on."""
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = _Room(key[0], self._refs)
        room.members[member] = None

    def leave(self, key: RoomKey, member: Member) -> None:
        """Let somebody be gone, and not present any more."""
        room = self._rooms.get(key)
        if room is None or member not in room.members:
            return
        del room.members[member]
        if not room.members:
            room.close()
            del self._rooms[key]
        elif room.presences.untrack(member):
            room.tell_soon()

    def broadcast(
        self,
        key: RoomKey,
        event: str,
        payload: bytes,
        *,
        is_json: bool,
        sender: Member | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Say something to all who are there.

        Args:
            key: of the room.
            event: its name.
            payload: JSON, or anything else, which only members of version 2.0.0 get.
            is_json: which of them.
            sender: who gets it only if it wants it; None for somebody from outside.
            metadata: what is known about it, for the members.
        """
        self.broadcasts += 1
        room = self._rooms.get(key)
        if room is None:
            return
        about = {name: value for name, value in (metadata or {}).items() if name != "persist"}
        frames = _Broadcast(key[0], event, payload, about, is_json=is_json)
        left_out = None if sender is None or sender.wants_self else sender
        self.sent_broadcasts += room.send(frames, left_out)

    def track(
        self, key: RoomKey, member: Member, presence_key: str, payload: Mapping[str, Any]
    ) -> None:
        """Let somebody who is in the room be present.

        Raises:
            TrackRefused: it is too much.
        """
        room = self._rooms.get(key)
        if room is None or member not in room.members:
            return
        content = self._verified(room.presences, member, presence_key, payload)
        if room.presences.track(member, presence_key, content):
            room.tell_soon()

    def untrack(self, key: RoomKey, member: Member) -> None:
        """Let somebody be in the room, and not present any more."""
        room = self._rooms.get(key)
        if room is not None and room.presences.untrack(member):
            room.tell_soon()

    def state(self, key: RoomKey) -> bytes:
        """Return who is present, as JSON: the payload of ``presence_state``.

        It is what the members know by now. Whoever enters, and is told this before anything else
        happens, knows the same from then on.
        """
        room = self._rooms.get(key)
        return b"{}" if room is None else room.presences.state()

    def _verified(
        self, presences: Presences, member: Member, key: str, payload: Mapping[str, Any]
    ) -> bytes:
        try:
            content = content_of(payload)
        except Unwritable:
            raise TrackRefused("Presence track payload cannot be written as JSON") from None
        size = size_of(key, content)
        if size > self._config.max_presence_bytes:
            raise TrackRefused(
                f"Track message size exceeded: found {size} bytes of key and payload; allowed:"
                f" {self._config.max_presence_bytes}"
            )
        # The state is one message, which everybody gets who enters.
        if presences.bytes - presences.size(member) + size > self._config.max_frame_bytes:
            raise TrackRefused(
                "Too many presences in this channel: together they are more than"
                f" {self._config.max_frame_bytes} bytes"
            )
        return content


def _refs() -> Iterator[str]:
    """Make refs that no other process has made."""
    process = secrets.token_urlsafe(6)
    return (f"{process}{number:x}" for number in itertools.count(1))


class _Frames(Protocol):
    def frame(self, version: Version) -> bytes:
        """Write it; empty where this version has no form for it."""


class _Broadcast(msgspec.Struct, frozen=True):
    topic: str
    event: str
    payload: bytes
    metadata: Mapping[str, Any]
    is_json: bool

    def frame(self, version: Version) -> bytes:
        about = msgspec.json.encode(self.metadata) if self.metadata else b""
        if not self.is_json:
            if version is Version.V1:
                return b""
            return encode_broadcast(self.topic, self.event, self.payload, about)
        # As text also for 2.0.0, which reads both: a binary one bounds the names.
        content = broadcast_json(self.event, self.payload, about)
        return encode(version, self.topic, "broadcast", content)


class _Diff(msgspec.Struct, frozen=True):
    topic: str
    content: bytes

    def frame(self, version: Version) -> bytes:
        return encode(version, self.topic, "presence_diff", self.content)


class _Room:
    """One room: it is there while somebody is in it."""

    def __init__(self, topic: str, refs: Iterator[str]) -> None:
        self.members: dict[Member, None] = {}
        self.presences: Final = Presences(refs)
        self._topic = topic
        self._telling: asyncio.Handle | None = None
        self._told_at = float("-inf")
        self._pause_seconds = 0.0

    def send(
        self, what: _Frames, left_out: Member | None = None, *, to_watchers: bool = False
    ) -> int:
        """Give it to the members but one; return to how many."""
        frames: dict[Version, bytes] = {}
        count = 0
        for member in tuple(self.members):  # one that is cut off by this may leave
            if member is left_out or (to_watchers and not member.wants_presence):
                continue
            version = member.version
            frame = frames.get(version)
            if frame is None:
                frame = frames[version] = what.frame(version)
            if frame:
                member.send(frame)
                count += 1
        return count

    def tell_soon(self) -> None:
        """Tell everybody who has come and gone, once it is time."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            seconds = self._told_at + self._pause_seconds - time.monotonic()
            if seconds > 0:
                self._telling = loop.call_later(seconds, self._tell)
            else:
                self._telling = loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = None
        if not self.presences.has_news:
            return
        count = self.send(_Diff(self._topic, self.presences.take_diff()), to_watchers=True)
        self._told_at = time.monotonic()
        self._pause_seconds = min(count * PAUSE_SECONDS_A_MEMBER, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
