"""Positions in the write-ahead log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.lsn import ZERO, Lsn


@given(st.integers(0, 2**64 - 1))
def test_every_position_survives_a_round_trip_through_its_text(position: int) -> None:
    """What is printed is read back."""
    assert Lsn.parse(str(Lsn(position))) == position


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("0/0", 0),
        ("0/16274F8", 0x16274F8),
        ("16/b374d848", 0x16_B374_D848),
        ("00000016/B374D848", 0x16_B374_D848),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
    ],
)
def test_text_in_the_forms_that_postgres_takes_is_read(text: str, position: int) -> None:
    """Leading zeros and small letters are allowed, as in pg_lsn."""
    assert Lsn.parse(text) == position


@pytest.mark.parametrize(
    "text", ["", "0", "/", "0/", "/0", "g/0", "0/123456789", "-1/0", "0/0 ", "0/0\n"]
)
def test_text_that_is_no_position_is_refused(text: str) -> None:
    """The message shows what was found and how it should look."""
    with pytest.raises(ValueError, match="is not an LSN; one looks like"):
        Lsn.parse(text)


@pytest.mark.parametrize("position", [-1, 2**64])
def test_positions_beyond_64_bits_are_refused(position: int) -> None:
    """The wire has 64 bits for a position."""
    with pytest.raises(ValueError, match="64 bits"):
        Lsn(position)


def test_positions_print_as_pg_lsn_does() -> None:
    """Capital letters, no leading zeros."""
    assert str(Lsn(0x16_B374_D848)) == "16/B374D848"
    assert repr(Lsn(0x16_B374_D848)) == "Lsn('16/B374D848')"
    assert str(ZERO) == "0/0"
