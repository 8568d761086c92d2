r"""How regular expressions are written for the engines that can match them.

Python's ``re`` tries what may match one way after another, which can take for ever: it is for the
patterns of whoever runs walstream. RE2 takes a time that is linear in the text, and a memory that
is bounded: it is for those of clients. RE2 looks neither ahead nor behind, and the edges of words
that it knows are those of ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Protocol

from walstream.character_classes import runs_of

Matcher = Callable[[str], bool]
"""Whether a text matches; it raises `ValueError` for one that is too long to be tried."""


class PatternError(ValueError):
    """PostgreSQL refuses the pattern, or we cannot match it as PostgreSQL does."""


class Dialect(Protocol):
    """How an engine wants things to be written; each raises `PatternError` if it has no such."""

    def literal(self, character: str) -> str:
        """Write a character that stands for itself."""

    def in_brackets(self, character: str) -> str:
        """Write a character that stands for itself in a bracket expression."""

    def members(self, name: str) -> str:
        """Write a class of characters as the inside of a bracket expression."""

    def constraint(self, letter: str) -> str:
        r"""Write what in PostgreSQL is ``\A``, ``\Z``, ``\m``, ``\M``, ``\y`` or ``\Y``."""

    def opening(self, kind: str) -> str:
        """Open a group (``:``), or what looks ahead or behind (``=``, ``<!`` and so on)."""

    def compile(self, pattern: str) -> Matcher:
        """Compile what has been written."""


class _Python:
    """``re``, where ``.`` is any character."""

    def literal(self, character: str) -> str:
        return re.escape(character)

    def in_brackets(self, character: str) -> str:
        return f"\\{character}" if character in r"\]^-[&~|" else character

    def members(self, name: str) -> str:
        return r"\w" if name == "word" else _members(self, name)

    def constraint(self, letter: str) -> str:
        return _CONSTRAINTS[letter]

    def opening(self, kind: str) -> str:
        return f"(?{kind}"

    def compile(self, pattern: str) -> Matcher:
        try:
            search = re.compile(pattern, re.DOTALL).search
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"the pattern cannot be translated: {error}") from None
        return lambda text: search(text) is not None


_CONSTRAINTS: Final = {
    "A": r"\A",
    "Z": r"\Z",
    "m": r"(?<!\w)(?=\w)",
    "M": r"(?<=\w)(?!\w)",
    "y": r"\b",
    # Python's \B does not hold in an empty text.
    "Y": r"(?!\b)",
}

MAX_MEMORY_BYTES: Final = 1 << 21
"""What RE2 may have for one pattern: where that is not enough it needs more time instead."""

MAX_PROGRAM: Final = 30_000
"""Steps of a pattern that RE2 has compiled: a character may cost as many, and no more.

``\\w``, which has the letters of all scripts, is some 1,200 of them.
"""

MAX_TEXT_BYTES: Final = 1 << 18
"""What a client's pattern is tried on."""


class _Linear:
    """RE2, where ``.`` is any character (https://github.com/google/re2/wiki/Syntax)."""

    def literal(self, character: str) -> str:
        return self.in_brackets(character)

    def in_brackets(self, character: str) -> str:
        is_plain = character.isalnum() or not character.isascii()
        return character if is_plain else f"\\x{{{ord(character):x}}}"

    def members(self, name: str) -> str:
        return _members(self, name)

    def constraint(self, letter: str) -> str:
        match letter:
            case "A":
                return r"\A"
            case "Z":
                return r"\z"
            case _:
                raise PatternError("the edges of words cannot be looked for here")

    def opening(self, kind: str) -> str:
        if kind != ":":
            raise PatternError("a pattern cannot look ahead or behind here")
        return "(?:"

    def compile(self, pattern: str) -> Matcher:
        re2 = _re2()
        options = re2.Options()
        options.max_mem = MAX_MEMORY_BYTES
        options.never_capture = True
        options.dot_nl = True
        options.log_errors = False
        try:
            compiled = re2.compile(pattern.encode(), options)
        except UnicodeEncodeError:
            raise PatternError("half of a character stands by itself") from None
        except re2.error as error:
            raise PatternError(f"the pattern cannot be translated: {_said(error)}") from None
        if compiled.programsize > MAX_PROGRAM:
            raise PatternError("the pattern would cost too much")
        return _bounded(compiled.search)


PYTHON: Final[Dialect] = _Python()
LINEAR: Final[Dialect] = _Linear()


@cache
def _members(dialect: Dialect, name: str) -> str:
    return "".join(
        dialect.in_brackets(first)
        if first == last
        else f"{dialect.in_brackets(first)}-{dialect.in_brackets(last)}"
        for first, last in runs_of(name)
    )


def _re2() -> Any:
    """Import RE2, which only clients' patterns need."""
    try:
        import re2  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        message = 'regular expressions of clients need google-re2: pip install "walstream[http]"'
        raise PatternError(message) from None
    return re2


def _said(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


def _bounded(search: Callable[[bytes], object]) -> Matcher:
    def matches(text: str) -> bool:
        encoded = text.encode()
        _verify_length(len(encoded))
        return search(encoded) is not None

    return matches


def bounded(matches: Matcher) -> Matcher:
    """Return a matcher for a client's pattern: it raises ValueError for a text that is too long."""

    def bounded_matches(text: str) -> bool:
        _verify_length(len(text))
        return matches(text)

    return bounded_matches


def _verify_length(length: int) -> None:
    if length > MAX_TEXT_BYTES:
        raise ValueError("a text that is too long for the pattern of a client")
