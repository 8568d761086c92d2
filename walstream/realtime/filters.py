"""The filters of postgres_changes bindings: ``column=operator.value``, with commas for "and".

The grammar is that of Supabase Realtime, which is not the one of `walstream.grammar`: there are no
groups and no "or", a column is all that stands before the first ``=``, the values of ``in`` are
written as in an array of PostgreSQL, and ``like`` has no wildcards but SQL's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from walstream.grammar import And, Comparison, Filter, Not, Operator
from walstream.realtime.terms import term

MAX_AMONG: Final = 100
"""Values of one ``in``."""


class Unreadable(ValueError):
    """A filter is none; the message is what a client is told behind ``Error parsing ...``."""


class ValueRefused(ValueError):
    """A value is one that the server refuses whatever the table is.

    ``sqlstate`` is the server's code for that; the message is the server's.
    """

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message


class Condition(msgspec.Struct, frozen=True):
    """One condition as it is written; the value of ``in`` is an array's text, ``{a,b}``."""

    column: str
    operator: Operator
    value: str
    is_negated: bool = False

    def __str__(self) -> str:
        """Print as the original shows a filter in its messages."""
        parts = (self.column, str(self.operator), self.value, self.is_negated)
        return "{" + ", ".join(map(term, parts)) + "}"


def read_conditions(text: str) -> tuple[Condition, ...]:
    """Read a filter; a blank one has no conditions.

    Raises:
        Unreadable: it is none.
    """
    text = text.strip()
    return tuple(_condition(segment.strip()) for segment in _segments(text)) if text else ()


def condition_on_rows(conditions: Sequence[Condition]) -> Filter | None:
    """Return the filter that all conditions together are; None when there are none.

    Raises:
        ValueRefused: a value is none of its operator.
    """
    parts: tuple[Filter, ...] = tuple(map(_comparison, conditions))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else And(parts)


# What stands between commas

_OPENS_QUOTES: Final = frozenset(".(,")


def _segments(text: str) -> Iterator[str]:
    """Split at the commas that are neither in parentheses nor in quotes.

    A quote opens only behind a dot, an opening parenthesis or a comma.
    """
    start = position = depth = 0
    while position < len(text):
        match text[position]:
            case '"' if position > start and text[position - 1] in _OPENS_QUOTES:
                position = _quoted_end(text, position)
                continue
            case "(":
                depth += 1
            case ")":
                depth = max(0, depth - 1)
            case "," if not depth:
                yield text[start:position]
                start = position + 1
        position += 1
    yield text[start:]


_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)


def _quoted_end(text: str, position: int) -> int:
    """Find the end of what is in quotes; where they are not closed, of the text."""
    quoted = _QUOTED.match(text, position)
    return quoted.end() if quoted else len(text)


def _condition(segment: str) -> Condition:
    if not segment:
        raise Unreadable("filter must not contain empty segments (check for extra commas)")
    column, equals, rest = segment.partition("=")
    if not equals:
        raise Unreadable(term([segment]))
    unnegated = rest.removeprefix("not.")
    name, dot, value = unnegated.partition(".")
    if not dot or name not in Operator.__members__.values():
        raise Unreadable(term([name, value] if dot else [name]))
    operator = Operator(name)
    return Condition(column, operator, _value(operator, value), unnegated != rest)


def _value(operator: Operator, written: str) -> str:
    if operator is not Operator.IN:
        return _unquoted(written)
    if len(written) > 1 and written.startswith("(") and written.endswith(")"):
        return f"{{{written[1:-1]}}}"
    raise Unreadable("`in` filter value must be wrapped by parentheses")


_WHOLLY_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)


def _unquoted(written: str) -> str:
    """Take the quotes off a value that is quoted as a whole; any other stays as it is."""
    quoted = _WHOLLY_QUOTED.fullmatch(written)
    return written if quoted is None else _ESCAPE.sub(r"\1", quoted[1])


# What is compared

_PATTERNS: Final = (Operator.LIKE, Operator.ILIKE)
_TRUTHS: Final = ("null", "true", "false", "unknown")
_RAISED: Final = "P0001"
_MALFORMED: Final = "22P02"


def _comparison(condition: Condition) -> Filter:
    match condition.operator:
        case Operator.IS:
            return _test(condition)
        case Operator.IN:
            return _among(condition)
        case operator:
            is_verbatim = operator in _PATTERNS
            comparison = Comparison(
                condition.column, operator, (condition.value,), is_verbatim=is_verbatim
            )
            return Not(comparison) if condition.is_negated else comparison


def _test(condition: Condition) -> Filter:
    value = condition.value
    if value not in _TRUTHS:
        message = "invalid value for is filter: must be null, true, false, or unknown"
        raise ValueRefused(_RAISED, message)
    if condition.is_negated and value == "null":  # IS NOT NULL, which of a row is not NOT (IS NULL)
        return Comparison(condition.column, Operator.IS, ("not_null",))
    comparison = Comparison(condition.column, Operator.IS, (value,))
    return Not(comparison) if condition.is_negated else comparison


def _among(condition: Condition) -> Filter:
    """Compare with the values of a list.

    Nothing equals a null among them, and nothing is known to be none of them: where it matters,
    which is whether a row is kept, this is as if it were not there, or as if nothing were kept.
    """
    values = _elements(condition.value)
    if len(values) > MAX_AMONG:
        raise ValueRefused(_RAISED, f"too many values for `in` filter. Maximum {MAX_AMONG}")
    known = tuple(value for value in values if value is not None)
    if condition.is_negated and len(known) < len(values):
        return Comparison(condition.column, Operator.IN, ())
    comparison = Comparison(condition.column, Operator.IN, known)
    return Not(comparison) if condition.is_negated else comparison


_SPACE: Final = r"[ \t\n\r\v\f]*+"
_QUOTED_ELEMENT: Final = r'"((?:[^"\\]|\\.)*+)"'
_PLAIN_ELEMENT: Final = rf'((?:{_SPACE}(?:[^"\\{{}}, \t\n\r\v\f]|\\.))++)'
_ELEMENT: Final = re.compile(
    rf"{_SPACE}(?:{_QUOTED_ELEMENT}|{_PLAIN_ELEMENT}){_SPACE}(,|\Z)", re.DOTALL
)


def _elements(array: str) -> list[str | None]:
    """Read an array of one dimension (PostgreSQL documentation, 8.15.2 Array Value Input)."""
    inner = array[1:-1]
    if not inner.strip(" \t\n\r\v\f"):
        return []
    values: list[str | None] = []
    position = 0
    while found := _ELEMENT.match(inner, position):
        quoted, plain, comma = found.groups()
        values.append(_element(quoted, plain))
        position = found.end()
        if not comma:
            return values
    raise ValueRefused(_MALFORMED, f'malformed array literal: "{array}"')


def _element(quoted: str | None, plain: str) -> str | None:
    if quoted is None and plain.upper() == "NULL":
        return None
    return _ESCAPE.sub(r"\1", plain if quoted is None else quoted)
