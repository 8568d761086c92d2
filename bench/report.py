"""What the benchmark says: one JSON object, or tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from bench.latency import Latency
from bench.throughput import Measures, Startup, Throughput


class Targets(msgspec.Struct, frozen=True):
    """What is wished for. Nothing fails when it is missed: machines differ."""

    ratio: float = 1.3
    cpu_microseconds_per_row: float = 12.0
    p50_milliseconds: float = 2.0
    p99_milliseconds: float = 10.0


TARGETS: Final = Targets()


class Report(msgspec.Struct, frozen=True):
    """All that was measured, and on what."""

    walstream: str
    python: str
    postgresql: str
    cpus: int
    transport: str
    options: dict[str, str]
    startup_seconds: Startup
    throughput: list[Throughput]
    latency: Latency | None
    targets: Targets = TARGETS


def as_json(report: Report) -> str:
    """Return the report as one JSON object on several lines."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def as_text(report: Report) -> str:
    """Return the report for people."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield (
        f"walstream {report.walstream}, Python {report.python},"
        f" PostgreSQL {report.postgresql}, {report.cpus} CPUs"
    )
    yield f"{report.transport}; wal2json's options are the same:"
    yield "  " + ", ".join(f"{name}={value}" for name, value in report.options.items())
    startup = report.startup_seconds
    yield (
        f"in every round, but not about rows: {startup.pg_recvlogical_empty_run:.2f} s"
        f" (pg_recvlogical), {startup.walstream_empty_run:.2f} s (walstream)"
    )
    yield f"before walstream's clock starts: {startup.walstream_load:.2f} s to load Python"
    for throughput in report.throughput:
        yield ""
        yield from _throughput_lines(throughput)
    if report.latency is not None:
        yield ""
        yield from _latency_lines(report.latency)


def _throughput_lines(throughput: Throughput) -> Iterator[str]:
    yield (
        f"{throughput.rows:,} updates, {throughput.transaction_rows:,} in a transaction,"
        f" records of {throughput.record_bytes:,.0f} bytes"
    )
    yield "          pg_recvlogical        walstream          walstream CPU      peak memory"
    yield "              rows/s  µs/row    rows/s    ratio     µs/row             MiB"
    for number, measures in enumerate(throughput.rounds, start=1):
        yield _row(f"round {number}", measures)
    yield _row("median", throughput.medians)
    yield f"{'target':10}{f'≥ {TARGETS.ratio}':>35}{f'≤ {TARGETS.cpu_microseconds_per_row:g}':>11}"


def _row(label: str, measures: Measures) -> str:
    return (
        f"{label:10}{measures.pg_recvlogical_rows_per_second:10,.0f}"
        f"{measures.pg_recvlogical_cpu_microseconds_per_row:8.1f}"
        f"{measures.walstream_rows_per_second:10,.0f}{measures.ratio:9.2f}"
        f"{measures.walstream_cpu_microseconds_per_row:11.1f}{measures.walstream_peak_mib:16.0f}"
    )


def _latency_lines(latency: Latency) -> Iterator[str]:
    yield (
        f"commit to handler, {latency.commits:,} commits at {latency.commits_per_second:.0f}"
        " a second, one row each (from just before COMMIT is sent to the handler's first line)"
    )
    yield (
        f"p50 {latency.p50_milliseconds:.2f} ms (target < {TARGETS.p50_milliseconds:g}),"
        f" p99 {latency.p99_milliseconds:.2f} ms (target < {TARGETS.p99_milliseconds:g}),"
        f" maximum {latency.maximum_milliseconds:.2f} ms"
    )
    yield (
        f"for comparison: COMMIT takes the writer {latency.commit_milliseconds:.2f} ms,"
        f" an empty statement {latency.round_trip_milliseconds:.2f} ms"
    )
