"""walstream: every committed change of a PostgreSQL database, delivered to your code."""

from walstream.app import Walstream
from walstream.changes import Change, Message, Operation, Relation, Row, UnchangedValueError
from walstream.config import Config
from walstream.errors import WalstreamError
from walstream.lsn import Lsn
from walstream.policy import Retry
from walstream.summary import Summary
from walstream.typed import UNCHANGED, Unchanged

__all__ = [
    "UNCHANGED",
    "Change",
    "Config",
    "Lsn",
    "Message",
    "Operation",
    "Relation",
    "Retry",
    "Row",
    "Summary",
    "Unchanged",
    "UnchangedValueError",
    "Walstream",
    "WalstreamError",
]
__version__ = "0.1.0"
