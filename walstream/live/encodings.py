"""How a change is written for a client."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final, Protocol, TypeAlias

from walstream.changes import Change
from walstream.live.views import Look, View
from walstream.positions import Position

Sighting: TypeAlias = tuple[int, bytes]
"""How a client sees a change by one of its subscriptions: the rank of that, and what is written."""


class Form(Protocol):
    """How a change is written, before it is addressed to anybody; one object for all clients."""

    def write(self, view: View, change: Change, look: Look) -> bytes:
        """Write the change as it is seen, the same for all views of an equal shape."""


class Encoding(Protocol):
    """What clients read; equal ones are equal and have one hash."""

    media_type: str

    @property
    def form(self) -> Form:
        """How a change is written for those who read this."""

    def address(self, sightings: Sequence[Sighting]) -> bytes:
        """Make what a client gets of a change; it is seen at least once, in any order."""

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        """Write something that is no change; `position` is where a client goes on from."""

    @property
    def heartbeat(self) -> bytes:
        """What keeps a quiet connection open, and means nothing."""


class _First(ABC):
    """The first subscription that sees a change counts; its form is all that is sent."""

    @property
    def form(self) -> Form:
        return self

    @abstractmethod
    def write(self, view: View, change: Change, look: Look) -> bytes:
        """Write the change as it is seen."""

    def address(self, sightings: Sequence[Sighting]) -> bytes:
        return min(sightings, key=_rank)[1] if len(sightings) > 1 else sightings[0][1]


class _ServerSentEvents(_First):
    """``text/event-stream`` (WHATWG HTML, 9.2 Server-sent events)."""

    media_type = "text/event-stream"
    # No blank line: some clients make an event of each.
    heartbeat = b":\n"

    def write(self, view: View, change: Change, look: Look) -> bytes:
        change = view.show(change, look)
        return b"id: %b\nevent: %b\ndata: %b\n\n" % (
            change.id.encode(),
            change.operation.encode(),
            change.to_json(),
        )

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        identity = "" if position is None else f"id: {position}\n"
        return f"{identity}event: {event}\ndata: {_json(content)}\n\n".encode()


class _JsonLines(_First):
    """One JSON object a line; notes have the key ``event`` and no ``operation``."""

    media_type = "application/jsonl"
    heartbeat = b"\n"

    def write(self, view: View, change: Change, look: Look) -> bytes:
        return view.show(change, look).to_json() + b"\n"

    def note(self, event: str, content: dict[str, Any], position: Position | None) -> bytes:
        at = {} if position is None else {"id": str(position)}
        return f"{_json({'event': event, **at, **content})}\n".encode()


_rank: Final = itemgetter(0)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


SERVER_SENT_EVENTS: Final[Encoding] = _ServerSentEvents()
JSON_LINES: Final[Encoding] = _JsonLines()
