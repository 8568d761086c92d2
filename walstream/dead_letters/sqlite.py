"""Dead letters in a file: the default, for which no other server is needed.

SQLite in WAL mode, synced at every commit (``synchronous = FULL``): a letter whose `add` returned
survives a crash of the machine. The daemon and the command line have it open at the same time; all
that writes begins with BEGIN IMMEDIATE, so that nobody decides by what another one is changing.
The file holds rows, and is readable for its owner only. It belongs on a local disk: SQLite's locks
do not hold on most network file systems.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import structlog

from walstream.dead_letters.bounds import Room, letters_to_park, new_letters
from walstream.dead_letters.letters import DeadLetter, Identity, storable
from walstream.dead_letters.rows import (
    COLUMNS,
    INSERTED,
    INSERTED_COUNT,
    Dialect,
    inserted_values,
    stored_letter,
    text_bytes,
    tried_values,
    where,
)
from walstream.dead_letters.store import LetterQuery, StoredLetter, Verify, replay_runs
from walstream.errors import DeadLetterStoreFailed
from walstream.files import sync_directory
from walstream.keys import WHOLE_TABLE, Key
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.dead_letters")

T = TypeVar("T")

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x57414C53  # WALS

BUSY_SECONDS: Final = 10.0
"""How long another process may hold the file."""

_BUSY_PAUSE_SECONDS: Final = 0.01


class SqliteStore:
    """A `DeadLetterStore` in a file."""

    def __init__(self, path: Path, *, slot: str, max_letters: int, max_bytes: int) -> None:
        self.path = path.absolute()
        self._slot = slot
        self._room = Room(max_letters, max_bytes)
        self._worker = Worker("walstream-dead-letters")
        self._connection: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None

    async def open(self, *, create: bool = True) -> None:
        """See `DeadLetterStore`; the folder has to be there."""
        await self._call(self._open, create)

    async def close(self) -> None:
        """See `DeadLetterStore`."""
        await self._call(self._close)

    async def blocked(self) -> list[tuple[str, Key]]:
        """See `DeadLetterStore`."""
        rows = await self._call(self._rows, _BLOCKED, [self._slot])
        return [(route, (relation, values.encode())) for route, relation, values in rows]

    async def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetterStore`."""
        await self._call(self._add, letters)

    async def park(self, letters: Sequence[DeadLetter], *, together: bool = False) -> list[bool]:
        """See `DeadLetterStore`."""
        return await self._call(self._park, letters, together)

    async def select(self, query: LetterQuery, *, payloads: bool = True) -> list[StoredLetter]:
        """See `DeadLetterStore`."""
        conditions, parameters = where(query, self._slot, _DIALECT)
        wide = "payload, traceback" if payloads else "x'', ''"
        rows = await self._call(self._rows, _SELECT.format(wide) + conditions, parameters)
        return [stored_letter(row, datetime.fromisoformat) for row in rows]

    async def count(self, query: LetterQuery) -> int:
        """See `DeadLetterStore`."""
        conditions, parameters = where(query, self._slot, _DIALECT)
        [(count,)] = await self._call(self._rows, _COUNT.format(conditions), parameters)
        return int(count)

    async def size(self) -> tuple[int, int]:
        """See `DeadLetterStore`."""
        return await self._call(self._size)

    async def drop(self, ids: Sequence[int]) -> int:
        """See `DeadLetterStore`."""
        return await self._call(self._change, _DROP, [self._slot, _members(ids)])

    async def settle(self, letters: Sequence[StoredLetter]) -> list[bool]:
        """See `DeadLetterStore`."""
        return await self._call(self._settle, letters)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Verify]:
        """See `DeadLetterStore`: a lock on a file beside this one, which stays there empty."""
        descriptor = await self._call(self._lock)
        try:
            yield _still_exclusive
        finally:
            os.close(descriptor)

    async def failed_again(
        self, letter_id: int, *, attempts: int, error: str, traceback: str, at: datetime
    ) -> bool:
        """See `DeadLetterStore`."""
        failed = [attempts, storable(error), storable(traceback), _time(at), _time(at)]
        size_bytes = text_bytes(error, traceback)
        changed = await self._call(
            self._change, _FAILED, [*failed, size_bytes, self._slot, letter_id]
        )
        return changed > 0

    # ---- In the worker's thread

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._worker.call(function, *arguments)
        except sqlite3.Error as error:
            raise self._failed(error) from error
        except OSError as error:
            message = f"the dead letters in {error.filename or self.path}: {error.strerror}"
            hint = "see to the file and its folder, or set dead_letters.path"
            raise DeadLetterStoreFailed(message, hint=hint) from error

    def _failed(self, error: sqlite3.Error) -> DeadLetterStoreFailed:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        message = f"the dead letters in {self.path}: {error}"
        return DeadLetterStoreFailed(message, hint=_HINTS.get(code, _DEFAULT_HINT))

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            message = f"the dead letters in {self.path} are not open"
            raise DeadLetterStoreFailed(message)
        return self._connection

    def _open(self, create: bool) -> None:  # noqa: FBT001 - called by the worker
        self._close()
        self._make_file(create=create)
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare_patiently(connection)
            self._file = self.path.stat()
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _make_file(self, *, create: bool) -> None:
        """Make the file before SQLite does, for its owner only.

        A file that is there is not opened here: closing it again would drop the locks that SQLite
        holds on it in this process (SQLite documentation, How To Corrupt, 2.2).
        """
        if self.path.exists():
            if not stat.S_ISREG(self.path.stat().st_mode):
                message = f"the dead letters cannot be in {self.path}: it is not a regular file"
                raise DeadLetterStoreFailed(message, hint="set dead_letters.path to a file's")
            self._tell_readable()
            return
        if not create:
            message = f"there is no file of dead letters at {self.path}"
            hint = (
                "walstream run makes it when a route has on_failure = dead_letter;"
                " dead_letters.path counts from the current folder"
            )
            raise DeadLetterStoreFailed(message, hint=hint)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except FileExistsError:  # another process was quicker
            return
        except FileNotFoundError:
            message = f"the folder of dead letters {self.path.parent} is not there"
            hint = "make it, or set dead_letters.path"
            raise DeadLetterStoreFailed(message, hint=hint) from None
        sync_directory(self.path.parent)

    def _tell_readable(self) -> None:
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning(
                "dead_letters_readable",
                path=str(self.path),
                mode=f"{mode:04o}",
                hint=f"letters hold rows: chmod 600 {shlex.quote(str(self.path))}",
            )

    def _prepare_patiently(self, connection: sqlite3.Connection) -> None:
        """Prepare the file; while another process does that too, try again.

        For the switch to WAL mode SQLite does not wait as it does for other locks.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._prepare(connection)
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > deadline:
                    raise
            time.sleep(_BUSY_PAUSE_SECONDS)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._verify_owner(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # what is dropped is gone from the file
        with _transaction(connection):
            if not _pragma(connection, "user_version"):
                for statement in _SCHEMA:
                    connection.execute(statement)

    def _verify_owner(self, connection: sqlite3.Connection) -> None:
        # In one transaction: another process may make the tables at this moment.
        with _transaction(connection, "DEFERRED"):
            version = _pragma(connection, "user_version")
            owner = _pragma(connection, "application_id")
            [(tables,)] = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        if owner != APPLICATION_ID and (tables or version or owner):
            message = f"{self.path} is another program's database"
            raise DeadLetterStoreFailed(message, hint="set dead_letters.path to a file of its own")
        if version > SCHEMA_VERSION:
            message = (
                f"the dead letters in {self.path} have schema version {version}, this walstream"
                f" knows up to {SCHEMA_VERSION}"
            )
            hint = "a later version of walstream made them: use that one"
            raise DeadLetterStoreFailed(message, hint=hint)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _transaction(self._opened) as connection:
            yield connection
        self._verify_file()

    def _verify_file(self) -> None:
        """Make sure that what was written is in the file that the path names."""
        try:
            is_same = self._file is not None and os.path.samestat(self._file, self.path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            message = f"the dead letters in {self.path} were removed or replaced while in use"
            hint = "put the file back with its -wal file while nothing uses it, and start again"
            raise DeadLetterStoreFailed(message, hint=hint)

    def _rows(self, statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        rows = self._opened.execute(statement, parameters).fetchall()
        self._verify_file()
        return rows

    def _change(self, statement: str, parameters: Sequence[Any]) -> int:
        with self._writing() as connection:
            return connection.execute(statement, parameters).rowcount

    def _size(self) -> tuple[int, int]:
        [(letters, size_bytes)] = self._rows(_SIZE, [self._slot])
        return letters, size_bytes

    def _add(self, letters: Sequence[DeadLetter]) -> None:
        with self._writing() as connection:
            here = self._come_again(connection, letters)
            for letter in letters:
                if letter.identity in here and not letter.parked:
                    size_bytes = text_bytes(letter.error, letter.traceback)
                    tried = [*tried_values(letter, _DIALECT), size_bytes]
                    connection.execute(_TRIED, [*tried, self._slot, *letter.identity])
                    self._room.grown(size_bytes)
            self._insert(connection, new_letters(letters, here))

    def _park(self, letters: Sequence[DeadLetter], together: bool) -> list[bool]:  # noqa: FBT001 - called by the worker
        with self._writing() as connection:
            here = self._come_again(connection, letters)
            held_up = {
                place
                for place, letter in enumerate(letters)
                if self._is_held_up(connection, letter)
            }
            new, is_here = letters_to_park(letters, here, held_up, together=together)
            self._insert(connection, new)
        return is_here

    def _come_again(
        self, connection: sqlite3.Connection, letters: Sequence[DeadLetter]
    ) -> set[Identity]:
        """Return those that are here already; that they came again is noted."""
        return {
            letter.identity
            for letter in letters
            if connection.execute(_CAME_AGAIN, [self._slot, *letter.identity]).rowcount
        }

    def _is_held_up(self, connection: sqlite3.Connection, letter: DeadLetter) -> bool:
        for table, values in letter.keys:
            rows = [self._slot, letter.route, table]
            if values == WHOLE_TABLE:
                found = connection.execute(_HELD_UP.format(""), rows)
            else:
                found = connection.execute(_HELD_UP.format(_SAME), [*rows, values.decode()])
            if found.fetchall():
                return True
        return False

    def _insert(self, connection: sqlite3.Connection, letters: Sequence[DeadLetter]) -> None:
        self._take_room(letters)
        for letter in letters:
            inserted = connection.execute(_INSERT, inserted_values(letter, self._slot, _DIALECT))
            for table, values in dict.fromkeys(letter.keys):
                key = [inserted.lastrowid, self._slot, letter.route, table, values.decode()]
                connection.execute(_INSERT_KEY, key)

    def _take_room(self, letters: Sequence[DeadLetter]) -> None:
        more = len(letters), sum(letter.size_bytes for letter in letters)
        if not letters or self._room.take(*more):
            return
        self._room.measured(*self._size())
        if not self._room.take(*more):
            raise self._room.full(*more)

    def _settle(self, letters: Sequence[StoredLetter]) -> list[bool]:
        with self._writing() as connection:
            return [
                connection.execute(_SETTLE, [self._slot, stored.id, stored.deliveries]).rowcount > 0
                for stored in letters
            ]

    def _lock(self) -> int:
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise replay_runs(self._slot) from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_lock(self) -> int:
        """Open the lock's file; one that root makes belongs to the owner of the letters.

        Only a file that is new is given away: another one may be a link to any file there is.
        """
        path = self.path.with_name(f"{self.path.name}-replay-{self._slot}")
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags)
        if os.geteuid() == 0:
            owner = self.path.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor


async def _still_exclusive() -> None:
    """A lock on a file is lost with its process only."""


@contextmanager
def _transaction(
    connection: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE"
) -> Iterator[sqlite3.Connection]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    [(value,)] = connection.execute(f"PRAGMA {name}").fetchall()
    return int(value)


def _members(values: object) -> str:
    return msgspec.json.encode(list(values)).decode()  # type: ignore[call-overload]


def _time(time: datetime) -> str:
    """Write a time so that the texts sort as the times do."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _lsn(lsn: int) -> str:
    """Write a position so that the texts sort as the positions do; SQLite has no 64 bits for it."""
    return f"{lsn:016X}"


_DEFAULT_HINT: Final = "see to the file and its disk, then start again"

_HINTS: Final = {
    sqlite3.SQLITE_BUSY: "another process holds the file for long: find out which (fuser)",
    sqlite3.SQLITE_READONLY: "make the file, its folder and its disk writable, or set"
    " dead_letters.path",
    sqlite3.SQLITE_CANTOPEN: "see that this user may read and write the file and its folder, or set"
    " dead_letters.path",
    sqlite3.SQLITE_FULL: "free space on the disk; nothing of the last call was stored",
    sqlite3.SQLITE_CORRUPT: "stop walstream, keep a copy, and rescue what can be read with sqlite3"
    " FILE .recover",
    sqlite3.SQLITE_NOTADB: "set dead_letters.path to a file of its own, or move this one away",
}

_DIALECT: Final = Dialect(
    keys="letter_keys",
    mark="?",
    within="IN (SELECT value FROM json_each(?))",
    find="instr",
    members=_members,
    time=_time,
    lsn=_lsn,
)

_SCHEMA: Final = (
    # AUTOINCREMENT: the number of a letter that is gone is not given to another one.
    """
    CREATE TABLE letters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        slot TEXT NOT NULL,
        route TEXT NOT NULL,
        change_id TEXT NOT NULL,
        lsn TEXT NOT NULL,
        ordinal INTEGER NOT NULL,
        operation TEXT NOT NULL,
        relation_schema TEXT,
        relation_name TEXT,
        keys TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        error TEXT NOT NULL,
        traceback TEXT NOT NULL,
        first_failed_at TEXT,
        last_failed_at TEXT,
        size_bytes INTEGER NOT NULL,
        parked INTEGER NOT NULL,
        stored_at TEXT NOT NULL,
        payload BLOB NOT NULL,
        deliveries INTEGER NOT NULL DEFAULT 1,
        UNIQUE (slot, route, change_id)
    )
    """,
    "CREATE INDEX letters_in_order ON letters (slot, lsn, ordinal, id)",
    """
    CREATE TABLE letter_keys (
        letter_id INTEGER NOT NULL REFERENCES letters ON DELETE CASCADE,
        slot TEXT NOT NULL,
        route TEXT NOT NULL,
        relation TEXT NOT NULL,
        key_values TEXT NOT NULL,
        PRIMARY KEY (letter_id, relation, key_values)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX letter_keys_by_key ON letter_keys (slot, route, relation, key_values, letter_id)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

# Joined with the letters: whoever deletes some by hand with sqlite3 may leave keys behind.
_BLOCKED: Final = """
    SELECT DISTINCT k.route, k.relation, k.key_values
      FROM letter_keys AS k
      JOIN letters AS l ON l.id = k.letter_id
     WHERE k.slot = ?
"""

_HELD_UP: Final = """
    SELECT 1
      FROM letter_keys AS k
      JOIN letters AS l ON l.id = k.letter_id
     WHERE k.slot = ? AND k.route = ? AND k.relation = ? {}
     LIMIT 1
"""
_SAME: Final = "AND k.key_values IN (?, '')"

_SELECT: Final = f"SELECT {COLUMNS}, {{}} FROM letters AS l WHERE "  # noqa: S608 - no values

_COUNT: Final = "SELECT count(*) FROM (SELECT 1 FROM letters AS l WHERE {})"

_SIZE: Final = "SELECT count(*), coalesce(sum(size_bytes), 0) FROM letters WHERE slot = ?"

_CAME_AGAIN: Final = """
    UPDATE letters SET deliveries = deliveries + 1
     WHERE slot = ? AND route = ? AND change_id = ?
"""

_TRIED: Final = """
    UPDATE letters
       SET attempts = ?, error = ?, traceback = ?, first_failed_at = ?, last_failed_at = ?,
           size_bytes = size_bytes + ? - length(CAST(error AS BLOB))
                                       - length(CAST(traceback AS BLOB)),
           parked = 0
     WHERE slot = ? AND route = ? AND change_id = ? AND parked
"""

_FAILED: Final = """
    UPDATE letters
       SET attempts = ?, error = ?, traceback = ?, first_failed_at = coalesce(first_failed_at, ?),
           last_failed_at = ?, parked = 0,
           size_bytes = size_bytes + ? - length(CAST(error AS BLOB))
                                       - length(CAST(traceback AS BLOB))
     WHERE slot = ? AND id = ?
"""

_INSERT: Final = f"INSERT INTO letters ({INSERTED}) VALUES ({', '.join('?' * INSERTED_COUNT)})"  # noqa: S608

_INSERT_KEY: Final = """
    INSERT INTO letter_keys (letter_id, slot, route, relation, key_values) VALUES (?, ?, ?, ?, ?)
"""

_DROP: Final = "DELETE FROM letters WHERE slot = ? AND id IN (SELECT value FROM json_each(?))"

_SETTLE: Final = "DELETE FROM letters WHERE slot = ? AND id = ? AND deliveries = ?"
