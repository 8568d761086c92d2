"""Changes as the messages of a joined channel: complete WebSocket frames.

What a change looks like is written once (`walstream.realtime.records`); a frame is that with the
channel's topic and the ids of its bindings around it. The bytes are shared by all clients that have
joined a channel of one name with equal bindings.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

import msgspec

from walstream.live.encodings import Form, Sighting
from walstream.positions import Position
from walstream.realtime.channels import PREFIX
from walstream.realtime.frames import text_frame
from walstream.realtime.messages import Version, encode
from walstream.realtime.records import RealtimeForm

_FORMS: Final[dict[bool, Form]] = {
    with_position: RealtimeForm(with_position=with_position) for with_position in (False, True)
}

MAX_COMBINED: Final = 64
"""So many combinations of bindings that see a change alike are remembered."""


class ChannelEncoding:
    """What clients of one channel read that have equal bindings."""

    __slots__ = ("_closing", "_combined", "_hash", "_ids", "_key", "_opening", "_single", "form")

    media_type = "application/json"
    heartbeat = b""

    def __init__(
        self, version: Version, topic: str, ids: tuple[int, ...], *, with_position: bool = False
    ) -> None:
        """Prepare what all frames have in common.

        Args:
            version: of the protocol.
            topic: of the channel, whole.
            ids: of the bindings, in the order of the client's subscriptions.
            with_position: the records carry the positions of changes.
        """
        self.form: Form = _FORMS[with_position]
        self._key = (version, topic, ids, with_position)
        self._hash = hash(self._key)
        self._ids = ids
        self._opening, self._closing = _around_ids(version, topic)
        self._single = [self._open(b"%d" % one) for one in ids]
        self._combined: dict[tuple[int, ...], bytes] = {}

    def __eq__(self, other: object) -> bool:
        """Equal ones make the same bytes."""
        return isinstance(other, ChannelEncoding) and self._key == other._key

    def __hash__(self) -> int:
        """Hash by what the bytes depend on."""
        return self._hash

    def address(self, sightings: Sequence[Sighting]) -> bytes:
        """Make a frame for each way in which the change is seen, with all bindings that see it."""
        if len(sightings) == 1:
            ((rank, body),) = sightings
            return text_frame(b"".join((self._single[rank], body, self._closing)))
        return b"".join(
            [
                text_frame(b"".join((self._several(ranks), body, self._closing)))
                for body, ranks in _by_body(sightings).items()
            ]
        )

    def _several(self, ranks: Sequence[int]) -> bytes:
        key = tuple(ranks)
        opening = self._combined.get(key)
        if opening is None:
            if len(self._combined) >= MAX_COMBINED:
                self._combined.clear()
            ids = dict.fromkeys([self._ids[rank] for rank in key])
            opening = self._combined[key] = self._open(b",".join([b"%d" % one for one in ids]))
        return opening

    def _open(self, ids: bytes) -> bytes:
        return b'%b{"ids":[%b],"data":' % (self._opening, ids)

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        """Tell of what may be missing, as a system message; of nothing else.

        In version 1.0.0 it is not of an error, after which the client for Python joins anew: from
        the same position, so that it would be told that again and again.
        """
        if event != "reset":
            return b""
        version, topic, _, _ = self._key
        reason = _REASONS.get(content["reason"], content["reason"])
        payload = {
            "channel": topic.removeprefix(PREFIX),
            "extension": "postgres_changes",
            "status": "ok" if version is Version.V1 else "error",
            "message": f"Changes may be missing: {reason}; what is kept begins behind"
            f" {content['begins']}, and the channel goes on behind {position}",
        }
        return encode(version, topic, "system", msgspec.json.encode(payload))


def _around_ids(version: Version, topic: str) -> tuple[bytes, bytes]:
    """Return what stands before and behind the payload."""
    name = msgspec.json.encode(topic)
    if version is Version.V1:
        return (
            b'{"topic":%b,"event":"postgres_changes","payload":' % name,
            b'},"ref":null}',
        )
    return b'[null,null,%b,"postgres_changes",' % name, b"}]"


def _by_body(sightings: Sequence[Sighting]) -> dict[bytes, list[int]]:
    bodies: dict[bytes, list[int]] = {}
    for rank, body in sorted(sightings, key=_rank):
        bodies.setdefault(body, []).append(rank)
    return bodies


_rank: Final = itemgetter(0)

_REASONS: Final = {
    "changed": "the routes, or what they mask, have changed",
    "interrupted": "others have read the replication slot, or nothing was known yet",
    "trimmed": "what was asked for is not kept any more",
    "foreign": "what was asked for is not a position of this server",
}
