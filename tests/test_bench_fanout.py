"""``python -m bench.fanout`` works; how fast anything is, is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from walstream.cluster import ServerPrograms


@pytest.fixture
def report(server_programs: ServerPrograms) -> object:
    small = ["--scenario", "500 filters", "500 alike", "--subscribers", "20", "--rounds", "1"]
    less = ["--events", "200", "--shared-events", "2000", "--transaction-rows", "10"]
    paced = ["--seconds", "0.1"]
    finished = subprocess.run(
        [sys.executable, "-m", "bench.fanout", "--json", *small, *less, *paced],
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(finished.stdout)


def test_the_benchmark_reports_every_figure_of_every_scenario(report: object) -> None:
    match report:
        case {
            "journal": False,
            "scenarios": [
                {"scenario": {"groups": None, "subscribers": 20}},
                {
                    "scenario": {"groups": 1, "events_per_second": float()},
                    "memory": {"bytes_per_subscriber": float()},
                    "throughput": [
                        {
                            "transaction_rows": 10,
                            "changes": 100,
                            "medians": {
                                "events_per_second": float(),
                                "walstream_cpu_microseconds": float(),
                                "slot_lag_bytes": float(),
                            },
                            "peer": {"events_per_second": float()},
                            "ratio": float(),
                        }
                    ],
                    "latencies": [{"part": 0.1, "p99_milliseconds": float()}, {"part": 1.0}],
                },
            ],
        }:
            pass
        case _:
            pytest.fail(f"not the report that is documented: {report}")
