"""The messages of Phoenix channels, in the two forms that clients speak.

Version 1.0.0 is a JSON object, 2.0.0 an array of five; both are text. 2.0.0 also has broadcasts in
binary: kind 3 from clients, kind 4 to them. Lengths there are one byte each.

::

    1.0.0   {"topic":..., "event":..., "payload":..., "ref":...}          from clients: "join_ref"
    2.0.0   [join_ref, ref, topic, event, payload]
    kind 3  3, len(join_ref), len(ref), len(topic), len(event), len(metadata), is_json, ..., payload
    kind 4  4, len(topic), len(event), len(metadata), is_json, topic, event, metadata, payload
"""

from __future__ import annotations

import re
from array import array
from enum import StrEnum
from itertools import accumulate
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from walstream.realtime.frames import binary_frame, text_frame

MAX_REF_CHARACTERS: Final = 255
MAX_TOPIC_CHARACTERS: Final = 1024
"""Of a topic and an event: both are in every frame of a channel."""
MAX_DEPTH: Final = 100
"""Of arrays and objects inside each other: what is passed on has to be readable by everybody, and
the Python client gives up at 200."""
MAX_BINARY_NAME_BYTES: Final = 255
"""Of a topic, an event and metadata in a binary frame: one byte says how long each is."""

_USER_PUSH: Final = 3
_USER_BROADCAST: Final = 4
_USER_PUSH_HEADER: Final = 7
_NO_JSON: Final = 0
_NO_PAYLOAD: Final = msgspec.Raw(b"{}")


class Version(StrEnum):
    """Of the protocol, as clients name it in ``vsn``."""

    V1 = "1.0.0"
    V2 = "2.0.0"


class Malformed(ValueError):
    """A client's frame is no message; the reason quotes nothing of it."""


class Message(msgspec.Struct, frozen=True):
    """What a client says; ``payload`` is whatever JSON it sent, and the text of that in ``raw``."""

    topic: str
    event: str
    raw: bytes
    ref: str | None
    join_ref: str | None

    @property
    def payload(self) -> Any:
        """The payload as Python values.

        Raises:
            Malformed: it has a number that Python cannot hold.
        """
        return _parse(_ANYTHING, self.raw)


class BinaryBroadcast(msgspec.Struct, frozen=True):
    """A broadcast in a frame of kind 3; ``payload`` is JSON text, or bytes of any kind."""

    join_ref: str | None
    ref: str | None
    topic: str
    event: str
    metadata: dict[str, Any]
    is_json: bool
    payload: bytes


ClientMessage: TypeAlias = Message | BinaryBroadcast


class TextBroadcast(msgspec.Struct, frozen=True):
    """The payload of a broadcast in a text frame; what is inside that is JSON text."""

    event: str
    payload: msgspec.Raw = _NO_PAYLOAD


class _ObjectMessage(msgspec.Struct):
    topic: str
    event: str
    payload: msgspec.Raw = _NO_PAYLOAD
    # The official clients send text.
    ref: str | int | None = None
    join_ref: str | int | None = None


class _ArrayMessage(msgspec.Struct, array_like=True):
    join_ref: str | int | None
    ref: str | int | None
    topic: str
    event: str
    payload: msgspec.Raw


_ANYTHING: Final = msgspec.json.Decoder()
_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
_METADATA: Final = msgspec.json.Decoder(dict[str, Any])
_TEXT_BROADCAST: Final = msgspec.json.Decoder(TextBroadcast)
_MESSAGES: Final[dict[Version, msgspec.json.Decoder[_ObjectMessage | _ArrayMessage]]] = {
    Version.V1: msgspec.json.Decoder(_ObjectMessage),
    Version.V2: msgspec.json.Decoder(_ArrayMessage),
}
_text: Final = msgspec.json.Encoder().encode
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NEITHER: Final = bytes(set(range(256)) - set(b'"[]{}'))
_TEXT: Final = re.compile(rb'"[^"]*"')
# As signed bytes: one step down, or one up.
_STEPS: Final = bytes.maketrans(b"[]", b"\x01\xff")


def decode(version: Version, text: str | bytes) -> Message:
    """Read a text frame.

    Raises:
        Malformed: it is no message of this version, or larger in some part than anybody needs.
    """
    data = _utf8(text)
    found = _parse(_MESSAGES[version], data)
    _verify_depth(data)
    _verify_names(found.topic, found.event)
    ref, join_ref = _ref(found.ref), _ref(found.join_ref)
    return Message(found.topic, found.event, bytes(found.payload), ref, join_ref)


def decode_text_broadcast(message: Message) -> TextBroadcast:
    """Read the payload of a broadcast that came as text.

    Raises:
        Malformed: it is no object with the name of an event.
    """
    found = _parse(_TEXT_BROADCAST, message.raw)
    _verify_names(message.topic, found.event)
    return found


def decode_binary(data: bytes) -> BinaryBroadcast:
    """Read a binary frame of version 2.0.0.

    Raises:
        Malformed: it is of another kind, shorter than its lengths say, or not what it says it is.
    """
    if len(data) < _USER_PUSH_HEADER or data[0] != _USER_PUSH:
        raise Malformed("a binary frame that is no broadcast")
    at = _USER_PUSH_HEADER
    parts = []
    for length in data[1:6]:
        parts.append(data[at : at + length])
        at += length
    if at > len(data):
        raise Malformed("a binary frame shorter than its header says")
    join_ref, ref, topic, event, metadata = parts
    is_json, payload = data[6] != 0, data[at:]
    if is_json:
        verify_json(payload)
    return BinaryBroadcast(
        join_ref=_name(join_ref) or None,
        ref=_name(ref) or None,
        topic=_name(topic),
        event=_name(event),
        metadata=_parse(_METADATA, metadata) if metadata else {},
        is_json=is_json,
        payload=payload,
    )


def verify_json(payload: bytes) -> None:
    """Make sure that everybody can read what one client wants passed on as JSON.

    Raises:
        Malformed: it is no JSON, no UTF-8, or nested deeper than `MAX_DEPTH`.
    """
    _name(payload)
    _parse(_RAW, payload)
    _verify_depth(payload)


def encode(
    version: Version,
    topic: str,
    event: str,
    payload_json: bytes,
    *,
    ref: str | None = None,
    join_ref: str | None = None,
) -> bytes:
    """Write a complete text frame; the payload is JSON text, and never ``null``.

    The JavaScript client fails on a payload that is null; the Python client on a message of version
    1.0.0 in which the key ``ref`` is missing.
    """
    if version is Version.V1:
        parts = (_text(topic), _text(event), payload_json, _text(ref))
        return text_frame(b'{"topic":%b,"event":%b,"payload":%b,"ref":%b}' % parts)
    names = (_text(join_ref), _text(ref), _text(topic), _text(event))
    return text_frame(b"[%b,%b,%b,%b,%b]" % (*names, payload_json))


def encode_broadcast(topic: str, event: str, payload: bytes, metadata_json: bytes = b"") -> bytes:
    """Write a complete binary frame of kind 4, for clients of version 2.0.0.

    It is for payloads that are no JSON: JSON goes out as text, in which names may be longer. A name
    that is too long makes nothing: no bytes.
    """
    names = (topic.encode(), event.encode(), metadata_json)
    if max(map(len, names)) > MAX_BINARY_NAME_BYTES:
        return b""
    header = bytes((_USER_BROADCAST, *map(len, names), _NO_JSON))
    return binary_frame(b"".join((header, *names, payload)))


def broadcast_json(event: str, payload: bytes, metadata_json: bytes = b"") -> bytes:
    """Write the payload of a broadcast that goes out as text; ``payload`` is JSON."""
    meta = b',"meta":%b' % metadata_json if metadata_json else b""
    parts = (_text(event), payload, meta)
    return b'{"type":"broadcast","event":%b,"payload":%b%b}' % parts


_Read = TypeVar("_Read")


def _parse(decoder: msgspec.json.Decoder[_Read], data: bytes) -> _Read:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise Malformed("no JSON of the expected form") from None


def _utf8(text: str | bytes) -> bytes:
    try:
        return text.encode() if isinstance(text, str) else text.decode().encode()
    except UnicodeError:
        raise Malformed("no UTF-8") from None


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeError:
        raise Malformed("no UTF-8") from None


def _ref(value: str | int | None) -> str | None:
    if isinstance(value, int):
        value = str(value)
    if value is not None and len(value) > MAX_REF_CHARACTERS:
        raise Malformed("a ref is too long")
    return value


def _verify_names(topic: str, event: str) -> None:
    if len(topic) > MAX_TOPIC_CHARACTERS or len(event) > MAX_TOPIC_CHARACTERS:
        raise Malformed("the name of a topic or an event is too long")


def _verify_depth(data: bytes) -> None:
    """Refuse what is nested too deeply; of valid JSON only, where each text has its end."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    steps = array("b", _brackets(data).translate(_STEPS))
    # `_brackets` leaves out one level.
    if max(accumulate(steps), default=0) >= MAX_DEPTH:
        raise Malformed("nested too deeply")


def _brackets(data: bytes) -> bytes:
    """Return the brackets outside of texts, all of them square, but for those with nothing inside.

    In passes over everything, since a frame may have millions of brackets and texts.
    """
    without_escapes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes_too = without_escapes.translate(_SQUARE, _NEITHER)
    # Most texts have no brackets. What is between two others stays outside, or inside, by this.
    quotes_too = quotes_too.replace(b'""', b"")
    return _TEXT.sub(b"", quotes_too).replace(b"[]", b"")
