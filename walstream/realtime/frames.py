"""Complete WebSocket frames, as a server sends them (RFC 6455, 5.2).

Each is final and, as the server's must be, not masked: the same bytes go to any number of clients,
and frames one after another are one write.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
"""Opcodes."""

FIN: Final = 0x80

CONTROL_BYTES: Final = 125
"""A control frame may have so much (5.5), and its head says so; a longer one says where to look."""

_FINAL_TEXT: Final = FIN | TEXT
_FINAL_BINARY: Final = FIN | BINARY
# A length up to 125 is in the second byte; 126 and 127 stand for two and eight bytes behind it.
_MAX_SHORT: Final = 125
_IN_TWO_BYTES: Final = 126
_IN_EIGHT_BYTES: Final = 127
_MEDIUM: Final = struct.Struct(">BBH")
_LONG: Final = struct.Struct(">BBQ")
_MAX_MEDIUM: Final = 0xFFFF


class CloseCode:
    """Why a connection is closed (7.4.1, and IANA's registry)."""

    NORMAL: Final = 1000
    PROTOCOL_ERROR: Final = 1002
    INVALID_TEXT: Final = 1007
    POLICY_VIOLATION: Final = 1008
    TOO_BIG: Final = 1009
    INTERNAL_ERROR: Final = 1011
    SERVICE_RESTART: Final = 1012
    TRY_AGAIN_LATER: Final = 1013


def text_frame(payload: bytes) -> bytes:
    """Wrap UTF-8 text."""
    return _header(_FINAL_TEXT, len(payload)) + payload


def binary_frame(payload: bytes) -> bytes:
    """Wrap bytes of any kind."""
    return _header(_FINAL_BINARY, len(payload)) + payload


def _header(first: int, length: int) -> bytes:
    if length <= _MAX_SHORT:
        return bytes((first, length))
    if length <= _MAX_MEDIUM:
        return _MEDIUM.pack(first, _IN_TWO_BYTES, length)
    return _LONG.pack(first, _IN_EIGHT_BYTES, length)


def control_frame(opcode: int, payload: bytes = b"") -> bytes:
    """Make a control frame; the payload has at most `CONTROL_BYTES`."""
    return _header(FIN | opcode, len(payload)) + payload


def close_frame(code: int | None, reason: str = "") -> bytes:
    """Make the last frame; a long reason is cut (5.5.1)."""
    if code is None:
        return control_frame(CLOSE)
    text = reason.encode()[: CONTROL_BYTES - 2].decode(errors="ignore")
    return control_frame(CLOSE, code.to_bytes(2) + text.encode())


def split(frames: bytes) -> Iterator[tuple[bool, bytes]]:
    """Take apart what `text_frame` and `binary_frame` made, any number of them.

    Yields:
        Whether it is text, and the payload.
    """
    at = 0
    while at < len(frames):
        is_text = frames[at] == _FINAL_TEXT
        start, length = _extent(frames, at)
        at = start + length
        yield is_text, frames[start:at]


def _extent(frames: bytes, at: int) -> tuple[int, int]:
    length = frames[at + 1]
    if length <= _MAX_SHORT:
        return at + 2, length
    layout = _MEDIUM if length == _IN_TWO_BYTES else _LONG
    return at + layout.size, layout.unpack_from(frames, at)[2]
