"""walstream as it is run in production: a process of its own, with a sink for clients by HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import psycopg

from bench import workload
from bench.fanout.scenarios import ANYONE, MEMBER, SECRET
from bench.processes import ROOT, own_environment
from walstream.cluster import PrivateCluster

SLOT: Final = "fanout"

START_SECONDS: Final = 30.0

_CONFIGURATION: Final = """\
[postgres]
dsn = "{dsn}"
[slot]
name = "{slot}"
create = true
[http]
listen = "127.0.0.1:0"
[[routes]]
table = "{table}"
to = "clients"
[sinks.clients]
type = "live"
[realtime]
enabled = true
[access]
anonymous_role = "{anyone}"
secret = "{secret}"
[access.roles.{anyone}]
tables = [{{ table = "*.*" }}]
[access.roles.{member}]
tables = [{{ table = "{table}", where = "conversation_id=eq.{{claims.conversation}}" }}]
"""

_JOURNAL: Final = """\
[journal]
path = "{folder}/journal.db"
"""


class Subject:
    """``walstream run`` on a cluster; it ends, and its slot is dropped, with the block."""

    def __init__(
        self,
        cluster: PrivateCluster,
        connection: psycopg.Connection,
        folder: Path,
        *,
        with_journal: bool,
    ) -> None:
        """Start it, and wait until it streams."""
        self._connection = connection
        self._log = folder / "walstream.log"
        configuration = folder / "walstream.toml"
        values = {
            "dsn": cluster.loopback_conninfo().replace("\\", "\\\\").replace('"', '\\"'),
            "slot": SLOT,
            "table": workload.TABLE,
            "folder": folder,
            "anyone": ANYONE,
            "member": MEMBER,
            "secret": SECRET,
        }
        text = _CONFIGURATION + (_JOURNAL if with_journal else "")
        configuration.write_text(text.format(**values))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "walstream", "run", "-c", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=ROOT,
                env=own_environment(),
            )
        try:
            self.address = self._wait_until_streaming()
        except BaseException:
            print(self.log_tail(), file=sys.stderr)
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Return its user and system time so far."""
        # proc(5): the name, in brackets, may hold spaces; behind it utime and stime are 12th, 13th.
        fields = (
            Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Return the memory that it has now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def lag_bytes(self) -> int:
        """Return how far behind the end of the WAL the slot is."""
        return workload.end_of_wal(self._connection) - workload.confirmed(self._connection, SLOT)

    def wait_until_confirmed(self) -> float:
        """Wait until the slot has passed what is written now; return the seconds that it took."""
        end, started = workload.end_of_wal(self._connection), time.monotonic()
        while workload.confirmed(self._connection, SLOT) < end:
            self._look_after(started)
            time.sleep(0.01)
        return time.monotonic() - started

    def _wait_until_streaming(self) -> str:
        started = time.monotonic()
        while not (address := self._listening()) or not workload.somebody_streams(self._connection):
            self._look_after(started)
            time.sleep(0.01)
        return address

    def _look_after(self, started: float) -> None:
        assert self._process.poll() is None, "walstream ended"
        assert time.monotonic() - started < START_SECONDS, "walstream hangs"

    def _listening(self) -> str:
        for line in self._log.read_bytes().splitlines():
            if b'"http_listening"' in line:
                return str(msgspec.json.decode(line)["address"])
        return ""

    def log_tail(self) -> str:
        """Return the last lines that it has logged."""
        return "\n".join(self._log.read_text(encoding="utf-8").splitlines()[-20:])

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        workload.drop_slot(self._connection, SLOT)
