"""Values as Python objects: psycopg's text loaders, chosen by type OID.

A handler gets the object that a psycopg ``SELECT`` of the column would give in a session whose
TimeZone is UTC and whose DateStyle is ISO, with psycopg's own optional adapters for composites
(named tuples), hstore (dict), ranges and arrays of the database's own types registered. Enums come
as their labels. A composite that psycopg cannot make a named tuple of is left to `values`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader, Transformer
from psycopg.pq import Format
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.hstore import register_hstore
from psycopg.types.multirange import MultirangeInfo, register_multirange
from psycopg.types.range import RangeInfo, register_range

from walstream.values import Kind, PgType


class TextLoaders:
    """One psycopg loader for each type OID, without a connection.

    Without a connection psycopg's loaders assume UTF-8, DateStyle ISO and TimeZone UTC, which is
    what the replication connection is pinned to.
    """

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        self.connection = None  # together with `adapters` this makes us psycopg's AdaptContext
        self._transformer = Transformer(self)

    def register(self, types: Iterable[PgType]) -> None:
        """Make loaders for types of the database, those that others are built on first.

        Registering a type again replaces its loader.
        """
        for pg_type in types:
            self._register(pg_type)
        # A Transformer keeps the loaders that it has handed out; a new one sees the new types.
        self._transformer = Transformer(self)

    def __call__(self, oid: int) -> Callable[[bytes], Any]:
        """Return the loader of a type; a type without one stays text.

        The loader raises ValueError for a value that Python has no object for, such as
        ``infinity`` as a date, and for one that was written when its composite had other
        attributes than it has now.
        """
        load = self._transformer.get_loader(oid, Format.TEXT).load

        def loader(text: bytes) -> Any:
            try:
                return load(text)
            except psycopg.Error as error:
                raise ValueError(type(error).__name__) from None  # its text holds the value

        return loader

    def _register(self, pg_type: PgType) -> None:
        match pg_type.kind:
            case Kind.DOMAIN:
                base = self.adapters.get_loader(pg_type.base, Format.TEXT)
                if base is not None:
                    self.adapters.register_loader(pg_type.oid, base)
            case Kind.ARRAY:
                # psycopg registers an array's loader along with the type of its elements.
                TypeInfo(
                    pg_type.name, pg_type.element, pg_type.oid, delimiter=pg_type.delimiter
                ).register(self)
            case Kind.COMPOSITE:
                self._register_composite(pg_type)
            case Kind.RANGE:
                range_info = RangeInfo(pg_type.name, pg_type.oid, 0, subtype_oid=pg_type.element)
                register_range(range_info, self)
            case Kind.MULTIRANGE:
                multirange = MultirangeInfo(
                    pg_type.name, pg_type.oid, 0, range_oid=0, subtype_oid=pg_type.element
                )
                register_multirange(multirange, self)
            case Kind.BASE if pg_type.name == "hstore":
                register_hstore(TypeInfo(pg_type.name, pg_type.oid, 0), self)
            case Kind.BASE | Kind.ENUM:
                pass

    def _register_composite(self, pg_type: PgType) -> None:
        info = CompositeInfo(
            pg_type.name,
            pg_type.oid,
            0,
            field_names=[name for name, _ in pg_type.attributes],
            field_types=[oid for _, oid in pg_type.attributes],
        )
        try:
            register_composite(info, self)
        except psycopg.DataError:  # a keyword, or two names that are one in Python
            self.adapters.register_loader(pg_type.oid, _RefusingLoader)


class _RefusingLoader(Loader):
    """Sends every value, also those inside of arrays and other composites, to `values`."""

    def load(self, data: Buffer) -> NoReturn:
        del data
        raise psycopg.DataError
