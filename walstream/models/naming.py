"""Python's names for PostgreSQL's: any text of up to 63 bytes becomes an identifier of its own.

The same names give the same identifiers in the same order, so that a file that was written twice is
the same file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from keyword import iskeyword
from typing import Final

from pydantic import BaseModel

IMPORTED: Final = frozenset(
    {
        *("Annotated", "Any", "BaseModel", "ConfigDict", "Decimal", "Field", "IPv4Address"),
        *("IPv4Interface", "IPv4Network", "IPv6Address", "IPv6Interface", "IPv6Network"),
        *("InstanceOf", "Multirange", "NamedTuple", "Range", "StrEnum", "UUID", "Unchanged", "dt"),
    }
)
"""What a generated file may import: no class and no field is called so."""

_TYPES: Final = frozenset({"bool", "bytes", "dict", "float", "int", "list", "str"})
"""Builtins that annotations are made of."""

_OF_A_MODEL: Final = frozenset({*dir(BaseModel), *dir(type(BaseModel))})
"""What pydantic takes a field's default from when it is called so, such as ``mro``."""

_PROTECTED: Final = ("model_validate", "model_dump")
"""Beginnings of names that pydantic warns of."""

_OF_A_TUPLE: Final = frozenset(dir(tuple))

_SEPARATORS: Final = re.compile(r"[\W_]+")


def field_names(columns: Iterable[str], classes: Iterable[str]) -> dict[str, str]:
    """Name the fields of a model: as the columns where that is possible."""
    taken = {*IMPORTED, *_TYPES, *classes, *_OF_A_MODEL}
    return _named(columns, lambda column: _free(_field(column), taken))


def attribute_names(attributes: Iterable[str], classes: Iterable[str]) -> dict[str, str]:
    """Name the attributes of a named tuple."""
    taken = {*IMPORTED, *_TYPES, *classes, *_OF_A_TUPLE}
    return _named(attributes, lambda attribute: _free(_field(attribute), taken))


def member_names(labels: Iterable[str]) -> dict[str, str]:
    """Name the members of an enum: its labels in capitals."""
    return _named(labels, _member)


def class_names(objects: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    """Name classes for objects, each a kind (``Table``, ``Enum``, ...), a schema and a name.

    Objects of the same name in CamelCase get their schema in front, then their kind behind, and
    tables keep the plain name before types do.
    """
    found: dict[tuple[str, str, str], str] = {}
    plain = [_camel(name, kind) for kind, _, name in objects]
    with_schema = [_camel(f"{schema}_{name}", kind) for kind, schema, name in objects]
    used: set[str] = set(IMPORTED)
    for place, key in sorted(enumerate(objects), key=lambda one: (one[1][0] != "Table", one[0])):
        candidates = [with_schema[place], with_schema[place] + key[0]]
        others = [objects[other] for other, name in enumerate(plain) if name == plain[place]]
        if all(_yields(other, key) for other in others if other != key):
            candidates.insert(0, plain[place])
        found[key] = _unused(candidates, used)
        used.add(found[key])
    return found


def _yields(other: tuple[str, str, str], key: tuple[str, str, str]) -> bool:
    """Whether a type leaves the plain name to the table that it is of the same schema with."""
    return key[0] == "Table" != other[0]


def _named(names: Iterable[str], propose: Callable[[str], str]) -> dict[str, str]:
    """Give each name its own identifier; the names that are identifiers already come first."""
    listed = list(names)
    proposed = {name: propose(name) for name in listed}
    used: set[str] = set()
    found: dict[str, str] = {}
    for name in sorted(listed, key=lambda one: proposed[one] != one):
        found[name] = _unused([proposed[name]], used)
        used.add(found[name])
    return {name: found[name] for name in listed}


def _unused(candidates: Sequence[str], used: set[str]) -> str:
    numbered = (f"{candidates[-1]}_{number}" for number in count(2))
    return next(one for names in (candidates, numbered) for one in names if one not in used)


def _free(name: str, taken: set[str]) -> str:
    if name.startswith(_PROTECTED):
        name = f"column_{name}"
    return f"{name}_" if name in taken or iskeyword(name) else name


def _field(name: str) -> str:
    """A name with a leading underscore would be private for pydantic and for named tuples."""
    identifier = _identifier(name)
    bare = identifier.lstrip("_")
    if bare == identifier:
        return identifier
    return f"{bare}_" if bare.isidentifier() else f"column_{bare}".rstrip("_")


def _member(label: str) -> str:
    name = _identifier(_identifier(label).upper()).strip("_")
    return name if name and name.isidentifier() else f"LABEL_{name}".rstrip("_")


def _camel(name: str, kind: str) -> str:
    parts = [part for part in _SEPARATORS.split(_identifier(name)) if part]
    camel = _normal("".join(part[:1].upper() + part[1:] for part in parts))
    camel = camel if camel.isidentifier() else _normal(f"{kind}{camel}")
    return f"{camel}_" if iskeyword(camel) else camel


def _identifier(name: str) -> str:
    """Replace what Python has no place for; the rest is in the form that Python gives it (NFKC)."""
    name = "".join(one if f"a{one}".isidentifier() else "_" for one in _normal(name))
    return name if name.isidentifier() else f"_{name}"


def _normal(name: str) -> str:
    return unicodedata.normalize("NFKC", name)
