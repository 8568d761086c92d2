"""Who reads: a role, and what of each table it may see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from walstream.changes import Layout, Relation
from walstream.grammar import Filter
from walstream.projection import Projection
from walstream.router import OWN_TABLES, TablePattern


class Persona(msgspec.Struct, frozen=True, cache_hash=True):
    """As whom the server is asked what its row security shows: a role there, and JSON of claims."""

    postgres_role: str
    claims: str

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"Persona({self.postgres_role!r})"

    def __rich_repr__(self) -> Iterator[str]:  # type: ignore[override]  # of a Struct it tells all
        """Print no more than `repr`."""
        yield self.postgres_role


class Sight(msgspec.Struct, frozen=True, cache_hash=True):
    """What a reader sees of a table: rows that pass ``where``, through ``projection``.

    None is all rows, and all columns as they are. Sights made of equal rules and claims are equal,
    so that readers who see the same can share work. ``table`` is the pattern that they are for.

    With a ``persona`` the server has to show the row to it, too; ``tells_deletes`` says whether
    keys of deleted rows are told then. ``is_open`` says that all rows are meant to be read.
    """

    table: str
    projection: Projection | None = None
    where: Filter | None = None
    persona: Persona | None = None
    tells_deletes: bool = False
    is_open: bool = False

    @property
    def narrows(self) -> bool:
        """Whether it is said which rows are seen."""
        return self.where is not None or self.persona is not None or self.is_open

    def reads(self, column: str) -> bool:
        """Whether a column is passed on as it is: clients may filter by no other."""
        return self.projection is None or self.projection.shows(column)

    def __repr__(self) -> str:
        """Print what is safe to log: the condition holds values of claims."""
        return f"Sight({self.table})"

    def __rich_repr__(self) -> Iterator[str]:  # type: ignore[override]  # of a Struct it tells all
        """Print no more than `repr`."""
        yield self.table


class Grant(msgspec.Struct, frozen=True):
    """What a reader sees of the tables that a pattern covers."""

    pattern: TablePattern
    sight: Sight
    own_tables: frozenset[Relation] = OWN_TABLES

    def covers(self, relation: Relation, ancestors: Iterable[Relation]) -> bool:
        """Whether it is about a table, or about one that this one is a partition of.

        A pattern with a ``*`` does not mean walstream's own tables.
        """
        if relation in self.own_tables and self.pattern.relation is None:
            return False
        return any(self.pattern.covers(candidate) for candidate in (relation, *ancestors))


class Reader(msgspec.Struct, frozen=True, eq=False):
    """Somebody who was let in.

    ``expires_at`` is when that ends, in seconds since 1970; None for never. Claims are in no repr.
    """

    role: str
    claims: Mapping[str, Any] = msgspec.field(default_factory=dict)
    expires_at: float | None = None
    can_see_status: bool = False
    can_operate: bool = False
    grants: tuple[Grant, ...] = ()

    def sight(self, layout: Layout) -> Sight | None:
        """Return what is seen of a table: the first grant that covers it counts. None: nothing."""
        for grant in self.grants:
            if grant.covers(layout.relation, layout.ancestors):
                return grant.sight
        return None

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"Reader({self.role!r})"

    def __rich_repr__(self) -> Iterator[str]:  # type: ignore[override]  # of a Struct it tells all
        """Print no more than `repr`."""
        yield self.role
