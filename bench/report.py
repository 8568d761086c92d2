"""What the benchmark says: one JSON object, or tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from bench.latency import Latency
from bench.throughput import KindMeasures, Measures, Startup, Throughput


class Targets(msgspec.Struct, frozen=True):
    """What is wished for. Nothing fails when it is missed: machines differ."""

    ratio: float = 1.3
    cpu_microseconds_per_row: float = 12.0
    batch_ratio: float = 1.1
    p50_milliseconds: float = 2.0
    p99_milliseconds: float = 10.0


TARGETS: Final = Targets()


class Report(msgspec.Struct, frozen=True):
    """All that was measured, and on what.

    ``load_average`` is that of the minute before the start: above zero, others were working, too.
    """

    walstream: str
    python: str
    postgresql: str
    cpus: int
    load_average: float
    transport: str
    options: dict[str, str]
    startup_seconds: Startup
    throughput: list[Throughput]
    kinds: list[KindMeasures]
    latency: Latency | None
    targets: Targets = TARGETS


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def as_text(report: Report) -> str:
    """Return the report for people."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    startup = report.startup_seconds
    yield (
        f"walstream {report.walstream}, Python {report.python},"
        f" PostgreSQL {report.postgresql}, {report.cpus} CPUs,"
        f" load average {report.load_average:.2f} before the start"
    )
    yield f"{report.transport}; both ask wal2json for"
    yield "  " + ", ".join(f"{name}={value}" for name, value in report.options.items())
    yield (
        f"an empty run takes pg_recvlogical {startup.pg_recvlogical_empty_run:.3f} s and walstream"
        f" {startup.walstream_empty_run:.3f} s, which is in the figures below;"
    )
    yield f"starting Python and loading the modules ({startup.walstream_load:.2f} s) is not"
    for throughput in report.throughput:
        yield ""
        yield from _throughput_lines(throughput)
    if report.kinds:
        yield ""
        yield from _kind_lines(report.kinds)
    if report.latency is not None:
        yield ""
        yield from _latency_lines(report.latency)


def _throughput_lines(throughput: Throughput) -> Iterator[str]:
    yield (
        f"{throughput.rows:,} updates, {throughput.transaction_rows:,} in a transaction,"
        f" records of {throughput.record_bytes:,.0f} bytes"
    )
    yield f"{'':10}{'--- pg_recvlogical ---':>24}{'----------- walstream -----------':>44}"
    yield _columns("", "rows/s", "CPU µs/row", "rows/s", "ratio", "CPU µs/row", "peak MiB")
    for number, played in enumerate(throughput.rounds, start=1):
        yield _row(f"round {number}", played.measures)
    yield _row("median", throughput.medians)
    yield _columns(
        "target", "", "", "", f">= {TARGETS.ratio}", f"<= {TARGETS.cpu_microseconds_per_row:g}", ""
    )


def _row(label: str, measures: Measures) -> str:
    return _columns(
        label,
        f"{measures.pg_recvlogical_rows_per_second:,.0f}",
        f"{measures.pg_recvlogical_cpu_microseconds_per_row:.1f}",
        f"{measures.walstream_rows_per_second:,.0f}",
        f"{measures.ratio:.2f}",
        f"{measures.walstream_cpu_microseconds_per_row:.1f}",
        f"{measures.walstream_peak_mib:.0f}",
    )


def _columns(label: str, *cells: str) -> str:
    return (f"{label:10}" + "".join(f"{cell:>12}" for cell in cells)).rstrip()


def _kind_lines(kinds: list[KindMeasures]) -> Iterator[str]:
    yield "kinds of handler over one WAL, medians; the ratio is to one change after another"
    yield f"{'':30}" + "".join(
        f"{cell:>12}" for cell in ("rows/s", "ratio", "CPU µs/row", "peak MiB")
    )
    for kind in kinds:
        cells = (
            f"{kind.rows_per_second:,.0f}",
            f"{kind.ratio:.2f}",
            f"{kind.cpu_microseconds_per_row:.1f}",
            f"{kind.peak_mib:.0f}",
        )
        yield f"{kind.kind:30}" + "".join(f"{cell:>12}" for cell in cells)
    yield f"target: with batch=500 at least {TARGETS.batch_ratio:g} times the rate without it"


def _latency_lines(latency: Latency) -> Iterator[str]:
    yield (
        f"commit to handler, {latency.commits:,} commits of one row,"
        f" {latency.commits_per_second:.0f} a second,"
        " from just before COMMIT is sent to the handler's first line"
    )
    yield (
        f"  p50 {latency.p50_milliseconds:.2f} ms (target < {TARGETS.p50_milliseconds:g}),"
        f" p99 {latency.p99_milliseconds:.2f} ms (target < {TARGETS.p99_milliseconds:g}),"
        f" maximum {latency.maximum_milliseconds:.2f} ms"
    )
    yield (
        f"  COMMIT itself takes the writer {latency.commit_milliseconds:.2f} ms,"
        f" an empty statement {latency.round_trip_milliseconds:.2f} ms"
    )
