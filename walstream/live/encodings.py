"""How a change is written for a client."""

from __future__ import annotations

import json
from typing import Any, Final, Protocol

from walstream.changes import Change
from walstream.positions import Position


class Encoding(Protocol):
    """A form that clients read; one object for all of them."""

    media_type: str

    def frame(self, change: Change) -> bytes:
        """Write one change."""

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        """Write something that is no change; `position` is where a client goes on from."""

    @property
    def heartbeat(self) -> bytes:
        """What keeps a quiet connection open, and means nothing."""


class _ServerSentEvents:
    """``text/event-stream`` (WHATWG HTML, 9.2 Server-sent events)."""

    media_type = "text/event-stream"
    # No blank line: some clients make an event of each.
    heartbeat = b":\n"

    def frame(self, change: Change) -> bytes:
        return b"id: %b\nevent: %b\ndata: %b\n\n" % (
            change.id.encode(),
            change.operation.encode(),
            change.to_json(),
        )

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        identity = "" if position is None else f"id: {position}\n"
        return f"{identity}event: {event}\ndata: {_json(content)}\n\n".encode()


class _JsonLines:
    """One JSON object a line; notes have the key ``event`` and no ``operation``."""

    media_type = "application/jsonl"
    heartbeat = b"\n"

    def frame(self, change: Change) -> bytes:
        return change.to_json() + b"\n"

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        at = {} if position is None else {"id": str(position)}
        return f"{_json({'event': event, **at, **content})}\n".encode()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


SERVER_SENT_EVENTS: Final[Encoding] = _ServerSentEvents()
JSON_LINES: Final[Encoding] = _JsonLines()
