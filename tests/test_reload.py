"""SIGHUP: other routes and sinks while it streams, all of them or none, and nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine, slot_name
from tests.postgres import Database, wait_until


class Service:
    """``walstream run`` on the orders of a database, whose configuration is written anew."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.cli = CommandLine(folder)
        self.database = database
        self.folder = folder
        self.slot = slot_name()
        self.process: subprocess.Popen[str]

    def configure(self, routes: dict[str, str], more: str = "") -> None:
        """Write a file with a route for each sink: its name, and the rest of the route."""
        sinks = "".join(
            f'[[routes]]\nto = "{name}"\n{route}\n'
            f'[sinks.{name}]\ntype = "file"\npath = "{name}.jsonl"\n'
            for name, route in routes.items()
        )
        self.cli.write(
            "walstream.toml",
            f'[postgres]\ndsn = "{self.database.dsn}"\n'
            f'[slot]\nname = "{self.slot}"\ncreate = true\n{sinks}{more}',
        )

    @contextmanager
    def running(self, app: str = "") -> Iterator[None]:
        with self.cli.running("run", *([app] if app else [])) as self.process:
            self.cli.wait_for("streaming")
            yield
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(20) == 0

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def events(self, name: str) -> list[dict[str, object]]:
        return [line for line in self.cli.log() if line["event"] == name]

    def ids(self, sink: str) -> list[int]:
        path = self.folder / f"{sink}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["row"]["id"] for line in lines]

    def walsender(self) -> Any:
        ((pid,),) = self.database.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", self.slot
        )
        return pid


@pytest.fixture
def service(tmp_path: Path, database: Database) -> Service:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY)")
    return Service(tmp_path, database)


ORDERS = 'table = "public.orders"'
NOTES = 'table = "public.notes"'


@contextmanager
def inserting(database: Database, table: str = "orders") -> Iterator[Callable[[], int]]:
    """Insert row after row; yields a function that says how many there are."""
    done, count = threading.Event(), 0

    def work() -> None:
        nonlocal count
        while not done.is_set():
            count += 1
            database.execute(f"INSERT INTO {table} VALUES ({count})")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: count
    finally:
        done.set()
        thread.join()


def test_other_routes_hold_from_one_transaction_on_without_leaving_the_stream(
    service: Service,
) -> None:
    service.configure({"before": ORDERS})
    with service.running():
        walsender = service.walsender()
        with inserting(service.database) as count:
            wait_until(lambda: len(service.ids("before")) > 20)
            service.configure({"after": ORDERS, "both": ORDERS + '\nwhere = "id=gt.0"'})
            service.reload()
            wait_until(lambda: len(service.ids("after")) > 20)
        wait_until(lambda: service.ids("after")[-1] == count())
        assert service.walsender() == walsender
    before, after = service.ids("before"), service.ids("after")
    assert before + after == list(range(1, count() + 1))
    assert service.ids("both") == after
    assert len(service.events("streaming")) == len(service.events("stream_ended")) == 1
    [reloaded] = service.events("reloaded")
    assert (reloaded["routes"], reloaded["sinks"]) == (2, 2)
    [stopped] = service.events("stopped")
    assert stopped["changes"] == count()


def test_routes_on_other_tables_begin_the_stream_anew_from_where_it_was(service: Service) -> None:
    service.configure({"before": ORDERS})
    with service.running():
        with inserting(service.database) as count:
            wait_until(lambda: len(service.ids("before")) > 20)
            service.configure({"before": ORDERS, "notes": NOTES})
            service.reload()
            service.cli.wait_for("reloaded")
            service.database.execute("INSERT INTO notes VALUES (7)")
            wait_until(lambda: service.ids("notes"))
        wait_until(lambda: service.ids("before")[-1] == count())
    assert service.ids("before") == list(range(1, count() + 1))
    assert service.ids("notes") == [7]
    [reconnecting] = service.events("reconnecting")
    assert (reconnecting["reason"], reconnecting["pause_seconds"]) == ("RoutesChanged", 0.0)


@pytest.mark.parametrize(
    ("routes", "more", "says"),
    [
        ({"other": ORDERS}, "[stream]\nunknown = 1", "stream.unknown: is not a key"),
        ({"other": 'table = "public.ordres"'}, "", "public.ordres does not exist"),
        ({"other": ORDERS + '\nwhere = "id=eq.x"'}, "", "invalid input syntax for type integer"),
        ({"other": ORDERS}, "[stream]\ndrain_seconds = 3", "stream: has changed, which takes a"),
        ({"missing/other": ORDERS}, "", "is not TOML"),
    ],
)
def test_what_is_wrong_is_refused_whole(
    service: Service, routes: dict[str, str], more: str, says: str
) -> None:
    service.configure({"before": ORDERS})
    with service.running():
        service.configure(routes, more)
        service.reload()
        refused = service.cli.wait_for("reload_refused")
        assert says in str(refused["error"])
        service.database.execute("INSERT INTO orders VALUES (1)")
        wait_until(lambda: service.ids("before") == [1])
    assert not (service.folder / "other.jsonl").exists()


def test_sinks_that_cannot_be_opened_leave_all_as_it_was(service: Service) -> None:
    service.configure({"before": ORDERS, "gone": ORDERS})
    with service.running():
        (service.folder / "taken.jsonl").mkdir()
        service.configure({"before": ORDERS, "new": ORDERS, "taken": ORDERS})
        service.reload()
        refused = service.cli.wait_for("reload_refused")
        assert "taken" in str(refused["error"])
        service.database.execute("INSERT INTO orders VALUES (1)")
        wait_until(lambda: service.ids("before") == service.ids("gone") == [1])
        (service.folder / "taken.jsonl").rmdir()
        service.reload()
        service.cli.wait_for("reloaded")
        service.database.execute("INSERT INTO orders VALUES (2)")
        wait_until(lambda: service.ids("new") == service.ids("taken") == [2])
    assert (service.ids("before"), service.ids("gone")) == ([1, 2], [1])


def test_the_log_level_changes_with_it(service: Service) -> None:
    service.configure({"before": ORDERS})
    with service.running():
        service.configure({"before": ORDERS}, '[log]\nlevel = "error"')
        service.reload()
        service.database.execute("INSERT INTO orders VALUES (1)")
        wait_until(lambda: service.ids("before") == [1])
        service.configure({"before": 'table = "public.ordres"'}, '[log]\nlevel = "error"')
        service.reload()
        service.cli.wait_for("reload_refused")
    assert not service.events("stopped")


STUCK = """
import asyncio, pathlib
from walstream import Change, Walstream

stream = Walstream()

@stream.on("public.orders", attempts=1000000)
async def stuck(change: Change) -> None:
    if change.row["id"] == 1 and not pathlib.Path("free").exists():
        raise RuntimeError
"""


def test_a_handler_that_fails_again_and_again_does_not_keep_it_from_reloading(
    service: Service,
) -> None:
    """What it has not taken comes again, and the reload is the way to mend another route."""
    (service.folder / "handlers.py").write_text(STUCK)
    quick = "[stream]\ndrain_seconds = 1\n[handlers]\nmax_backoff_seconds = 0.1"
    service.configure({"before": ORDERS}, quick)
    with service.running("handlers:stream"):
        service.database.execute("INSERT INTO orders VALUES (1)")
        service.cli.wait_for("delivery_retried")
        service.configure({"after": ORDERS}, quick)
        service.reload()
        service.cli.wait_for("reloaded")
        (service.folder / "free").touch()
        service.database.execute("INSERT INTO orders VALUES (2)")
        wait_until(lambda: service.ids("after") == [1, 2])


def test_quiet_files_are_reopened(service: Service) -> None:
    service.configure({"before": ORDERS})
    with service.running():
        path = service.folder / "before.jsonl"
        path.rename(service.folder / "before.jsonl.1")
        service.reload()
        wait_until(path.exists)
        service.database.execute("INSERT INTO orders VALUES (1)")
        wait_until(lambda: service.ids("before") == [1])
