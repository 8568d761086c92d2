"""What a client's messages come to: what the driver of a socket has to do, in this order."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from walstream.realtime.channels import Channel


class Answer(msgspec.Struct, frozen=True):
    """Frames for the client, now."""

    frames: bytes


class Joining(msgspec.Struct, frozen=True):
    """A channel that is asked for: `Protocol.joined` or `Protocol.refuse_join` has to follow."""

    channel: Channel


class Left(msgspec.Struct, frozen=True):
    """A channel that is no more, whether it had been joined or not; nothing is answered to it."""

    channel: Channel


class TokenGiven(msgspec.Struct, frozen=True):
    """The token from now on, perhaps the same as before; it is not answered when it is good."""

    channel: Channel
    token: str


class Broadcasting(msgspec.Struct, frozen=True):
    """Something to be passed on: ``payload`` is JSON text that everybody can read, or raw bytes."""

    channel: Channel
    ref: str | None
    event: str
    payload: bytes
    is_json: bool
    metadata: dict[str, Any]
    wants_ack: bool


class Tracking(msgspec.Struct, frozen=True):
    """Somebody wants to be present, with this; it is to be answered."""

    channel: Channel
    ref: str | None
    payload: dict[str, Any]


class Untracking(msgspec.Struct, frozen=True):
    """Somebody wants to be absent; it is to be answered."""

    channel: Channel
    ref: str | None


class Overrun(msgspec.Struct, frozen=True):
    """The client sends too much: every channel is told so and closed, and then the socket."""

    reason: str


Event: TypeAlias = (
    Answer | Joining | Left | TokenGiven | Broadcasting | Tracking | Untracking | Overrun
)
