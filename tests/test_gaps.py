"""After a failover, a restore or a dropped slot nothing goes on silently over what is missing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.command_line import CommandLine, slot_name
from tests.postgres import Database, wait_until
from walstream.errors import EX_CONFIG


class Restarted(CommandLine):
    """``walstream run`` with a state file, several times."""

    def __init__(self, folder: Path, database: Database) -> None:
        super().__init__(folder)
        self.database = database
        self.slot = slot_name()
        self.state = folder / "state.json"
        self.write(
            "walstream.toml",
            f"""
            [postgres]
            dsn = "{database.dsn}"
            [slot]
            name = "{self.slot}"
            create = true
            [state]
            path = "state.json"
            [[routes]]
            table = "public.orders"
            to = "out"
            [sinks.out]
            type = "file"
            path = "out.jsonl"
            """,
        )

    def insert(self, number: int) -> None:
        self.database.execute("INSERT INTO orders VALUES (%s)", number)

    def ids(self) -> list[int]:
        lines = (self.folder / "out.jsonl").read_text().splitlines()
        return [json.loads(line)["row"]["id"] for line in lines]

    def stream_one(self, number: int, *options: str) -> None:
        """Run until a row is delivered and its position recorded."""
        with self.running("run", *options) as process:
            self.wait_for("streaming")
            self.insert(number)
            wait_until(lambda: number in self.ids())
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0

    def recorded(self) -> dict[str, object]:
        content: dict[str, object] = json.loads(self.state.read_text())
        return content

    def pretend(self, **changes: object) -> None:
        self.state.write_text(json.dumps(self.recorded() | changes))

    def confirmed(self) -> int:
        ((position,),) = self.database.execute(
            "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s",
            self.slot,
        )
        return int(position)

    def drop_slot(self) -> None:
        self.database.execute("SELECT pg_drop_replication_slot(%s)", self.slot)


@pytest.fixture
def service(tmp_path: Path, database: Database) -> Restarted:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    return Restarted(tmp_path, database)


def test_a_slot_that_was_dropped_is_not_made_again_unasked(service: Restarted) -> None:
    """Although the configuration says ``create``: that was for the first start."""
    service.stream_one(1)
    service.drop_slot()
    service.insert(2)
    refused = service.run("run")
    assert refused.returncode == EX_CONFIG
    assert f"SlotLost: the slot {service.slot} was there and is gone" in refused.stderr
    assert "--accept-gap" in refused.stderr
    service.stream_one(3, "--accept-gap")
    assert service.ids() == [1, 3]
    service.stream_one(4)
    assert service.ids() == [1, 3, 4]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"systemid": "7"}, "SlotLost: the server is the cluster"),
        ({"timeline": 9}, "HistoryForked: the server is on timeline 1, which does not go on"),
        ({"flush_lsn": "FFFF/0"}, "HistoryForked: the server stands at"),
        ({"slot": "other"}, "is that of the slot other"),
    ],
    ids=str,
)
def test_another_server_or_an_older_copy_is_refused(
    service: Restarted, changes: dict[str, object], says: str
) -> None:
    service.stream_one(1)
    service.pretend(**changes)
    refused = service.run("run")
    assert refused.returncode == EX_CONFIG
    assert says in refused.stderr


def test_what_is_accepted_is_one_gap_of_a_start_that_streams(service: Restarted) -> None:
    """A start that comes to nothing leaves the next one as careful as it was."""
    service.stream_one(1)
    before = service.recorded()
    service.drop_slot()
    service.environment["WALSTREAM_SLOT_CREATE"] = "false"
    refused = service.run("run", "--accept-gap")
    assert (refused.returncode, "SlotMissing" in refused.stderr) == (EX_CONFIG, True)
    assert service.recorded() == before


def test_a_slot_that_was_made_anew_is_refused(service: Restarted) -> None:
    """It stands beyond what was confirmed, and what was committed in between is missing."""
    service.stream_one(1)
    service.drop_slot()
    service.insert(2)
    assert service.run("slot", "create").returncode == 0
    refused = service.run("run")
    assert refused.returncode == EX_CONFIG
    assert f"SlotLost: the slot {service.slot} stands at" in refused.stderr
    service.stream_one(3, "--accept-gap")
    service.stream_one(4)
    assert service.ids() == [1, 3, 4]


def test_a_slot_that_was_advanced_by_walstreams_own_command_goes_on(service: Restarted) -> None:
    service.stream_one(1)
    service.insert(2)
    assert service.run("slot", "advance", "now").returncode == 0
    service.stream_one(3)
    assert service.ids() == [1, 3]


def test_what_another_process_of_the_same_service_has_confirmed_is_no_gap(
    service: Restarted,
) -> None:
    service.stream_one(1)
    service.insert(2)
    ((position,),) = service.database.execute("SELECT pg_current_wal_lsn()::text")
    service.database.execute("SELECT pg_replication_slot_advance(%s, %s)", service.slot, position)
    assert service.run("run", "--until", "now").returncode == EX_CONFIG
    service.environment["WALSTREAM_SLOT_SHARED"] = "true"
    service.stream_one(3)
    [moved] = [line for line in service.log() if line["event"] == "slot_moved"]
    assert moved["confirmed_flush_lsn"] == position
    assert service.ids() == [1, 3]


def test_what_is_confirmed_is_recorded_also_when_the_process_is_killed(service: Restarted) -> None:
    with service.running("run") as process:
        service.wait_for("streaming")
        service.insert(1)
        ((position,),) = service.database.execute("SELECT pg_current_wal_lsn()::text")
        wait_until(lambda: _lsn(str(service.recorded()["flush_lsn"])) >= _lsn(position))
        process.kill()
    service.stream_one(2)
    assert set(service.ids()) == {1, 2}


def test_nothing_is_confirmed_before_it_is_recorded(service: Restarted) -> None:
    """Or a start after a kill would take the slot's own position for somebody else's."""
    for number in range(1, 6):
        with service.running("run") as process:
            service.wait_for("streaming")
            service.insert(number)
            wait_until(lambda: service.confirmed() > 0 and service.ids()[-1:] == [number])  # noqa: B023
            before = service.confirmed()
            wait_until(lambda: service.confirmed() > before)  # noqa: B023
            process.kill()
        assert service.confirmed() <= _lsn(str(service.recorded()["flush_lsn"]))


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)
