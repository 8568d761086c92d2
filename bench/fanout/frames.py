"""What a client of Supabase Realtime reads off its socket: Phoenix messages in WebSocket frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from bench.fanout.delivered import Delivered

STREAMING: Final = b'"message":"Subscribed to PostgreSQL"'

INSERT: Final = b'"type":"INSERT"'

ROW: Final = b'"record":{"id":'

ROW_NUMBER: Final = re.compile(re.escape(ROW) + rb"(\d+)")

WHOLE: Final = (b"}}]",)
"""What ends a frame with a change; no row of the benchmark has it."""

BEGUN: Final = (b"}]",)

SIGN: Final = b"\x8a\x80\0\0\0\0"
"""An empty pong (RFC 6455, 5.5.3): who is silent for long is taken for gone."""

_CUT: Final = re.compile(rb'"event":"phx_(?:close|error)"|"(phx_close|phx_error)"|"status":"error"')

_HEADERS_END: Final = b"\r\n\r\n"
_MASK: Final = bytes(4)  # all zeros: the payload stays as it is
_SHORT: Final = 125
_TWO_BYTES: Final = 126


class Wish(msgspec.Struct, frozen=True):
    """What a client asks for: the path to connect to, and what it says when it is connected."""

    path: str
    join: str


def opening(host: str, port: int, target: str) -> bytes:
    """Ask for a WebSocket (RFC 6455, 4.1)."""
    wish = msgspec.json.decode(target, type=Wish)
    return (
        f"GET {wish.path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def answer(heard: bytes, target: str) -> bytes | None:
    """Join, once the server has accepted."""
    if not heard.endswith(_HEADERS_END):
        return None
    assert heard.startswith(b"HTTP/1.1 101"), f"no WebSocket: {heard[:300]!r}"
    payload = msgspec.json.decode(target, type=Wish).join.encode()
    assert _SHORT < len(payload) < 1 << 16, "the header has another form then"
    head = bytes((0x81, 0x80 | _TWO_BYTES)) + len(payload).to_bytes(2, "big")
    return head + _MASK + payload


def cuts(text: bytes) -> list[str]:
    """List the messages that say that a client was cut off, or has missed something."""
    return [found.group().decode() for found in _CUT.finditer(text)]


def delivered(_head: bytes, body: bytes) -> list[Delivered]:
    """Read all frames as a strict client would.

    Raises:
        AssertionError: a frame is not what is documented.
    """
    messages = [msgspec.json.decode(payload) for payload in _payloads(body)]
    return [_delivered(one) for one in messages if one[3] == "postgres_changes"]


def _payloads(body: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(body):
        assert body[position] == 0x81, "a frame that is no whole text"  # noqa: PLR2004
        length, start = body[position + 1], position + 2
        if length > _SHORT:
            size = 2 if length == _TWO_BYTES else 8
            length = int.from_bytes(body[start : start + size], "big")
            start += size
        position = start + length
        assert position <= len(body), "the last frame is not whole"
        yield body[start:position]


def _delivered(message: Any) -> Delivered:
    join_ref, ref, _topic, _event, payload = message
    assert join_ref is None, "a change with the reference of a join"
    assert ref is None, "a change with a reference"
    assert payload["ids"], "a change for no binding"
    assert all(isinstance(one, int) for one in payload["ids"]), "an id that is no number"
    data = payload["data"]
    assert data["errors"] is None, f"errors: {data['errors']}"
    return Delivered("", data["record"]["id"])
