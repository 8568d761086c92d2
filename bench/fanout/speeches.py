"""How subscribers speak with the server: what they say first, and what counts in what they hear.

A process with thousands of clients only counts bytes where they lie; so each way of speaking says
which bytes those are. Whole streams are read strictly only where each change is verified.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import msgspec

from bench.fanout import events, frames
from bench.fanout.delivered import Delivered


class Speech(msgspec.Struct, frozen=True):
    """One way of speaking.

    ``opening`` is what a client sends first, made of host, port and what it asks for. To what it
    has heard ``answer`` says what it sends next, None while it waits for more; with ``streaming``
    in what it has heard, all it asks for is there from then on.

    ``change`` is in every change once, ``row`` before the number of its row, and ``whole`` ends
    what is heard where a change ends, ``begun`` where that begins. ``cuts`` finds what says that a
    client misses something, ``read`` reads all changes strictly. A client that says nothing else
    sends ``sign`` from time to time.
    """

    opening: Callable[[str, int, str], bytes]
    answer: Callable[[bytes, str], bytes | None]
    streaming: bytes
    change: bytes
    row: bytes
    row_number: re.Pattern[bytes]
    whole: tuple[bytes, ...]
    begun: tuple[bytes, ...]
    cuts: Callable[[bytes], list[str]]
    read: Callable[[bytes, bytes], list[Delivered]]
    sign: bytes = b""


SPEECHES: Final = {
    "events": Speech(
        opening=events.opening,
        answer=events.answer,
        streaming=events.STREAMING,
        change=events.INSERT,
        row=events.ROW,
        row_number=events.ROW_NUMBER,
        whole=events.WHOLE,
        begun=events.WHOLE,
        cuts=events.cuts,
        read=events.delivered,
    ),
    "frames": Speech(
        opening=frames.opening,
        answer=frames.answer,
        streaming=frames.STREAMING,
        change=frames.INSERT,
        row=frames.ROW,
        row_number=frames.ROW_NUMBER,
        whole=frames.WHOLE,
        begun=frames.BEGUN,
        cuts=frames.cuts,
        read=frames.delivered,
        sign=frames.SIGN,
    ),
}
"""Server-Sent Events of ``/changes``, and the frames that clients of Supabase Realtime get."""
