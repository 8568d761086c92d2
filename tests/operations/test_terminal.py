"""What cannot be waited out: a loud stop with the right exit code and sentence, never a gap."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import StartCluster
from tests.operations.rig import PASSWORD, ROLE, SETTINGS, Rig
from tests.operations.standby import Standby
from tests.postgres import Database, wait_until
from tests.proxy import Which
from walstream.cluster import PrivateCluster
from walstream.errors import EX_CONFIG

SEED: Final = 8460

ROW_BYTES: Final = 540_000_000
"""wal2json writes two characters a byte: more than the gigabyte that Postgres allocates."""


@pytest.fixture
def rig(private_cluster: StartCluster, tmp_path: Path) -> Iterator[Rig]:
    """A process that streams."""
    cluster = private_cluster(SETTINGS, loopback=True)
    with Rig(cluster, tmp_path, SEED) as rig:
        rig.start()
        rig.recover()
        yield rig


def drop_slot(rig: Rig) -> None:
    """Drop the slot under the process."""
    rig.proxy.refuse()
    rig.proxy.cut(Which.REPLICATION)
    rig.wait_until_free()
    rig.execute("SELECT pg_drop_replication_slot(%s)", rig.slot)
    rig.proxy.restore()


def test_a_slot_dropped_mid_stream_is_a_loud_stop(rig: Rig) -> None:
    """Also for the process that is started next, and also when it may make the slot."""
    drop_slot(rig)
    stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} was there and is gone")
    rig.configure(slot={"create": True})
    rig.start()
    stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} was there and is gone")
    assert not rig.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", rig.slot)


def test_a_slot_that_max_slot_wal_keep_size_invalidates_is_a_loud_stop(rig: Rig) -> None:
    """While the process hears nothing the server writes more than the slot may hold back."""
    assert rig.process is not None
    rig.process.send_signal(signal.SIGSTOP)
    rig.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    rig.execute("SELECT pg_reload_conf()")
    rig.execute("CREATE TABLE marks.filling (n int)")

    def is_lost() -> bool:
        rig.execute("INSERT INTO marks.filling SELECT generate_series(1, 100000)")
        rig.execute("SELECT pg_switch_wal()")
        rig.execute("CHECKPOINT")
        return bool(
            rig.execute(
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND wal_status = 'lost'",
                rig.slot,
            )
        )

    wait_until(is_lost, 30)
    rig.process.send_signal(signal.SIGCONT)
    stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} is lost", "max_slot_wal_keep_size")
    rig.start()
    stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} is lost", "max_slot_wal_keep_size")


def test_a_role_that_may_not_enter_any_more_is_a_loud_stop(rig: Rig) -> None:
    """In a sentence that says where to look, and without the password."""
    rig.execute(f"ALTER ROLE {ROLE} NOLOGIN")
    rig.proxy.cut()
    stopped_loudly(rig, EX_CONFIG, "is not permitted to log in", "pg_hba.conf")
    assert PASSWORD not in rig.log()


def test_another_cluster_under_the_same_address_is_refused(
    rig: Rig, private_cluster: StartCluster
) -> None:
    """It has a slot of that name; by a process that was connected, and by one that starts anew."""
    # A copy of the template would be the same cluster: this one comes from initdb.
    other = private_cluster(SETTINGS, loopback=True, encoding="UTF8")
    make_like(other, rig)
    rig.proxy.lead_to(other.loopback_conninfo())
    rig.proxy.cut()
    stopped_loudly(rig, EX_CONFIG, "the server is the cluster", "check the dsn")
    rig.start()
    stopped_loudly(rig, EX_CONFIG, "the server is the cluster", "check the dsn")


def make_like(other: PrivateCluster, rig: Rig) -> None:
    """Give a cluster the role, the database and the slot of another one."""
    with Database(other.conninfo()) as database:
        database.execute(f"CREATE ROLE {ROLE} LOGIN REPLICATION PASSWORD '{PASSWORD}'")
        database.execute(f"CREATE DATABASE {rig.database.name} TEMPLATE template0 ENCODING 'UTF8'")
    with Database(other.conninfo(), rig.database.name) as database:
        database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", rig.slot)


def test_a_promoted_standby_without_the_slot_is_refused(rig: Rig) -> None:
    """By the process that was connected to the primary, and by one that might make the slot."""
    with Standby(rig.cluster) as standby:
        fail_over(rig, standby)
        stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} was there and is gone")
        rig.configure(slot={"create": True})
        rig.start()
        stopped_loudly(rig, EX_CONFIG, f"the slot {rig.slot} was there and is gone")
        with Database(standby.conninfo()) as database:
            assert not database.execute("SELECT 1 FROM pg_replication_slots")


def test_a_slot_made_on_the_promoted_standby_is_refused_as_a_gap(rig: Rig) -> None:
    """What was committed between the last confirmation and the new slot is nowhere."""
    with Standby(rig.cluster) as standby:
        fail_over(rig, standby)
        rig.ended()
        with Database(standby.conninfo(), rig.database.name) as database:
            database.execute("INSERT INTO marks.markers VALUES (-1)")
            database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", rig.slot)
        rig.start()
        stopped_loudly(rig, EX_CONFIG, "was confirmed last", "--accept-gap")
        rig.start("--accept-gap", "--until", "now")
        assert rig.ended() == 0, rig.log_tail()


def test_a_standby_promoted_behind_what_was_confirmed_is_refused(rig: Rig) -> None:
    """The last changes that were delivered are not in its history."""
    with Standby(rig.cluster) as standby:
        standby.stop()
        rig.recover()
        fail_over(rig, standby)
        stopped_loudly(rig, EX_CONFIG, "that were delivered are not in this database")
        rig.start()
        stopped_loudly(rig, EX_CONFIG, "that were delivered are not in this database")


def fail_over(rig: Rig, standby: Standby) -> None:
    """Lose the primary, promote the standby, and let the address lead to it.

    A standby that runs has everything by then.
    """
    rig.load.end()
    rig.settle()
    if standby.running:
        standby.catch_up(rig.twins.now())
    rig.proxy.refuse()
    rig.proxy.cut()
    rig.cluster.stop("immediate")
    standby.start()
    standby.promote()
    rig.proxy.lead_to(standby.loopback_conninfo())
    rig.proxy.restore()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_row_that_wal2json_cannot_write_is_recognised(rig: Rig) -> None:
    """The same error at the same position; what is behind it comes once the slot is advanced."""
    rig.load.end()
    rig.execute("CREATE TABLE marks.large (id int PRIMARY KEY, content bytea)")
    rig.settle()
    marker = rig.mark()
    rig.wait_for(marker)
    rig.execute("INSERT INTO marks.large SELECT 1, convert_to(repeat('x', %s), 'UTF8')", ROW_BYTES)
    behind = rig.twins.now()
    said = stopped_loudly(rig, EX_CONFIG, "invalid memory alloc request size", seconds=200)
    assert "times in a row, each time after" in said
    assert "too large for wal2json" in said
    rig.start()
    stopped_loudly(rig, EX_CONFIG, "times in a row, each time after", seconds=200)
    rig.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", rig.slot, behind)
    rig.start("--accept-gap")
    rig.recover()


def stopped_loudly(rig: Rig, code: int, *sentences: str, seconds: float = 30) -> str:
    """The process ends by itself, with an exit code, and says why; return what it has said."""
    found = rig.ended(seconds)
    said = rig.said()
    assert found == code, said
    for sentence in sentences:
        assert sentence in said, said
    assert "Traceback" not in said, said
    return said
