"""The values of filters, read without a server.

A server reads far more than this: here are the plain forms of common types, whose text in
PostgreSQL is known for certain. Everything else is left to a server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from typing import Final

from walstream.filters import Literal
from walstream.values import Kind, Types


def read_offline(literal: Literal, types: Types) -> str | None:
    """Return what the server would make of a filter's value, or None when only it can tell.

    A text that is no value of the type is one of those cases: the server says best why.
    """
    if literal.is_pattern:
        return literal.text  # translated, and so checked, by us
    pg_type = types.get(literal.typeoid)
    if pg_type is None:
        return None
    if pg_type.kind is Kind.ENUM:
        return literal.text if literal.text in pg_type.labels else None
    read = _READERS.get(pg_type.name)
    if read is None or pg_type.kind is not Kind.BASE:
        return None
    try:
        return read(literal.text)
    except (ValueError, OverflowError):  # such as the 30th of February
        return None


_Reader = Callable[[str], str | None]

_WHOLE: Final = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?\d{1,100}(\.\d{1,100})?", re.ASCII)
_SHORT_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIME: Final = re.compile(r"\d\d:\d\d:\d\d(\.\d{1,6})?", re.ASCII)
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,6})?", re.ASCII)
_TIMESTAMPTZ: Final = re.compile(_TIMESTAMP.pattern + r"(Z|[+-]\d\d:\d\d)?", re.ASCII)
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BYTEA: Final = re.compile(r"\\x([0-9a-f]{2})*")

_NAME_BYTES: Final = 63


def _whole(bits: int, *, signed: bool = True) -> _Reader:
    lowest, beyond = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)

    def read(text: str) -> str | None:
        if not _WHOLE.fullmatch(text):
            return None
        number = int(text)
        return str(number) if lowest <= number < beyond else None

    return read


def _short_number(digits: int) -> _Reader:
    """With so few digits a float prints as what it was read from (FLT_DIG and DBL_DIG of C)."""

    def read(text: str) -> str | None:
        if not _SHORT_NUMBER.fullmatch(text) or sum(map(str.isdigit, text)) > digits:
            return None
        return text

    return read


def _matching(pattern: re.Pattern[str]) -> _Reader:
    return lambda text: text if pattern.fullmatch(text) else None


def _date(text: str) -> str | None:
    return str(date.fromisoformat(text)) if _DATE.fullmatch(text) else None


def _time(text: str) -> str | None:
    return _trimmed(str(time.fromisoformat(text))) if _TIME.fullmatch(text) else None


def _timestamp(text: str) -> str | None:
    if not _TIMESTAMP.fullmatch(text):
        return None
    return _trimmed(str(datetime.fromisoformat(text)))


def _timestamptz(text: str) -> str | None:
    """Without a zone it is in that of the session, which is UTC."""
    if not _TIMESTAMPTZ.fullmatch(text):
        return None
    read = datetime.fromisoformat(text)
    instant = read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
    return _trimmed(str(instant.replace(tzinfo=None))) + "+00"


def _trimmed(text: str) -> str:
    """PostgreSQL prints no zeros at the end of a fraction."""
    return text.rstrip("0") if "." in text else text


def _boolean(text: str) -> str | None:
    return text if text in ("true", "false") else {"t": "true", "f": "false"}.get(text)


def _name(text: str) -> str | None:
    return text if len(text.encode()) <= _NAME_BYTES else None


def _blank_padded(text: str) -> str:
    return text.rstrip(" ")


def _as_it_is(text: str) -> str:
    return text


_READERS: Final[dict[str, _Reader]] = {
    "int2": _whole(16),
    "int4": _whole(32),
    "int8": _whole(64),
    "oid": _whole(32, signed=False),
    "float4": _short_number(6),
    "float8": _short_number(15),
    "numeric": _matching(_NUMBER),
    "bool": _boolean,
    "bpchar": _blank_padded,
    "name": _name,
    "citext": _as_it_is,
    "uuid": _matching(_UUID),
    "bytea": _matching(_BYTEA),
    "date": _date,
    "time": _time,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
}
