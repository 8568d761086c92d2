"""Keys sort and equal as PostgreSQL's values do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream import comparables
from walstream.comparables import NAN

ASCENDING = [
    (comparables.boolean, ["f", "t"]),
    (comparables.floating, ["-Infinity", "-1.5", "0", "1e-7", "2", "1e+20", "Infinity", "NaN"]),
    (comparables.numeric, ["-Infinity", "-2", "0.1", "0.10000000000000000001", "Infinity", "NaN"]),
    (comparables.blank_padded, ["", "B", "a   ", "a!"]),
    (comparables.single_byte, ["", "!", "a", "\\377"]),
    (
        comparables.date,
        [
            *("-infinity", "4713-01-01 BC", "0001-12-31 BC", "0001-01-01", "2024-02-29"),
            *("2024-03-01", "9999-12-31", "10000-01-01", "infinity"),
        ],
    ),
    (
        comparables.timestamptz,
        [
            *("-infinity", "0044-03-15 00:00:00+00 BC", "2024-01-01 00:00:00+00"),
            *("2024-01-01 00:00:00.000001+00", "2024-01-01 00:00:00.1+00", "infinity"),
        ],
    ),
    (comparables.timetz, ["00:00:00+02", "00:00:00.5+02", "00:00:00+01", "24:00:00-15:59:59"]),
    (
        comparables.interval,
        [
            *("-infinity", "-1 years", "-1 mons +29 days", "-00:00:00.5", "00:00:00"),
            *("00:00:00.000001", "1 day -00:00:00.5", "1 day", "29 days 24:00:01"),
            *("1 mon 00:00:02", "infinity"),
        ],
    ),
    (
        comparables.network,
        ["10.0.0.0/8", "10.0.0.0/9", "10.0.0.1/9", "10.1.0.0/16", "10.1.0.0", "10.1.0.1", "::1"],
    ),
    (comparables.log_sequence_number, ["0/0", "0/A0", "1/0", "A/0"]),
    (comparables.tuple_identifier, ["(0,2)", "(0,10)", "(1,1)"]),
    (comparables.money, ["-$1,000.00", "-$0.05", "$0.00", "$0.05", "$10.00", "$1,000.00"]),
    (comparables.identical, ["A", "a", "b", "é", "€", "𐀀"]),
]

EQUAL = [
    (comparables.boolean, "t", "true"),
    (comparables.floating, "0", "-0"),
    (comparables.floating, "NaN", "NaN"),
    (comparables.numeric, "1.0", "1.00"),
    (comparables.numeric, "NaN", "NaN"),
    (comparables.blank_padded, "a", "a  "),
    (comparables.interval, "1 mon", "30 days"),
    (comparables.interval, "1 day", "24:00:00"),
    (comparables.interval, "-1 years -2 mons +3 days -04:05:06", "-417 days -04:05:06"),
    (comparables.network, "10.0.0.1", "10.0.0.1/32"),
    (comparables.money, "($5.00)", "-$5.00"),
    (comparables.jsonb, '{"a": 1.0, "b": [100.10, 0.00]}', '{"a": 1, "b": [100.1, 0]}'),
    (comparables.fold, "ÀÉΣİA", "àéσia"),  # noqa: RUF001 - two alphabets on purpose
]

DIFFERENT = [
    (comparables.timetz, "12:00:00+00", "13:00:00+01"),
    (comparables.network, "10.0.0.0/8", "10.0.0.0/9"),
    (comparables.jsonb, '"1.0"', '"1.00"'),
    (comparables.jsonb, '"\\"1.0"', '"\\"1.00"'),
    (comparables.jsonb, "10", "1"),
    (comparables.numeric, "NaN", "Infinity"),
]

WRONG = [
    (comparables.boolean, "yes"),
    (comparables.floating, "x"),
    (comparables.timestamptz, "2024-01-01 00:00:00+05:30"),
    (comparables.timetz, "12:00:00"),
    (comparables.interval, "P1D"),
    (comparables.network, "10.0.0"),
]


@pytest.mark.parametrize(("to_key", "texts"), ASCENDING)
def test_keys_sort_as_values(to_key: Callable[[str], Any], texts: list[str]) -> None:
    keys = [to_key(text) for text in texts]
    for (low, lower), (high, higher) in product(enumerate(keys), repeat=2):
        assert (lower < higher) == (low < high), (texts[low], texts[high])
        assert (lower <= higher) == (low <= high)
        assert (lower > higher) == (low > high)
        assert (lower >= higher) == (low >= high)
        assert (lower == higher) == (low == high)


@pytest.mark.parametrize(("to_key", "one", "other"), EQUAL)
def test_equal_values_have_one_key(to_key: Callable[[str], Any], one: str, other: str) -> None:
    assert to_key(one) == to_key(other)
    assert hash(to_key(one)) == hash(to_key(other))


@pytest.mark.parametrize(("to_key", "one", "other"), DIFFERENT)
def test_different_values_have_two_keys(to_key: Callable[[str], Any], one: str, other: str) -> None:
    assert to_key(one) != to_key(other)


@pytest.mark.parametrize(("to_key", "text"), WRONG)
def test_a_text_of_another_form_is_refused(to_key: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each says it in its own words
        to_key(text)


def test_nan_prints_as_postgres_prints_it() -> None:
    assert repr(NAN) == "NaN"


@given(
    st.lists(
        st.one_of(st.floats().map(str), st.sampled_from(["NaN", "Infinity", "-Infinity"])),
        min_size=2,
    )
)
def test_the_order_of_floats_is_total(texts: list[str]) -> None:
    keys = sorted(map(comparables.floating, (text.replace("nan", "NaN") for text in texts)))
    assert all(one <= other for one, other in pairwise(keys))
    assert all(one == other or not other <= one for one, other in pairwise(keys))


@given(st.text())
def test_folding_twice_folds_no_more(text: str) -> None:
    assert comparables.fold(comparables.fold(text)) == comparables.fold(text)
    assert len(comparables.fold(text)) == len(text)
