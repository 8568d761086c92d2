"""PostgreSQL's text forms of values inside values: arrays, composites, ranges, hstore.

This reads what the output functions print, which is less than what the input functions take
(PostgreSQL documentation, 8.15.6 Array Input and Output Syntax, 8.16.6 Composite Type Input and
Output Syntax, 8.17.5 Range Input/Output, F.18 hstore). A text in another form raises `ValueError`,
whose message never holds the text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

import msgspec

_DECORATION: Final = re.compile(r"((?:\[-?\d+:-?\d+\])+)=")
_LOWER_BOUND: Final = re.compile(r"\[(-?\d+):")
_BACKSLASHED: Final = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_BACKSLASH: Final = re.compile(r"\\(.)", re.DOTALL)

# Inside the quotes of a composite or a range a quote is doubled, and so is a backslash.
_QUOTED: Final = r'"([^"\\]*(?:(?:""|\\.)[^"\\]*)*)"'
_FIELD: Final = re.compile(rf'(?:{_QUOTED}|([^",()\\]*))(,|\))', re.DOTALL)
_BOUND: Final = rf'(?:{_QUOTED}|([^",()\[\]\\]*))'
_RANGE: Final = re.compile(rf"([\[(]){_BOUND},{_BOUND}([\])])", re.DOTALL)
_DOUBLED: Final = re.compile(r'""|\\(.)', re.DOTALL)

_HSTORE_PAIR: Final = re.compile(
    rf"{_BACKSLASHED}=>(?:{_BACKSLASHED}|NULL)(?:, (?!\Z)|\Z)", re.DOTALL
)


class Array(msgspec.Struct, frozen=True):
    """Nested lists of element texts and None, and the subscript each dimension starts at.

    An empty array has no dimensions.
    """

    items: list[Any]
    dimensions: tuple[int, ...]
    lower_bounds: tuple[int, ...]


class Range(msgspec.Struct, frozen=True):
    """A range that is not empty; a bound of None is unbounded."""

    lower: str | None
    upper: str | None
    lower_inclusive: bool
    upper_inclusive: bool


def parse_array(text: str, delimiter: str = ",") -> Array:
    """Read an array such as ``{1,NULL,"a b"}``, ``{{1},{2}}`` or ``[2:3]={1,2}``."""
    decoration = _DECORATION.match(text)
    if decoration is None:
        items = parse_items(text, delimiter)
        dimensions = _dimensions(items)
        return Array(items, dimensions, (1,) * len(dimensions))
    items = parse_items(text[decoration.end() :], delimiter)
    lower_bounds = tuple(map(int, _LOWER_BOUND.findall(decoration[1])))
    return Array(items, _dimensions(items), lower_bounds)


def parse_items(text: str, delimiter: str = ",") -> list[Any]:
    """Read an array's elements alone, as nested lists of texts and None."""
    if text.startswith("["):
        text = text[text.find("=") + 1 :]
    if text == "{}":
        return []
    if not (text.startswith("{") and text.endswith("}")):
        raise _malformed("array")
    inner = text[1:-1]
    if '"' in inner or "{" in inner or "\\" in inner:
        return _nested_items(text, delimiter)
    return [None if item == "NULL" else item for item in inner.split(delimiter)]


def parse_composite(text: str) -> list[str | None]:
    """Read a composite such as ``(1,,"a b",t)``; None is a null attribute.

    A composite without attributes prints as ``()``, and so does one whose only attribute is null:
    this reads the latter.
    """
    if not text.startswith("("):
        raise _malformed("composite")
    fields: list[str | None] = []
    position, separator = 1, ","
    while separator == ",":
        matched = _FIELD.match(text, position)
        if matched is None:
            raise _malformed("composite")
        quoted, plain, separator = matched.groups()
        fields.append(_bound(quoted, plain))
        position = matched.end()
    if position != len(text):
        raise _malformed("composite")
    return fields


def parse_range(text: str) -> Range | None:
    """Read a range such as ``[1,5)`` or ``(,"2024-01-01 00:00:00"]``; None is the empty range."""
    if text == "empty":
        return None
    matched = _RANGE.fullmatch(text)
    if matched is None:
        raise _malformed("range")
    return _range(matched)


def parse_multirange(text: str) -> list[Range]:
    """Read a multirange such as ``{[1,3),[5,)}``; it holds no empty ranges."""
    if text == "{}":
        return []
    ranges: list[Range] = []
    position = 0
    while text[position : position + 1] == ("," if ranges else "{"):
        matched = _RANGE.match(text, position + 1)
        if matched is None:
            raise _malformed("multirange")
        ranges.append(_range(matched))
        position = matched.end()
    if text[position:] != "}":
        raise _malformed("multirange")
    return ranges


def parse_hstore(text: str) -> dict[str, str | None]:
    """Read an hstore such as ``"a"=>"1", "b"=>NULL``."""
    pairs: dict[str, str | None] = {}
    position = 0
    while position < len(text):
        matched = _HSTORE_PAIR.match(text, position)
        if matched is None:
            raise _malformed("hstore")
        key, value = matched.groups()
        pairs[_unescape(key)] = None if value is None else _unescape(value)
        position = matched.end()
    return pairs


def _nested_items(text: str, delimiter: str) -> list[Any]:
    outer: list[Any] = []
    stack = [outer]
    position = 0
    element = _array_element(delimiter)
    while position < len(text):
        matched = element.match(text, position)
        if matched is None or len(matched[4]) >= len(stack) + len(matched[1]):
            raise _malformed("array")
        opening, quoted, plain, closing = matched.groups()
        _open(stack, len(opening))
        stack[-1].append(_element(quoted, plain))
        del stack[len(stack) - len(closing) :]
        position = matched.end()
    if len(stack) != 1 or len(outer) != 1:
        raise _malformed("array")
    items: list[Any] = outer[0]
    return items


@lru_cache(maxsize=16)
def _array_element(delimiter: str) -> re.Pattern[str]:
    """One element with the braces around it and the delimiter after it."""
    plain = rf'[^{{}}"\\{re.escape(delimiter)}]+'
    return re.compile(
        rf"(\{{*)(?:{_BACKSLASHED}|({plain}))(\}}*)(?:{re.escape(delimiter)}(?!\Z)|\Z)",
        re.DOTALL,
    )


def _open(stack: list[list[Any]], depth: int) -> None:
    for _ in range(depth):
        inner: list[Any] = []
        stack[-1].append(inner)
        stack.append(inner)


def _element(quoted: str | None, plain: str) -> str | None:
    if quoted is not None:
        return _unescape(quoted)
    return None if plain == "NULL" else plain


def _dimensions(items: list[Any]) -> tuple[int, ...]:
    dimensions = []
    inner: Any = items
    while isinstance(inner, list) and inner:
        dimensions.append(len(inner))
        inner = inner[0]
    return tuple(dimensions)


def _range(matched: re.Match[str]) -> Range:
    opening, lower_quoted, lower, upper_quoted, upper, closing = matched.groups()
    return Range(
        _bound(lower_quoted, lower), _bound(upper_quoted, upper), opening == "[", closing == "]"
    )


def _bound(quoted: str | None, plain: str) -> str | None:
    """Without quotes nothing is no value; the empty text has quotes."""
    if quoted is None:
        return plain or None
    return _DOUBLED.sub(lambda escape: escape[1] or '"', quoted)


def _unescape(quoted: str) -> str:
    return _BACKSLASH.sub(r"\1", quoted) if "\\" in quoted else quoted


def _malformed(what: str) -> ValueError:
    return ValueError(f"not an {what}" if what[0] in "ah" else f"not a {what}")
