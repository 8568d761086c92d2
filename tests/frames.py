"""Frames as a WebSocket client sends them, and as it reads them."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

_MASK: Final = b"\x37\xfa\x21\x3d"


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """One frame of a client; longer than a standard allows if the payload is."""
    first = (0x80 if fin else 0) | opcode
    body = bytes(byte ^ _MASK[at % 4] for at, byte in enumerate(payload))
    return bytes((first,)) + _length(len(payload)) + _MASK + body


def _length(length: int) -> bytes:
    if length < 126:
        return bytes((0x80 | length,))
    if length < 1 << 16:
        return b"\xfe" + length.to_bytes(2)
    return b"\xff" + length.to_bytes(8)


class Frame(NamedTuple):
    opcode: int
    payload: bytes


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    """Read one frame of a server.

    Raises:
        asyncio.IncompleteReadError: the connection has ended.
    """
    first, length = await reader.readexactly(2)
    assert first & 0x80
    if length >= 126:
        length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
    return Frame(first & 0x0F, await reader.readexactly(length))
