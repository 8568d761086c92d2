"""Pydantic models of tables: written from the live catalog, and compared with it later.

`tables` asks the catalog, `naming` makes Python's names of PostgreSQL's, `annotations` says which
Python types a column's values have, `source` writes the file, and `drift` tells in words what has
become different since.
"""

from __future__ import annotations

from walstream.models.drift import Difference, differences
from walstream.models.source import Request, write
from walstream.models.tables import read_tables

__all__ = ["Difference", "Request", "differences", "read_tables", "write"]
