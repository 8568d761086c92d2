"""Testing handlers: on a real stream with pytest, and with changes made by hand.

The fixtures are in pytest's own list: ``pytest --fixtures``. docs/testing.md tells about them.
"""

from walstream.testing.changes import (
    delete,
    insert,
    message,
    new_transaction,
    passes,
    routed,
    truncate,
    update,
)
from walstream.testing.databases import Database
from walstream.testing.servers import StartCluster
from walstream.testing.stream import DrainTimedOut, HandlerStream, MakeStream, NotCrashed

__all__ = [
    "Database",
    "DrainTimedOut",
    "HandlerStream",
    "MakeStream",
    "NotCrashed",
    "StartCluster",
    "delete",
    "insert",
    "message",
    "new_transaction",
    "passes",
    "routed",
    "truncate",
    "update",
]
