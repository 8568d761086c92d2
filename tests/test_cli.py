"""The command line: what it prints, what it refuses, and how it exits."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psycopg
import pytest

from tests.command_line import CommandLine, slot_name
from tests.conftest import StartCluster
from tests.postgres import Database, create_database, wait_until


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, amount numeric)")
    database.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
    return database


def is_streaming(database: Database) -> bool:
    """Whether a walsender sends the changes of this database."""
    return bool(
        database.execute(
            "SELECT 1 FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid"
            " WHERE state IN ('catchup', 'streaming') AND database = %s",
            database.name,
        )
    )


def config(database: Database, slot: str, *, create: bool = True, routes: str = "") -> str:
    return f"""
        [postgres]
        dsn = "{database.dsn}"
        [slot]
        name = "{slot}"
        create = {str(create).lower()}
        [sinks.out]
        type = "stdout"
        [stream]
        reconnect_seconds = 0.1
        {routes or "[[routes]]" + chr(10) + 'table = "public.orders"' + chr(10) + 'to = "out"'}
    """


def test_help_and_version_are_for_people(cli: CommandLine) -> None:
    for arguments in ([], ["--help"], ["run", "--help"], ["tail", "-h"], ["slot", "--help"]):
        answer = cli.run(*arguments)
        assert answer.returncode == 0
        assert "Usage" in answer.stdout
    assert re.match(r"walstream \d", cli.run("--version").stdout)


def test_run_until_now_writes_json_lines_and_exits(cli: CommandLine, orders: Database) -> None:
    slot = slot_name()
    cli.write("walstream.toml", config(orders, slot))
    assert cli.run("run", "--until", "now").returncode == 0
    orders.execute("INSERT INTO orders VALUES (1, 'new', 1.50)")
    orders.execute("UPDATE orders SET status = 'paid'")
    answer = cli.run("run", "--until", "now")
    assert answer.returncode == 0
    insert, update = map(json.loads, answer.stdout.splitlines())
    assert insert["row"] == {"id": 1, "status": "new", "amount": 1.5}
    assert update["identity"]["status"] == "new"
    assert list(update) == [
        "id", "operation", "schema", "table", "row", "identity", "unchanged", "xid",
        "commit_lsn", "end_lsn", "ordinal", "commit_time",
    ]  # fmt: skip
    assert cli.run("run", "--until", "now").stdout == ""


def test_until_a_position_stops_before_what_commits_after_it(
    cli: CommandLine, orders: Database
) -> None:
    slot = slot_name()
    cli.write("walstream.toml", config(orders, slot))
    cli.run("run", "--until", "now")
    orders.execute("INSERT INTO orders VALUES (1)")
    ((position,),) = orders.execute("SELECT pg_current_wal_flush_lsn()::text")
    orders.execute("INSERT INTO orders VALUES (2)")
    answer = cli.run("run", "--until", position)
    assert [json.loads(line)["row"]["id"] for line in answer.stdout.splitlines()] == [1]
    answer = cli.run("run", "--until", "now")
    assert [json.loads(line)["row"]["id"] for line in answer.stdout.splitlines()] == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--until", "tomorrow"], "'tomorrow' is not an LSN"),
        (["run", "nowhere:stream"], "there is no module nowhere"),
        (["run", "handlers"], "does not name handlers"),
        (["run", "json:stream"], "the module json has no stream"),
        (["run", "json:loads"], "not a Walstream"),
        (["run", "--frobnicate"], "No such option"),
        (["frobnicate"], "No such command"),
        (["tail", "-o", "upsert"], "found 'upsert'"),
        (["tail", "orders"], "write schema.table"),
        (["tail", "public.orders", "--where", "status=equals.x"], "equals"),
        (["run"], "nothing is routed anywhere"),
        (["slot", "create", "--name", "Foo"], "found 'Foo'; allowed: lower-case letters"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_64(
    cli: CommandLine, arguments: list[str], said: str
) -> None:
    answer = cli.run(*arguments)
    assert (answer.returncode, answer.stdout) == (64, "")
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_five_mistakes_in_a_file_are_five_lines(cli: CommandLine) -> None:
    """Each with its key path, what was found, and what is allowed; the password stays secret."""
    cli.write(
        "walstream.toml",
        """
        [postgres]
        dsn = "postgresql://me:hunter2@host/db"
        [slot]
        name = "My-Slot"
        [sinks.a]
        type = "fax"
        [[routes]]
        table = "public.orders"
        operations = ["upsert"]
        to = "b"
        wheer = "id=eq.1"
        """,
    )
    answer = cli.run("run")
    assert (answer.returncode, answer.stdout) == (78, "")
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 5, answer.stderr
    assert "hunter2" not in answer.stderr
    for line, said in zip(
        sorted(lines, key=lambda line: line.removeprefix("ConfigError: ")),
        [
            "routes[0].operations[0]: found 'upsert'; allowed: 'insert', 'update', 'delete'",
            "routes[0].to: found 'b'; allowed: a",
            "routes[0].wheer: is not a key; allowed: table, operations, where, changed, columns",
            "sinks.a.type: found 'fax'; allowed: 'stdout', 'file', 'webhook' or 'live'",
            "slot.name: found 'My-Slot'; allowed: lower-case letters",
        ],
        strict=True,
    ):
        assert said in line


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ('table = "public.nothing"', "the table public.nothing does not exist"),
        ('table = "public.order"', "is public.orders meant?"),
        ('table = "public.orders"\nwhere = "stat=eq.x"', "'stat'"),
        ('table = "public.orders"\nwhere = "id=like.x"', "like"),
        (
            'table = "public.orders"\nwhere = "id=eq.one"',
            'invalid input syntax for type integer: "one"',
        ),
        ('table = "public.orders"\ncolumns = { exclude = ["ssn"] }', "'ssn'"),
    ],
)
def test_routes_that_do_not_fit_the_database_are_refused_at_the_start(
    cli: CommandLine, orders: Database, route: str, said: str
) -> None:
    cli.write(
        "walstream.toml",
        config(orders, slot_name(), routes=f'[[routes]]\nto = "out"\n{route}'),
    )
    answer = cli.run("run", "--until", "now")
    assert (answer.returncode, answer.stdout) == (78, "")
    assert said in answer.stderr
    assert (
        orders.execute("SELECT 1 FROM pg_replication_slots WHERE database = %s", orders.name) == []
    )


def test_a_missing_slot_is_named_with_what_to_do(cli: CommandLine, orders: Database) -> None:
    cli.write("walstream.toml", config(orders, "not_there", create=False))
    answer = cli.run("run")
    assert answer.returncode == 78
    assert "not_there does not exist" in answer.stderr
    assert "walstream slot create" in answer.stderr


def test_a_slot_in_use_is_waited_for_and_its_holder_named(
    cli: CommandLine, orders: Database
) -> None:
    slot = slot_name()
    cli.write("walstream.toml", config(orders, slot))
    with cli.running("run") as first:
        wait_until(lambda: any(e["event"] == "streaming" for e in cli.log()))
        ((pid,),) = orders.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", slot
        )
        second = CommandLine(cli.folder / "second")
        second.folder.mkdir()
        quick = "\n[stream]\nreconnect_seconds = 0.1\nstandby_poll_seconds = 0.05\n"
        second.write(
            "walstream.toml",
            config(orders, slot).replace("[stream]\n        reconnect_seconds = 0.1\n", quick),
        )
        with second.running("run") as waiting:
            standing_by = second.wait_for("standing_by")
            assert f"in use by PID {pid}, application walstream" in str(standing_by["error"])
            first.send_signal(signal.SIGTERM)
            assert first.wait(10) == 0
            second.wait_for("streaming")
            assert sum(e["event"] == "standing_by" for e in second.log()) == 1
            waiting.send_signal(signal.SIGTERM)
            assert waiting.wait(10) == 0


def test_a_handler_that_keeps_raising_stops_the_stream_before_its_transaction(
    cli: CommandLine, orders: Database
) -> None:
    """What the exception says stays out of the log: it may hold row values."""
    slot = slot_name()
    cli.write(
        "walstream.toml",
        config(orders, slot, routes="[handlers]\nattempts = 2\nbackoff_seconds = 0.01"),
    )
    cli.write(
        "handlers.py",
        "from walstream import Walstream\n"
        "stream = Walstream()\n"
        "@stream.on('public.orders')\n"
        "def take(change):\n"
        "    if change.row['id'] == 2:\n"
        "        raise ValueError('the secret is ' + change.row['status'])\n"
        "    print(change.id)\n",
    )
    assert cli.run("run", "handlers:stream", "--until", "now").returncode == 0
    orders.execute("INSERT INTO orders VALUES (1)")
    orders.execute("INSERT INTO orders VALUES (2, 'hidden')")
    answer = cli.run("run", "handlers:stream", "--until", "now")
    assert answer.returncode == 75
    assert len(answer.stdout.splitlines()) == 1
    assert "take did not take change" in answer.stderr
    assert "ValueError at " in answer.stderr
    assert "handlers.py:6" in answer.stderr
    assert "hidden" not in answer.stderr
    again = cli.run("run", "handlers:stream", "--until", "now")
    assert (again.returncode, again.stdout) == (75, "")


def test_a_plugin_that_is_refused_is_told_with_the_setting(
    cli: CommandLine, private_cluster: StartCluster
) -> None:
    cluster = private_cluster()
    if not cluster.knows_output_plugin_libraries:
        pytest.skip("this server does not know output_plugin_libraries")
    cluster.settings["output_plugin_libraries"] = "pgoutput, test_decoding"
    cluster.restart("fast")
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute("CREATE TABLE orders (id int)")
        cli.write("walstream.toml", config(database, "refused"))
        answer = cli.run("run")
    assert answer.returncode == 78
    assert "PluginRefused" in answer.stderr
    assert "output_plugin_libraries = pgoutput, test_decoding, wal2json" in answer.stderr


def test_a_wal_level_that_is_too_low_is_told_with_its_mend(
    cli: CommandLine, private_cluster: StartCluster
) -> None:
    cluster = private_cluster({"wal_level": "replica"})
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute("CREATE TABLE orders (id int)")
        cli.write("walstream.toml", config(database, "low"))
        answer = cli.run("run")
    assert answer.returncode == 78
    assert "wal_level is replica" in answer.stderr
    assert "ALTER SYSTEM SET wal_level = logical" in answer.stderr


def test_tail_shows_what_is_committed_from_now_on(cli: CommandLine, orders: Database) -> None:
    with cli.running(
        "tail", "public.orders", "--dsn", orders.dsn, "--where", "status=eq.new"
    ) as tail:
        assert tail.stdout is not None
        wait_until(lambda: is_streaming(orders))
        orders.execute("INSERT INTO orders VALUES (1, 'old'), (2, 'new')")
        assert json.loads(tail.stdout.readline())["row"]["id"] == 2
        tail.send_signal(signal.SIGINT)
        assert tail.wait(10) == 0
    assert (
        orders.execute("SELECT 1 FROM pg_replication_slots WHERE database = %s", orders.name) == []
    )


def test_tail_ends_quietly_when_its_reader_has_seen_enough(
    cli: CommandLine, orders: Database
) -> None:
    with cli.running("tail", "--dsn", orders.dsn) as tail:
        assert tail.stdout is not None
        wait_until(lambda: is_streaming(orders))
        orders.execute("INSERT INTO orders VALUES (1)")
        tail.stdout.readline()
        tail.stdout.close()
        orders.execute("INSERT INTO orders VALUES (2)")
        assert tail.wait(10) == 0
    assert (cli.folder / "log").read_text() == ""


def test_the_slot_is_made_looked_at_advanced_and_dropped(
    cli: CommandLine, orders: Database
) -> None:
    slot = slot_name()
    common = ("--name", slot, "--dsn", orders.dsn)
    assert f"created {slot} at" in cli.run("slot", "create", *common).stdout
    orders.execute("INSERT INTO orders VALUES (1)")
    status = json.loads(cli.run("slot", "status", "--json", *common).stdout)
    assert (status["plugin"], status["active"]) == ("wal2json", False)
    assert status["lag_bytes"] > 0
    assert "wal_status" in cli.run("slot", "status", *common).stdout
    assert "stands at" in cli.run("slot", "advance", "now", *common).stdout
    back = cli.run("slot", "advance", "0/1", *common)
    assert (back.returncode, back.stdout) == (64, "")
    beyond = cli.run("slot", "advance", "FFFF/0", *common)
    assert beyond.returncode == 64
    assert "at most, not to FFFF/0" in beyond.stderr
    assert cli.run("slot", "drop", *common).stdout == f"dropped {slot}\n"
    assert cli.run("slot", "status", *common).returncode == 78


def test_secrets_are_read_from_files_and_never_shown(cli: CommandLine, orders: Database) -> None:
    cli.write("dsn", orders.dsn + "\n")
    cli.write("walstream.toml", f'[postgres]\ndsn_file = "{cli.folder}/dsn"\n[slot]\nname = "s"\n')
    assert cli.run("slot", "status").returncode == 78
    cli.write("dsn", "hunter2 hunter2")
    answer = cli.run("slot", "status")
    assert answer.returncode == 78
    assert "is not a connection string" in answer.stderr
    assert "hunter2" not in answer.stderr


def test_a_key_file_that_is_not_text_is_a_mistake_of_the_configuration(
    cli: CommandLine, orders: Database
) -> None:
    (cli.folder / "key").write_bytes(b"\xff\xfe\x00")
    cli.write(
        "walstream.toml",
        config(orders, slot_name()) + f'[masking]\nkey_file = "{cli.folder}/key"\n',
    )
    answer = cli.run("run")
    assert (answer.returncode, answer.stdout) == (78, "")
    assert f"masking.key_file: {cli.folder}/key is not text in UTF-8" in answer.stderr


@pytest.mark.parametrize("command", ["run", "tail", "check"])
def test_a_password_that_is_not_percent_encoded_is_refused_unseen(
    cli: CommandLine, command: str
) -> None:
    answer = cli.run(command, "--dsn", "postgresql://me:hunt@er2@nohost/db")
    assert answer.returncode == 78
    assert "must be percent-encoded" in answer.stderr
    assert "er2" not in answer.stderr + answer.stdout


def test_the_reconnecting_log_holds_no_password(cli: CommandLine) -> None:
    cli.write(
        "walstream.toml",
        '[postgres]\ndsn = "host=hunter2.invalid password=hunter2"\n[sinks.out]\ntype = "stdout"\n'
        '[[routes]]\ntable = "*.*"\nto = "out"\n[stream]\nreconnect_seconds = 0.05\n',
    )
    with cli.running("run") as process:
        wait_until(lambda: any(e["event"] == "reconnecting" for e in cli.log()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert "***.invalid" in (cli.folder / "log").read_text()
    assert "hunter2" not in (cli.folder / "log").read_text()


@pytest.mark.parametrize("command", ["run", "check"])
def test_environment_variables_of_no_section_are_named_without_their_values(
    cli: CommandLine, command: str
) -> None:
    cli.environment |= {
        "WALSTREAM_POSTGRS_DSN": "host=h password=hunter2",
        "WALSTREAM_POSTGRES_DSN": "host=/nowhere",
        "WALSTREAM_TEST_DSN": "",
        "WALSTREAM_SERVICE_HOST": "10.0.0.1",
        "WALSTREAM_PORT_80_TCP": "tcp://10.0.0.1:80",
    }
    with cli.running(command) as process:
        process.wait(20)
    told = [e for e in cli.log() if e["event"] == "environment_ignored"]
    assert [(e["level"], e["variable"]) for e in told] == [("warning", "WALSTREAM_POSTGRS_DSN")]
    assert "hunter2" not in (cli.folder / "log").read_text()


def test_connection_parameters_that_nobody_takes_are_not_tried_again(cli: CommandLine) -> None:
    cli.write(
        "walstream.toml",
        '[postgres]\ndsn = "host=localhost sslmode=nonsense"\n[sinks.out]\ntype = "stdout"\n'
        '[[routes]]\ntable = "*.*"\nto = "out"\n',
    )
    answer = cli.run("run")
    assert (answer.returncode, answer.stdout) == (78, "")
    assert 'invalid sslmode value: "nonsense"' in answer.stderr


def test_the_environment_wins_over_the_file(cli: CommandLine, orders: Database) -> None:
    cli.write("walstream.toml", '[postgres]\ndsn = "host=/nowhere"\n[slot]\nname = "from_file"\n')
    cli.environment["WALSTREAM_POSTGRES_DSN"] = orders.dsn
    cli.environment["WALSTREAM_SLOT_NAME"] = "from_environment"
    assert "from_environment does not exist" in cli.run("slot", "status").stderr


def test_a_server_that_cannot_be_reached_is_told_and_tried_again(cli: CommandLine) -> None:
    answer = cli.run("slot", "status", "--dsn", "host=127.0.0.1 port=1 user=x dbname=x")
    assert answer.returncode == 75
    assert "no connection to the server" in answer.stderr
    cli.write(
        "walstream.toml",
        '[postgres]\ndsn = "host=127.0.0.1 port=1"\n[sinks.out]\ntype = "stdout"\n'
        '[[routes]]\ntable = "*.*"\nto = "out"\n[stream]\nreconnect_seconds = 0.05\n',
    )
    with cli.running("run") as process:
        wait_until(lambda: sum(e["event"] == "reconnecting" for e in cli.log()) > 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_the_connection_that_is_cut_is_opened_again(cli: CommandLine, orders: Database) -> None:
    slot = slot_name()
    cli.write("walstream.toml", config(orders, slot))
    with cli.running("run") as process:
        assert process.stdout is not None
        wait_until(lambda: any(e["event"] == "streaming" for e in cli.log()))
        orders.execute("INSERT INTO orders VALUES (1)")
        assert json.loads(process.stdout.readline())["row"]["id"] == 1
        with psycopg.connect(orders.dsn, autocommit=True) as killer:
            killer.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE slot_name = %s",
                [slot],
            )
        orders.execute("INSERT INTO orders VALUES (2)")
        rows = [json.loads(process.stdout.readline())["row"]["id"]]
        if rows == [1]:  # was not confirmed yet, and comes again
            rows = [json.loads(process.stdout.readline())["row"]["id"]]
        assert rows == [2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
