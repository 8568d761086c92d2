"""A stop is a stop, however the network and the server are."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.conftest import StartCluster
from tests.operations.rig import SETTINGS, STREAM, Rig
from tests.postgres import wait_until
from tests.proxy import Which

SEED: Final = 15

FINISH_SECONDS: Final = 5.0
"""How long the server gets to read the last status update."""

CANCEL_SECONDS: Final = 5.0
"""How long psycopg waits until the server has taken note that a query is not wanted any more."""

LIMIT_SECONDS: Final[float] = STREAM["drain_seconds"] + CANCEL_SECONDS + FINISH_SECONDS + 2.0


@pytest.fixture(scope="module")
def rig(
    module_private_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    cluster = module_private_cluster(SETTINGS, loopback=True)
    with Rig(cluster, tmp_path_factory.mktemp("stopping"), SEED) as rig:
        yield rig


def nothing_passes(rig: Rig) -> None:
    rig.proxy.stall()


def nothing_passes_for_replication(rig: Rig) -> None:
    rig.proxy.stall(Which.REPLICATION)


def nobody_answers(rig: Rig) -> None:
    before = rig.said().count("reconnecting")
    rig.proxy.stall()
    rig.proxy.cut()
    wait_until(lambda: rig.said().count("reconnecting") > before)


def nobody_listens(rig: Rig) -> None:
    before = rig.said().count("reconnecting")
    rig.proxy.refuse()
    rig.proxy.cut()
    wait_until(lambda: rig.said().count("reconnecting") > before + 2)


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault",
    [
        nothing_passes,
        nothing_passes_for_replication,
        nobody_answers,
        nobody_listens,
    ],
)
def test_a_stop_in_the_middle_of_a_fault_ends_in_time(
    rig: Rig, fault: Callable[[Rig], None]
) -> None:
    """As if nothing were wrong, but for the time that it takes to say goodbye to nobody."""
    rig.start()
    rig.recover()
    fault(rig)
    begun = time.monotonic()
    code = rig.end(signal.SIGTERM)
    took = time.monotonic() - begun
    rig.proxy.restore()
    assert code == 0, rig.said()
    assert took < LIMIT_SECONDS, rig.said()
