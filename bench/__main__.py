"""``python -m bench``: measure, and print what was measured."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import psycopg

import walstream
from bench import latency, report, workload
from bench.latency import Latency
from bench.report import Report
from bench.throughput import Contest
from walstream.cluster import PrivateCluster


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark. It fails only when it cannot measure, never for being slow."""
    asked = _parser().parse_args(arguments)
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
        workload.create_table(connection, asked.rows)
        contest = Contest(cluster, connection)
        startup = contest.startup(repetitions=asked.rounds)
        throughput = []
        for transaction_rows in asked.transaction_rows:
            _say(f"{asked.rows:,} updates, {transaction_rows:,} in a transaction")
            throughput.append(contest.measure(asked.rows, transaction_rows, asked.rounds))
        kinds = []
        if not asked.skip_kinds:
            _say(f"{asked.rows:,} updates for each kind of handler")
            kinds = contest.kinds(asked.rows, asked.transaction_rows[0], asked.rounds)
        measured_latency = None if asked.skip_latency else _latency(cluster, connection, asked)
        return Report(
            walstream=walstream.__version__,
            python=platform.python_version(),
            postgresql=connection.info.parameter_status("server_version") or "",
            cpus=os.cpu_count() or 0,
            load_average=load_average,
            transport="both clients connect by TCP, over the loopback interface",
            options=contest.options,
            startup_seconds=startup,
            throughput=throughput,
            kinds=kinds,
            latency=measured_latency,
        )


def _latency(
    cluster: PrivateCluster, connection: psycopg.Connection, asked: argparse.Namespace
) -> Latency:
    _say(f"{latency.COMMITS_PER_SECOND} commits a second for {asked.seconds:g} seconds")
    commits = min(max(round(asked.seconds * latency.COMMITS_PER_SECOND), 2), asked.rows)
    return latency.measure(cluster, connection, commits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="walstream against pg_recvlogical -f /dev/null on the same WAL, then the time"
        " from commit to handler.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=_count, default=3, help="how often each drains the WAL")
    parser.add_argument("--rows", type=_count, default=200_000, help="updates in the WAL")
    parser.add_argument(
        "--transaction-rows",
        type=_count,
        nargs="+",
        default=[2000, 1],
        help="updates in a transaction; all is done once for each number",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring the latency")
    parser.add_argument("--skip-latency", action="store_true", help="measure the throughput only")
    parser.add_argument("--skip-kinds", action="store_true", help="one kind of handler only")
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
