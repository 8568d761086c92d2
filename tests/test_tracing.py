"""Spans of calls: what is in them, what is their child, and where they go."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from tests.lines import QUICK, Line, Recorder, called, handler
from tests.postgres import Database, async_wait_until
from walstream import Walstream, config
from walstream.backoff import Backoff
from walstream.changes import Change
from walstream.errors import SetupError, SinkFailed
from walstream.policy import FailurePolicy
from walstream.tracing import Tracing, start_tracing


class Traced:
    """Lines that are traced, and their spans in the order in which they ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(self.provider, slot="orders", database="shop")

    def line(self, *destinations: Any, **options: Any) -> Line:
        return Line(*destinations, trace=self.tracing.traced, **options)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    @property
    def deliveries(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name.startswith("deliver ")]


@pytest.fixture
def traced() -> Traced:
    return Traced()


class Sink:
    name = "archive"

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    async def open(self) -> None:
        """Nothing to make ready."""

    async def close(self) -> None:
        """Nothing to let go."""

    async def take(self, changes: Sequence[Change]) -> None:
        if self.failures:
            raise self.failures.pop()


async def test_what_only_some_sinks_have_is_there_when_they_are_traced(traced: Traced) -> None:
    class Chooser(Sink):
        max_changes = 2

        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        async def take(self, changes: Sequence[Change]) -> None:
            self.sizes.append(len(changes))

        async def reopen(self) -> None:
            self.sizes.clear()

    chooser = Chooser()
    line = traced.line(chooser)
    line.commit("a b c d e")
    await line.deliver()
    assert chooser.sizes == [2, 2, 1]
    line.delivery.close()
    sink: Any = traced.tracing.traced(chooser)
    await sink.reopen()
    assert chooser.sizes == []
    assert not hasattr(traced.tracing.traced(Sink()), "reopen")


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


ALWAYS: Final = {
    "messaging.system": "walstream",
    "messaging.operation.name": "deliver",
    "messaging.operation.type": "process",
    "messaging.destination.name": "orders",
    "db.system.name": "postgresql",
    "db.namespace": "shop",
}

KINDS: Final[dict[str, tuple[dict[str, Any], list[str]]]] = {
    "plain": ({}, ["a", "b", "c"]),
    "unit": ({"visible": True}, ["a", "b", "c"]),
    "batch": ({"batch": 2, "linger_seconds": 0.0}, ["a b", "c"]),
    "lanes": ({"concurrency": 2}, ["a", "b", "c"]),
    "transactions": ({"transactions": True}, ["a b", "c"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_thread", [False, True])
async def test_each_call_has_a_span_that_is_current_in_the_handler(
    traced: Traced, kind: str, *, in_thread: bool
) -> None:
    tracer = traced.provider.get_tracer("its own")

    def work(item: Any) -> None:
        changes = item if isinstance(item, list) else [item]
        with tracer.start_as_current_span(" ".join(map(called, changes))):
            pass

    async def in_loop(item: Any) -> None:
        await asyncio.sleep(0)
        work(item)

    options, calls = KINDS[kind]
    line = traced.line(handler(work if in_thread else in_loop, "greet", **options))
    line.commit("a b", "c")
    await line.deliver()
    inner = {span.name: span for span in traced.spans if span not in traced.deliveries}
    outer = {span.context.span_id: span for span in traced.deliveries if span.context}
    assert sorted(inner) == calls
    assert len(outer) == len(calls)
    for span in inner.values():
        assert span.parent is not None
        parent = outer.pop(span.parent.span_id)
        assert (parent.name, parent.kind, parent.parent) == (
            "deliver greet",
            SpanKind.CONSUMER,
            None,
        )
        assert attributes(parent)["walstream.changes"] == len(span.name.split())
        assert parent.status.status_code is StatusCode.UNSET
    line.delivery.close()


async def test_a_span_says_what_the_call_is_about(traced: Traced) -> None:
    recorder = Recorder()
    line = traced.line(handler(recorder.in_loop, "greet"))
    line.commit("a", "a>b", "*")
    line.message("x")
    await line.deliver()
    found = [attributes(span) for span in traced.deliveries]
    about = {**ALWAYS, "walstream.destination": "greet", "walstream.changes": 1}
    table = "db.collection.name"
    ids = ["0/64:1", "0/C8:1", "0/12C:1", "0/190"]
    common = [
        {
            **about,
            "messaging.message.id": one,
            "walstream.first_change": one,
            "walstream.last_change": one,
        }
        for one in ids
    ]
    assert found == [
        {**common[0], table: "public.orders", "db.operation.name": "insert"},
        {**common[1], table: "public.orders", "db.operation.name": "update"},
        {**common[2], table: "public.orders", "db.operation.name": "truncate"},
        {**common[3], "walstream.prefix": "jobs"},
    ]


async def test_a_span_of_several_changes_names_what_they_have_in_common(traced: Traced) -> None:
    line = traced.line(Sink())
    line.commit("a b", "c>d e")
    await line.deliver()
    [span] = traced.deliveries
    assert span.name == "deliver archive"
    assert attributes(span) == {
        **ALWAYS,
        "walstream.destination": "archive",
        "walstream.changes": 4,
        "walstream.first_change": "0/64:1",
        "walstream.last_change": "0/C8:2",
        "messaging.batch.message_count": 4,
        "db.collection.name": "public.orders",
    }


@pytest.mark.parametrize("kind", ["plain", "sync", "sink"])
async def test_a_failure_is_told_by_its_type_alone(traced: Traced, kind: str) -> None:
    """And is still the failure that it was."""
    secret = "secret of a row"  # noqa: S105 - none
    destination: Any = Sink(SinkFailed(secret))
    if kind != "sink":
        recorder = Recorder(a=[ValueError(secret)])
        destination = handler(recorder.in_thread if kind == "sync" else recorder.in_loop)
    line = traced.line(destination, policy=QUICK)
    line.commit("a")
    with capture_logs() as logs:
        await line.deliver()
    failed, done = traced.deliveries
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, None)
    name = "walstream.errors.SinkFailed" if kind == "sink" else "ValueError"
    assert attributes(failed)["error.type"] == name
    assert failed.events == ()
    assert secret not in failed.to_json()
    assert "error.type" not in attributes(done)
    [retried] = logs
    assert retried["error"].startswith(name.rpartition(".")[2])
    assert kind == "sink" or "lines.py" in retried["error"]  # the handler's line, not ours


@pytest.mark.parametrize("kind", ["plain", "sync"])
async def test_where_a_stuck_handler_stands_begins_with_the_handler(
    traced: Traced, kind: str
) -> None:
    opened = threading.Event()

    def in_thread(_: Change) -> None:
        opened.wait(10)

    async def in_loop(_: Change) -> None:
        await async_wait_until(opened.is_set)

    line = traced.line(handler(in_thread if kind == "sync" else in_loop))
    line.commit("a")
    async with line.session():
        await async_wait_until(lambda: line.delivery.held is not None)
        held = line.delivery.held
        assert held is not None
        await async_wait_until(lambda: bool(held.slot.frames()))
        assert held.slot.frames()[0].startswith(f"{__file__}:")
        opened.set()
    line.delivery.close()


async def test_a_call_that_is_cancelled_ends_its_span(traced: Traced) -> None:
    entered = asyncio.Event()

    async def wait(_: Change) -> None:
        entered.set()
        await asyncio.sleep(3600)

    line = traced.line(handler(wait))
    line.commit("a")
    async with line.session() as running:
        await entered.wait()
        running.cancel()
        await asyncio.wait([running])
    [span] = traced.deliveries
    assert attributes(span)["error.type"] == "asyncio.exceptions.CancelledError"


async def test_the_destination_itself_stays_as_it_is(traced: Traced) -> None:
    """It may be used again by a run that is not traced."""
    recorder = Recorder()
    destination = handler(recorder.in_loop)
    function = destination.function
    for line in (traced.line(destination), Line(destination)):
        line.commit("a")
        await line.deliver()
    assert destination.function == function
    assert len(traced.spans) == 1


async def test_a_handler_that_returns_something_unfinished_is_still_noticed(
    traced: Traced,
) -> None:
    async def finish() -> None:
        """Never awaited."""

    def forget(_: Change) -> Any:
        return finish()

    line = traced.line(handler(forget), policy=FailurePolicy(1, None, Backoff(1, 1)))
    line.commit("a")
    with pytest.raises(Exception, match="unfinished coroutine"):
        await line.deliver()


# ---- Where spans go


TRACED: Final = """
import asyncio, os, sys
from walstream import Walstream, config

stream = Walstream()

@stream.on("public.orders")
async def greet(change):
    from opentelemetry import trace
    with trace.get_tracer("mine").start_as_current_span("inside"):
        pass

settings = {"slot": {"name": os.environ["SLOT"]}, "tracing": {"enabled": True}}
asyncio.run(stream.run(config.parse(settings), until="now"))
print("done")
"""


def run(database: Database, slot: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", TRACED],
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "WALSTREAM_POSTGRES_DSN": database.dsn,
            "SLOT": slot,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def slot(database: Database) -> str:
    """Of a database in which an order was made."""
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    name = f"traced_{os.urandom(4).hex()}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    database.execute("INSERT INTO orders VALUES (1)")
    return name


def spans_of(stderr: str) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines if "context" in line}


def test_the_environment_says_where_spans_go(database: Database, slot: str) -> None:
    """The standard output carries data only; the handler's own spans go there too."""
    done = run(database, slot, OTEL_TRACES_EXPORTER="console")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    spans = spans_of(done.stderr)
    outer, inner = spans["deliver greet"], spans["inside"]
    assert inner["parent_id"] == outer["context"]["span_id"]
    assert outer["resource"]["attributes"]["service.name"] == "walstream"
    assert outer["attributes"]["db.collection.name"] == "public.orders"
    assert outer["attributes"]["messaging.destination.name"] == slot


def test_a_name_of_the_service_is_kept(database: Database, slot: str) -> None:
    done = run(database, slot, OTEL_TRACES_EXPORTER="console,none", OTEL_SERVICE_NAME="shop")
    assert done.returncode == 0, done.stderr
    [outer] = [one for name, one in spans_of(done.stderr).items() if name == "deliver greet"]
    assert outer["resource"]["attributes"]["service.name"] == "shop"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "exports traces to otlp"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "exports traces to zipkin"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "exports traces to otlp"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is 'http/json'; allowed: http/protobuf, grpc",
        ),
    ],
)
def test_an_exporter_that_there_is_not_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    for variable in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(variable)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SetupError) as refused:
        start_tracing(slot="s", dsn="")
    assert told in refused.value.message
    assert refused.value.hint
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def test_without_the_package_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SetupError, match="OpenTelemetry is not installed") as refused:
        start_tracing(slot="s", dsn="")
    assert refused.value.hint == 'pip install "walstream[tracing]"'


async def test_a_program_that_has_its_own_provider_keeps_it(
    monkeypatch: pytest.MonkeyPatch, database: Database, slot: str, traced: Traced
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: traced.provider)
    stream = Walstream()

    @stream.on("public.orders")
    async def greet(_: Change) -> None:
        """Nothing to do."""

    settings = {
        "postgres": {"dsn": database.dsn},
        "slot": {"name": slot},
        "tracing": {"enabled": True},
    }
    await stream.run(config.parse(settings), until="now")
    [span] = traced.spans
    assert span.name == f"deliver {stream.handlers[0][1].name}"
    assert attributes(span)["db.namespace"]
