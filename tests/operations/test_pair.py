"""An active process and one that stands by: kill -9 the active, and the other one goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.conftest import StartCluster
from tests.operations import verdict
from tests.operations.load import Load
from tests.operations.rig import configuration
from tests.oracle import ROOT, Twins, _environment
from tests.postgres import create_database, wait_until
from tests.proxy import Proxy
from walstream.cluster import PrivateCluster
from walstream.lsn import Lsn

TAKEOVER_SECONDS: Final = 5.0
SEED: Final = 3127
ROUNDS: Final = 3
TRANSACTIONS: Final = 15
"""So many are committed at least while a process is the active one."""

SETTINGS: Final = {"wal_sender_timeout": "2s", "autovacuum": "off"}


class Member:
    """One of the pair, as if on a machine of its own: with its own file, state and network."""

    def __init__(self, name: str, slot: str, dsn: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}.jsonl"
        self.lines_before = 0
        self._dsn = dsn
        self._slot = slot
        self._folder = folder
        self._log = folder / f"{name}.log"
        self._config = folder / f"{name}.toml"
        self._opened = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.proxy = self._opened.enter_context(Proxy(self._dsn))
        sections: dict[str, dict[str, Any]] = {
            "postgres": {"dsn": self.proxy.dsn(self._dsn), "application_name": self.name},
            "slot": {"name": self._slot, "shared": True},
            "state": {"path": str(self._folder / f"{self.name}.json")},
            "sinks.changes": {"type": "file", "path": str(self.path)},
        }
        self._config.write_text(configuration(sections, ["changes"]))
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._opened.close()

    def start(self) -> None:
        """Start, or start again after `kill`."""
        self.lines_before = self.lines()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "walstream", "run", "-c", str(self._config)],
                cwd=ROOT,
                env=_environment(self._folder),
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def has_said(self, event: str) -> bool:
        """Whether an event is in its log, since it was started last."""
        log = self._log.read_text()
        assert self._process is not None
        assert self._process.poll() is None, log[-4000:]
        return event in log

    def lines(self) -> int:
        """Count the whole lines that it has written."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["killed", pytest.param("vanished", marks=pytest.mark.faults)])
def test_the_standby_goes_on_where_the_active_one_ended(
    private_cluster: StartCluster, tmp_path: Path, how: str
) -> None:
    """Time and again, the other way round each time, within five seconds and without a gap.

    A process that is killed frees the slot at once. Of a machine that vanishes the server hears
    nothing: it frees the slot after wal_sender_timeout.
    """
    cluster = private_cluster(SETTINGS, loopback=True)
    lives: list[tuple[Path, int, int]] = []
    took = []
    with pair(cluster, tmp_path) as (twins, load, *members):
        active, standby = members
        active.start()
        wait_until(lambda: active.has_said("streaming"))
        for _ in range(ROUNDS):
            standby.start()
            wait_until(lambda: standby.has_said("standing_by"))  # noqa: B023
            enough = load.begun + TRANSACTIONS
            wait_until(lambda: load.begun > enough)  # noqa: B023
            if how == "vanished":
                active.proxy.stall()
            active.kill()
            took.append(seconds_without_streaming(twins, standby))
            lives.append((active.path, active.lines_before, active.lines()))
            active.proxy.restore()
            active, standby = standby, active
        load.end()
        until = twins.now()
        wait_until(lambda: Lsn.parse(twins.confirmed()) >= Lsn.parse(until), 20)
        active.kill()
        lives.append((active.path, active.lines_before, active.lines()))
        expected = verdict.expected_of(twins.records(until))
    print(f"{how}: taken over after {took} seconds")  # noqa: T201 - pytest shows it
    assert max(took) < TAKEOVER_SECONDS
    written = {path: verdict.written([path]) for path, _, _ in lives}
    in_turn = [line for path, start, end in lives for line in written[path][start:end]]
    verdict.assert_goes_on("the pair", [line.identity for line in in_turn], expected)
    verdict.assert_all_there(in_turn, expected)


@contextmanager
def pair(cluster: PrivateCluster, folder: Path) -> Iterator[tuple[Twins, Load, Member, Member]]:
    """Make a slot, a workload, and two processes that are not started yet."""
    with (
        create_database(cluster.conninfo(), "template0") as database,
        Twins(database, cluster.programs, folder) as twins,
        Load(database.dsn, SEED, 40) as load,
    ):
        dsn = cluster.loopback_conninfo(database.name)
        with (
            Member("one", twins._slot, dsn, folder) as one,
            Member("other", twins._slot, dsn, folder) as other,
        ):
            yield twins, load, one, other


def seconds_without_streaming(twins: Twins, standby: Member) -> float:
    """Wait until the standby streams; return how long after the slot was free."""
    freed = 0.0

    def streams() -> bool:
        nonlocal freed
        holder = twins._database.execute(
            "SELECT application_name FROM pg_replication_slots JOIN pg_stat_replication"
            " ON pid = active_pid WHERE slot_name = %s",
            twins._slot,
        )
        is_free_or_taken = holder in ([], [(standby.name,)])
        freed = freed or (time.monotonic() if is_free_or_taken else 0.0)
        return standby.has_said('"streaming"')

    wait_until(streams, 20)
    return time.monotonic() - freed
