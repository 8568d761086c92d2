"""Keys that compare as PostgreSQL compares values.

From the text that a type's output function prints (DateStyle ISO, IntervalStyle postgres, TimeZone
UTC, bytea_output hex) to a hashable key. For two keys of one type ``<`` and ``==`` are what
PostgreSQL's operators of the type's default B-tree class say, with the exceptions noted here:

- text is ordered by code point, as with ``COLLATE "C"``, whatever the column's collation; equality
  is that of a deterministic collation.
- money compares only with money printed under the same ``lc_monetary``.
- citext is folded as `fold` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from ipaddress import ip_address
from typing import Any, Final

ToKey = Callable[[str], Any]
"""From output text to a hashable key; a text of another form raises `ValueError`."""


class _NotANumber:
    """NaN as PostgreSQL sorts it: equal to itself, greater than everything else."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is self

    def __lt__(self, other: object) -> bool:
        return False

    def __le__(self, other: object) -> bool:
        return other is self

    def __gt__(self, other: object) -> bool:
        return other is not self

    def __ge__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "NaN"


NAN: Final = _NotANumber()


def boolean(text: str) -> bool:
    """Bool: ``t`` and ``f``, or ``true`` and ``false``, which a cast to text prints."""
    if text not in _BOOLEANS:
        raise ValueError("not a bool")
    return _BOOLEANS[text]


def floating(text: str) -> Any:
    """Float4 and float8; the shortest exact text of either sorts as its value."""
    return NAN if text == "NaN" else float(text)


def numeric(text: str) -> Any:
    """Numeric: exact, the scale does not count."""
    return NAN if text == "NaN" else Decimal(text)


def blank_padded(text: str) -> str:
    """Char(n): trailing blanks do not count."""
    return text.rstrip(" ")


def single_byte(text: str) -> int:
    r"""Type ``"char"``: one byte, as itself or as ``\ooo``; zero prints as nothing."""
    if len(text) == 4:  # noqa: PLR2004 - a backslash and three octal digits
        return int(text[1:], 8)
    return ord(text) if text else 0


def date(text: str) -> tuple[float, str]:
    """Date, timestamp: the year, counted through zero, and the rest, which sorts as text.

    The rest has two digits for everything and no trailing zeros in the fraction.
    """
    if text in _INFINITIES:
        return _INFINITIES[text]
    year, _, rest = text.partition("-")
    if rest.endswith(" BC"):
        return 1 - int(year), rest[:-3]
    return int(year), rest


def timestamptz(text: str) -> tuple[float, str]:
    """Timestamptz, printed in UTC."""
    if text in _INFINITIES:
        return _INFINITIES[text]
    if text.endswith("+00"):
        return date(text[:-3])
    if text.endswith("+00 BC"):
        return date(text[:-6] + " BC")
    raise ValueError("a timestamptz that is not printed in UTC")


def timetz(text: str) -> tuple[int, int]:
    """Timetz: by the instant, then by the zone, seconds west of UTC (timetz_cmp_internal)."""
    matched = _matched(_TIMETZ, text)
    hours, minutes, seconds, fraction, sign, *zone = matched.groups("0")
    zone_seconds = _seconds(*zone) * (1 if sign == "-" else -1)
    local = _seconds(hours, minutes, seconds) * 1_000_000 + int(fraction.ljust(6, "0"))
    return local + zone_seconds * 1_000_000, zone_seconds


def interval(text: str) -> float:
    """Interval in microseconds: a month has 30 days, a day 24 hours (interval_cmp_value)."""
    if text in _INFINITIES:
        return _INFINITIES[text][0]
    years, months, days, sign, hours, minutes, seconds, fraction = _matched(_INTERVAL, text).groups(
        "0"
    )
    time = _seconds(hours, minutes, seconds) * 1_000_000 + int(fraction.ljust(6, "0"))
    total_days = (int(years) * 12 + int(months)) * 30 + int(days)
    return total_days * 86_400_000_000 + (-time if sign == "-" else time)


def network(text: str) -> tuple[int, str, int]:
    """Inet, cidr: family, then the network's bits, shorter first, then the address.

    This sorts as ``network_cmp`` does: common bits, then length of the mask, then all bits.
    """
    host, _, mask = text.partition("/")
    address = ip_address(host)
    bits = f"{int(address):0{address.max_prefixlen}b}"
    return address.version, bits[: int(mask)] if mask else bits, int(address)


def log_sequence_number(text: str) -> int:
    """Type pg_lsn."""
    upper, _, lower = text.partition("/")
    return int(upper, 16) << 32 | int(lower, 16)


def tuple_identifier(text: str) -> tuple[int, ...]:
    """Type tid: block and offset."""
    return tuple(map(int, text[1:-1].split(",")))


def money(text: str) -> int:
    """Money: its digits are the amount in the smallest unit, whatever separates them."""
    digits = "".join(filter(str.isdigit, text))
    return -int(digits) if "-" in text or "(" in text else int(digits)


def jsonb(text: str) -> str:
    """Jsonb, for equality alone: its text is canonical but for zeros at the end of a fraction."""
    return _JSON_STRING_OR_FRACTION.sub(_without_trailing_zeros, text)


def fold(text: str) -> str:
    """Make lower-case as PostgreSQL's ``lower`` does: one character at a time, by Unicode.

    This is libc's ``towlower`` under C.UTF-8 and other UTF-8 locales but Turkish ones. Under the
    locale ``C`` the server folds only ASCII, under ICU it may change the length of a text.
    """
    return text.lower() if text.isascii() else text.translate(_LOWER)


def identical(text: str) -> str:
    """Types whose output text sorts as they do, or is the same for what is equal."""
    return text


class _Lower(dict[int, int]):
    """Code points to their lower case, filled when they are met."""

    def __missing__(self, code_point: int) -> int:
        lowered = ord(chr(code_point).lower()[0])
        self[code_point] = lowered
        return lowered


_LOWER: Final = _Lower()
_BOOLEANS: Final = {"t": True, "f": False, "true": True, "false": False}
_INFINITIES: Final = {"infinity": (math.inf, ""), "-infinity": (-math.inf, "")}
_TIMETZ: Final = re.compile(
    r"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?"
)
_INTERVAL: Final = re.compile(
    r"(?:([+-]?\d+) years? ?)?(?:([+-]?\d+) mons? ?)?(?:([+-]?\d+) days? ?)?"
    r"(?:([+-]?)(\d+):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?"
)
_JSON_STRING_OR_FRACTION: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|\.\d+')


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    matched = pattern.fullmatch(text)
    if matched is None:
        raise ValueError("a text that the type's output function does not print")
    return matched


def _seconds(hours: str, minutes: str, seconds: str) -> int:
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def _without_trailing_zeros(matched: re.Match[str]) -> str:
    token = matched[0]
    return token if token[0] == '"' else token.rstrip("0").rstrip(".")
