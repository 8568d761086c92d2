"""Row conditions over the claims of a token.

    user_id=eq.{claims.sub},team_id=in.({claims.app_metadata.teams})

A row condition is a filter (`walstream.grammar`) in which the whole of a value may be a
placeholder. The text is parsed once; a claim takes its placeholder's place in what the parser has
made of it. So a claim is a value whatever it holds, and never syntax.

A list fills ``in.()`` with its elements; everywhere else a claim is one text, number or boolean.
Patterns take no placeholder, for a claim's own ``*`` would count in them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self, assert_never

import msgspec

from walstream.errors import FilterError
from walstream.grammar import And, Comparison, Filter, Not, Operator, Or, comparisons, parse

_NAME: Final = re.compile(r'"((?:[^"]|"")+)"|([^".,(){}\s]+)')
_PLAIN: Final = re.compile(r'[^".,(){}\s]+')


class ClaimPath(msgspec.Struct, frozen=True):
    """Where in a token's claims a value is: ``sub``, ``app_metadata.role``."""

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read names with dots between them; a name with a dot in it is quoted.

        Raises:
            ValueError: it is something else.
        """
        names: list[str] = []
        position = 0
        while matched := _NAME.match(text, position):
            quoted, plain = matched.groups()
            names.append(quoted.replace('""', '"') if quoted else plain)
            position = matched.end()
            if position == len(text):
                return cls(tuple(names))
            if text[position] != ".":
                break
            position += 1
        raise ValueError(
            f"found {text!r}; allowed: the name of a claim such as role, or a path to it such as"
            ' app_metadata.role; names with dots in double quotes: "https://example.org/role"'
        )

    def find(self, claims: Mapping[str, Any]) -> Any:
        """Return what is there, None for nothing."""
        found: Any = claims
        for name in self.names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return ".".join(
            name if _PLAIN.fullmatch(name) else '"' + name.replace('"', '""') + '"'
            for name in self.names
        )


class ClaimUnusable(ValueError):
    """A claim cannot fill its placeholder. The message names it, and never holds its value."""


class RowCondition(msgspec.Struct, frozen=True):
    """A filter with placeholders for claims."""

    where: Filter

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a condition.

        Raises:
            FilterError: it is no filter, or has a placeholder where none can be.
        """
        where = parse(text)
        if where == And(()):
            raise FilterError("found an empty text; leave it out to have all rows read")
        for comparison in comparisons(where):
            _verify(comparison)
        return cls(where)

    @property
    def claims(self) -> list[ClaimPath]:
        """The claims that it needs."""
        values = (value for comparison in comparisons(self.where) for value in comparison.values)
        return list(dict.fromkeys(path for value in values if (path := _path(value))))

    def fill(self, claims: Mapping[str, Any]) -> Filter:
        """Return the filter for whoever has these claims.

        Raises:
            ClaimUnusable: one is missing, null, or of a type that has no place there.
        """
        return _filled(self.where, claims)


def is_placeholder(value: str) -> bool:
    """Whether a value of a condition waits for a claim."""
    return _PLACEHOLDER.fullmatch(value) is not None


_PLACEHOLDER: Final = re.compile(r"\{claims\.(.+)\}", re.DOTALL)
_ALMOST: Final = re.compile(r"\{\s*claims\b|\A\W*claims\.[\w.]+\W*\Z", re.IGNORECASE)
_LOOKALIKE: Final = re.compile(r"\{\s*[A-Za-z_]\w*(\.\w+)*\s*\}")
_FILLABLE: Final = frozenset(Operator) - {
    Operator.LIKE,
    Operator.ILIKE,
    Operator.MATCH,
    Operator.IMATCH,
    Operator.IS,
}


def _verify(comparison: Comparison) -> None:
    """Refuse what looks like a placeholder and is none: it would be compared as it is written."""
    if _ALMOST.search(comparison.column):
        raise FilterError(f"found {comparison.column!r} as a column; a placeholder is for a value")
    for value in comparison.values:
        if is_placeholder(value):
            _verify_placeholder(comparison, value)
        elif _ALMOST.search(value) or _LOOKALIKE.fullmatch(value):
            raise FilterError(
                f"found {value!r}; allowed: a whole value such as {{claims.sub}}, and nothing"
                ' before or behind it; an array of one word is written with quotes: {"word"}'
            )


def _verify_placeholder(comparison: Comparison, value: str) -> None:
    try:
        _path(value)
    except ValueError as error:
        raise FilterError(f"{value}: {error}") from None
    if comparison.operator not in _FILLABLE:
        allowed = ", ".join(one for one in Operator if one in _FILLABLE)
        raise FilterError(
            f"found {value} behind {comparison.operator}; allowed for claims: {allowed}"
        )


def _path(value: str) -> ClaimPath | None:
    matched = _PLACEHOLDER.fullmatch(value)
    return ClaimPath.parse(matched[1]) if matched else None


def _filled(where: Filter, claims: Mapping[str, Any]) -> Filter:
    match where:
        case Comparison():
            values = tuple(_values(where, claims))
            return Comparison(where.column, where.operator, values)
        case Not(negated):
            return Not(_filled_inside(negated, claims))
        case And(parts):
            return And(tuple(_filled(part, claims) for part in parts))
        case Or(parts):
            return Or(tuple(_filled(part, claims) for part in parts))
        case _:
            assert_never(where)


def _filled_inside(
    negated: Comparison | And | Or, claims: Mapping[str, Any]
) -> Comparison | And | Or:
    filled = _filled(negated, claims)
    assert not isinstance(filled, Not)  # noqa: S101 - a tree keeps its shape
    return filled


def _values(comparison: Comparison, claims: Mapping[str, Any]) -> Iterator[str]:
    for value in comparison.values:
        path = _path(value)
        if path is None:
            yield value
            continue
        found = path.find(claims)
        if isinstance(found, list) and comparison.operator is Operator.IN:
            yield from (_text(path, element) for element in found)
        else:
            yield _text(path, found)


def _text(path: ClaimPath, value: Any) -> str:
    """Write a claim as the text of a value."""
    match value:
        case None:
            raise _unusable(path, "is missing")
        case bool():  # which is an int, too
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return msgspec.json.encode(value).decode()
        case str():
            return _checked(path, value)
        case _:
            raise _unusable(path, "is of a type that no column is compared with there")


def _checked(path: ClaimPath, text: str) -> str:
    """Refuse what Postgres has no text for."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _unusable(path, "has a character that Postgres has not")
    return text


def _unusable(path: ClaimPath, why: str) -> ClaimUnusable:
    return ClaimUnusable(f"the claim {path} {why}")
