"""An hour of mixed load: the process holds no more at its end than soon after its beginning."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import pytest

from tests.conftest import StartCluster
from tests.operations.rig import SETTINGS, Rig

SECONDS: Final = float(os.environ.get("WALSTREAM_SOAK_SECONDS") or 3600)
SEED: Final = int(os.environ.get("WALSTREAM_SOAK_SEED") or 60)

WARM_UP: Final = 0.2
"""The part of the time in which memory may grow."""

TRANSACTIONS_PER_SECOND: Final = 40.0
LOOK_SECONDS: Final = 2.0
ROTATE_SECONDS: Final = 60.0
FLAT_MEGABYTES: Final = 10.0
MOMENTARY_DESCRIPTORS: Final = 2
"""Open for a moment: the state file while it is written, a sink's file that follows a rename."""

LAG_SECONDS: Final = 5.0
"""Within so long after the end of the load everything is confirmed."""


class Sample(NamedTuple):
    """What the process held at a moment."""

    seconds: float
    resident_megabytes: float
    descriptors: int
    threads: int


@pytest.mark.soak
@pytest.mark.timeout(int(SECONDS) + 600)
def test_memory_and_descriptors_are_flat_and_the_lag_returns_to_zero(
    private_cluster: StartCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For WALSTREAM_SOAK_SECONDS, with a file, a webhook and two handlers."""
    cluster = private_cluster(SETTINGS, loopback=True)
    with Rig(cluster, tmp_path, SEED, transactions_per_second=TRANSACTIONS_PER_SECOND) as rig:
        rig.execute("SELECT pg_drop_replication_slot(%s)", rig.twins._twin)  # it would keep the WAL
        rig.start()
        samples = observe(rig)
        rig.load.end()
        begun = time.monotonic()
        rig.settle()
        lag_seconds = time.monotonic() - begun
        changes = len(rig.endpoint.ids)
        assert rig.end(signal.SIGTERM) == 0, rig.log_tail()
    warm = [sample for sample in samples if sample.seconds > SECONDS * WARM_UP]
    memory = [sample.resident_megabytes for sample in warm]
    descriptors = [sample.descriptors for sample in warm]
    with capsys.disabled():
        tenths = [round(one, 1) for one in memory[:: max(1, len(memory) // 10)]]
        print(  # noqa: T201 - who waits for an hour wants to see what came of it
            f"{rig.load.begun} transactions, {changes} changes in {SECONDS:.0f} seconds;"
            f" resident {min(memory):.1f} to {max(memory):.1f} MB after warm-up: {tenths};"
            f" descriptors {dict(Counter(descriptors))}; threads"
            f" {sorted({sample.threads for sample in warm})}; lag zero after {lag_seconds:.1f} s"
        )
    assert max(memory) - memory[0] < FLAT_MEGABYTES, samples[:: max(1, len(samples) // 40)]
    third = len(descriptors) // 3
    assert median(descriptors[:third]) == median(descriptors[-third:])
    assert max(descriptors) - min(descriptors) <= MOMENTARY_DESCRIPTORS, Counter(descriptors)
    assert lag_seconds < LAG_SECONDS


def observe(rig: Rig) -> list[Sample]:
    """Sample until the time is over; what has been written is moved away now and then."""
    samples = []
    begun = rotated = time.monotonic()
    while (now := time.monotonic()) - begun < SECONDS:
        assert rig.process is not None
        assert rig.process.poll() is None, rig.log_tail()
        samples.append(sample(rig.process.pid, now - begun))
        if now - rotated > ROTATE_SECONDS:
            rotated = now
            rig.recover()
            rig.forget()
        time.sleep(LOOK_SECONDS)
    return samples


def sample(pid: int, seconds: float) -> Sample:
    """Look at a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Sample(
        seconds,
        pages * resource.getpagesize() / 1e6,
        len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - names only
        len(os.listdir(f"/proc/{pid}/task")),  # noqa: PTH208 - as above
    )
