"""Arrays, composites, ranges and hstore: what PostgreSQL prints is read back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.nested import (
    Array,
    Range,
    parse_array,
    parse_composite,
    parse_hstore,
    parse_items,
    parse_multirange,
    parse_range,
)

TEXTS = st.one_of(st.none(), st.text(), st.sampled_from(["NULL", "null", "{", '"', "\\", ",", ""]))


@pytest.mark.parametrize(
    ("text", "items", "dimensions", "lower_bounds"),
    [
        ("{}", [], (), ()),
        ("{1,2}", ["1", "2"], (2,), (1,)),
        ("{NULL,null}", [None, "null"], (2,), (1,)),
        ('{"NULL",""}', ["NULL", ""], (2,), (1,)),
        ('{"a \\"b\\"","\\\\"}', ['a "b"', "\\"], (2,), (1,)),
        ("{{1,2},{3,4},{5,6}}", [["1", "2"], ["3", "4"], ["5", "6"]], (3, 2), (1, 1)),
        ('{{{"a"}},{{NULL}}}', [[["a"]], [[None]]], (2, 1, 1), (1, 1, 1)),
        ("[2:3]={1,2}", ["1", "2"], (2,), (2,)),
        ("[0:0][-1:1]={{1,2,3}}", [["1", "2", "3"]], (1, 3), (0, -1)),
        ("{a=b,[x]}", ["a=b", "[x]"], (2,), (1,)),
    ],
)
def test_an_array_is_read_with_its_shape(
    text: str, items: list[Any], dimensions: tuple[int, ...], lower_bounds: tuple[int, ...]
) -> None:
    assert parse_array(text) == Array(items, dimensions, lower_bounds)
    assert parse_items(text) == items


def test_boxes_stand_between_semicolons() -> None:
    assert parse_items("{(1,1),(0,0);(3,3),(2,2)}", ";") == ["(1,1),(0,0)", "(3,3),(2,2)"]
    assert parse_items("{{(1,1),(0,0)};{NULL}}", ";") == [["(1,1),(0,0)"], [None]]


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "{", "}", "{1", "1}", '{"a}', '{"a"b}'),
        *("{{1},2}}", "{{1}", '{"a",}', "{{1},}", "{a\\}"),
    ],
)
def test_what_is_no_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an array"):
        parse_array(text)


@given(st.lists(TEXTS, min_size=1), st.integers(1, 3), st.sampled_from([",", ";"]))
def test_every_array_that_is_printed_is_read(
    elements: list[str | None], depth: int, delimiter: str
) -> None:
    printed = "{" * depth + delimiter.join(map(_array_element, elements)) + "}" * depth
    items: Any = parse_items(printed, delimiter)
    for _ in range(depth - 1):
        (items,) = items
    assert items == elements


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("()", [None]),
        ("(,)", [None, None]),
        ('("",a b)', ["", "a b"]),
        ('("a ""b"" \\\\ (c)",t)', ['a "b" \\ (c)', "t"]),
        ('({1},"{1,2}")', ["{1}", "{1,2}"]),
    ],
)
def test_a_composite_is_read_by_its_attributes(text: str, fields: list[str | None]) -> None:
    assert parse_composite(text) == fields


@pytest.mark.parametrize("text", ["", "a", "(", "(a", '("a)', '("a"b)', "(a)b", "(a))", "a)"])
def test_what_is_no_composite_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a composite"):
        parse_composite(text)


@given(st.lists(TEXTS, min_size=1))
def test_every_composite_that_is_printed_is_read(fields: list[str | None]) -> None:
    printed = "(" + ",".join(map(_field, fields)) + ")"
    assert parse_composite(printed) == fields


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("empty", None),
        ("[1,5)", Range("1", "5", lower_inclusive=True, upper_inclusive=False)),
        ("(,)", Range(None, None, lower_inclusive=False, upper_inclusive=False)),
        (
            '("2024-01-01 00:00:00",]',
            Range("2024-01-01 00:00:00", None, lower_inclusive=False, upper_inclusive=True),
        ),
        ('["","a""b\\\\"]', Range("", 'a"b\\', lower_inclusive=True, upper_inclusive=True)),
    ],
)
def test_a_range_is_read_by_its_bounds(text: str, expected: Range | None) -> None:
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "[1,5", "1,5)", "[1;5)", "[1,5))", "[1,5),", "EMPTY"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a range"):
        parse_range(text)


def test_a_multirange_is_read_range_by_range() -> None:
    first, last = parse_multirange("{[1,3),[5,)}")
    assert (first.lower, first.upper) == ("1", "3")
    assert (last.lower, last.upper) == ("5", None)
    assert parse_multirange("{}") == []


@pytest.mark.parametrize("text", ["", "[1,3)", "{", "{[1,3)", "{[1,3),}", "{[1,3)}x", "{,}"])
def test_what_is_no_multirange_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a multirange"):
        parse_multirange(text)


def test_an_hstore_is_read_by_its_keys() -> None:
    text = '"a"=>"1", "b"=>NULL, "c \\"d\\\\"=>"NULL", ""=>""'
    assert parse_hstore(text) == {"a": "1", "b": None, 'c "d\\': "NULL", "": ""}
    assert parse_hstore("") == {}


@pytest.mark.parametrize("text", ["a=>1", '"a"', '"a"=>1', '"a"=>"1",', '"a"=>"1", ', '"a"=>"1"x'])
def test_what_is_no_hstore_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an hstore"):
        parse_hstore(text)


def _array_element(element: str | None) -> str:
    """Print as ``array_out`` may: quotes are allowed where they are not needed."""
    if element is None:
        return "NULL"
    return '"' + element.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _field(field: str | None) -> str:
    if field is None:
        return ""
    return '"' + field.replace("\\", "\\\\").replace('"', '""') + '"'
