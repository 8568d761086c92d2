"""Values of filters that are read without a server; tests/test_recording.py asks a server too."""

from __future__ import annotations

import pytest

from walstream.filters import Literal
from walstream.offline import read_offline
from walstream.values import Kind, PgType, Types

MOOD = 90_000
CITEXT = 90_001
TYPES = Types(
    lambda _: lambda text: text.decode(),
    [
        PgType(MOOD, "mood", "public", Kind.ENUM, labels=("sad", "happy")),
        PgType(CITEXT, "citext", "public"),
    ],
)
BY_NAME = {
    "bool": 16, "bytea": 17, "name": 19, "int8": 20, "int2": 21, "int4": 23, "oid": 26,
    "json": 114, "float4": 700, "float8": 701, "bpchar": 1042, "date": 1082, "time": 1083,
    "timestamp": 1114, "timestamptz": 1184, "interval": 1186, "numeric": 1700, "uuid": 2950,
    "_int4": 1007, "int4range": 3904, "mood": MOOD, "citext": CITEXT, "unheard_of": 77_777,
}  # fmt: skip

UUID = "0188f5e0-0000-7000-8000-00000000abcd"

READ = [
    ("bool", "true", "true"),
    ("bool", "f", "false"),
    ("int2", "+007", "7"),
    ("int2", "-32768", "-32768"),
    ("int4", "2147483647", "2147483647"),
    ("int8", "-9223372036854775808", "-9223372036854775808"),
    ("oid", "4294967295", "4294967295"),
    ("float4", "0.25", "0.25"),
    ("float4", "-1", "-1"),
    ("float8", "123456789.012345", "123456789.012345"),
    ("numeric", "12345678901234567890.10", "12345678901234567890.10"),
    ("bpchar", "ab  ", "ab"),
    ("name", "relname", "relname"),
    ("citext", "MiXed", "MiXed"),
    ("uuid", UUID, UUID),
    ("bytea", "\\xdead00", "\\xdead00"),
    ("date", "2024-02-29", "2024-02-29"),
    ("time", "23:59:59.500", "23:59:59.5"),
    ("time", "10:00:00", "10:00:00"),
    ("timestamp", "2026-01-02T03:04:05.000000", "2026-01-02 03:04:05"),
    ("timestamp", "2026-01-02 03:04:05.120", "2026-01-02 03:04:05.12"),
    ("timestamptz", "2026-01-02 03:04:05", "2026-01-02 03:04:05+00"),
    ("timestamptz", "2026-01-02 03:04:05.5+02:00", "2026-01-02 01:04:05.5+00"),
    ("timestamptz", "2026-01-02T03:04:05Z", "2026-01-02 03:04:05+00"),
    ("mood", "sad", "sad"),
]

LEFT = [
    ("bool", "yes"),
    ("int2", "32768"),
    ("int4", "1e3"),
    ("int4", "x"),
    ("oid", "-1"),
    ("float4", "0.1234567"),
    ("float8", "1e5"),
    ("float8", "0.1234567890123456"),
    ("numeric", "NaN"),
    ("name", "ü" * 32),
    ("uuid", UUID.upper()),
    ("bytea", "text"),
    ("date", "2026-02-30"),
    ("date", "today"),
    ("time", "24:00:00"),
    ("timestamp", "2026-01-02"),
    ("timestamptz", "0001-01-01 00:00:00+10:00"),
    ("timestamptz", "2026-01-02 03:04:05 Europe/Berlin"),
    ("mood", "angry"),
    ("interval", "1 day"),
    ("json", "{}"),
    ("_int4", "{1}"),
    ("int4range", "[1,2)"),
    ("unheard_of", "1"),
]


def literal(type_name: str, text: str) -> Literal:
    return Literal("column", BY_NAME[type_name], type_name, text)


@pytest.mark.parametrize(("type_name", "text", "expected"), READ)
def test_plain_values_are_read(type_name: str, text: str, expected: str) -> None:
    assert read_offline(literal(type_name, text), TYPES) == expected


@pytest.mark.parametrize(("type_name", "text"), LEFT)
def test_what_only_a_server_can_read_is_left_to_it(type_name: str, text: str) -> None:
    assert read_offline(literal(type_name, text), TYPES) is None


def test_a_pattern_stays_as_it_is() -> None:
    assert read_offline(Literal("column", 25, "text", "^a+$", is_pattern=True), TYPES) == "^a+$"
