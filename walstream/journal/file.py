"""The journal's file: an SQLite database in WAL mode, its tables, and what can be wrong with it.

Three kinds of connection: that of the process that writes, which holds a lock of its own; readers,
which never wait for it; and ``walstream journal trim``, which removes the oldest blocks beside it,
in short transactions. Who writes looks at `other_changes` in each transaction.

The file holds rows, and is readable for its owner only. It belongs on a local disk: the locks do
not hold on most network file systems.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shlex
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
import structlog

from walstream.errors import SetupError, SinkFailed
from walstream.files import lock_holders, sync_directory
from walstream.journal.attachments import ATTACHED_TABLE
from walstream.journal.blocks import Block
from walstream.lsn import ZERO, Lsn
from walstream.positions import BEGINNING, Position

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.journal")

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x57414C4A  # WALJ

PAGE_BYTES: Final = 4096
BUSY_SECONDS: Final = 10.0
"""How long another process may hold the file."""

_BUSY_PAUSE_SECONDS: Final = 0.01
_PROBE_BYTES: Final = 64 << 10


class JournalTrimmed(Exception):
    """What is asked for is not in the journal any more; it goes back to ``begins``."""

    def __init__(self, begins: Position) -> None:
        super().__init__(f"the journal begins at {begins}")
        self.begins = begins


class State(msgspec.Struct, frozen=True):
    """Where a journal stands.

    Attributes:
        history: by which rules its changes were kept.
        generation: counts how often it was begun anew.
        begins: all changes behind it, up to ``position``, are here.
        position: where the last change stands that was appended.
        covered: all changes up to there were appended.
        since_time: what was committed then or before may be missing, in microseconds since 1970.
        latest_time: the latest commit of all changes since it was begun anew; 0 when none has come.
        next_block: the number of the next block. Of higher ones an append was not finished.
        changes: how many are here.
    """

    history: str = ""
    generation: int = 0
    begins: Position = BEGINNING
    position: Position = BEGINNING
    covered: Lsn = ZERO
    since_time: int = 0
    latest_time: int = 0
    next_block: int = 1
    changes: int = 0


class Sizes(NamedTuple):
    """What the files take."""

    file_bytes: int
    wal_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.file_bytes + self.wal_bytes


# ---- Opening


def lock_to_write(path: Path) -> int:
    """Return the descriptor of a lock that only one process has; closing it lets go.

    It is on a file beside the journal's: to close that one would drop SQLite's own locks.

    Raises:
        SetupError: another process has it, or the file cannot be made.
    """
    lock = lock_path(path)
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        raise SetupError(
            f"the folder of the journal {path.parent} is not there",
            hint="make it, or set path under [journal]",
        ) from None
    except OSError as error:
        raise SetupError(
            f"the journal {path} cannot be opened: {lock.name}: {error.strerror}", hint=_PLACE_HINT
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        holder = next(lock_holders(lock), None)
        who = "another process" if holder is None else f"another process, PID {holder},"
        raise SetupError(
            f"{who} writes the journal {path}",
            hint="end it, or give each process a journal of its own: path under [journal]",
        ) from None
    return descriptor


def lock_path(path: Path) -> Path:
    """Return the file that is locked by who writes a journal."""
    return path.with_name(f"{path.name}-lock")


def connect_to_write(path: Path, *, durable: bool, wal_bytes: int) -> sqlite3.Connection:
    """Open the file for the process that has the lock; make it when it is not there.

    Args:
        path: where it is.
        durable: a transaction is on disk before it ends. Otherwise a process that is killed loses
            nothing; a machine that crashes may lose the last transactions, and nothing else.
        wal_bytes: about how large the file beside it, ``-wal``, may get.

    Raises:
        SetupError: something has to be changed first.
        SinkFailed: it cannot be written to now.
    """
    with _refusing(path):
        _make_file(path)
        connection = _connect(path, "rw")
        try:
            _prepare_patiently(connection, path)
            synchronous = "FULL" if durable else "NORMAL"
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {wal_bytes // 2 // PAGE_BYTES}")
            connection.execute(f"PRAGMA journal_size_limit = {wal_bytes}")
            # What is deleted is overwritten where that costs nothing.
            connection.execute("PRAGMA secure_delete = FAST")
        except BaseException:
            connection.close()
            raise
    return connection


def connect_beside(path: Path, *, write: bool = False) -> sqlite3.Connection:
    """Open a file that is there, beside a process that may write it.

    Raises:
        SetupError: there is none, or it is no journal of this version.
        SinkFailed: it cannot be read now.
    """
    with _refusing(path):
        if not path.exists():
            raise SetupError(
                f"there is no journal at {path}",
                hint="walstream run makes it; path under [journal] counts from the current folder",
            )
        connection = _connect(path, "rw" if write else "ro")
        try:
            _verify_made(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _verify_made(connection: sqlite3.Connection, path: Path) -> None:
    if not _verify_owner(connection, path):
        raise SetupError(f"the journal {path} is empty", hint="walstream run makes its tables")
    load_state(connection)


def sizes(path: Path) -> Sizes:
    """Measure the files; what is not there has no bytes."""
    return Sizes(*(_size(one) for one in (path, path.with_name(f"{path.name}-wal"))))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def _make_file(path: Path) -> None:
    """Make the file before SQLite does, for its owner only."""
    if path.exists():
        if not stat.S_ISREG(path.stat().st_mode):
            raise SetupError(
                f"the journal cannot be in {path}: it is not a regular file", hint=_PLACE_HINT
            )
        _tell_readable(path)
        return
    for rest in ("-wal", "-shm"):  # of a file that was moved away; not of the new one
        path.with_name(path.name + rest).unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    sync_directory(path.parent)


def _tell_readable(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning(
            "journal_readable",
            path=str(path),
            mode=f"{mode:04o}",
            hint=f"it holds rows: chmod 600 {shlex.quote(str(path))}",
        )


def _prepare_patiently(connection: sqlite3.Connection, path: Path) -> None:
    """For the switch to WAL mode SQLite does not wait as it does for other locks."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _prepare(connection, path)
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
        time.sleep(_BUSY_PAUSE_SECONDS)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if not _verify_owner(connection, path):
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(_FIRST_STATE, _row(State()))
    load_state(connection)


def _verify_owner(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell whether the tables are there."""
    version, owner = pragma(connection, "user_version"), pragma(connection, "application_id")
    [(tables,)] = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    if owner != APPLICATION_ID and (tables or version or owner):
        raise SetupError(
            f"{path} is another program's database", hint="set path under [journal] to another file"
        )
    if version > SCHEMA_VERSION:
        raise SetupError(
            f"the journal {path} has schema version {version}, this walstream knows up to"
            f" {SCHEMA_VERSION}",
            hint="a later version of walstream made it: use that one, or move the file away",
        )
    return bool(version)


# ---- What all that have it open do


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Keep what is done in it, or nothing of it."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # the first error says why
                connection.execute("ROLLBACK")
        raise


def pragma(connection: sqlite3.Connection, name: str) -> int:
    """Ask for a number."""
    [(value,)] = connection.execute(f"PRAGMA {name}").fetchall()
    return int(value)


def other_changes(connection: sqlite3.Connection) -> int:
    """Return a number that is another one when another connection has written."""
    return pragma(connection, "data_version")


def load_state(connection: sqlite3.Connection) -> State:
    """Read where the journal stands.

    Raises:
        ValueError: it cannot be read.
    """
    rows = connection.execute(_LOAD_STATE).fetchall()
    if len(rows) != 1:
        raise ValueError("the journal's state is missing")
    [(history, generation, begins, position, covered, *numbers)] = rows
    covered_lsn = Lsn(int(covered, 16))
    return State(
        history, generation, position_of(begins), position_of(position), covered_lsn, *numbers
    )


def save_state(connection: sqlite3.Connection, state: State) -> None:
    """Write down where the journal stands."""
    connection.execute(_SAVE_STATE, _row(state))


def insert(connection: sqlite3.Connection, number: int, block: Block, latest_time: int) -> None:
    """Add a block."""
    connection.execute(
        "INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            number,
            position_text(block.first),
            position_text(block.last),
            block.oldest_time,
            block.newest_time,
            latest_time,
            block.changes,
            block.data,
        ),
    )


def forget(connection: sqlite3.Connection, state: State, number: int) -> State:
    """Delete the blocks up to a number, and return where the journal stands then."""
    [(changes, newest_time, last)] = connection.execute(_UP_TO, [number]).fetchall()
    if not changes:
        return state
    connection.execute("DELETE FROM blocks WHERE id <= ?", [number])
    return msgspec.structs.replace(
        state,
        begins=position_of(last),
        since_time=max(state.since_time, newest_time),
        changes=state.changes - changes,
    )


def oldest_up_to(connection: sqlite3.Connection, state: State, size_bytes: int) -> int | None:
    """Return the number of the last of so many blocks as have this size together.

    One at least; None when there is none. Of very many it may be fewer.
    """
    rows = connection.execute(_OLDEST, [state.next_block]).fetchall()
    total = 0
    for number, its_bytes in rows:
        total += its_bytes
        if total >= size_bytes:
            return int(number)
    return int(rows[-1][0]) if rows else None


def older_than(connection: sqlite3.Connection, state: State, time: int) -> int | None:
    """Return the number of the last of the blocks at the front that are all older."""
    [(kept,)] = connection.execute(_FIRST_KEPT, [state.next_block, time]).fetchall()
    [(first,)] = connection.execute("SELECT min(id) FROM blocks").fetchall()
    last = state.next_block - 1 if kept is None else kept - 1
    return None if first is None or last < first else int(last)


def used_pages(connection: sqlite3.Connection) -> int:
    """Return how many pages hold something."""
    return pragma(connection, "page_count") - pragma(connection, "freelist_count")


def release(connection: sqlite3.Connection, pages: int) -> bool:
    """Give so many free pages back to the file system; others move into their places.

    Returns:
        Whether there were any.
    """
    before = pragma(connection, "page_count")
    connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    return pragma(connection, "page_count") < before


def checkpoint(connection: sqlite3.Connection) -> bool:
    """Bring all into the file itself and empty ``-wal``; tell whether nobody was in the way."""
    [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not busy


def position_text(position: Position) -> str:
    """Write a position so that the texts sort as the positions do."""
    return f"{position.end_lsn:016X}/{position.ordinal:08X}"


def position_of(text: str) -> Position:
    """Read what `position_text` wrote."""
    lsn, _, ordinal = text.partition("/")
    return Position(Lsn(int(lsn, 16)), int(ordinal, 16))


def _row(state: State) -> list[Any]:
    return [
        state.history,
        state.generation,
        position_text(state.begins),
        position_text(state.position),
        f"{state.covered:016X}",
        state.since_time,
        state.latest_time,
        state.next_block,
        state.changes,
    ]


# ---- What can be wrong


class Reason(NamedTuple):
    """Why something failed, in a word or two, and what to do."""

    word: str
    hint: str


def reason_of(error: Exception, path: Path) -> Reason:
    """Say why SQLite, or the operating system, did not do something."""
    if isinstance(error, OSError):
        return _ERRNOS.get(error.errno or 0, Reason(error.strerror or "failed", _DEFAULT_HINT))
    if isinstance(error, ValueError):
        return _CORRUPT
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}:
        return _why_not_written(path) or _CODES[code]
    return _CODES.get(code, Reason(str(error), _DEFAULT_HINT))


def failed(error: Exception, path: Path, what: str = "cannot be written to") -> SinkFailed:
    """Say that it did not work now."""
    reason = reason_of(error, path)
    return SinkFailed(f"the journal {path} {what}: {reason.word}", hint=reason.hint)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Tell what has to be changed by somebody from what may pass."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:
        failure = failed(error, path, "cannot be opened")
        if reason_of(error, path).word in _PASSING:
            raise failure from error
        raise SetupError(failure.message, hint=failure.hint) from error


def _why_not_written(path: Path) -> Reason | None:
    """Find out by trying: SQLite does not tell what the operating system has said."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and max(sizes(path)) + _PROBE_BYTES > limit:
        return _ERRNOS[errno.EFBIG]
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    try:
        with probe.open("xb") as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return _ERRNOS.get(error.errno or 0)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


_PLACE_HINT: Final = (
    "path under [journal] has to name a file, in a folder that is there and that walstream may"
    " write to"
)
_DEFAULT_HINT: Final = "see to the file and its disk"
_FULL: Final = Reason(
    "disk full",
    "make room on its file system: it goes on by itself. Trimming needs room, too: when there is"
    " nothing else, stop walstream and remove the journal with its -wal, and clients get a reset",
)
_READ_ONLY: Final = Reason(
    "read-only", "make the file, its folder and its disk writable, or set path under [journal]"
)
_CORRUPT: Final = Reason(
    "corrupt",
    "stop walstream, move the file away with its -wal and -shm files, and start again: the journal"
    " begins anew, and clients that come back are told so (reset)",
)

_ERRNOS: Final = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: Reason("disk full", "the quota is used up: make room, or raise it"),
    errno.EFBIG: Reason(
        "disk full", "files of this process may not get larger: raise the limit (ulimit -f)"
    ),
    errno.EROFS: _READ_ONLY,
    errno.EACCES: Reason("not permitted", _PLACE_HINT),
    errno.EPERM: Reason("not permitted", _PLACE_HINT),
    errno.EIO: Reason("input/output error", "look at the disk"),
}

_CODES: Final = {
    sqlite3.SQLITE_BUSY: Reason("busy", "another process holds the file: find out which (fuser)"),
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: Reason("not permitted", _PLACE_HINT),
    sqlite3.SQLITE_CANTOPEN: Reason("not permitted", _PLACE_HINT),
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: Reason("input/output error", "look at the disk"),
    sqlite3.SQLITE_CORRUPT: _CORRUPT,
    sqlite3.SQLITE_NOTADB: _CORRUPT,
}

_PASSING: Final = frozenset({"disk full", "busy", "input/output error"})
"""What may be over without anybody changing the configuration or the file."""

_STATE_COLUMNS: Final = (
    "history, generation, begins, position, covered, since_time, latest_time, next_block, changes"
)
_LOAD_STATE: Final = f"SELECT {_STATE_COLUMNS} FROM state"  # noqa: S608 - no values
_SAVE_STATE: Final = f"UPDATE state SET ({_STATE_COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_FIRST_STATE: Final = f"INSERT INTO state ({_STATE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608

_UP_TO: Final = """
    SELECT sum(changes), max(newest_time), max(last) FROM blocks WHERE id <= ?
"""
_OLDEST: Final = """
    SELECT id, length(data) FROM blocks WHERE id < ? ORDER BY id LIMIT 10000
"""
_FIRST_KEPT: Final = """
    SELECT min(id) FROM (
        SELECT id FROM blocks WHERE id < ? AND newest_time >= ? ORDER BY id LIMIT 1
    )
"""

_SCHEMA: Final = (
    """
    CREATE TABLE state (
        history TEXT NOT NULL,
        generation INTEGER NOT NULL,
        begins TEXT NOT NULL,
        position TEXT NOT NULL,
        covered TEXT NOT NULL,
        since_time INTEGER NOT NULL,
        latest_time INTEGER NOT NULL,
        next_block INTEGER NOT NULL,
        changes INTEGER NOT NULL
    )
    """,
    # The data stands last: what is before it is read without it. latest_time is the newest of this
    # block and all before it, so that it can be searched for.
    """
    CREATE TABLE blocks (
        id INTEGER PRIMARY KEY,
        first TEXT NOT NULL,
        last TEXT NOT NULL,
        oldest_time INTEGER NOT NULL,
        newest_time INTEGER NOT NULL,
        latest_time INTEGER NOT NULL,
        changes INTEGER NOT NULL,
        data BLOB NOT NULL
    )
    """,
    # AUTOINCREMENT: readers remember layouts by their number. last_block is the last one that may
    # need it, and null while it is used for new ones.
    """
    CREATE TABLE layouts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        digest BLOB NOT NULL UNIQUE,
        definition BLOB NOT NULL,
        last_block INTEGER
    )
    """,
    ATTACHED_TABLE,
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

Work = Callable[[sqlite3.Connection, State], State]
"""What is done in one transaction: it returns where the journal stands afterwards."""
