"""Some hundred faults one after another, by a seed: nothing is missing, and order is kept."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias

import pytest

from tests.conftest import StartCluster
from tests.operations import verdict
from tests.operations.rig import JOURNALS, SETTINGS, Rig
from tests.operations.scripted import script

SEED: Final = int(os.environ.get("WALSTREAM_FAULTS_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on the workload, the faults and the moments; left to chance unless it is given."""

MANY: Final = int(os.environ.get("WALSTREAM_FAULTS") or 500)
FEW: Final = 20

Say: TypeAlias = Callable[[str], None]


@pytest.mark.timeout(180)
def test_nothing_is_missing_after_a_few_faults(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    """A sample; ``make faults`` plays as many as WALSTREAM_FAULTS says."""
    play(private_cluster, tmp_path, FEW, print)


@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
def test_nothing_is_missing_after_hundreds_of_faults(
    private_cluster: StartCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any of them can come while walstream has not yet recovered from the one before."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)  # noqa: T201 - who waits for minutes wants to see something

    play(private_cluster, tmp_path, MANY, say)


def play(private_cluster: StartCluster, folder: Path, count: int, say: Say) -> None:
    """Let faults come; then look at what has arrived.

    Args:
        private_cluster: starts the server.
        folder: for what the process writes.
        count: how many.
        say: tells the seed, how far it is, and what was played.
    """
    say(f"WALSTREAM_FAULTS_SEED={SEED} WALSTREAM_FAULTS={count}")
    begun = time.monotonic()
    with Rig(private_cluster(SETTINGS, loopback=True), folder, SEED) as rig, rig.watched():
        rig.start()
        rig.recover()
        times = suffer(rig, count, say)
        rig.load.end()
        rig.set_clock(0)
        rig.recover()
        rig.settle()
        assert rig.end(signal.SIGTERM) == 0, rig.log_tail()
        suffered = time.monotonic() - begun
        until = rig.twins.now()
        records = rig.twins.records(until)
    assert_kept(rig, verdict.expected_of(records))
    say(report(rig, times))
    say(f"{count} faults in {suffered:.0f} seconds, compared by {time.monotonic() - begun:.0f}")


def suffer(rig: Rig, count: int, say: Say) -> dict[str, list[float]]:
    """Play the faults; return how long it took to recover, by the name of the last one."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    times: defaultdict[str, list[float]] = defaultdict(list)
    for number, fault in enumerate(script(chance, count), start=1):
        rig.look_after()
        try:
            fault.play(rig, chance)
            if chance.random() < 0.6 or number == count:
                times[fault.name].append(rig.recover())
            else:
                time.sleep(chance.uniform(0, 0.2))
                times.setdefault(fault.name, [])
        except BaseException:
            say(f"failed at fault {number}: {fault.name}")
            raise
        if number % 50 == 0:
            say(f"{number} faults, {rig.load.begun} transactions, exits {dict(rig.codes)}")
    return times


def assert_kept(rig: Rig, expected: verdict.Expected) -> None:
    """What the suite is about."""
    lines = verdict.written(rig.parts())
    verdict.assert_goes_on("the file", [line.identity for line in lines], expected)
    verdict.assert_all_there(lines, expected)
    verdict.assert_comes_again_from_the_begin(lines, expected)
    verdict.assert_never_ahead(rig.looks, lines, expected)
    for name in JOURNALS:
        verdict.assert_goes_on(name, rig.journal(name), expected)
    verdict.assert_goes_on("the receiver", rig.endpoint.ids, expected)
    assert "Traceback" not in rig.log()


def report(rig: Rig, times: dict[str, list[float]]) -> str:
    """Say what was played."""
    lines = [f"{rig.load.begun} transactions, exits {dict(rig.codes)}, {len(rig.looks)} looks"]
    for name, taken in sorted(times.items()):
        figures = f"{median(taken):6.2f} s, at most {max(taken):6.2f} s" if taken else ""
        lines.append(f"{name:55} waited for {len(taken):3}: {figures}")
    return "\n".join(lines)
