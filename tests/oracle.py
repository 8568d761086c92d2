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
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from tests.postgres import Database, wait_until
from tests.workload import Kind, make_tables
from walstream.cluster import ServerPrograms
from walstream.decoder import START_OPTIONS

Record: TypeAlias = Mapping[str, Any]

ROOT: Final = Path(__file__).parent.parent

OPERATIONS: Final = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}

TABLES: Final = {(table.schema, table.name): table for table in make_tables().values()}


class Twins:
    """Two slots made at one moment, and a configuration that drains the first into a file."""

    def __init__(
        self,
        database: Database,
        programs: ServerPrograms,
        folder: Path,
        routes: Sequence[Mapping[str, Any]] = ({"table": "*.*"},),
        app: str | None = None,
    ) -> None:
        """Make the slots, and write the configuration.

        Args:
            database: whose changes are streamed, from now on.
            programs: where pg_recvlogical is.
            folder: for the configuration, the file and the log; modules in it can be imported.
            routes: what goes into the file.
            app: handlers, as ``module:name``.
        """
        self._database = database
        self._programs = programs
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._slot = f"walstream_{secrets.token_hex(4)}"
        self._twin = f"{self._slot}_twin"
        self.path = folder / "changes.jsonl"
        self.log = folder / "walstream.log"
        self._config = folder / "walstream.toml"
        self._config.write_text(_configuration(database.dsn, self._slot, self.path, routes, app))
        database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self._slot)
        database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", self._slot, self._twin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End what a failed test has left running."""
        for process in self._started:
            process.kill()
            process.wait()

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start ``walstream run`` as a process of its own."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "walstream", "run", "-c", str(self._config), *options],
                cwd=ROOT,
                env=_environment(self._folder),
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        return process

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
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", self._slot
            )
        )

    def found(self) -> list[str]:
        """Return what walstream has written, in the form in which ``expected`` is."""
        return [canonical(line) for line in lines_of(self.path)]

    def expected(self, until: str, wanted: Callable[[Record], bool] | None = None) -> list[str]:
        """Return the lines that must be there when all records, or those wanted, are sent."""
        return [json.dumps(line) for line in expected_lines(filter(wanted, self.records(until)))]

    def records(self, until: str) -> list[Record]:
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
        return [json.loads(line, parse_float=str) for line in lines_of(output)]


def lines_of(path: Path) -> list[bytes]:
    """Read a file of whole lines."""
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content, f"{path} ends within a line"
    return content.split(b"\n")[:-1]


def canonical(line: bytes) -> str:
    """Write a line as ``Twins.expected`` does: the order of keys counts, white space does not."""
    return json.dumps(json.loads(line, parse_float=str))


def expected_lines(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Turn wal2json's records into what a file sink must hold of them."""
    begin: Record = {}
    ordinal = 0
    for record in records:
        match record["action"]:
            case "B":
                begin, ordinal = record, 0
            case "M":
                ordinal += record["transactional"]
            case "I" | "U" | "D" | "T":
                ordinal += 1
                yield _line(begin, ordinal, record)


def _line(begin: Record, ordinal: int, record: Record) -> dict[str, Any]:
    row, unchanged = _row(record)
    root = {"root": "public.readings"} if record["table"].startswith("readings_") else {}
    return {
        "id": f"{begin['nextlsn']}:{ordinal}",
        "operation": OPERATIONS[record["action"]],
        "schema": record["schema"],
        "table": record["table"],
        **root,
        "row": row,
        "identity": _values(record, "identity"),
        "unchanged": unchanged,
        "xid": begin["xid"],
        "commit_lsn": begin["lsn"],
        "end_lsn": begin["nextlsn"],
        "ordinal": ordinal,
        "commit_time": _instant(begin["timestamp"]),
    }


def _row(record: Record) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the new row, and the columns that an update left out and nobody can fill in."""
    row, identity = _values(record, "columns"), _values(record, "identity")
    table = TABLES.get((record["schema"], record["table"]))
    if row is None or identity is None or table is None:
        return row, []
    if table.is_full:
        return {**identity, **row}, []
    big = [name for name, kind in table.columns.items() if kind is Kind.BIG]
    return row, [name for name in big if name not in row]


def _values(record: Record, member: str) -> dict[str, Any] | None:
    columns = record.get(member)
    return None if columns is None else {column["name"]: column["value"] for column in columns}


def _instant(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).isoformat(timespec="microseconds")


def assert_same(found: Sequence[str], expected: Sequence[str]) -> None:
    """Compare lines, and show the first one that differs, from where it does."""
    for number, (line, other) in enumerate(zip_longest(found, expected, fillvalue=""), start=1):
        if line != other:
            start = max(_equal_characters(line, other) - 40, 0)
            message = (
                f"line {number} of {len(found)} found, {len(expected)} expected,"
                f" from character {start} on:\n"
                f"found:    {line[start : start + 300]}\nexpected: {other[start : start + 300]}"
            )
            raise AssertionError(message)


def _equal_characters(line: str, other: str) -> int:
    pairs = enumerate(zip_longest(line, other))
    return next(place for place, (one, another) in pairs if one != another)


def _configuration(
    dsn: str, slot: str, path: Path, routes: Sequence[Mapping[str, Any]], app: str | None
) -> str:
    """Write a configuration file with one file sink; TOML's strings and lists are JSON's."""
    lines = [
        "[postgres]",
        f"dsn = {_toml(dsn)}",
        "[slot]",
        f"name = {_toml(slot)}",
        "[stream]",
        "reconnect_seconds = 0.05",
    ]
    if app is not None:
        lines += ["[handlers]", f"app = {_toml(app)}"]
    if routes:
        lines += ["[sinks.changes]", 'type = "file"', f"path = {_toml(str(path))}"]
    for route in routes:
        lines += ["[[routes]]", 'to = "changes"']
        lines += [f"{key} = {_toml(value)}" for key, value in route.items()]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _environment(folder: Path) -> dict[str, str]:
    """Ours, without what would configure walstream, and with the modules of a folder."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WALSTREAM_")}
    paths = [str(folder), *filter(None, [ours.get("PYTHONPATH")])]
    return {**ours, "PYTHONPATH": os.pathsep.join(paths)}
