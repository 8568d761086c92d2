"""The text form of filters: the grammar of PostgREST and Supabase.

    filter     = item *("," item)                                 all of them; blank keeps every row
    item       = condition / group
    group      = ["not."] ("and" / "or") ["="] "(" item *("," item) ")"
    condition  = column ("=" / ".") ["not."] operator "." value   "." only inside of a group
    column     = text without = , ( ) and, inside of a group, "." / quoted
    operator   = eq neq lt lte gt gte in like ilike is match imatch isdistinct
    value      = text / quoted; of in: "(" [value *("," value)] ")"
    quoted     = in double quotes, with a backslash before a double quote and a backslash

A value ends at a comma, and inside of a group or a list at the closing parenthesis. Parentheses in
a value must balance, or it must be quoted. White space around an item, a list's value, and at the
end of a value does not count. Quotes count around the whole of a value; one that is quoted in part
is taken as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final, TypeAlias, assert_never

import msgspec

from walstream.errors import FilterError


class Operator(StrEnum):
    """What compares a column with a value."""

    EQ = "eq"
    NEQ = "neq"
    LT = "lt"
    LTE = "lte"
    GT = "gt"
    GTE = "gte"
    IN = "in"
    LIKE = "like"
    ILIKE = "ilike"
    IS = "is"
    MATCH = "match"
    IMATCH = "imatch"
    ISDISTINCT = "isdistinct"


IS_VALUES: Final = ("null", "not_null", "true", "false", "unknown")
"""What ``is`` takes, in any case."""


class Comparison(msgspec.Struct, frozen=True):
    """``column=operator.value``; ``in`` has any number of values, the others have one.

    ``is_verbatim`` says of ``like`` and ``ilike`` that the pattern is SQL's own, in which ``*`` is
    no wildcard: `parse` gives none, and what such a one prints as is read as another.
    """

    column: str
    operator: Operator
    values: tuple[str, ...]
    is_verbatim: bool = False

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return _printed(self, "=")


class Not(msgspec.Struct, frozen=True):
    """``not.`` before an operator or a group."""

    negated: Comparison | And | Or

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return _printed(self, "=")


class And(msgspec.Struct, frozen=True):
    """All of them: ``a=eq.1,b=eq.2`` or, as a group, ``and(a.eq.1,b.eq.2)``. Of none: true."""

    parts: tuple[Filter, ...]

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return ",".join(_printed(part, "=") for part in self.parts)


class Or(msgspec.Struct, frozen=True):
    """At least one of them: ``or(a.eq.1,b.eq.2)``."""

    parts: tuple[Filter, ...]

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return _printed(self, "=")


Filter: TypeAlias = Comparison | Not | And | Or


def parse(text: str) -> Filter:
    """Read a filter; a blank one is the `And` of nothing.

    Raises:
        FilterError: with the position, counted from 1, what stands there, and what could.
    """
    return _Parser(text).filter()


def comparisons(where: Filter) -> Iterator[Comparison]:
    """Iterate over the comparisons of a filter, in its order."""
    match where:
        case Comparison():
            yield where
        case Not(negated):
            yield from comparisons(negated)
        case And(parts) | Or(parts):
            for part in parts:
                yield from comparisons(part)
        case _:
            assert_never(where)


_MAX_DEPTH: Final = 50
_MAX_SHOWN: Final = 20

_SPACE: Final = re.compile(r"\s*")
_GROUP: Final = re.compile(r"(not\.)?(and|or)=?\(")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_COLUMN: Final = re.compile(r"[^=,()]*")
_COLUMN_IN_GROUP: Final = re.compile(r"[^=,().]*")
_NEGATION: Final = re.compile(r"not\.")
_OPERATOR: Final = re.compile(r"[^.,()]*")
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_SEPARATOR: Final = re.compile(r"[,()]")
_NEEDS_QUOTES: Final = re.compile(r'[,()"\\]|\A\s|\s\Z')
_COLUMN_NEEDS_QUOTES: Final = re.compile(r'[=.,()"\\]|\A\s|\s\Z|\A\Z')


class _Parser:
    """Reads from left to right; every method starts at ``position`` and leaves it behind itself."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

    def filter(self) -> Filter:
        self.take(_SPACE)
        if self.position == len(self.text):
            return And(())
        parts = self.items()
        if self.position < len(self.text):
            raise self.unexpected("a comma or the end")
        return parts[0] if len(parts) == 1 else And(parts)

    def items(self) -> tuple[Filter, ...]:
        parts = [self.item()]
        while self.skip(","):
            parts.append(self.item())
        return tuple(parts)

    def item(self) -> Filter:
        self.take(_SPACE)
        group = self.take(_GROUP)
        part = self.group(group) if group else self.condition()
        self.take(_SPACE)
        return part

    def group(self, start: re.Match[str]) -> Filter:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.unexpected(f"at most {_MAX_DEPTH} groups within each other")
        parts = self.items()
        if not self.skip(")"):
            raise self.unexpected("a comma or a closing parenthesis")
        self.depth -= 1
        return _negated(_joined(And if start[2] == "and" else Or, parts), negate=bool(start[1]))

    def condition(self) -> Filter:
        column = self.column()
        if not self.skip("=") and not (self.depth and self.skip(".")):
            raise self.unexpected("'=' or '.'" if self.depth else "'='", "column=operator.value")
        negation = self.take(_NEGATION)
        operator = self.operator()
        comparison = Comparison(column, operator, self.values(operator))
        return _negated(comparison, negate=bool(negation))

    def column(self) -> str:
        quoted = self.take(_QUOTED)
        if quoted:
            self.take(_SPACE)
            return _unquoted(quoted)
        start = self.position
        matched = self.take(_COLUMN_IN_GROUP if self.depth else _COLUMN)
        name = matched[0].strip() if matched else ""
        if not name:
            self.position = start
            raise self.unexpected("a column")
        return name

    def operator(self) -> Operator:
        start = self.position
        matched = self.take(_OPERATOR)
        name = matched[0] if matched else ""
        if name not in Operator.__members__.values():
            self.position = start
            raise self.unexpected(f"an operator ({', '.join(Operator)})")
        if not self.skip("."):
            raise self.unexpected("'.' and a value")
        return Operator(name)

    def values(self, operator: Operator) -> tuple[str, ...]:
        if operator is Operator.IN:
            return self.listed()
        start = self.position
        value = self.value()
        if operator is not Operator.IS:
            return (value,)
        if value.lower() not in IS_VALUES:
            self.position = start
            raise self.unexpected(f"one of {', '.join(IS_VALUES)}")
        return (value.lower(),)

    def listed(self) -> tuple[str, ...]:
        if not self.skip("("):
            raise self.unexpected("a list in parentheses")
        self.take(_SPACE)
        if self.skip(")"):
            return ()
        self.depth += 1  # a value in a list ends where one in a group does
        values = [self.element()]
        while self.skip(","):
            values.append(self.element())
        if not self.skip(")"):
            raise self.unexpected("a comma or a closing parenthesis")
        self.depth -= 1
        return tuple(values)

    def element(self) -> str:
        self.take(_SPACE)
        start = self.position
        value = self.value()
        if not value and self.position == start:
            raise self.unexpected('a value; the empty text is ""')
        return value

    def value(self) -> str:
        start = self.position
        end = self.value_end()
        self.position = end
        written = self.text[start:end].rstrip()
        quoted = _QUOTED.fullmatch(written)
        return _unquoted(quoted) if quoted else written

    def value_end(self) -> int:
        """Find where a value ends; commas and parentheses inside of quotes do not end it."""
        text, position = self.text, self.position
        opened: list[int] = []
        while position < len(text) and (opened or not self.ends(text[position])):
            match text[position]:
                case '"' if position == self.position or text[position - 1] in ".(,":
                    position = self.quoted_end(position)
                    continue
                case "(":
                    opened.append(position)
                case ")" if not opened:
                    raise self.unbalanced(position)
                case ")":
                    opened.pop()
            position += 1
        if opened:
            raise self.unbalanced(opened[-1])
        return position

    def ends(self, character: str) -> bool:
        return character == "," or (character == ")" and self.depth > 0)

    def quoted_end(self, position: int) -> int:
        """Skip what is in quotes, or a lone quote that nothing hangs on."""
        quoted = _QUOTED.match(self.text, position)
        if quoted:
            return quoted.end()
        if _SEPARATOR.search(self.text, position):
            self.position = position
            raise self.unexpected("a closing quote", 'write a value with a quote as "\\"..."')
        return position + 1

    def unbalanced(self, position: int) -> FilterError:
        self.position = position
        return self.unexpected("balanced parentheses", 'quote a value that has its own: "..."')

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        matched = pattern.match(self.text, self.position)
        if matched:
            self.position = matched.end()
        return matched

    def skip(self, character: str) -> bool:
        found = self.text.startswith(character, self.position)
        self.position += found
        return found

    def unexpected(self, expected: str, hint: str = "") -> FilterError:
        rest = self.text[self.position :]
        shown = rest if len(rest) <= _MAX_SHOWN else rest[:_MAX_SHOWN] + "…"
        found = f"found {shown!r}" if rest else "the filter ends"
        return FilterError(
            f"filter, position {self.position + 1}: {found}, expected {expected}", hint=hint
        )


def _joined(group: Callable[[tuple[Filter, ...]], And | Or], parts: tuple[Filter, ...]) -> Filter:
    return parts[0] if len(parts) == 1 else group(parts)


def _negated(part: Filter, *, negate: bool) -> Filter:
    if not negate:
        return part
    return part.negated if isinstance(part, Not) else Not(part)


def _unquoted(quoted: re.Match[str]) -> str:
    return _ESCAPE.sub(r"\1", quoted[1])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _printed(part: Filter, separator: str) -> str:
    match part:
        case Comparison():
            return _printed_condition(part, separator, "")
        case Not(Comparison() as negated):
            return _printed_condition(negated, separator, "not.")
        case Not(negated):
            return f"not.{_printed(negated, separator)}"
        case And(parts):
            return f"and({','.join(_printed(inner, '.') for inner in parts)})"
        case Or(parts):
            return f"or({','.join(_printed(inner, '.') for inner in parts)})"
        case _:
            assert_never(part)


def _printed_condition(comparison: Comparison, separator: str, negation: str) -> str:
    column = comparison.column
    if _COLUMN_NEEDS_QUOTES.search(column):
        column = _quoted(column)
    values = [_printed_value(value) for value in comparison.values]
    if comparison.operator is Operator.IN:
        value = "(" + ",".join(one or '""' for one in values) + ")"
    else:
        (value,) = values
    return f"{column}{separator}{negation}{comparison.operator}.{value}"


def _printed_value(value: str) -> str:
    return _quoted(value) if _NEEDS_QUOTES.search(value) else value
