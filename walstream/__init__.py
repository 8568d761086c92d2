"""walstream: every committed change of a PostgreSQL database, delivered to your code."""

from walstream.app import Walstream
from walstream.changes import Change, Message, Operation, Relation, Row, UnchangedValueError
from walstream.config import Config
from walstream.daemon import Summary
from walstream.errors import WalstreamError
from walstream.lsn import Lsn

__all__ = [
    "Change",
    "Config",
    "Lsn",
    "Message",
    "Operation",
    "Relation",
    "Row",
    "Summary",
    "UnchangedValueError",
    "Walstream",
    "WalstreamError",
]
__version__ = "0.1.0"
