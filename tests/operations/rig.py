"""walstream as a process, a server of its own, a proxy between them, and a steady workload.

The process is looked after as systemd would look after it: when it gives up with 75 it is started
again. Any other end must be one that the test expects.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import psycopg

from tests.operations.endpoint import Endpoint
from tests.operations.load import Load
from tests.operations.verdict import Look
from tests.oracle import ROOT, Twins, _environment
from tests.postgres import Database, create_database, wait_until
from tests.proxy import Proxy
from walstream.cluster import PrivateCluster
from walstream.errors import EX_TEMPFAIL
from walstream.lsn import Lsn

RECOVERY_SECONDS: Final = 30.0
"""So long may pass from the end of a fault until what is written now has arrived."""

LOOK_SECONDS: Final = 0.02

SETTINGS: Final = {
    "wal_sender_timeout": "3s",
    "max_prepared_transactions": "8",
    "autovacuum": "off",
    "checkpoint_timeout": "30s",
    "logical_decoding_work_mem": "64kB",
}
"""Transactions of some hundred rows are spilled to disk."""

ROLE: Final = "streamer"
PASSWORD: Final = "the right one"  # noqa: S105 - of a server that is thrown away

STREAM: Final[Mapping[str, Any]] = {
    "reconnect_seconds": 0.05,
    "max_reconnect_seconds": 0.3,
    "after_shutdown_seconds": 0.3,
    "standby_poll_seconds": 0.1,
    "receive_timeout_seconds": 4.0,
    "drain_seconds": 2.0,
    "stalled_after_seconds": 2.0,
}

HANDLERS: Final = """
import json, os, random, sys
from pathlib import Path
from walstream import Change, Walstream

stream = Walstream()
chance = random.Random()
folder = Path(__file__).parent


class Journal:
    def __init__(self, name):
        path = folder / f"{name}.journal"
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, changes):
        if chance.random() < 0.004:
            raise ValueError("before")
        # What a full disk leaves of a line is told apart by the line end in front of the next.
        text = b"\\n" + json.dumps([change.id for change in changes]).encode() + b"\\n"
        if os.write(self.file, text) < len(text):
            raise OSError("a part of a line")
        if chance.random() < 0.004:
            raise ValueError("after")


one, lists = Journal("one"), Journal("lists")


@stream.on("*.*", name="one")
async def take(change: Change) -> None:
    one.note([change])


@stream.on("*.*", name="lists", batch=50, linger_seconds=0.01)
def take_lists(changes: list[Change]) -> None:
    lists.note(changes)
"""

JOURNALS: Final = ("one", "lists")

CLOCK: Final = """
import mmap, struct, time
from pathlib import Path

with Path(__file__).with_name("clock").open("rb") as file:
    offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
real_time, real_time_ns = time.time, time.time_ns
time.time = lambda: real_time() + struct.unpack("d", offset)[0]
time.time_ns = lambda: real_time_ns() + int(struct.unpack("d", offset)[0] * 1e9)
"""
"""As sitecustomize: the process's wall clock is as wrong as a file says."""


class SturdyDatabase(Database):
    """A database whose server comes and goes: a statement is tried until it is up again."""

    def execute(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                return super().execute(query, *parameters)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                with suppress(psycopg.Error):
                    self.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


class Rig:
    """What faults are done to, and what is looked at afterwards."""

    def __init__(
        self,
        cluster: PrivateCluster,
        folder: Path,
        seed: int,
        *,
        transactions_per_second: float = 25.0,
    ) -> None:
        """Choose the parts; they begin with the block.

        Args:
            cluster: with ``loopback``; a database of it is used, and dropped by nobody.
            folder: for all files.
            seed: decides on the workload.
            transactions_per_second: of the workload.
        """
        self.transactions_per_second = transactions_per_second
        self.cluster = cluster
        self.folder = folder
        self.file_limit_bytes = resource.RLIM_INFINITY
        self.codes: Counter[int] = Counter()
        self.looks: list[Look] = []
        self.looking = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._seed = seed
        self._marker = 0
        self._parts = 0
        self._tails: dict[int, int] = {}
        self._seen = 0
        self._said_before = 0
        self._opened = ExitStack()
        self._copying: list[threading.Thread] = []
        self._over = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._open(opening)
            self._opened = opening.pop_all()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _open(self, opening: ExitStack) -> None:
        made = create_database(self.cluster.conninfo(), "template0")
        self.database = opening.enter_context(SturdyDatabase(made.dsn))
        self.database.name = made.name
        self.execute(
            f"CREATE ROLE {ROLE} LOGIN REPLICATION PASSWORD '{PASSWORD}';"
            "CREATE SCHEMA marks; CREATE TABLE marks.markers (n int)"
        )
        self.server_dsn = self.cluster.loopback_conninfo(
            made.name, ROLE, password=PASSWORD, connect_timeout=2
        )
        self.proxy = opening.enter_context(Proxy(self.server_dsn))
        self.twins = Twins(self.database, self.cluster.programs, self.folder)
        self.slot = self.twins._slot
        self._clock = opening.enter_context(self._make_clock())
        (self.folder / "handlers.py").write_text(HANDLERS)
        self.endpoint = opening.enter_context(Endpoint())
        self.config = self.twins._config
        self.configure()
        opening.callback(self._join)
        opening.callback(self._kill)
        self.load = opening.enter_context(Load(made.dsn, self._seed, self.transactions_per_second))

    @contextmanager
    def _make_clock(self) -> Iterator[mmap.mmap]:
        (self.folder / "sitecustomize.py").write_text(CLOCK)
        path = self.folder / "clock"
        path.write_bytes(struct.pack("d", 0.0))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as clock:
            yield clock

    def configure(self, **changed: Mapping[str, Any]) -> None:
        """Write the configuration; sections can be changed."""
        sections: dict[str, Mapping[str, Any]] = {
            "postgres": {"dsn": self.proxy.dsn(self.server_dsn)},
            "slot": {"name": self.slot},
            "state": {"path": str(self.folder / "state.json")},
            "stream": STREAM,
            "handlers": {
                "app": "handlers:stream",
                "attempts": 4,
                "backoff_seconds": 0.02,
                "max_backoff_seconds": 0.1,
            },
            "sinks.changes": {"type": "file", "path": str(self.twins.path)},
            "sinks.receiver": {
                "type": "webhook",
                "url": self.endpoint.url,
                "format": "ndjson",
                "timeout_seconds": 1.0,
                "connect_timeout_seconds": 1.0,
                "max_retry_after_seconds": 1.0,
            },
            "log": {"level": "info", "format": "json"},
        }
        for name, content in changed.items():
            sections[name] = {**sections.get(name, {}), **content}
        text = configuration(sections, ["changes", "receiver"])
        # Never half a file: the process may be reading it.
        written = self.config.with_suffix(".new")
        written.write_text(text)
        written.replace(self.config)

    def execute(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run SQL on the server itself."""
        return self.database.execute(query, *parameters)

    # The process

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start walstream."""
        self._said_before = len(self.log())
        process = subprocess.Popen(
            [sys.executable, "-m", "walstream", "run", "-c", str(self.config), *options],
            cwd=ROOT,
            env=_environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.process = process
        self.limit_files(self.file_limit_bytes)
        assert process.stdout is not None
        copying = threading.Thread(target=_copy, args=(process.stdout, self.twins.log))
        copying.start()
        self._copying.append(copying)
        return process

    def end(self, how: signal.Signals) -> int:
        """Send a signal, and wait for the end; the exit code is returned and counted."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.ended()

    def ended(self, seconds: float = RECOVERY_SECONDS) -> int:
        """Wait until the process has ended by itself."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            message = f"walstream did not end in {seconds:g} seconds\n{self.log_tail()}"
            raise AssertionError(message) from None
        self._join()
        self.codes[code] += 1
        self.process = None
        return code

    def look_after(self) -> None:
        """Start the process again when it has given up for now."""
        if self.process is not None and self.process.poll() is not None:
            code = self.ended()
            assert code == EX_TEMPFAIL, f"walstream ended with {code}\n{self.log_tail()}"
        if self.process is None:
            self.start()

    def limit_files(self, limit_bytes: int) -> None:
        """Let writes of the process fail beyond so many bytes of a file."""
        self.file_limit_bytes = limit_bytes
        if self.process is not None:
            with suppress(ProcessLookupError):
                limits = (limit_bytes, resource.RLIM_INFINITY)
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    def set_clock(self, offset_seconds: float) -> None:
        """Let the process's wall clock be wrong."""
        self._clock[:] = struct.pack("d", offset_seconds)

    def log_tail(self) -> str:
        """What walstream said last."""
        return self.log()[-6000:]

    def said(self) -> str:
        """What the process has said that was started last."""
        return self.log()[self._said_before :]

    def log(self) -> str:
        """All that walstream has said."""
        return self.twins.log.read_text() if self.twins.log.exists() else ""

    # What has arrived

    def mark(self) -> int:
        """Commit a row that can be waited for."""
        self._marker += 1
        self.execute(f"INSERT INTO marks.markers VALUES ({self._marker})")
        return self._marker

    def wait_for(self, marker: int, seconds: float = RECOVERY_SECONDS) -> None:
        """Wait until the row is in the sink's file; look after the process meanwhile."""
        deadline = time.monotonic() + seconds
        while self._newest_marker() < marker:
            self.look_after()
            if time.monotonic() > deadline:
                message = f"marker {marker} did not arrive in {seconds:g} seconds"
                raise AssertionError(f"{message}\n{self.log_tail()}")
            time.sleep(0.01)

    def recover(self) -> float:
        """Wait until what is committed now has arrived; return how long that took, in seconds."""
        begun = time.monotonic()
        self.wait_for(self.mark())
        return time.monotonic() - begun

    def settle(self) -> None:
        """Wait until everything is confirmed that is committed now: all destinations have it."""
        target = Lsn.parse(self.twins.now())

        def is_confirmed() -> bool:
            self.look_after()
            return Lsn.parse(self.twins.confirmed()) >= target

        wait_until(is_confirmed, 2 * RECOVERY_SECONDS)

    def parts(self) -> list[Path]:
        """Return the sink's files, the oldest first."""
        parts = [self._part(number) for number in range(1, self._parts + 1)]
        return [*parts, self.twins.path]

    def rotate(self) -> None:
        """Move the sink's file away, as logrotate does."""
        with self.looking:
            if self.twins.path.exists():
                self._parts += 1
                self.twins.path.rename(self._part(self._parts))

    def forget(self) -> None:
        """Move the sink's file away, and remove what was moved away before."""
        for path in self.parts()[:-2]:
            if path.exists():
                self._tails.pop(path.stat().st_ino, None)  # the next file may get its number
                path.unlink()
        self.rotate()

    def journal(self, name: str) -> list[str]:
        """Return what a handler has noted, without what a full disk has torn."""
        ids: list[str] = []
        for line in (self.folder / f"{name}.journal").read_text().splitlines():
            if line.startswith("[") and line.endswith("]"):
                ids += json.loads(line)
        return ids

    def _part(self, number: int) -> Path:
        return self.folder / f"changes.{number}.jsonl"

    def _newest_marker(self) -> int:
        for path in self.parts():
            with suppress(FileNotFoundError), path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(self._tails.get(inode, 0))
                lines = file.read()
                complete = lines.rfind(b"\n") + 1
                self._tails[inode] = file.tell() - len(lines) + complete
                for line in lines[:complete].splitlines():
                    if b'"table":"markers"' in line:
                        self._seen = max(self._seen, json.loads(line)["row"]["n"])
        return self._seen

    # The watch over the position

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the slot's position and the size of the files all the time."""
        thread = threading.Thread(target=self._watch, name="watch")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            with (
                suppress(psycopg.OperationalError, psycopg.InterfaceError),
                psycopg.connect(self.database.dsn, autocommit=True) as connection,
            ):
                while not self._over.wait(LOOK_SECONDS):
                    self._look(connection)
            self._over.wait(LOOK_SECONDS)

    def _look(self, connection: psycopg.Connection) -> None:
        """Read the position first: what it has passed must be in the files by then."""
        rows = connection.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            [self.slot],
        ).fetchall()
        with self.looking:
            size = sum(path.stat().st_size for path in self.parts() if path.exists())
        self.looks += [Look(Lsn.parse(confirmed), size) for (confirmed,) in rows]

    def is_streaming(self) -> bool:
        """Whether somebody has the slot."""
        return bool(self.walsender())

    def walsender(self) -> int:
        """Return who has the slot, 0 for nobody."""
        [(pid,)] = self.execute(
            "SELECT coalesce(active_pid, 0) FROM pg_replication_slots WHERE slot_name = %s",
            self.slot,
        )
        return int(pid)

    def wait_until_free(self) -> None:
        """Wait until nobody has the slot."""
        wait_until(lambda: not self.is_streaming(), RECOVERY_SECONDS)

    def wait_until_streaming(self) -> None:
        """Wait until the process has streamed; look after it meanwhile."""

        def streams() -> bool:
            self.look_after()
            return '"event":"streaming"' in self.said()

        wait_until(streams, RECOVERY_SECONDS)

    def _kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def _join(self) -> None:
        while self._copying:
            self._copying.pop().join()


def configuration(sections: Mapping[str, Mapping[str, Any]], sinks: Sequence[str]) -> str:
    """Write a configuration in which everything goes to each of the sinks."""
    lines = []
    for name, content in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in content.items())]
    for sink in sinks:
        lines += ["[[routes]]", 'table = "*.*"', f"to = {json.dumps(sink)}"]
    return "\n".join(lines) + "\n"


def _copy(source: IO[bytes], path: Path) -> None:
    """Write what a process says into a file: its own files may be limited in size."""
    with source, path.open("ab") as file:
        for line in source:
            file.write(line)
            file.flush()
