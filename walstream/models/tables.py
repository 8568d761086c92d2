"""What models are written from: tables, their columns, and the types that these have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from psycopg import sql
from psycopg.rows import TupleRow

from walstream.catalog import Catalog
from walstream.changes import Relation
from walstream.router import TablePattern
from walstream.values import Types


class Column(msgspec.Struct, frozen=True):
    """A column as the catalog describes it.

    ``sql_type`` is the type as SQL writes it, with its modifier; ``domain_over`` what a domain is
    over, likewise. ``dimensions`` are the declared ones of an array, which PostgreSQL does not
    hold anyone to. ``may_be_left_out``: an update that does not touch it need not carry it.
    """

    name: str
    typeoid: int
    sql_type: str
    domain_over: str
    nullable: bool
    dimensions: int
    may_be_left_out: bool
    comment: str


class Table(msgspec.Struct, frozen=True):
    """A table, or a partitioned one, and its columns in their order."""

    relation: Relation
    comment: str
    columns: tuple[Column, ...]


class Found(msgspec.Struct, frozen=True):
    """The tables that patterns mean; ``missing`` are the patterns that mean none."""

    tables: tuple[Table, ...]
    missing: tuple[TablePattern, ...]
    types: Types


async def read_tables(catalog: Catalog, patterns: Iterable[TablePattern]) -> Found:
    """Ask the catalog for tables in the order of their names, and for their types.

    A pattern with a ``*`` leaves partitions out: their rows come to routes on the partitioned
    table.
    """
    relations: set[Relation] = set()
    missing = []
    for pattern in patterns:
        found = await _matching(catalog, pattern)
        relations |= found
        if not found:
            missing.append(pattern)
    tables = [await _table(catalog, relation) for relation in sorted(relations)]
    await catalog.learn_types({column.typeoid for table in tables for column in table.columns})
    return Found(tuple(tables), tuple(missing), catalog.types)


async def _matching(catalog: Catalog, pattern: TablePattern) -> set[Relation]:
    named = set(await catalog.tables(pattern.schema, pattern.name))
    if pattern.relation is not None or not named:
        return named
    partitions = {Relation(*row) for row in await catalog.rows(_PARTITIONS)}
    return named - partitions


async def _table(catalog: Catalog, relation: Relation) -> Table:
    parameters = {"schema": relation.schema, "name": relation.name}
    rows: Sequence[TupleRow] = await catalog.rows(_COLUMNS, parameters)
    comment = rows[0][0] if rows else ""
    return Table(relation, comment, tuple(Column(*row[1:]) for row in rows if row[1] is not None))


_PARTITIONS: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relispartition
    """
)

# A virtual generated column (PostgreSQL 18) has no value that could be sent.
_COLUMNS: Final = sql.SQL(
    """
    WITH RECURSIVE wanted AS (
        SELECT c.oid
          FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = %(schema)s AND c.relname = %(name)s
    ), parts AS (
        SELECT tree.relid AS oid
          FROM wanted, pg_partition_tree(wanted.oid) AS tree
         WHERE tree.isleaf
    ), leaves AS (
        -- The replica identity of each partition is its own.
        SELECT c.oid, c.relreplident
          FROM pg_class c
         WHERE c.oid IN (SELECT oid FROM parts)
            OR c.oid IN (SELECT oid FROM wanted) AND NOT EXISTS (SELECT FROM parts)
    ), domains AS (
        SELECT t.oid AS typeoid, t.oid, t.typbasetype, t.typtypmod, t.typnotnull
          FROM pg_type t
         WHERE t.typtype = 'd'
           AND t.oid IN (SELECT a.atttypid FROM pg_attribute a, wanted WHERE attrelid = wanted.oid)
         UNION ALL
        SELECT domains.typeoid, t.oid, t.typbasetype, t.typtypmod, t.typnotnull
          FROM domains
          JOIN pg_type t ON t.oid = domains.typbasetype AND t.typtype = 'd'
    )
    SELECT coalesce(obj_description(wanted.oid, 'pg_class'), ''),
           a.attname,
           a.atttypid::bigint,
           format_type(a.atttypid, a.atttypmod),
           coalesce((SELECT format_type(d.typbasetype, d.typtypmod)
                       FROM domains d WHERE d.typeoid = a.atttypid AND d.oid = a.atttypid), ''),
           NOT (a.attnotnull
                OR EXISTS (SELECT FROM domains d WHERE d.typeoid = a.atttypid AND d.typnotnull)),
           a.attndims::int,
           EXISTS (SELECT
                     FROM leaves
                     JOIN pg_attribute own ON own.attrelid = leaves.oid AND own.attname = a.attname
                    WHERE own.attlen = -1 AND own.attstorage <> 'p' AND leaves.relreplident <> 'f'
                      AND NOT EXISTS (SELECT FROM pg_index i
                                       WHERE i.indrelid = leaves.oid
                                         AND own.attnum = ANY (i.indkey)
                                         AND (leaves.relreplident = 'd' AND i.indisprimary
                                              AND i.indimmediate
                                              OR leaves.relreplident = 'i' AND i.indisreplident))),
           coalesce(col_description(wanted.oid, a.attnum), '')
      FROM wanted
      LEFT JOIN pg_attribute a ON a.attrelid = wanted.oid AND a.attnum > 0
                              AND NOT a.attisdropped AND a.attgenerated <> 'v'
     ORDER BY a.attnum
    """
)
