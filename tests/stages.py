"""What a run of killed processes has to show: nothing missing, order, repeats, positions.

Nothing here uses walstream's own decoder, keys or acknowledger: what must come is read from a twin
of the slot with pg_recvlogical, what came from the journals of the handlers (`tests.faults`), and
the position from the server.
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import psycopg

from tests.faults import Entry, Gate, Phase
from tests.oracle import Record
from walstream.lsn import Lsn

Keys: TypeAlias = frozenset[tuple[str, str]]
"""The rows that a change is about, by table and key; ALL_ROWS stands for those of a table."""

ALL_ROWS: Final = "*"

SAMPLE_SECONDS: Final = 0.02
GATE_SECONDS: Final = 0.3


class Expected:
    """What a handler must get, in commit order."""

    def __init__(self, ids: Sequence[str], keys: Mapping[str, Keys]) -> None:
        self.ids = ids
        self.keys = keys
        self.place = {identity: number for number, identity in enumerate(ids)}
        self.end_lsns = [end_lsn(identity) for identity in ids]

    def first_beyond(self, lsn: Lsn) -> int:
        """Return the place of the first change that a slot at this position sends."""
        return bisect_right(self.end_lsns, lsn)

    def by_key(self) -> dict[tuple[str, str], list[str]]:
        """Return the ids about each row; those about a whole table are among each of its rows."""
        by_key: dict[tuple[str, str], list[str]] = {
            key: [] for identity in self.ids for key in self.keys[identity]
        }
        for identity in self.ids:
            for table, row in self.keys[identity]:
                rows = [key for key in by_key if key[0] == table] if row == ALL_ROWS else []
                for key in rows or [(table, row)]:
                    by_key[key].append(identity)
        return by_key


class Sample(NamedTuple):
    """A position of the slot, and how long the journals were after it was read."""

    confirmed: Lsn
    sizes: dict[str, int]


class Life(NamedTuple):
    """A process: where it began, how it ended and when, and what the server had then."""

    pid: int
    ended: str
    end: float
    started_at: Lsn
    confirmed: Lsn


def end_lsn(identity: str) -> Lsn:
    """Return the end of the transaction that a change's id tells."""
    return Lsn.parse(identity.partition(":")[0])


def expected_of(records: Iterable[Record], wanted: str = "IUDT") -> Expected:
    """Read what must come from wal2json's records.

    Args:
        records: of a twin of the slot.
        wanted: the actions.
    """
    ids: list[str] = []
    keys: dict[str, Keys] = {}
    begin: Record = {}
    ordinal = 0
    for record in records:
        if record["action"] == "B":
            begin, ordinal = record, 0
        elif record["action"] in "IUDTM":
            ordinal += 1
            if record["action"] in wanted:
                ids.append(f"{begin['nextlsn']}:{ordinal}")
                keys[ids[-1]] = _keys(record)
    return Expected(ids, keys)


def _keys(record: Record) -> Keys:
    """Tell rows apart by ``id``, or by ``a`` and ``b``; those of other tables are all alike."""
    if record["action"] == "T":
        return frozenset([(record["table"], ALL_ROWS)])
    if record["action"] == "M":
        return frozenset([("message", record["prefix"])])
    found = set()
    for columns in (record.get("columns"), record.get("identity")):
        values = {column["name"]: column["value"] for column in columns or ()}
        key = [values[name] for name in ("id", "a", "b") if name in values]
        if columns is not None:
            found.add((record["table"], json.dumps(key)))
    return frozenset(found)


class Watcher:
    """Looks at the slot and the journals all the time, and opens the gate for those that hold."""

    def __init__(self, dsn: str, slot: str, journals: Mapping[str, Path], gate: Gate) -> None:
        self.samples: list[Sample] = []
        self._dsn = dsn
        self._slot = slot
        self._journals = journals
        self._gate = gate
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in a thread, and once more at the end."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            thread = threading.Thread(target=self._watch, args=(connection,))
            thread.start()
            try:
                yield
            finally:
                self._over.set()
                thread.join()

    def _watch(self, connection: psycopg.Connection) -> None:
        opened = 0.0
        while not self._over.wait(SAMPLE_SECONDS):
            if time.monotonic() - opened > GATE_SECONDS:
                self._gate.open()
                opened = time.monotonic()
            self._look(connection)
        self._look(connection)

    def _look(self, connection: psycopg.Connection) -> None:
        """Read the position first: what it has passed must be in the journals by then."""
        [(confirmed,)] = connection.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
            [self._slot],
        ).fetchall()
        sizes = {name: size_of(path) for name, path in self._journals.items()}
        self.samples.append(Sample(Lsn.parse(confirmed), sizes))


def size_of(path: Path) -> int:
    """Return the size of a file, 0 when it is not there."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_size  # noqa: PTH116 - often called
    return 0


def sink_entries(path: Path) -> list[Entry]:
    """Read a file sink as a journal: its lines are effects that are done."""
    lines = path.read_bytes().splitlines(keepends=True)
    ends = accumulate(map(len, lines))
    return [
        Entry(Phase.DONE, 0, 0.0, "", (json.loads(line)["id"],), end)
        for line, end in zip(lines, ends, strict=True)
    ]


def assert_nothing_missing(name: str, entries: Sequence[Entry], expected: Expected) -> None:
    """All was done, and nothing else."""
    done = {identity for entry in entries if entry.phase is Phase.DONE for identity in entry.ids}
    missing = [identity for identity in expected.ids if identity not in done]
    assert not missing, f"{name}: {len(missing)} missing, first {missing[:5]}"
    assert done <= set(expected.ids), f"{name}: {sorted(done - set(expected.ids))[:5]} are unknown"


def assert_position_never_passed_untaken(
    name: str, entries: Sequence[Entry], expected: Expected, samples: Sequence[Sample]
) -> None:
    """When a position was read, all before it had been done.

    For each change: by the first sample whose position has passed it, its line was in the journal.
    """
    positions = [sample.confirmed for sample in samples]
    assert positions == sorted(positions), "the position went backwards"
    done_at: dict[str, int] = {}
    for entry in entries:
        if entry.phase is Phase.DONE:
            for identity in entry.ids:
                done_at.setdefault(identity, entry.end)
    for identity, position in zip(expected.ids, expected.end_lsns, strict=True):
        first = bisect_left(positions, position)
        if first == len(samples):
            break
        assert identity in done_at, f"{name}: {identity} is passed and was never done"
        size = samples[first].sizes[name]
        assert done_at[identity] <= size, (
            f"{name}: {samples[first].confirmed} was confirmed before {identity} was done"
        )


def assert_in_commit_order(name: str, units: Iterable[tuple[str, ...]], expected: Expected) -> None:
    """First effects are in commit order."""
    first = list(dict.fromkeys(identity for unit in units for identity in unit))
    wanted = [identity for identity in expected.ids if identity in set(first)]
    _assert_equal(name, first, wanted)


def assert_in_order_per_key(name: str, ids: Iterable[str], expected: Expected) -> int:
    """First effects are in commit order for each row; return how many rows had several changes."""
    first = {identity: number for number, identity in enumerate(dict.fromkeys(ids))}
    several = 0
    for key, wanted in expected.by_key().items():
        found = sorted((one for one in wanted if one in first), key=first.__getitem__)
        _assert_equal(f"{name}, {key}", found, [one for one in wanted if one in first])
        several += len(found) > 1
    return several


def assert_no_gap_within_a_process(
    name: str, units: Sequence[tuple[str, ...]], expected: Expected, started_at: Lsn
) -> None:
    """A process begins behind the position, and goes on from unit to unit; it may repeat the last.

    Args:
        name: of the handler.
        units: what each effect was about, in the order of the effects.
        expected: what must come.
        started_at: the position when the process began.
    """
    place = expected.first_beyond(started_at)
    last: tuple[str, ...] = ()
    for unit in units:
        if unit != last:
            wanted = tuple(expected.ids[place : place + len(unit)])
            assert unit == wanted, f"{name}: {unit} instead of {wanted}"
            place += len(unit)
        last = unit


def _assert_equal(name: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one == other, f"{name}: number {number} is {one} instead of {other}"


def units_of(
    entries: Iterable[Entry], phase: Phase, pid: int | None = None
) -> list[tuple[str, ...]]:
    """Return what calls were about that have come to a phase, in this order."""
    return [entry.ids for entry in entries if entry.phase is phase and pid in {None, entry.pid}]


def restricted(expected: Expected, ids: Iterable[str]) -> Expected:
    """Return what must come of some changes only."""
    kept = set(ids)
    return Expected([one for one in expected.ids if one in kept], expected.keys)


def settings(text: str, **sections: Mapping[str, Any]) -> str:
    """Add keys to sections of a configuration."""
    for section, content in sections.items():
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in content.items())
        header = f"[{section}]\n"
        assert header in text
        text = text.replace(header, header + lines)
    return text
