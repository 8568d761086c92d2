"""The opening handshake of a WebSocket, as a server reads and answers it (RFC 6455, 4.2)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

import httptools

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES: Final = 16
_VERSION: Final = b"13"


class HandshakeRefused(Exception):
    """The request asks for a WebSocket, and not as it must."""

    def __init__(self, error: str, hint: str) -> None:
        super().__init__(error)
        self.error = error
        self.hint = hint


def accept(method: str, http_version: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the head of the answer that opens the connection.

    Args:
        method: of the request.
        http_version: as ``1.1``.
        headers: of the request, names in lower case; they ask for an upgrade to ``websocket``.

    Raises:
        HandshakeRefused: this is no handshake.
    """
    if method != "GET" or http_version != "1.1":
        found = f"the WebSocket is asked for by {method} of HTTP/{http_version}"
        raise HandshakeRefused(found, "ask by GET of HTTP/1.1")
    if _only(headers, b"sec-websocket-version") != _VERSION:
        found = "there is not exactly one header Sec-WebSocket-Version with a version that is known"
        raise HandshakeRefused(found, "send Sec-WebSocket-Version: 13")
    key = _only(headers, b"sec-websocket-key")
    if key is None or not _is_key(key):
        found = "there is not exactly one header Sec-WebSocket-Key with a key in it"
        raise HandshakeRefused(found, "send 16 random bytes, in base64")
    answer = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - the protocol's
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: %b\r\n\r\n" % answer
    )


def split_target(target: bytes) -> tuple[str, bytes, bytes]:
    """Return a path, decoded and as it came, and the query of what a request is for.

    Raises:
        HandshakeRefused: it has no path.
    """
    try:
        url = httptools.parse_url(target)
        path = url.path.decode("ascii")
    except (httptools.HttpParserInvalidURLError, AttributeError, UnicodeDecodeError):
        raise HandshakeRefused("the address cannot be read", "give an absolute path") from None
    return unquote(path), url.path, url.query or b""


def _only(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    found = [value.strip() for name, value in headers if name == wanted]
    return found[0] if len(found) == 1 else None


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False
