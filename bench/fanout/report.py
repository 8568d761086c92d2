"""What the benchmark says: one JSON object, or tables for people."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bench.fanout.rounds import Latency, Measured, Round, Throughput
from bench.fanout.scenarios import Scenario


class Report(msgspec.Struct, frozen=True):
    """All that was measured, and on what. Nothing fails when a target is missed: machines differ.

    ``load_average`` is that of the minute before the start: above zero, others were working, too.
    """

    walstream: str
    python: str
    postgresql: str
    cpus: int
    load_average: float
    journal: bool
    scenarios: list[Measured]


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def as_text(report: Report) -> str:
    """Return the report for people."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield (
        f"walstream {report.walstream}, Python {report.python},"
        f" PostgreSQL {report.postgresql}, {report.cpus} CPUs,"
        f" load average {report.load_average:.2f} before the start,"
        f" {'with' if report.journal else 'without'} a journal"
    )
    yield "PostgreSQL, walstream and two processes with all the clients share the CPUs"
    for measured in report.scenarios:
        yield ""
        yield from _scenario_lines(measured)


def _scenario_lines(measured: Measured) -> Iterator[str]:
    scenario, memory = measured.scenario, measured.memory
    yield (
        f"{scenario.name}: {scenario.subscribers:,} subscribers, {_gets(scenario)}"
        f"; all stream {measured.connect_seconds:.2f} s after the first begins to connect"
    )
    yield (
        f"  memory {memory.bytes_per_subscriber / 1024:.1f} KiB a subscriber:"
        f" {memory.before_mib:.0f} MiB without, {memory.connected_mib:.0f} MiB with all connected,"
        f" {memory.end_mib:.0f} MiB at the end"
    )
    for throughput in measured.throughput:
        yield from _throughput_lines(scenario, throughput)
    yield from (_latency_line(scenario, latency) for latency in measured.latencies)


def _throughput_lines(scenario: Scenario, throughput: Throughput) -> Iterator[str]:
    rows, medians, peer = throughput.transaction_rows, throughput.medians, throughput.peer
    yield (
        f"  {throughput.changes:,} changes in a round,"
        f" {rows:,} row{'s' if rows > 1 else ''} in a transaction,"
        f" {medians.event_bytes:,.0f} bytes an event"
    )
    yield _columns("", "changes/s", "events/s", "written/s", "CPU µs/event", "clients'", "per read")
    for number, played in enumerate(throughput.rounds, start=1):
        yield _row(f"round {number}", played)
    yield _row("median", medians)
    yield _columns(
        "target", f">= {scenario.changes_per_second:,.0f}", f">= {scenario.events_per_second:,.0f}"
    )
    yield _columns(
        "asyncio",
        f"{peer.events_per_second / scenario.events_per_change:,.0f}",
        f"{peer.events_per_second:,.0f}",
        "",
        f"{peer.cpu_microseconds:.2f}",
    )
    yield (
        f"    {throughput.ratio:.2f} of what asyncio alone reaches with ready-made bytes;"
        f" the slot is {medians.slot_lag_bytes / (1 << 20):.1f} MiB behind at the last event,"
        f" confirmed {medians.confirmed_seconds:.2f} s later"
    )


def _row(label: str, played: Round) -> str:
    return _columns(
        label,
        f"{played.changes_per_second:,.0f}",
        f"{played.events_per_second:,.0f}",
        f"{played.written_per_second:,.0f}",
        f"{played.walstream_cpu_microseconds:.2f}",
        f"{played.clients_cpu_microseconds:.2f}",
        f"{played.events_per_read:.1f}",
    )


def _columns(label: str, *cells: str) -> str:
    return (f"    {label:10}" + "".join(f"{cell:>13}" for cell in cells)).rstrip()


def _gets(scenario: Scenario) -> str:
    if scenario.conversations == 1:
        return "each gets every change"
    if scenario.by_role:
        return f"each sees 1 of {scenario.conversations} changes by its role"
    return "each with a filter of its own"


def _latency_line(scenario: Scenario, latency: Latency) -> str:
    limit = scenario.limit
    is_limited = latency.part == limit.part
    target = f" (p{limit.percentile} target < {limit.milliseconds:g})" if is_limited else ""
    return (
        f"  commit to client, {latency.commits:,} commits of one row,"
        f" {latency.commits_per_second:.0f} a second:"
        f" p50 {latency.p50_milliseconds:.2f} ms,"
        f" p95 {latency.p95_milliseconds:.2f} ms,"
        f" p99 {latency.p99_milliseconds:.2f} ms{target},"
        f" maximum {latency.maximum_milliseconds:.2f} ms;"
        f" p99 of the last client {latency.last_p99_milliseconds:.2f} ms"
    )
