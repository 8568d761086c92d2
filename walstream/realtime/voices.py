"""What one channel of a socket says to the others of its room, and what it hears of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Final

from walstream.access.readers import Reader
from walstream.realtime.channels import Channel
from walstream.realtime.events import Broadcasting
from walstream.realtime.messages import Version
from walstream.realtime.protocol import Protocol
from walstream.realtime.refusals import PAYLOAD_TOO_LARGE, not_writable
from walstream.realtime.rooms import TrackRefused
from walstream.realtime.services import Services
from walstream.realtime.tally import Reason


class Voice:
    """A member of a room; ``reader`` is who it is at each moment."""

    def __init__(
        self,
        services: Services,
        core: Protocol,
        channel: Channel,
        send: Callable[[bytes], None],
        reader: Reader,
    ) -> None:
        """Be in no room yet.

        Args:
            services: of the process.
            core: the protocol of the socket.
            channel: that is joined.
            send: gives frames to the client.
            reader: who it is.
        """
        self.version: Final[Version] = core.version
        self.wants_self: Final = channel.join.broadcast_self
        self.wants_presence: Final = channel.join.presence_enabled
        self.send: Final = send
        self.reader = reader
        self._services = services
        self._core = core
        self._channel = channel
        self._key = channel.join.presence_key or str(uuid.uuid4())
        self._room = (channel.topic, channel.join.is_private)
        self._is_there = False

    def enter(self) -> None:
        """Hear the others from now on, and know who is there."""
        rooms = self._services.rooms
        rooms.enter(self._room, self)
        self._is_there = True
        if self.wants_presence:
            state = rooms.state(self._room)
            self.send(self._core.push(self._channel, "presence_state", state))

    def leave(self) -> None:
        """Be gone, and not seen any more; also where it never entered."""
        if self._is_there:
            self._is_there = False
            self._services.rooms.leave(self._room, self)

    def broadcast(self, event: Broadcasting) -> None:
        """Say something to the others."""
        refusal = self._refusal(event.payload)
        if not refusal:
            self._services.rooms.broadcast(
                self._room,
                event.event,
                event.payload,
                is_json=event.is_json,
                sender=self,
                metadata=event.metadata,
            )
        else:
            self._services.refusals.add(Reason.BROADCAST)
        if event.wants_ack:
            self._answer(event.ref, refusal)

    def track(self, ref: str | None, payload: dict[str, Any]) -> None:
        """Be seen with this."""
        refusal = self._refusal(b"")
        if not refusal:
            try:
                self._services.rooms.track(self._room, self, self._key, payload)
            except TrackRefused as refused:
                refusal = str(refused)
        if refusal:
            self._services.refusals.add(Reason.PRESENCE)
        self._answer(ref, refusal)

    def untrack(self, ref: str | None) -> None:
        """Be seen no more."""
        self._answer(ref, "")
        self._services.rooms.untrack(self._room, self)

    def _answer(self, ref: str | None, refusal: str) -> None:
        response = {"reason": refusal} if refusal else {}
        self.send(self._core.reply(self._channel, ref, response, ok=not refusal))

    def _refusal(self, payload: bytes) -> str:
        if len(payload) > self._services.config.max_broadcast_bytes:
            return PAYLOAD_TOO_LARGE
        may = not self._channel.join.is_private or self._services.topics.may_write(
            self.reader, self._channel.name
        )
        return "" if may else not_writable(self._channel.name)
