"""Complete WebSocket frames, as a server sends them (RFC 6455, 5.2).

Each is final and, as the server's must be, not masked: the same bytes go to any number of clients,
and frames one after another are one write.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

_FINAL_TEXT: Final = 0x81
_FINAL_BINARY: Final = 0x82
# A length up to 125 is in the second byte; 126 and 127 stand for two and eight bytes behind it.
_MAX_SHORT: Final = 125
_IN_TWO_BYTES: Final = 126
_IN_EIGHT_BYTES: Final = 127
_MEDIUM: Final = struct.Struct(">BBH")
_LONG: Final = struct.Struct(">BBQ")
_MAX_MEDIUM: Final = 0xFFFF


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
