"""Disks and clocks of the machine that walstream runs on."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import StartCluster
from tests.operations import verdict
from tests.operations.rig import JOURNALS, ROLE, SETTINGS, Rig
from tests.postgres import wait_until
from walstream.errors import EX_TEMPFAIL

SEED: Final = 1999
DISK_BYTES: Final = 4 << 20

LIBFAKETIME: Final = (
    Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"),
    Path("/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"),
)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of a few megabytes; where that is not allowed the test is skipped."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)],  # noqa: S607
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@pytest.mark.timeout(120)
def test_a_full_disk_is_waited_out_and_nothing_is_missing(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    """The process gives up with 75 for its supervisor to start again, until there is room."""
    cluster = private_cluster(SETTINGS, loopback=True)
    with small_disk(tmp_path / "disk") as disk, Rig(cluster, tmp_path, SEED) as rig:
        rig.twins.path = disk / "changes.jsonl"
        rig.configure()
        rig.start()
        rig.recover()
        fill(disk / "filling")
        for _ in range(2):
            assert rig.ended() == EX_TEMPFAIL, rig.log_tail()
            assert "No space left on device" in rig.said()
            rig.start()
        (disk / "filling").unlink()
        rig.look_after()
        rig.recover()
        rig.load.end()
        finish(rig)


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_jumps_of_the_machines_clock_change_nothing(
    private_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock only, as ntpd or an administrator sets it: timers go by the monotonic one."""
    library = next((path for path in LIBFAKETIME if path.exists()), None)
    if library is None:
        pytest.skip("needs libfaketime: apt-get install libfaketime")
    clock = tmp_path / "faketime"
    clock.write_text("+0")
    cluster = private_cluster(SETTINGS, loopback=True)
    with Rig(cluster, tmp_path, SEED) as rig:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
        monkeypatch.setenv("FAKETIME_CACHE_DURATION", "1")
        monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        rig.start()
        monkeypatch.undo()
        rig.recover()
        for offset in ("-3600", "+3153600000", "-315360000"):
            clock.write_text(offset)
            wait_until(lambda: is_off_by(rig, float(offset)), 20)  # noqa: B023
            rig.recover()
        assert not rig.codes
        assert rig.log().count('"event":"streaming"') == 1
        rig.load.end()
        finish(rig)


def is_off_by(rig: Rig, offset_seconds: float) -> bool:
    """Whether the process has told the server a time that is wrong by so much."""
    [(off,)] = rig.execute(
        "SELECT extract(epoch FROM reply_time - now())::float8 FROM pg_stat_replication"
        " WHERE usename = %s",
        ROLE,
    )
    return abs(float(off) - offset_seconds) < 60


def finish(rig: Rig) -> None:
    """End the process, and compare what has arrived with what was to come."""
    rig.settle()
    assert rig.end(signal.SIGTERM) == 0, rig.log_tail()
    expected = verdict.expected_of(rig.twins.records(rig.twins.now()))
    lines = verdict.written(rig.parts())
    verdict.assert_goes_on("the file", [line.identity for line in lines], expected)
    verdict.assert_all_there(lines, expected)
    for name in JOURNALS:
        verdict.assert_goes_on(name, rig.journal(name), expected)
    verdict.assert_goes_on("the receiver", rig.endpoint.ids, expected)
