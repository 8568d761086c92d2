"""What a WebSocket client sends, decoded: bytes in, messages out (RFC 6455).

Nothing is kept of a frame that is refused, and no more than ``max_bytes`` of a message: a frame
that would make it longer is refused by its head. Extensions are not negotiated, so no reserved bit
may be set (5.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias, cast

from walstream.realtime.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    CONTROL_BYTES,
    FIN,
    PING,
    PONG,
    TEXT,
    CloseCode,
)

try:
    from websockets.speedups import apply_mask
except ImportError:  # where there is no compiled wheel
    from websockets.utils import apply_mask

_unmask: Final = cast("Callable[[bytearray, bytearray], bytes]", apply_mask)

_LENGTH_OF_TWO_BYTES: Final = 126
_HEAD_BYTES: Final = 2
_MASK_BYTES: Final = 4
_CODE_BYTES: Final = 2

_RESERVED: Final = 0x70
_OPCODE: Final = 0x0F
_MASKED: Final = 0x80
_LENGTH: Final = 0x7F

_CODES: Final = frozenset((*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)))
"""Those that may be in a frame."""


class Violation(Exception):
    """What the client sent cannot be, or is too much: close with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Ping(NamedTuple):
    """Wants a pong of the same payload."""

    payload: bytes


class Pong(NamedTuple):
    """The client is there."""


class Closing(NamedTuple):
    """The client closes; ``code`` is None when it gives none."""

    code: int | None


class Fragment(NamedTuple):
    """A part of a message that goes on."""


Arrival: TypeAlias = str | bytes | Ping | Pong | Fragment | Closing


class Incoming:
    """One client's side of a connection."""

    def __init__(self, max_bytes: int) -> None:
        """Take messages of at most so many bytes."""
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._message: bytearray | None = None
        """What has come of a message in fragments."""
        self._is_text = False

    @property
    def is_within(self) -> bool:
        """Whether a message or a frame has begun and is not complete."""
        return bool(self._buffer) or self._message is not None

    def feed(self, data: bytes) -> None:
        """Take what came, to be read by `read`."""
        self._buffer += data

    def read(self) -> Arrival | None:
        """Return what came next, or None when more has to come first.

        Raises:
            Violation: this cannot be read, nor what comes after it.
        """
        frame = self._frame()
        if frame is None:
            return None
        first, payload = frame
        opcode = first & _OPCODE
        if opcode >= CLOSE:
            return _control(opcode, payload)
        if opcode != CONTINUATION and first & FIN:
            return _text(payload) if opcode == TEXT else payload
        return self._join(opcode, payload, is_last=bool(first & FIN))

    def _frame(self) -> tuple[int, bytes] | None:
        """Take a frame out of what came: its first byte, and what it carries."""
        buffer = self._buffer
        if len(buffer) < _HEAD_BYTES:
            return None
        first, length = buffer[0], buffer[1] & _LENGTH
        self._check(first, buffer[1])
        mask = _HEAD_BYTES
        if length > CONTROL_BYTES:
            mask += 2 if length == _LENGTH_OF_TWO_BYTES else 8
            if len(buffer) < mask:
                return None
            length = int.from_bytes(buffer[_HEAD_BYTES:mask])
        self._check_length(length)
        begin = mask + _MASK_BYTES
        end = begin + length
        if len(buffer) < end:
            return None
        payload = _unmask(buffer[begin:end], buffer[mask:begin])
        del buffer[:end]
        return first, payload

    def _check(self, first: int, second: int) -> None:
        """Refuse what no frame of a client begins with, at this place (5.1, 5.2, 5.4, 5.5)."""
        opcode = first & _OPCODE
        if first & _RESERVED:
            raise _broken("a reserved bit is set")
        if not second & _MASKED:
            raise _broken("the frame is not masked")
        if opcode in (CLOSE, PING, PONG):
            if not first & FIN:
                raise _broken("a control frame is fragmented")
            if second & _LENGTH > CONTROL_BYTES:
                raise _broken("a control frame is too long")
        elif opcode > BINARY:
            raise _broken("there is no such opcode")
        elif (opcode == CONTINUATION) is (self._message is None):
            raise _broken("a fragment is out of place")

    def _check_length(self, length: int) -> None:
        begun = 0 if self._message is None else len(self._message)
        if length > self._max_bytes - begun:
            raise Violation(CloseCode.TOO_BIG, f"a message may have {self._max_bytes} bytes")

    def _join(self, opcode: int, payload: bytes, *, is_last: bool) -> str | bytes | Fragment:
        if self._message is None:
            self._message = bytearray()
            self._is_text = opcode == TEXT
        self._message += payload
        if not is_last:
            return Fragment()
        message, self._message = bytes(self._message), None
        return _text(message) if self._is_text else message


def _control(opcode: int, payload: bytes) -> Ping | Pong | Closing:
    if opcode == PING:
        return Ping(payload)
    return Pong() if opcode == PONG else _closing(payload)


def _closing(payload: bytes) -> Closing:
    """Read a code and a reason, of which only the code is of use (5.5.1)."""
    if not payload:
        return Closing(None)
    code = int.from_bytes(payload[:2])
    if len(payload) < _CODE_BYTES or code not in _CODES:
        raise _broken("there is no such close code")
    _text(payload[2:])
    return Closing(code)


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise Violation(CloseCode.INVALID_TEXT, "the text is not UTF-8") from None


def _broken(reason: str) -> Violation:
    return Violation(CloseCode.PROTOCOL_ERROR, reason)
