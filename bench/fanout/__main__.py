"""``python -m bench.fanout``: measure, and print what was measured."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psycopg

import walstream
from bench import workload
from bench.fanout import report, rounds
from bench.fanout.report import Report
from bench.fanout.rounds import Effort, Measured
from bench.fanout.scenarios import SCENARIOS, Scenario
from bench.fanout.subject import Subject
from walstream.cluster import PrivateCluster


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark. It fails only when it cannot measure, never for being slow."""
    asked = _parser().parse_args(arguments)
    _allow_descriptors()
    measured = measure(asked)
    print(report.as_json(measured) if asked.json else report.as_text(measured))


def measure(asked: argparse.Namespace) -> Report:
    """Measure on a cluster of our own."""
    load_average = os.getloadavg()[0]
    _say("starting a private cluster")
    with (
        PrivateCluster(workload.CLUSTER_SETTINGS, loopback=True) as cluster,
        psycopg.connect(cluster.loopback_conninfo(), autocommit=True) as connection,
    ):
        workload.create_table(connection, rows=0)
        return Report(
            walstream=walstream.__version__,
            python=platform.python_version(),
            postgresql=connection.info.parameter_status("server_version") or "",
            cpus=os.cpu_count() or 0,
            load_average=load_average,
            journal=asked.journal,
            scenarios=[
                _measure(cluster, connection, scenario, asked) for scenario in _scenarios(asked)
            ],
        )


def _measure(
    cluster: PrivateCluster,
    connection: psycopg.Connection,
    scenario: Scenario,
    asked: argparse.Namespace,
) -> Measured:
    _say(f"{scenario.subscribers:,} subscribers: {scenario.name}")
    effort = Effort(
        events=asked.events,
        shared_events=asked.shared_events,
        rounds=asked.rounds,
        transaction_rows=asked.transaction_rows,
        latency_seconds=asked.seconds,
    )
    with (
        tempfile.TemporaryDirectory(prefix="walstream-fanout-") as folder,
        Subject(cluster, connection, Path(folder), with_journal=asked.journal) as subject,
    ):
        try:
            return rounds.measure(connection, scenario, subject, effort)
        except AssertionError:
            _say(f"walstream has logged\n{subject.log_tail()}")
            raise


def _scenarios(asked: argparse.Namespace) -> list[Scenario]:
    return [
        scenario
        if asked.subscribers is None
        else msgspec.structs.replace(scenario, subscribers=asked.subscribers)
        for scenario in SCENARIOS
        if scenario.name in asked.scenario
    ]


def _allow_descriptors() -> None:
    """Let the processes that are started have as many connections as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fanout",
        description="How many clients by HTTP one walstream serves how fast, beside what asyncio"
        " alone does with ready-made bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, nargs="+", default=names)
    parser.add_argument("--rounds", type=_count, default=3, help="at full speed")
    parser.add_argument(
        "--events", type=_count, default=20_000, help="in a round, where filters differ"
    )
    parser.add_argument(
        "--shared-events", type=_count, default=5_000_000, help="in a round, where all get all"
    )
    parser.add_argument(
        "--transaction-rows",
        type=_count,
        nargs="+",
        default=[1, 100],
        help="rows in a transaction; rounds are played for each number",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of even pace; 0 for none")
    parser.add_argument("--subscribers", type=_count, help="so many in each scenario")
    parser.add_argument("--journal", action="store_true", help="let walstream keep a journal")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return count


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
