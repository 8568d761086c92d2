r"""PostgreSQL's LIKE and regular expressions, by Python's ``re`` or RE2 (`dialects`).

LIKE and ILIKE are exact (PostgreSQL documentation, 9.7.1). Advanced regular expressions (9.7.3) are
translated where the engine can say the same, and refused where it cannot: back references,
collating elements, basic and expanded syntax; with Python lookbehind of varying length, with RE2
all that looks ahead or behind and the edges of words. Whether a text matches depends neither on
greediness nor on the order of alternatives, so those may differ.

Case is folded as by glibc in a UTF-8 locale, exactly. Character classes are glibc's too, but
combining vowel signs are no letters, and with Python ``\w`` is Python's beyond ASCII.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left, bisect_right
from functools import cache
from typing import Final

from walstream.character_classes import NAMES, upper
from walstream.comparables import fold
from walstream.dialects import LINEAR, PYTHON, Dialect, Matcher, PatternError

__all__ = ["Matcher", "PatternError", "like", "linear_expression", "regular_expression"]


def like(pattern: str, *, fold_case: bool = False) -> Matcher:
    r"""Compile a LIKE pattern: ``%`` any text, ``_`` one character, ``\`` takes the next literally.

    Raises:
        PatternError: the pattern ends with a lone backslash.
    """
    if fold_case:
        matches = like(fold(pattern))
        return lambda text: matches(fold(text))
    first, *others = _like_pieces(pattern)
    if not others:
        return PYTHON.compile(rf"\A{first}\Z")
    # A piece between two % may match where it first can: as atomic groups they never try again,
    # and the effort stays linear.
    *middle, last = others
    between = "".join(f"(?>.*?{piece})" for piece in middle if piece)
    return PYTHON.compile(rf"\A{first}{between}.*{last}\Z")


def regular_expression(pattern: str, *, fold_case: bool = False) -> Matcher:
    """Compile an advanced regular expression; ``fold_case`` is what ``~*`` does.

    Raises:
        PatternError: it is none, or one that cannot be translated.
    """
    return PYTHON.compile(_Translation(pattern, PYTHON, fold_case=fold_case).translated())


def linear_expression(pattern: str, *, fold_case: bool = False) -> Matcher:
    """Compile one that comes from a client: it takes a bounded time, and looks nowhere around.

    Raises:
        PatternError: it is none, or one that cannot be translated, or costs too much.
    """
    return LINEAR.compile(_Translation(pattern, LINEAR, fold_case=fold_case).translated())


_LIKE_TOKEN: Final = re.compile(r"\\(.)|(\\)|(%+)|(_)|(.)", re.DOTALL)


def _like_pieces(pattern: str) -> list[str]:
    """Translate what stands between the ``%``."""
    pieces = [""]
    for escaped, backslash, percent, underscore, plain in _LIKE_TOKEN.findall(pattern):
        if backslash:
            raise PatternError("a LIKE pattern must not end with a backslash, its escape character")
        if percent:
            pieces.append("")
        else:
            pieces[-1] += "." if underscore else re.escape(escaped or plain)
    return pieces


_DIRECTOR: Final = re.compile(r"\*\*\*([:=])?")
_OPTIONS: Final = re.compile(r"\(\?([a-z]+)\)")
_GROUP: Final = re.compile(r"\((?:\?(:|<?[=!]))?")
_QUANTIFIER: Final = re.compile(r"(?:[*+?]|\{(\d+)(?:(,)(\d*))?\})\??")
_MAX_REPEATS: Final = 255  # RE_DUP_MAX
_WORD_EDGE: Final = re.compile(r"\[\[:([<>]):\]\]")
_CLASS: Final = re.compile(r"\[:([a-z]*):\]")
_NUMBERED: Final = (
    re.compile(r"u([0-9A-Fa-f]{4})"),
    re.compile(r"U([0-9A-Fa-f]{8})"),
    re.compile(r"x([0-9A-Fa-f]+)"),
)
_OCTAL: Final = re.compile(r"0[0-7]{0,2}")
_CONTROL: Final = re.compile(r"c(.)", re.DOTALL)
_CHARACTERS: Final = {
    "a": "\a",
    "b": "\b",
    "B": "\\",
    "e": "\x1b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_CONSTRAINTS: Final = frozenset("AZmMyY")
_SHORTHANDS: Final = {"d": "digit", "s": "space", "w": "word"}
_MAX_FOLDED_RANGE: Final = 100_000


class _Translation:
    """Reads an expression from left to right, and writes it in a dialect."""

    def __init__(self, pattern: str, dialect: Dialect, *, fold_case: bool) -> None:
        self.pattern = pattern
        self.dialect = dialect
        self.position = 0
        self.fold_case = fold_case
        self.is_literal = False
        self.stops_at_newline = False
        """``.`` and ``[^a]`` do not match a line end."""
        self.anchors_at_newline = False
        """``^`` and ``$`` match at line ends too."""

    def translated(self) -> str:
        self.prefix()
        if self.is_literal:
            return "".join(map(self.character, self.pattern[self.position :]))
        output: list[str] = []
        groups: list[bool] = []
        quantifiable = False
        while self.position < len(self.pattern):
            piece, quantifiable = self.piece(groups, quantifiable=quantifiable)
            output.append(piece)
        if groups:
            raise PatternError("a parenthesis is not closed")
        return "".join(output)

    def prefix(self) -> None:
        """Read the director and the options that an expression can begin with."""
        director = self.take(_DIRECTOR)
        if director and director[1] is None:
            raise self.refused("***")
        if director and director[1] == "=":
            self.is_literal = True
            return
        options = self.take(_OPTIONS)
        for option in options[1] if options else "":
            self.option(option)

    def option(self, option: str) -> None:
        match option:
            case "c" | "i":
                self.fold_case = option == "i"
            case "q":
                self.is_literal = True
            case "t":
                pass  # tight syntax, which is the default
            case "s" | "m" | "n" | "p" | "w":
                self.stops_at_newline = option in "mnp"
                self.anchors_at_newline = option in "mnw"
            case _:
                raise self.refused(f"the option {option!r}")

    def piece(self, groups: list[bool], *, quantifiable: bool) -> tuple[str, bool]:
        """Translate the next piece, and tell whether a quantifier may follow it."""
        quantifier = self.take(_QUANTIFIER)
        if quantifier:
            return self.quantifier(quantifier, quantifiable=quantifiable), False
        character = self.pattern[self.position]
        if character == "(":
            return self.opening(groups), False
        self.position += 1
        if character == ")" and groups:
            return ")", groups.pop()
        if character in "|^$":
            return self.branch_or_anchor(character), False
        return self.atom(character)

    def branch_or_anchor(self, character: str) -> str:
        if character == "|":
            return "|"
        if self.anchors_at_newline:
            return f"(?m:{character})"
        return self.dialect.constraint("A" if character == "^" else "Z")

    def atom(self, character: str) -> tuple[str, bool]:
        match character:
            case ".":
                return (r"[^\n]" if self.stops_at_newline else "."), True
            case "[":
                return self.bracket()
            case "\\":
                return self.escape()
            case ")":
                raise PatternError("a parenthesis is closed that was not opened")
            case "{" if self.pattern[self.position : self.position + 1].isdecimal():
                raise PatternError("a repetition is written {m}, {m,} or {m,n}")
            case _:
                return self.character(character), True

    def quantifier(self, found: re.Match[str], *, quantifiable: bool) -> str:
        if not quantifiable:
            raise PatternError("a quantifier follows nothing that can be repeated")
        bounds = [int(bound) for bound in (found[1], found[3]) if bound]
        if any(bound > _MAX_REPEATS for bound in bounds) or bounds != sorted(bounds):
            raise PatternError(f"the bounds of a repetition go from 0 to {_MAX_REPEATS}")
        return found[0]

    def opening(self, groups: list[bool]) -> str:
        """Open a group; what it captures does not matter. A lookaround cannot be repeated."""
        found = self.take(_GROUP)
        kind = found[1] if found else None
        groups.append(kind in (None, ":"))
        return self.dialect.opening(kind or ":")

    def escape(self) -> tuple[str, bool]:
        """Translate what follows a backslash."""
        letter = self.pattern[self.position : self.position + 1]
        if letter in _CONSTRAINTS:
            self.position += 1
            return self.dialect.constraint(letter), False
        if letter.lower() in _SHORTHANDS:
            self.position += 1
            return self.shorthand(letter), True
        return self.character(self.escaped_character()), True

    def shorthand(self, letter: str) -> str:
        """The negated ones match line ends in every mode, since PostgreSQL 14."""
        members = self.dialect.members(_SHORTHANDS[letter.lower()])
        return f"[{members}]" if letter.islower() else f"[^{members}]"

    def escaped_character(self) -> str:
        if self.position == len(self.pattern):
            raise PatternError("a backslash stands at the end")
        for numbered in _NUMBERED:
            if found := self.take(numbered):
                return self.code_point(found[1], 16)
        if found := self.take(_OCTAL):
            return self.code_point(found[0], 8)
        if found := self.take(_CONTROL):
            return chr(ord(found[1]) & 0x1F)
        letter = self.pattern[self.position]
        if letter.isascii() and letter.isalnum() and letter not in _CHARACTERS:
            raise self.refused(f"\\{letter}")
        self.position += 1
        return _CHARACTERS.get(letter, letter)

    def code_point(self, digits: str, base: int) -> str:
        number = int(digits, base)
        if number > sys.maxunicode:
            raise PatternError(f"there is no character of number {digits}")
        return chr(number)

    def character(self, character: str) -> str:
        variants = self.variants(character)
        if len(variants) == 1:
            return self.dialect.literal(variants[0])
        return f"[{''.join(map(self.dialect.in_brackets, variants))}]"

    def variants(self, character: str) -> list[str]:
        """With case folded a character stands for its lower and upper case, as in ``allcases``."""
        return _cases(character) if self.fold_case else [character]

    def bracket(self) -> tuple[str, bool]:
        """Translate a bracket expression from behind its opening bracket."""
        edge = _WORD_EDGE.match(self.pattern, self.position - 1)
        if edge:
            self.position = edge.end()
            return self.dialect.constraint("m" if edge[1] == "<" else "M"), False
        negated = self.skip("^")
        members = [self.member()]
        while not self.skip("]"):
            members.append(self.member())
        if negated and self.stops_at_newline:
            members.append(r"\n")
        return f"[{'^' if negated else ''}{''.join(members)}]", True

    def member(self) -> str:
        """Translate a class, a shorthand, a range or a character of a bracket expression."""
        found = self.take(_CLASS)
        if found:
            return self.named_class(found[1])
        if self.pattern.startswith("\\", self.position):
            letter = self.pattern[self.position + 1 : self.position + 2]
            if letter in _SHORTHANDS:
                self.position += 2
                return self.dialect.members(_SHORTHANDS[letter])
        start = self.endpoint()
        following = self.pattern[self.position + 1 : self.position + 2]
        if following in ("", "]") or not self.skip("-"):
            return "".join(map(self.dialect.in_brackets, self.variants(start)))
        return self.range(start, self.endpoint())

    def named_class(self, name: str) -> str:
        if name not in NAMES:
            raise PatternError(f"there is no character class {name!r}")
        if self.fold_case and name in ("upper", "lower"):
            name = "alpha"
        return self.dialect.members(name)

    def endpoint(self) -> str:
        if self.position == len(self.pattern):
            raise PatternError("a bracket is not closed")
        character = self.pattern[self.position]
        if self.pattern.startswith(("[.", "[=", "[:"), self.position):
            raise self.refused(self.pattern[self.position : self.position + 2])
        self.position += 1
        return self.escaped_character() if character == "\\" else character

    def range(self, start: str, end: str) -> str:
        if start > end:
            raise PatternError("a range in brackets ends before it starts")
        in_brackets = self.dialect.in_brackets
        members = f"{in_brackets(start)}-{in_brackets(end)}"
        if not self.fold_case:
            return members
        if ord(end) - ord(start) > _MAX_FOLDED_RANGE:
            raise PatternError("a range in brackets is too long to ignore case in it")
        cased, cases = _cased()
        within = cases[bisect_left(cased, start) : bisect_right(cased, end)]
        others = {variant for variants in within for variant in variants}
        beyond = [one for one in sorted(others) if not start <= one <= end]
        return members + "".join(map(in_brackets, beyond))

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.pattern, self.position)
        if found:
            self.position = found.end()
        return found

    def skip(self, character: str) -> bool:
        found = self.pattern.startswith(character, self.position)
        self.position += found
        return found

    def refused(self, what: str) -> PatternError:
        return PatternError(f"regular expressions with {what} are not supported")


def _cases(character: str) -> list[str]:
    return list(dict.fromkeys((fold(character), upper(character))))


_CASED_BEFORE: Final = 0x20000
"""From there on no character has a case."""


@cache
def _cased() -> tuple[list[str], list[list[str]]]:
    """List the characters that stand for others, too, and those: of a long range they are few."""
    found = [(one, _cases(one)) for one in map(chr, range(_CASED_BEFORE))]
    cased = [(one, cases) for one, cases in found if cases != [one]]
    return [one for one, _ in cased], [cases for _, cases in cased]
