"""What a WebSocket client sends, decoded: rules as tables, and another decoder as the judge."""

from __future__ import annotations

import base64
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, Side
from websockets.server import ServerProtocol

from tests.frames import masked
from walstream.gateway.handshake import HandshakeRefused, accept, split_target
from walstream.gateway.incoming import (
    Arrival,
    Closing,
    Fragment,
    Incoming,
    Ping,
    Pong,
    Violation,
)
from walstream.realtime.frames import close_frame

MAX_BYTES = 100


def arrivals(*data: bytes) -> list[Arrival | int]:
    """All that is decoded of what came, and the code of what ends it."""
    incoming = Incoming(MAX_BYTES)
    found: list[Arrival | int] = []
    try:
        for piece in data:
            incoming.feed(piece)
            while (arrival := incoming.read()) is not None:
                found.append(arrival)
    except Violation as violation:
        found.append(violation.code)
    return found


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (masked(0x1, b"text"), ["text"]),
        (masked(0x2, b"\xff"), [b"\xff"]),
        (masked(0x1, b""), [""]),
        (masked(0x2, b"x" * MAX_BYTES), [b"x" * MAX_BYTES]),
        (masked(0x9, b"why"), [Ping(b"why")]),
        (masked(0xA, b"so"), [Pong()]),
        (masked(0x8), [Closing(None)]),
        (masked(0x8, b"\x03\xe8" + b"reason"), [Closing(1000)]),
        (masked(0x8, b"\x0f\xa0"), [Closing(4000)]),
        # Fragments, with a ping between them and a character across them.
        (masked(0x1, b"a\xc3", fin=False) + masked(0x0, b"\xa4"), [Fragment(), "aä"]),
        (
            masked(0x2, b"a", fin=False) + masked(0x9) + masked(0x0, b"b"),
            [Fragment(), Ping(b""), b"ab"],
        ),
        # 5.1, 5.2: heads that no client may send.
        (b"\x81\x00", [1002]),
        (b"\xc1\x80", [1002]),
        (b"\xa1\x80", [1002]),
        (b"\x91\x80", [1002]),
        (b"\x83\x80", [1002]),
        (b"\x8b\x80", [1002]),
        (b"\x8f\x80", [1002]),
        # 5.4: fragments out of place.
        (masked(0x0, b"a"), [1002]),
        (masked(0x1, b"a", fin=False) + masked(0x1, b"b"), [Fragment(), 1002]),
        # 5.5: control frames.
        (masked(0x9, fin=False), [1002]),
        (b"\x89\xfe", [1002]),
        (masked(0x8, b"\x03"), [1002]),
        (masked(0x8, b"\x03\xed"), [1002]),
        (masked(0x8, b"\x13\x88"), [1002]),
        (masked(0x8, b"\x03\xe8\xff"), [1007]),
        # 8.1: text is UTF-8.
        (masked(0x1, b"\xff"), [1007]),
        (masked(0x1, b"a\xc3", fin=False) + masked(0x0, b"b"), [Fragment(), 1007]),
        # Too much, told by the head alone.
        (b"\x82\xfe\x00\x65", [1009]),
        (b"\x82\xff" + b"\xff" * 8, [1009]),
        (
            masked(0x2, b"x" * 60, fin=False) + masked(0x0, b"x" * 41)[:2],
            [Fragment(), 1009],
        ),
    ],
)
def test_frames_are_read_as_the_standard_has_them(sent: bytes, found: list[Arrival | int]) -> None:
    assert arrivals(sent) == found
    assert arrivals(*(sent[at : at + 1] for at in range(len(sent)))) == found


def _is_within(incoming: Incoming) -> bool:
    return incoming.is_within


def test_what_is_incomplete_is_known() -> None:
    incoming = Incoming(MAX_BYTES)
    assert not _is_within(incoming)
    incoming.feed(masked(0x1, b"a", fin=False)[:3])
    assert _is_within(incoming)
    incoming.feed(masked(0x1, b"a", fin=False)[3:])
    assert incoming.read() == Fragment()
    assert _is_within(incoming)
    incoming.feed(masked(0x0, b"b"))
    assert incoming.read() == "ab"
    assert not _is_within(incoming)


def test_a_long_reason_is_cut_between_characters() -> None:
    assert close_frame(4000, "ü" * 100) == b"\x88\x7c\x0f\xa0" + "ü".encode() * 61
    assert close_frame(None) == b"\x88\x00"


FRAMES = st.lists(
    st.one_of(
        st.builds(
            masked,
            st.sampled_from([0x0, 0x1, 0x1, 0x2, 0x8, 0x9, 0xA]),
            st.one_of(st.binary(max_size=130), st.text(max_size=40).map(str.encode)),
            fin=st.booleans(),
        ),
        st.binary(min_size=1, max_size=8),
    ),
    max_size=8,
)


def others(data: bytes) -> list[Arrival | int]:
    """The same by python-websockets."""
    logger = logging.Logger("other")  # noqa: LOG001 - heard by nobody
    protocol = Protocol(Side.SERVER, max_size=MAX_BYTES, logger=logger)
    protocol.receive_data(data)
    found: list[Arrival | int] = []
    message, is_text = b"", False
    for frame in protocol.events_received():
        assert isinstance(frame, Frame)
        payload = bytes(frame.data)
        if frame.opcode is Opcode.PING:
            found.append(Ping(payload))
        elif frame.opcode is Opcode.PONG:
            found.append(Pong())
        elif frame.opcode is Opcode.CLOSE:
            found.append(Closing(int.from_bytes(payload[:2]) if payload else None))
        else:
            if frame.opcode is not Opcode.CONT:
                message, is_text = b"", frame.opcode is Opcode.TEXT
            message += payload
            if not frame.fin:
                found.append(Fragment())
            elif is_text and not _is_utf8(message):
                return [*found, 1007]
            else:
                found.append(message.decode() if is_text else message)
    return found if protocol.parser_exc is None else [*found, 1002]


def _is_utf8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def _good(found: list[Arrival | int]) -> list[Arrival | int]:
    """Without the fault, and without what comes behind a goodbye: that is of no interest."""
    kept = [one for one in found if not isinstance(one, int)]
    goodbyes = [at for at, one in enumerate(kept) if isinstance(one, Closing)]
    return list(kept[: goodbyes[0] + 1]) if goodbyes else list(kept)


@given(FRAMES, st.integers(1, 40))
def test_another_decoder_finds_the_same_however_it_is_cut(frames: list[bytes], size: int) -> None:
    data = b"".join(frames)
    ours = arrivals(*(data[at : at + size] for at in range(0, len(data), size)))
    theirs = others(data)
    good = _good(ours)
    if theirs and isinstance(theirs[-1], int) and good and isinstance(good[-1], Closing):
        good = good[: len(_good(theirs))]  # it refuses a goodbye amid a message: to us it is one
    assert good == _good(theirs)
    if theirs and isinstance(theirs[-1], int):  # which of several faults is told is open
        assert isinstance(ours[-1], int | Closing) or isinstance(_good(ours)[-1], Closing)


@given(st.lists(st.binary(max_size=64), max_size=30))
def test_garbage_is_read_or_refused_and_never_kept(pieces: list[bytes]) -> None:
    incoming = Incoming(MAX_BYTES)
    try:
        for piece in pieces:
            incoming.feed(piece)
            while (arrival := incoming.read()) is not None:
                if isinstance(arrival, str | bytes):
                    assert len(arrival) <= MAX_BYTES
            assert len(incoming._buffer) <= MAX_BYTES + 14
    except Violation:
        pass


# ---- The opening handshake

KEY = base64.b64encode(b"0123456789abcdef")
HEADERS = {
    b"upgrade": b"websocket",
    b"connection": b"Upgrade",
    b"sec-websocket-key": KEY,
    b"sec-websocket-version": b"13",
}


def test_the_answer_is_what_another_server_says() -> None:
    head = accept("GET", "1.1", list(HEADERS.items()))
    other = ServerProtocol()
    headers = Headers({name.decode(): value.decode() for name, value in HEADERS.items()})
    request = Request("/", headers)
    wanted = other.accept(request).headers["Sec-WebSocket-Accept"]
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert f"sec-websocket-accept: {wanted}\r\n\r\n".encode() in head


@pytest.mark.parametrize(
    ("method", "version", "changed"),
    [
        ("POST", "1.1", {}),
        ("GET", "1.0", {}),
        ("GET", "1.1", {b"sec-websocket-version": b"8"}),
        ("GET", "1.1", {b"sec-websocket-version": None}),
        ("GET", "1.1", {b"sec-websocket-key": None}),
        ("GET", "1.1", {b"sec-websocket-key": b"c2hvcnQ="}),
        ("GET", "1.1", {b"sec-websocket-key": b"\xff" * 24}),
        ("GET", "1.1", {b"sec-websocket-key": b"!" * 24}),
    ],
)
def test_what_is_no_handshake_is_refused(
    method: str, version: str, changed: dict[bytes, bytes | None]
) -> None:
    headers = [(name, value) for name, value in (HEADERS | changed).items() if value is not None]
    with pytest.raises(HandshakeRefused):
        accept(method, version, headers)


def test_headers_given_twice_are_refused() -> None:
    for name in (b"sec-websocket-key", b"sec-websocket-version"):
        with pytest.raises(HandshakeRefused):
            accept("GET", "1.1", [*HEADERS.items(), (name, HEADERS[name])])


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (b"/a%20b?x=%20", ("/a b", b"/a%20b", b"x=%20")),
        (b"http://host/a", ("/a", b"/a", b"")),
        (b"/", ("/", b"/", b"")),
    ],
)
def test_the_address_is_taken_apart(target: bytes, parts: tuple[str, bytes, bytes]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize("target", [b"", b"http://host", b"nothing", b"/\xff"])
def test_an_address_that_is_none_is_refused(target: bytes) -> None:
    with pytest.raises(HandshakeRefused):
        split_target(target)
