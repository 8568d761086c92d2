"""The messages inside CopyData."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.errors import ProtocolError
from walstream.lsn import Lsn
from walstream.protocol import PrimaryKeepalive, XLogData, parse, record_of, status_update

POSITIONS = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)


@given(POSITIONS, POSITIONS, TIMES, st.binary())
def test_xlogdata_is_read(data_start: int, wal_end: int, send_time: int, record: bytes) -> None:
    """Every field is where the documentation says."""
    message = parse(struct.pack(">cQQq", b"w", data_start, wal_end, send_time) + record)
    assert isinstance(message, XLogData)
    assert (message.data_start, message.wal_end, message.send_time) == (
        data_start,
        wal_end,
        send_time,
    )
    assert bytes(message.record) == record


@given(wal_end=POSITIONS, send_time=TIMES, reply_requested=st.booleans())
def test_a_keepalive_is_read(wal_end: int, send_time: int, *, reply_requested: bool) -> None:
    """The last byte asks for a reply."""
    data = struct.pack(">cQqB", b"k", wal_end, send_time, reply_requested)
    assert parse(data) == PrimaryKeepalive(wal_end, send_time, reply_requested)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_the_protocols_error(data: bytes) -> None:
    """Nothing else is raised, whatever comes."""
    with contextlib.suppress(ProtocolError):
        assert isinstance(parse(data), XLogData | PrimaryKeepalive)


@pytest.mark.parametrize("data", [b"", b"w" + bytes(23), b"k" + bytes(16), b"k" + bytes(18), b"z"])
def test_messages_of_a_wrong_length_or_kind_are_refused(data: bytes) -> None:
    """A shorter or longer keepalive is not one."""
    with pytest.raises(ProtocolError, match="not in the protocol"):
        parse(data)


@given(position=POSITIONS, reply_requested=st.booleans())
def test_a_status_update_reports_one_position_three_times(
    position: int, *, reply_requested: bool
) -> None:
    """Write, flush and apply; the time counts microseconds from 2000-01-01."""
    data = status_update(Lsn(position), now=946_684_800 + 1.5, reply_requested=reply_requested)
    assert struct.unpack(">cQQQqB", data) == (
        b"r",
        position,
        position,
        position,
        1_500_000,
        reply_requested,
    )


@given(st.binary(max_size=40))
def test_the_record_of_a_message_is_that_of_the_parsed_one(data: bytes) -> None:
    """The short way for the hot path, and the long one, agree."""
    with contextlib.suppress(ProtocolError):
        message = parse(data)
        record = record_of(data)
        assert record == (message.record if isinstance(message, XLogData) else None)
