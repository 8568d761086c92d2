"""Clients over a reload: who is there goes on, and nothing is read under rules that are gone."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, LiveService
from walstream.testing import Database

PLAIN = '[[routes]]\ntable = "public.people"\nto = "live"'
MASKED = PLAIN + '\ncolumns = { mask = { email = "redact" } }'
OTHER = '[[routes]]\ntable = "public.orders"\nto = "log"'


def configuration(dsn: str, slot: str, routes: Sequence[str], journal: str) -> str:
    return f"""
[postgres]
dsn = "{dsn}"
[slot]
name = "{slot}"
create = true
[http]
listen = "127.0.0.1:0"
{chr(10).join(routes)}
[sinks.live]
type = "live"
[sinks.log]
type = "file"
path = "log.jsonl"
{journal}
{ANYBODY}
"""


@pytest.mark.parametrize("journal", ["", '[journal]\npath = "journal.sqlite3"'])
def test_what_was_kept_before_a_mask_is_not_read_after_it(
    journal: str, database: Database, tmp_path: Path
) -> None:
    """A client that is there goes on, masked; one that asks for what was before gets a reset."""
    database.execute("CREATE TABLE people (id int PRIMARY KEY, email text)")
    command_line, slot = CommandLine(tmp_path), slot_name()
    command_line.write("walstream.toml", configuration(database.dsn, slot, [PLAIN], journal))
    parameters = [("table", "public.people")]
    with command_line.running("run") as process:
        service = LiveService(str(command_line.wait_for("http_listening")["address"]))
        command_line.wait_for("streaming")
        with service.stream(parameters) as events:
            begin = next(events).id
            database.execute("INSERT INTO people VALUES (1, 'ada@example.org')")
            assert next(events).content["row"]["email"] == "ada@example.org"
            command_line.write(
                "walstream.toml", configuration(database.dsn, slot, [MASKED], journal)
            )
            process.send_signal(signal.SIGHUP)
            command_line.wait_for("reloaded")
            reset = next(events)
            assert (reset.name, reset.content["reason"]) == ("reset", "changed")
            database.execute("INSERT INTO people VALUES (2, 'bob@example.org')")
            assert next(events).content["row"]["email"] == "[redacted]"
        with service.stream([*parameters, ("since", begin)]) as events:
            assert [next(events).name, next(events).name] == ["streaming", "reset"]
        process.terminate()
        process.wait(20)


def test_a_reload_of_other_routes_tells_clients_nothing(database: Database, tmp_path: Path) -> None:
    """What was kept can be read on."""
    database.execute("CREATE TABLE people (id int PRIMARY KEY, email text)")
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    command_line, slot = CommandLine(tmp_path), slot_name()
    command_line.write("walstream.toml", configuration(database.dsn, slot, [PLAIN], ""))
    parameters = [("table", "public.people")]
    with command_line.running("run") as process:
        service = LiveService(str(command_line.wait_for("http_listening")["address"]))
        command_line.wait_for("streaming")
        with service.stream(parameters) as events:
            begin = next(events).id
            database.execute("INSERT INTO people VALUES (1)")
            assert next(events).name == "insert"
            command_line.write(
                "walstream.toml", configuration(database.dsn, slot, [PLAIN, OTHER], "")
            )
            process.send_signal(signal.SIGHUP)
            command_line.wait_for("reloaded")
            database.execute("INSERT INTO people VALUES (2)")
            assert next(events).content["row"]["id"] == 2
        with service.stream([*parameters, ("since", begin)]) as events:
            assert next(events).name == "streaming"
            assert [next(events).content["row"]["id"] for _ in range(2)] == [1, 2]
        process.terminate()
        process.wait(20)
