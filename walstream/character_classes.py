"""PostgreSQL's character classes: which characters are letters, digits, space, as in glibc.

By Unicode's categories (PostgreSQL documentation, 9.7.3.2 Bracket Expressions). Combining vowel
signs are no letters here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from typing import Final
from unicodedata import category

Run = tuple[str, str]
"""The first and the last of characters that follow each other."""


@cache
def runs_of(name: str) -> tuple[Run, ...]:
    r"""Return the characters of a class, such as ``alpha``; ``word`` is that of ``\w``.

    Raises:
        KeyError: there is no such class.
    """
    if name in _RUNS:
        return _RUNS[name]
    return tuple(_runs(_CLASSES[name]))


def upper(character: str) -> str:
    """Make upper-case as ``towupper`` does: to one character or not at all."""
    for one in (character.upper(), character.title()):
        if len(one) == 1:
            return one
    return character


_BLOCKS: Final = ((0, 0x3FFFF), (0xE0000, 0xE0FFF))
_PRIVATE: Final = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
"""What may be anything, and what is all alike; between them nothing is assigned."""


def _runs(belongs: Callable[[str], bool]) -> Iterator[Run]:
    for first, last in _BLOCKS:
        for is_member, run in groupby(map(chr, range(first, last + 1)), key=belongs):
            if is_member:
                characters = list(run)
                yield characters[0], characters[-1]
    for first, last in _PRIVATE:
        if belongs(chr(first)):
            yield chr(first), chr(last)


def _is_alnum(character: str) -> bool:
    return category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl")


def _is_printed(character: str) -> bool:
    return category(character) not in ("Cc", "Cs", "Cn", "Zl", "Zp")


def _is_graphic(character: str) -> bool:
    return _is_printed(character) and character not in _SPACES


_SPACES: Final = frozenset(
    "\t\n\v\f\r \u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2008\u2009\u200a\u2028\u2029\u205f\u3000"
)
"""No-break spaces are none, and neither are the separators of ASCII."""

_RUNS: Final[dict[str, tuple[Run, ...]]] = {
    "ascii": (("\x00", "\x7f"),),
    "blank": (("\t", "\t"), (" ", " ")),
    "cntrl": (("\x00", "\x1f"), ("\x7f", "\x9f")),
    "digit": (("0", "9"),),
    "xdigit": (("0", "9"), ("A", "F"), ("a", "f")),
}
_CLASSES: Final[dict[str, Callable[[str], bool]]] = {
    "alnum": _is_alnum,
    "alpha": lambda one: _is_alnum(one) and one not in "0123456789",
    "graph": _is_graphic,
    "lower": lambda one: one.islower() or (one.istitle() and upper(one) != one),
    "print": _is_printed,
    "punct": lambda one: _is_graphic(one) and not _is_alnum(one),
    "space": lambda one: one in _SPACES,
    "upper": lambda one: one.isupper() or one.istitle(),
    "word": lambda one: one == "_" or _is_alnum(one),
}

NAMES: Final = frozenset((*_RUNS, *_CLASSES))
