"""The journal: the changes that clients can ask for again, in a file, within bounds.

    Journal.append -> Writer: blocks of changes, compressed, a row each (SQLite, WAL mode)
    Journal.read   -> JournalReader: a connection of its own, decoded blocks remembered

What is masked is kept masked. A change is kept with the shape of its relation and its types, so
that it can be filtered and printed after a restart without asking a database.
"""

from __future__ import annotations

from walstream.journal.attachments import Attachment
from walstream.journal.file import JournalTrimmed, State, lock_path, sizes
from walstream.journal.journal import Journal
from walstream.journal.reader import JournalReader, JournalStatus
from walstream.journal.trimming import trim

__all__ = [
    "Attachment",
    "Journal",
    "JournalReader",
    "JournalStatus",
    "JournalTrimmed",
    "State",
    "lock_path",
    "sizes",
    "trim",
]
