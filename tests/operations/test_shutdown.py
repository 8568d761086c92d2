"""The server is shut down under load: it is not kept waiting, and nothing is missing afterwards."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import StartCluster
from tests.operations import verdict
from tests.operations.rig import SETTINGS, STREAM, Rig
from tests.postgres import wait_until

SEED: Final = 90210
DRAIN_SECONDS: Final[float] = STREAM["drain_seconds"]
GRACE_SECONDS: Final = 2.0

SLOW_HANDLERS: Final = """
import asyncio, time
from pathlib import Path
from walstream import Change, Walstream

stream = Walstream()
folder = Path(__file__).parent


def holds() -> bool:
    # Whichever holds first is told: once in-flight is full, the other is given nothing.
    if is_holding := folder.joinpath("hold").exists():
        folder.joinpath("held").touch()
    return is_holding


@stream.on("*.*", name="one")
async def hold(change: Change) -> None:
    while holds():
        await asyncio.sleep(0.01)


@stream.on("*.*", name="threads", concurrency=4)
def hold_a_thread(change: Change) -> None:
    while holds():
        time.sleep(0.01)
"""


@pytest.mark.timeout(180)
def test_a_shutdown_is_not_kept_waiting(private_cluster: StartCluster, tmp_path: Path) -> None:
    """A sample; ``make faults`` does it twenty times."""
    shut_down_again_and_again(private_cluster, tmp_path, 3)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_shutdown_is_not_kept_waiting_in_twenty_times(
    private_cluster: StartCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With handlers that hold changes for as long as it takes, and with some that do not."""
    took = shut_down_again_and_again(private_cluster, tmp_path, 20)
    with capsys.disabled():
        print(f"seconds of pg_ctl stop -m fast: {[round(one, 2) for one in took]}")  # noqa: T201


def shut_down_again_and_again(
    private_cluster: StartCluster, folder: Path, times: int
) -> list[float]:
    """Return how long each shutdown took, in seconds; two in three find changes that are held."""
    took = []
    (folder / "slow.py").write_text(SLOW_HANDLERS)
    with Rig(
        private_cluster(SETTINGS, loopback=True), folder, SEED, transactions_per_second=60
    ) as rig:
        rig.configure(handlers={"app": "slow:stream"})
        rig.start()
        for number in range(times):
            rig.recover()
            if number % 3:
                hold(rig)
            took.append(seconds_to_stop(rig))
            (folder / "hold").unlink(missing_ok=True)
            rig.cluster.start()
        rig.recover()
        rig.load.end()
        rig.settle()
        assert rig.end(signal.SIGTERM) == 0, rig.log_tail()
        expected = verdict.expected_of(rig.twins.records(rig.twins.now()))
    lines = verdict.written(rig.parts())
    verdict.assert_goes_on("the file", [line.identity for line in lines], expected)
    verdict.assert_all_there(lines, expected)
    assert max(took) < DRAIN_SECONDS + GRACE_SECONDS, took
    return took


def hold(rig: Rig) -> None:
    """Let the handlers hold what comes, and wait until they do."""
    held = rig.folder / "held"
    held.unlink(missing_ok=True)
    (rig.folder / "hold").touch()
    rig.mark()
    wait_until(held.exists)


def seconds_to_stop(rig: Rig) -> float:
    begun = time.monotonic()
    rig.cluster.stop("fast")
    return time.monotonic() - begun
