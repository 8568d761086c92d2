"""Databases for walstream's own tests: those of its pytest plugin."""

from __future__ import annotations

from walstream.testing.databases import (
    Database,
    async_wait_until,
    create_database,
    drop_database,
    wait_until,
)

__all__ = ["Database", "async_wait_until", "create_database", "drop_database", "wait_until"]
