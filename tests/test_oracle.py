"""What a file sink holds equals what pg_recvlogical saw on a twin slot."""

from __future__ import annotations

import json
from pathlib import Path

from tests import workload
from tests.conftest import StartCluster
from tests.oracle import Record, Twins, assert_same
from tests.postgres import Database
from walstream.cluster import ServerPrograms
from walstream.router import TablePattern

SEED = 20260813
TRANSACTIONS = 800


def test_nothing_is_missing_or_reordered_when_it_is_read_long_afterwards(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """The catalog that walstream asks is younger than every record."""
    workload.prepare(database.dsn)
    with Twins(database, server_programs, tmp_path) as twins:
        workload.run(database.dsn, SEED, TRANSACTIONS)
        until = twins.now()
        twins.run(until)
        assert_equal_to_the_twin(twins, until)
        assert_is_mixed(twins)


def test_nothing_is_missing_or_reordered_when_it_is_read_meanwhile(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """The tables change their form under a running stream, which is stopped and started again."""
    workload.prepare(database.dsn)
    with Twins(database, server_programs, tmp_path) as twins:
        walstream = twins.start()
        twins.wait_until_streaming()
        workload.run(database.dsn, SEED + 1, TRANSACTIONS)
        twins.stop(walstream)
        until = twins.now()
        twins.run(until)
        assert_equal_to_the_twin(twins, until)


def test_prepared_transactions_come_with_the_others(
    private_cluster: StartCluster, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """At COMMIT PREPARED, whichever session says it; those rolled back do not come."""
    cluster = private_cluster({"max_prepared_transactions": str(workload.SESSIONS)})
    with (
        Database(cluster.conninfo(), "postgres") as database,
        Twins(database, server_programs, tmp_path) as twins,
    ):
        workload.prepare(database.dsn)
        workload.run(database.dsn, SEED + 2, TRANSACTIONS)
        until = twins.now()
        twins.run(until)
        assert_equal_to_the_twin(twins, until)


def test_the_server_filters_by_names_that_need_escaping(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """What is routed is all there; what is not routed is not sent, so it takes no ordinal."""
    workload.prepare(database.dsn)
    tables = workload.make_tables()
    names = ("orders", "lines", "badges", "star", "documents")
    routed = {(tables[name].schema, tables[name].name) for name in names}
    routes = [
        {
            "table": str(TablePattern(schema, name)),
            "operations": ["insert", "update", "delete"],
        }
        for schema, name in sorted(routed)
    ]

    def is_sent(record: Record) -> bool:
        if record["action"] in "BCM":
            return True
        return record["action"] != "T" and (record["schema"], record["table"]) in routed

    with Twins(database, server_programs, tmp_path, routes) as twins:
        workload.run(database.dsn, SEED + 3, TRANSACTIONS)
        until = twins.now()
        twins.run(until)
        expected = twins.expected(until, is_sent)
        assert {(line["schema"], line["table"]) for line in map(json.loads, expected)} == routed
        assert_same(twins.found(), expected)


def assert_equal_to_the_twin(twins: Twins, until: str) -> None:
    found = twins.found()
    assert_same(found, twins.expected(until))
    ids = [json.loads(line)["id"] for line in found]
    assert len(set(ids)) == len(ids) > TRANSACTIONS


def assert_is_mixed(twins: Twins) -> None:
    """The comparison would say little about a workload that leaves something out."""
    lines = [json.loads(line) for line in twins.found()]
    assert {line["operation"] for line in lines} == {"insert", "update", "delete", "truncate"}
    tables = {(table.schema, table.name) for table in workload.make_tables().values()}
    assert {(line["schema"], line["table"]) for line in lines} > tables
    assert any(line["unchanged"] for line in lines)
    assert any(line["operation"] == "delete" and "root" in line for line in lines)
    begun = [line["xid"] for line in lines]
    assert begun != sorted(begun), "transactions commit in another order than they began"
