"""``python -m bench`` works; how fast anything is, is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from walstream.cluster import ServerPrograms

ROWS = 300


@pytest.fixture
def report(server_programs: ServerPrograms) -> object:
    small = ["--rows", str(ROWS), "--rounds", "1", "--transaction-rows", "100", "--seconds", "0.2"]
    finished = subprocess.run(
        [sys.executable, "-m", "bench", "--json", *small],
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(finished.stdout)


def test_the_benchmark_reports_every_figure_and_delivers_every_row(report: object) -> None:
    match report:
        case {
            "transport": str(transport),
            "options": {"format-version": "2", "actions": "update"},
            "startup_seconds": {"walstream_load": float()},
            "throughput": [
                {
                    "rows": rows,
                    "transaction_rows": 100,
                    "rounds": [{"first": "pg_recvlogical", "delivered": delivered}],
                    "medians": {
                        "pg_recvlogical_rows_per_second": float(),
                        "walstream_rows_per_second": float(),
                        "ratio": float(),
                        "walstream_cpu_microseconds_per_row": float(),
                        "walstream_peak_mib": float(),
                    },
                }
            ],
            "kinds": [{"kind": "async def", "ratio": 1.0, "cpu_microseconds_per_row": float()}, *_],
            "latency": {
                "commits": 100,
                "p50_milliseconds": float(),
                "p99_milliseconds": float(),
            },
            "targets": {"ratio": 1.3},
        }:
            assert "TCP" in transport
            assert rows == delivered == ROWS
        case _:
            pytest.fail(f"not the report that is documented: {report}")
