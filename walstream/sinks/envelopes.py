"""What a webhook sends: changes in the body of a request, and the headers that vouch for it.

Pure: bodies, ids and signatures depend on changes and keys only, so that a request that is sent
again is the same request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from walstream.changes import Change

Format: TypeAlias = Literal["json", "ndjson", "cloudevents"]

_DIGEST_CHARACTERS: Final = 16


class _Frame(msgspec.Struct, frozen=True):
    """What stands around and between the changes of a body."""

    content_type: str
    begin: bytes
    separator: bytes
    end: bytes


_FRAMES: Final[dict[Format, _Frame]] = {
    "json": _Frame("application/json", b'{"changes":[', b",", b"]}"),
    "ndjson": _Frame("application/x-ndjson", b"", b"\n", b"\n"),
    "cloudevents": _Frame("application/cloudevents-batch+json", b"[", b",", b"]"),
}


class Envelope(msgspec.Struct, frozen=True):
    """The body of one request, and the changes in it."""

    changes: tuple[Change, ...]
    body: bytes

    def __repr__(self) -> str:
        """Print without the body, which holds row values."""
        return f"Envelope({len(self.changes)} changes, {len(self.body)} bytes)"

    @property
    def first(self) -> str:
        """The id of the first change."""
        return self.changes[0].id

    @property
    def last(self) -> str:
        """The id of the last change."""
        return self.changes[-1].id

    def id(self, sink: str) -> str:
        """Return an id that is the same at every attempt: of what, and by what it is told apart.

        Another view of the same changes, of another route or database, has another one. It holds no
        full stop, which separates the parts of what is signed.
        """
        digest = hashlib.sha256(sink.encode() + b"\0" + self.body).hexdigest()
        places = f"{self.first}_{self.last}".replace("/", "-").replace(":", "-")
        return f"msg_{places}_{digest[:_DIGEST_CHARACTERS]}"


class Packing(msgspec.Struct, frozen=True):
    """How changes are put into requests: at most so many, of at most so many bytes.

    A change that is larger by itself goes alone. ``source`` is that of CloudEvents.
    """

    format: Format = "json"
    source: str = "/walstream"
    max_changes: int = 100
    max_request_bytes: int = 1 << 20

    @property
    def content_type(self) -> str:
        """Of the bodies."""
        return _FRAMES[self.format].content_type

    def pack(self, changes: Sequence[Change]) -> Iterator[Envelope]:
        """Put changes into envelopes, in their order."""
        frame = _FRAMES[self.format]
        spare = self.max_request_bytes - len(frame.begin) - len(frame.end) + len(frame.separator)
        packed: list[Change] = []
        items: list[bytes] = []
        size = 0
        for change in changes:
            item = self._item(change)
            added = len(item) + len(frame.separator)
            if items and (len(items) == self.max_changes or size + added > spare):
                yield _envelope(frame, packed, items)
                packed, items, size = [], [], 0
            packed.append(change)
            items.append(item)
            size += added
        if items:
            yield _envelope(frame, packed, items)

    def _item(self, change: Change) -> bytes:
        if self.format != "cloudevents":
            return change.to_json()
        return msgspec.json.encode(
            {
                "specversion": "1.0",
                "id": change.id,
                "source": self.source,
                "type": f"walstream.{change.operation}",
                "subject": str(change.relation),
                "time": change.commit_time.isoformat(timespec="microseconds"),
                "datacontenttype": "application/json",
                "data": msgspec.Raw(change.to_json()),
            }
        )


def _envelope(frame: _Frame, changes: list[Change], items: list[bytes]) -> Envelope:
    return Envelope(tuple(changes), frame.begin + frame.separator.join(items) + frame.end)


def signature(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """Return the signatures of Standard Webhooks, one for each key.

    "The content to sign is the id, timestamp and payload, separated by a full stop", and while keys
    are exchanged "the header holds a space delimited list of signatures".
    """
    content = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    digests = [hmac.digest(key, content, "sha256") for key in keys]
    return " ".join([f"v1,{base64.b64encode(digest).decode()}" for digest in digests])
