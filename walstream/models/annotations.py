"""Which Python types the values of a column have, as text that stands in an annotation.

Exactly: what Python has no object for comes as text (docs/types.md), and an array has the
dimensions that its value has, whatever was declared. Narrow annotations leave both out, for tables
that hold no such values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walstream.models.tables import Column
from walstream.values import Kind, PgType, Types

ClassNames = Mapping[tuple[str, str, str], str]
"""By kind, schema and name of an object."""

ENUM: Final = "Enum"
COMPOSITE: Final = "Composite"
TABLE: Final = "Table"

_FIRST_OWN_OID: Final = 16384
"""OIDs of types that are not built in begin here (FirstNormalObjectId)."""

_TEXT_TOO: Final = frozenset({"date", "time", "timetz", "timestamp", "timestamptz", "interval"})
"""Types with values that Python has no object for."""

_BASE: Final = {
    "bool": "bool",
    "int2": "int",
    "int4": "int",
    "int8": "int",
    "oid": "int",
    "float4": "float",
    "float8": "float",
    "numeric": "Decimal",
    "bytea": "bytes",
    "date": "dt.date",
    "time": "dt.time",
    "timetz": "dt.time",
    "timestamp": "dt.datetime",
    "timestamptz": "dt.datetime",
    "interval": "dt.timedelta",
    "uuid": "UUID",
    "json": "Any",
    "jsonb": "Any",
    "inet": "IPv4Address | IPv6Address | IPv4Interface | IPv6Interface",
    "cidr": "IPv4Network | IPv6Network",
}
"""The others are text."""


class Annotations:
    """Writes annotations with the names that classes have in one file."""

    def __init__(self, types: Types, class_names: ClassNames, *, narrow: bool) -> None:
        self._types = types
        self._class_names = class_names
        self._narrow = narrow

    def of_column(self, column: Column) -> str:
        """Annotate a column, with null and `Unchanged` where they can come."""
        annotation = self._of(column.typeoid, column.dimensions)
        if column.may_be_left_out:
            annotation += " | Unchanged"
        return f"{annotation} | None" if column.nullable else annotation

    def of_attribute(self, typeoid: int) -> str:
        """Annotate an attribute of a composite, which can always be null."""
        return f"{self._of(typeoid)} | None"

    def _of(self, typeoid: int, dimensions: int = 1) -> str:
        pg_type = self._types.get(self._types.resolve(typeoid))
        if pg_type is None:
            return "str"
        match pg_type.kind:
            case Kind.ARRAY:
                return self._array(pg_type, dimensions)
            case Kind.RANGE | Kind.MULTIRANGE:
                return self._range(pg_type)
            case Kind.ENUM:
                return self._class_names[ENUM, pg_type.schema, pg_type.name]
            case Kind.COMPOSITE:
                return self._composite(pg_type)
            case _:
                return self._base(pg_type)

    def _array(self, pg_type: PgType, dimensions: int) -> str:
        element = self._of(pg_type.element)
        if not self._narrow:
            return f"list[{element} | list[Any] | None]"
        lists = max(dimensions, 1)
        return "list[" * lists + f"{element} | None" + "]" * lists

    def _range(self, pg_type: PgType) -> str:
        cls = "Range" if pg_type.kind is Kind.RANGE else "Multirange"
        subtype = self._types.get(self._types.resolve(pg_type.element))
        bound = "str" if subtype is None else self._bound(subtype)
        annotation = f"InstanceOf[{cls}[{bound}]]"
        return self._with_text(annotation, subtype)

    def _bound(self, pg_type: PgType) -> str:
        # Bounds are not validated, so an enum's are labels, and a composite's psycopg's own tuples.
        match pg_type.kind:
            case Kind.BASE:
                return self._plain_base(pg_type)
            case Kind.ENUM:
                return "str"
            case _:
                return "Any"

    def _composite(self, pg_type: PgType) -> str:
        return self._class_names.get((COMPOSITE, pg_type.schema, pg_type.name), "Any")

    def _base(self, pg_type: PgType) -> str:
        return self._with_text(self._plain_base(pg_type), pg_type)

    def _plain_base(self, pg_type: PgType) -> str:
        if pg_type.oid < _FIRST_OWN_OID:
            return _BASE.get(pg_type.name, "str")
        return "dict[str, str | None]" if pg_type.name == "hstore" else "str"

    def _with_text(self, annotation: str, pg_type: PgType | None) -> str:
        exact = pg_type is not None and pg_type.name in _TEXT_TOO and not self._narrow
        return f"{annotation} | str" if exact else annotation
