"""What must be in a file sink, as pg_recvlogical tells it: nothing here uses walstream's decoder.

pg_recvlogical reads a twin of walstream's slot with the same options of wal2json. Its records are
turned into the lines of the documented form by plain ``json``.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from psycopg.conninfo import make_conninfo

from tests.postgres import Database, wait_until
from tests.workload import BIG, make_tables
from walstream.cluster import ServerPrograms
from walstream.decoder import START_OPTIONS

Record: TypeAlias = Mapping[str, Any]
Pairs: TypeAlias = list[Record]

ROOT: Final = Path(__file__).parent.parent

OPERATIONS: Final = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}

OUT_OF_LINE: Final = {
    (table.schema, table.name): [name for name, kind in table.columns.items() if kind == BIG]
    for table in make_tables().values()
    if not table.is_full
}
"""Columns whose values can be missing from an update: under FULL the identity has them."""


class Twins:
    """Two slots made at one moment, and a configuration that drains the first into a file."""

    def __init__(
        self,
        database: Database,
        programs: ServerPrograms,
        folder: Path,
        routes: Sequence[Mapping[str, Any]] = ({"table": "*.*"},),
    ) -> None:
        self._database = database
        self._programs = programs
        self._folder = folder
        self._slot = f"walstream_{secrets.token_hex(4)}"
        self._twin = f"{self._slot}_twin"
        self.path = folder / "changes.jsonl"
        self.log = folder / "walstream.log"
        self._config = folder / "walstream.toml"
        self._config.write_text(_configuration(database.dsn, self._slot, self.path, routes))
        database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self._slot)
        database.execute(
            "SELECT pg_copy_logical_replication_slot(%s, %s)", self._slot, self._twin
        )

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start ``walstream run`` as a process of its own."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "walstream", "run", "-c", str(self._config), *options],
                cwd=ROOT,
                env=_environment(),
                stdout=log,
                stderr=log,
            )

    def run(self, until: str) -> None:
        """Drain the first slot up to a position."""
        self.finish(self.start("--until", until))

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask walstream to end, as systemd would."""
        process.send_signal(signal.SIGTERM)
        self.finish(process)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until walstream has ended well."""
        assert process.wait(timeout=60) == 0, self.log.read_text()[-4000:]

    def now(self) -> str:
        """Return a position behind everything that is committed."""
        [(position,)] = self._database.execute("SELECT pg_current_wal_flush_lsn()::text")
        return str(position)

    def confirmed(self) -> str:
        """Return the position up to which the first slot is confirmed."""
        [(position,)] = self._database.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            self._slot,
        )
        return str(position)

    def wait_until_streaming(self) -> None:
        """Wait until walstream has the first slot."""
        wait_until(
            lambda: self._database.execute(
                "SELECT FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid"
                " WHERE s.slot_name = %s AND r.state = 'streaming'",
                self._slot,
            )
        )

    def found(self) -> list[str]:
        """Return what walstream has written, in the form in which ``expected`` is."""
        return [canonical(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def expected(
        self, until: str, wanted: Callable[[Record], bool] = lambda record: True
    ) -> list[str]:
        """Return the lines that must be there when the records that are wanted are routed."""
        return [json.dumps(line) for line in expected_lines(filter(wanted, self.records(until)))]

    def records(self, until: str) -> Iterator[Record]:
        """Read the twin up to a position."""
        output = self._folder / "pg_recvlogical.jsonl"
        options = [f"--option={name}={value}" for name, value in START_OPTIONS.items()]
        subprocess.run(
            [
                self._programs.path("pg_recvlogical"),
                f"--dbname={self._database.dsn}",
                f"--slot={self._twin}",
                f"--file={output}",
                f"--endpos={until}",
                "--start",
                "--no-loop",
                *options,
            ],
            env={**os.environ, "PGTZ": "UTC"},
            check=True,
            timeout=60,
        )
        with output.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line, parse_float=str)
