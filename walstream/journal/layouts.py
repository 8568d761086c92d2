"""The shape of a relation's records as the journal keeps it, with the types that it needs.

With these a change can be filtered and printed later, without a database: after a restart, and when
the table or a type is gone or has become another. Of built-in types, which all know, only that is
kept which the catalog has told besides: how SQL names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from walstream.changes import Layout, Relation
from walstream.loaders import TextLoaders
from walstream.values import Kind, PgType, Types


def own_types(layout: Layout) -> list[PgType]:
    """Return the types of a layout, and those that these are built on, as far as not all know them.

    In the order in which they are to be learned.
    """
    found: dict[int, PgType] = {}
    waiting = [*_typeoids(layout)]
    while waiting:
        oid = waiting.pop()
        pg_type = layout.types.get(oid)
        if oid in found or pg_type is None or pg_type == _KNOWN.get(oid):
            continue
        found[oid] = pg_type
        waiting += [pg_type.element, pg_type.base, *(part for _, part in pg_type.attributes)]
    # Domains last: they take over the loader of what they are over.
    return sorted(found.values(), key=lambda one: (one.kind is Kind.DOMAIN, one.oid))


def definition_of(layout: Layout, types: list[PgType]) -> bytes:
    """Return all that `Shapes.layout` needs, as JSON."""
    return msgspec.json.encode(
        _Definition(
            layout.relation,
            layout.names,
            layout.typeoids,
            layout.key,
            layout.ancestors,
            dict(layout.columns),
            layout.missing,
            layout.toastable,
            layout.is_full,
            layout.in_catalog,
            layout.table_columns,
            types,
        )
    )


class Shapes:
    """Makes layouts of definitions; those with the same types share them."""

    def __init__(self) -> None:
        self._types: dict[tuple[PgType, ...], Types] = {}

    def layout(self, definition: bytes) -> Layout:
        """Make the layout.

        Raises:
            ValueError: it is not what `definition_of` made.
        """
        try:
            fields = msgspec.structs.asdict(_decode(definition))
        except msgspec.DecodeError:
            raise ValueError("the shape of a relation cannot be read") from None
        return Layout(**fields | {"types": self._known(fields["types"])})

    def _known(self, types: Iterable[PgType]) -> Types:
        key = tuple(types)
        known = self._types.get(key)
        if known is None:
            loaders = TextLoaders()
            loaders.register(one for one in key if one.oid not in _KNOWN)
            known = self._types[key] = Types(loaders, key)
        return known


class _Definition(msgspec.Struct, frozen=True):
    relation: Relation
    names: list[str]
    typeoids: list[int]
    key: list[str]
    ancestors: tuple[Relation, ...]
    columns: dict[str, int]
    missing: tuple[str, ...]
    toastable: tuple[str, ...]
    is_full: bool
    in_catalog: bool
    table_columns: tuple[tuple[str, int], ...]
    types: list[PgType]


_KNOWN: Final = Types(TextLoaders())
_decode: Final = msgspec.json.Decoder(_Definition).decode


def _typeoids(layout: Layout) -> Iterator[int]:
    yield from layout.typeoids
    yield from layout.columns.values()
    yield from (typeoid for _, typeoid in layout.table_columns)
