"""What is written to a client: complete frames, in the version that it speaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from walstream.realtime.channels import Channel
from walstream.realtime.messages import ClientMessage, Version, encode

_UNMATCHED: Final = {"reason": "unmatched topic"}


class Answers:
    """Writes what one socket gets, but for changes and broadcasts, which many get."""

    def __init__(self, version: Version) -> None:
        self.version: Final = version

    def reply(
        self, channel: Channel, ref: str | None, response: Mapping[str, Any], *, ok: bool = True
    ) -> bytes:
        """Answer the message that had this ref."""
        return self._reply(channel.topic, ref, channel.join_ref, response, ok=ok)

    def system(self, channel: Channel, extension: str, status: str, message: str) -> bytes:
        """Tell how it is with a part of the channel."""
        content = {
            "channel": channel.name,
            "extension": extension,
            "message": message,
            "status": status,
        }
        return self.push(channel, "system", msgspec.json.encode(content))

    def push(self, channel: Channel, event: str, payload_json: bytes) -> bytes:
        """Tell anything; the payload is a JSON object."""
        return encode(self.version, channel.topic, event, payload_json, join_ref=channel.join_ref)

    def _closed(self, channel: Channel) -> bytes:
        # Clients pass by a close whose ref is not that of their join.
        ref = channel.join_ref
        return encode(self.version, channel.topic, "phx_close", b"{}", ref=ref, join_ref=ref)

    def _reply_to(
        self, message: ClientMessage, join_ref: str | None, response: Mapping[str, Any], *, ok: bool
    ) -> bytes:
        """Answer a message that no channel is there for."""
        return self._reply(message.topic, message.ref, join_ref, response, ok=ok)

    def _unmatched(self, messages: Iterable[ClientMessage]) -> bytes:
        return b"".join([self._reply_to(one, None, _UNMATCHED, ok=False) for one in messages])

    def _reply(
        self,
        topic: str,
        ref: str | None,
        join_ref: str | None,
        response: Mapping[str, Any],
        *,
        ok: bool,
    ) -> bytes:
        payload = msgspec.json.encode({"status": "ok" if ok else "error", "response": response})
        return encode(self.version, topic, "phx_reply", payload, ref=ref, join_ref=join_ref)
