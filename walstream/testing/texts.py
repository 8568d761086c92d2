"""A Python value as the JSON scalar that wal2json would write for it.

The other way round than `walstream.values`: what comes back from there is the value again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final
from uuid import UUID

import msgspec
import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.postgres import types as registry

from walstream.values import TEXT_OID, Kind, Types


def oid_of(value: Any) -> int:
    """Return the OID of the type that fits a value; a null is text.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, list):
        return _array_oid(value)
    if isinstance(value, int) and not isinstance(value, bool) and not _fits_int8(value):
        return _OID["numeric"]
    if isinstance(value, datetime):
        return _OID["timestamp" if value.tzinfo is None else "timestamptz"]
    if isinstance(value, time):
        return _OID["time" if value.tzinfo is None else "timetz"]
    for kind, name in _TYPES:
        if isinstance(value, kind):
            return _OID[name]
    return _dumped(value)[1]


def oid_named(name: str) -> int:
    """Return the OID of a built-in type by its name, such as ``int4[]`` or ``bigint``.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return registry.get_oid(name)
    except KeyError:
        message = (
            f"{name!r} is not a built-in type; an enum's labels and other types' values can be"
            " given as text"
        )
        raise ValueError(message) from None


def raw_of(value: Any, oid: int, types: Types) -> msgspec.Raw:
    """Return what wal2json would write.

    Raises:
        TypeError: a value of this kind cannot be of a PostgreSQL type.
    """
    if value is None:
        return msgspec.Raw(b"null")
    text = _text(value, oid, types)
    if oid == _OID["bytea"]:
        return msgspec.Raw(msgspec.json.encode(text.removeprefix("\\x")))
    if oid == _OID["bool"]:
        return msgspec.Raw(b"true" if text == "t" else b"false")
    if oid in _NUMBERS and _JSON_NUMBER.fullmatch(text):
        return msgspec.Raw(text.encode())
    return msgspec.Raw(msgspec.json.encode(text))


def _text(value: Any, oid: int, types: Types) -> str:
    """Print as the type's output function does. A ``str`` is that text already, but in JSON."""
    if oid in _JSONS:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        pg_type = types.get(oid)
        if pg_type is None or pg_type.kind is not Kind.ARRAY:
            message = f"a list cannot be a value of the type {registry[oid].name}"
            raise TypeError(message)
        return _array(value, pg_type.element, pg_type.delimiter, types)
    if isinstance(value, bool) or oid == _OID["bool"]:
        return "t" if value else "f"
    return _scalar_text(value)


def _scalar_text(value: Any) -> str:  # noqa: PLR0911 - a return for each kind of value
    match value:
        case int() | UUID() | IPv4Address() | IPv4Network() | IPv6Address() | IPv6Network():
            return str(value)
        case float():
            return _WORDS.get(repr(value), repr(value).removesuffix(".0"))
        case Decimal():
            return format(value, "f") if value.is_finite() else _WORDS[str(value).lower()]
        case bytes() | bytearray() | memoryview():
            return "\\x" + value.hex()
        case datetime():
            return _timestamp(value)
        case date():
            return value.isoformat()
        case time():
            return _time(value)
        case timedelta():
            return _interval(value)
        case _:
            return _dumped(value)[0]


def _timestamp(value: datetime) -> str:
    """Print in UTC where there is a zone, as walstream's sessions do."""
    naive = value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
    return _trimmed(naive.isoformat(" ")) + ("" if value.tzinfo is None else "+00")


def _time(value: time) -> str:
    zone = "" if value.tzinfo is None else re.sub(r":00$", "", value.isoformat()[-6:])
    return _trimmed(value.replace(tzinfo=None).isoformat()) + zone


def _interval(value: timedelta) -> str:
    """Print as ``IntervalStyle = postgres`` does: ``-1 days +22:00:00``."""
    clock = _trimmed(str(timedelta(seconds=value.seconds, microseconds=value.microseconds)))
    clock = clock.rjust(len(clock) + (clock.index(":") == 1), "0")
    if not value.days:
        return clock
    sign = "+" if value.days < 0 else ""
    days = f"{value.days} day{'' if value.days == 1 else 's'}"
    return days if clock == "00:00:00" else f"{days} {sign}{clock}"


def _trimmed(text: str) -> str:
    return text.rstrip("0") if "." in text else text


def _array(items: list[Any], element: int, delimiter: str, types: Types) -> str:
    return "{" + delimiter.join(_item(item, element, delimiter, types) for item in items) + "}"


def _item(item: Any, element: int, delimiter: str, types: Types) -> str:
    if item is None:
        return "NULL"
    if isinstance(item, list) and element not in _JSONS:
        return _array(item, element, delimiter, types)
    text = _text(item, element, types)
    if _NEEDS_NO_QUOTES.fullmatch(text) and text.upper() != "NULL" and delimiter not in text:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _array_oid(items: Iterable[Any]) -> int:
    for item in _flat(items):
        if item is not None:
            array = registry.get(oid_of(item))
            if array is not None and array.array_oid:
                return array.array_oid
    return registry["text"].array_oid


def _flat(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _dumped(value: Any) -> tuple[str, int]:
    """Let psycopg print what it has a dumper for: ranges, and what a project has registered."""
    try:
        dumper = Transformer().get_dumper(value, PyFormat.TEXT)
        text = dumper.dump(value)
    except psycopg.Error:
        message = f"a column cannot hold a value of the class {type(value).__name__}"
        raise TypeError(message) from None
    return bytes(text or b"").decode(), dumper.oid or TEXT_OID


def _fits_int8(value: int) -> bool:
    return -(1 << 63) <= value < 1 << 63


_OID: Final = {info.name: info.oid for info in registry}

_NUMBERS: Final = frozenset(
    _OID[name] for name in ("int2", "int4", "int8", "oid", "float4", "float8", "numeric")
)
_JSONS: Final = frozenset({_OID["json"], _OID["jsonb"]})

# In this order: a bool is an int, a datetime a date.
_TYPES: Final[tuple[tuple[type | tuple[type, ...], str], ...]] = (
    (bool, "bool"),
    (int, "int8"),
    (float, "float8"),
    (Decimal, "numeric"),
    ((str, type(None)), "text"),
    ((bytes, bytearray, memoryview), "bytea"),
    (date, "date"),
    (timedelta, "interval"),
    (UUID, "uuid"),
    (dict, "jsonb"),
    ((IPv4Address, IPv6Address), "inet"),
    ((IPv4Network, IPv6Network), "cidr"),
)

_WORDS: Final = {
    "nan": "NaN",
    "inf": "Infinity",
    "-inf": "-Infinity",
    "infinity": "Infinity",
    "-infinity": "-Infinity",
}
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NEEDS_NO_QUOTES: Final = re.compile(r'[^\s{}"\\]+')
