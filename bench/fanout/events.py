"""What a client reads off its socket: server-sent events in the chunks of HTTP/1.1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from bench.fanout.delivered import Delivered

STREAMING: Final = b"\nevent: streaming\n"

INSERT: Final = b"\nevent: insert\n"
"""In every event that counts, once: JSON has no line ends."""

ROW: Final = b'"row":{"id":'
"""What comes before the number of the row, which is the table's first column."""

ROW_NUMBER: Final = re.compile(re.escape(ROW) + rb"(\d+)")

WHOLE: Final = (b"\n\n\r\n", b"\n\n")
"""What ends an event, with and without the end of a chunk."""

_CUT: Final = re.compile(rb"\nevent: (end|reset)\ndata: (.*)\n")

_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)


def opening(host: str, port: int, target: str) -> bytes:
    """Ask for the events at a path."""
    return (
        f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n\r\n"
    ).encode()


def answer(_heard: bytes, _target: str) -> None:
    """Say nothing more."""


def cuts(text: bytes) -> list[str]:
    """List the events that say that a client was cut off, or has missed something."""
    return [b" ".join(found).decode() for found in _CUT.findall(text)]


def delivered(head: bytes, body: bytes) -> list[Delivered]:
    """Read a whole body as a strict client would.

    Raises:
        AssertionError: an event is not what is documented, or ids do not grow.
    """
    text = b"".join(_chunks(body)) if _CHUNKED.search(head) else body
    changes = [_delivered(event) for event in _events(text) if event.get("event") == "insert"]
    places = [_place(change.id) for change in changes]
    assert all(map(tuple.__lt__, places, places[1:])), "ids do not grow"
    return changes


def _place(identity: str) -> tuple[int, ...]:
    """Return what orders ids, such as 0/16274F8:3."""
    # Not by `walstream.positions`: many processes would load all of walstream for it.
    high, low, ordinal = re.split("[/:]", identity)
    return int(high, 16), int(low, 16), int(ordinal)


def _chunks(body: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(body):
        end = body.index(b"\r\n", position)
        size = int(body[position:end], 16)
        yield body[end + 2 : end + 2 + size]
        position = end + 2 + size + 2
        assert body[position - 2 : position] == b"\r\n", "a chunk is longer than it says"


def _events(text: bytes) -> Iterator[dict[str, str]]:
    assert text.endswith(b"\n"), "the last event is not whole"
    for block in text.decode().removesuffix("\n\n").split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name:  # and no comment
                assert name not in fields, f"an event has two lines {name!r}"
                fields[name] = value
        yield fields


def _delivered(event: dict[str, str]) -> Delivered:
    change: dict[str, Any] = msgspec.json.decode(event["data"])
    assert change["id"] == event["id"], f"the id is {event['id']}, of the data {change['id']}"
    assert change["operation"] == event["event"], f"{change['operation']} as {event['event']}"
    return Delivered(change["id"], change["row"]["id"])
