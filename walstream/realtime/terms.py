"""Values and types in the texts of errors, written as the original server writes them.

Clients and their tests compare these texts, so the notation is Elixir's: ``nil``, ``%{"a" => 1}``,
and types have their names of SQL: ``integer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from walstream.values import Kind, Types

MAX_CHARACTERS: Final = 4096
MAX_ITEMS: Final = 50
MAX_DEPTH: Final = 4
"""Of what is shown of one value: it comes from the client, and goes back to it."""

_ESCAPES: Final = {
    '"': '\\"',
    "\\": "\\\\",
    "\0": "\\0",
    "\a": "\\a",
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\v": "\\v",
    "\f": "\\f",
    "\r": "\\r",
    "\x1b": "\\e",
    "\x7f": "\\d",
}


def term(value: Any, depth: int = 0) -> str:
    """Write a value that came as JSON; what is long or deep is cut."""
    match value:
        case None:
            return "nil"
        case bool():
            return "true" if value else "false"
        case str():
            return _text(value)
        case Mapping():
            shown = ", ".join(
                f"{term(name, depth + 1)} => {term(one, depth + 1)}"
                for name, one in sorted(value.items())[: _bound(depth)]
            )
            return f"%{{{shown}}}"
        case list() | tuple():
            return f"[{', '.join(term(one, depth + 1) for one in value[: _bound(depth)])}]"
        case _:
            return str(value)


def type_shown(typeoid: int, types: Types) -> str:
    """Name a type as ``format_type`` does, built-in ones too."""
    pg_type = types.get(typeoid)
    if pg_type is None or pg_type.sql_name:
        return types.name(typeoid)
    if pg_type.kind is Kind.ARRAY:
        return f"{type_shown(pg_type.element, types)}[]"
    return _SQL_NAMES.get(pg_type.name, pg_type.name)


_SQL_NAMES: Final = {
    "bool": "boolean",
    "bpchar": "character",
    "float4": "real",
    "float8": "double precision",
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
    "time": "time without time zone",
    "timestamp": "timestamp without time zone",
    "timestamptz": "timestamp with time zone",
    "timetz": "time with time zone",
    "varbit": "bit varying",
    "varchar": "character varying",
}


def _bound(depth: int) -> int:
    return MAX_ITEMS if depth < MAX_DEPTH else 0


def _text(value: str) -> str:
    shown = "".join(map(_escaped, value[:MAX_CHARACTERS])).replace("#{", "\\#{")
    return f'"{shown}"' if len(value) <= MAX_CHARACTERS else f'"{shown}"...'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else f"\\x{{{ord(character):X}}}"
