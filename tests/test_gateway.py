"""Health and metrics by HTTP, from made-up vitals; dashboards and alerts name what there is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import metadata
from typing import Any, Final

import httpx
import pytest
import structlog
import yaml
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.routing import Mount

from tests import vitals
from tests.test_documents import code, tables, text_of
from walstream.changes import Operation, Relation
from walstream.config.live import HttpConfig
from walstream.errors import EX_CONFIG, ConfigError, SetupError
from walstream.gateway import Gateway, listening, shared
from walstream.gateway import connection as http_connection
from walstream.gateway.app import make_app
from walstream.gateway.metrics import make_registry
from walstream.vitals import ChangeCount, Outcome, Phase, Vitals

LISTEN: Final = HttpConfig(listen="127.0.0.1:0")
REFERENCE: Final = "docs/metrics-and-health.md"
OPENMETRICS: Final = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"}

Process = list[Vitals]
"""How the process is: its only item may be replaced."""


@pytest.fixture
def process() -> Process:
    return [vitals.full()]


@pytest.fixture
async def client(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(lambda: process[0]))
    async with httpx.AsyncClient(transport=transport, base_url="http://walstream") as client:
        yield client


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """Events of all levels, whatever level another test has left."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(0))
    with structlog.testing.capture_logs() as events:
        yield events
    structlog.configure(**before)


# ---- Health


@pytest.mark.parametrize("word", ["live", "ready"])
@pytest.mark.parametrize("yes", [True, False])
async def test_health_answers_by_what_the_vitals_say(
    client: httpx.AsyncClient, process: Process, word: str, *, yes: bool
) -> None:
    name = {"live": "alive", "ready": "ready"}[word]
    process[0] = vitals.full(
        **{f"is_{name}": yes}, reason="so it is", stalled_because="orders", stalled_seconds=2.34
    )
    answer = await client.get(f"/health/{word}")
    assert answer.status_code == (200 if yes else 503)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        name: yes,
        "phase": "streaming",
        "reason": "so it is",
        "stalled_because": "orders",
        "stalled_seconds": 2.3,
    }


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
async def test_only_get_and_head_are_answered(client: httpx.AsyncClient, path: str) -> None:
    got = await client.get(path)
    head = await client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        answer = await client.request(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_other_paths_are_not_there(client: httpx.AsyncClient) -> None:
    for path in ("/", "/health", "/health/ready/", "/metrics/x", "/docs"):
        answer = await client.get(path)
        assert answer.status_code in (404, 307), path


async def test_the_application_can_be_mounted_in_another_one() -> None:
    app = Starlette(routes=[Mount("/walstream", make_app(vitals.young))])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://own"
    ) as client:
        assert (await client.get("/walstream/health/ready")).status_code == 503
        assert (await client.get("/walstream/health/live")).status_code == 200
        assert "walstream_ready" in (await client.get("/walstream/metrics")).text


# ---- Metrics


async def test_the_version_is_not_looked_up_at_each_scrape(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, and keeps what it finds in folders in which files come and go."""
    monkeypatch.setattr(metadata, "version", None)
    assert 'walstream_build_info{slot="' in (await client.get("/metrics")).text


def families(vitals: Vitals) -> dict[str, Metric]:
    """All families, under the names that the text format gives them."""
    return {exposed(family): family for family in make_registry(lambda: vitals).collect()}


def exposed(family: Metric) -> str:
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def value(text: str, name: str, **labels: str) -> float:
    """The value of the only sample with this name and these labels, in the text format."""
    [found] = [
        sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return found


@pytest.mark.parametrize("process", [[vitals.full()], [vitals.young()]], ids=["full", "young"])
async def test_both_formats_parse_and_say_the_same(client: httpx.AsyncClient) -> None:
    text = await client.get("/metrics")
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    openmetrics = await client.get("/metrics", headers=OPENMETRICS)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1")
    assert openmetrics.text.endswith("# EOF\n")
    strict: Any = parse_openmetrics
    assert samples(parse_text(text.text)) == samples(strict(openmetrics.text))


def samples(parsed: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in parsed
        for sample in family.samples
        if sample.name.startswith("walstream_")
    ]
    assert len(dict(found)) == len(found)  # no sample twice
    return dict(found)


async def test_metrics_have_the_numbers_of_the_vitals(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    assert value(text, "walstream_ready") == 1
    assert value(text, "walstream_up_phase", phase="streaming") == 1
    assert value(text, "walstream_up_phase", phase="waiting") == 0
    assert value(text, "walstream_flush_lsn_bytes") == vitals.full().flush_lsn
    assert value(text, "walstream_wal_status", status="reserved") == 1
    assert value(text, "walstream_wal_status", status="lost") == 0
    assert value(text, "walstream_changes_total", table="orders", operation="insert") == 1000
    assert value(text, "walstream_changes_total", table='a "b"\\\n é') == 200
    assert value(text, "walstream_route_changes_total", outcome="filtered") == 92
    assert value(text, "walstream_lost_changes_total", table="public.heap") == 6
    assert value(text, "walstream_deliveries_total", destination="orders", outcome="parked") == 3
    assert value(text, "walstream_reconnects_total", reason="ConnectionLost") == 1
    assert value(text, "walstream_reconnects_total", reason="SlotBusy") == 0
    assert value(text, "walstream_reloads_total", outcome="refused") == 1
    assert value(text, "walstream_realtime_refusals_total", reason="PrivateOnly") == 2
    assert value(text, "process_open_fds") > 3
    slots = {
        sample.labels["slot"]
        for family in parse_text(text)
        for sample in family.samples
        if sample.name.startswith("walstream_")
    }
    assert slots == {"shop"}


async def test_the_buckets_of_calls_add_up(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    bucket, of = "walstream_handler_seconds_bucket", {"destination": "orders"}
    assert value(text, bucket, le="0.001", **of) == 0
    assert value(text, bucket, le="0.005", **of) == 0 + 1 + 2
    assert value(text, bucket, le="+Inf", **of) == sum(vitals.CALLS.counts)
    assert value(text, "walstream_handler_seconds_count", **of) == sum(vitals.CALLS.counts)
    assert value(text, "walstream_handler_seconds_sum", **of) == 12.5
    assert value(text, "walstream_handler_seconds_count", destination="archive") == 0


@pytest.mark.parametrize("process", [[vitals.young()]])
async def test_what_is_not_known_has_no_sample(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    unknown = {family.name for family in parse_text(text) if not family.samples}
    assert unknown >= {"walstream_retained_wal_bytes", "walstream_dead_letters"}
    assert value(text, "walstream_up_phase", phase="connecting") == 1


async def test_an_odd_accept_header_gets_the_text(client: httpx.AsyncClient) -> None:
    for accept in ("", "*/*", "text/html,;;=", "application/openmetrics-text;q=0", "version=x"):
        answer = await client.get("/metrics", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith("text/plain"), accept
    for accept in ("application/openmetrics-text;version=zzz", "APPLICATION/OpenMetrics-Text"):
        answer = await client.get("/metrics", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.")


def test_a_scrape_of_200_relations_is_quick() -> None:
    changes = tuple(
        ChangeCount(Relation("public", f"table_{number}"), operation, Outcome.ROUTED, number)
        for number in range(200)
        for operation in (Operation.INSERT, Operation.UPDATE, Operation.DELETE)
    )
    registry = make_registry(lambda: vitals.full(changes=changes))
    before = time.process_time()
    text = generate_latest(registry)
    took = time.process_time() - before
    assert text.count(b"walstream_changes_total{") == 600
    assert took < 0.2  # it is some 5 ms


# ---- What documents, dashboards and alerts say


def test_every_metric_is_documented_and_no_other() -> None:
    rows = tables(REFERENCE, "metric", "type", "labels")
    documented = {code(row[0])[0]: (row[1], set(code(row[2]))) for row in rows}
    assert documented == {
        name: (family.type, labels_of(family)) for name, family in families(vitals.full()).items()
    }


def labels_of(family: Metric) -> set[str]:
    assert family.samples, f"{family.name} has no sample: add one to tests/vitals.py"
    return {label for sample in family.samples for label in sample.labels} - {"slot", "le"}


def test_every_phase_is_documented() -> None:
    text = text_of(REFERENCE)
    assert all(f"`{phase}`" in text for phase in Phase)


def test_the_keys_of_health_are_documented() -> None:
    [shown] = re.findall(r"^```json\n(.*?)^```$", text_of(REFERENCE), re.MULTILINE | re.DOTALL)
    keys = {"ready", "phase", "reason", "stalled_because", "stalled_seconds"}
    assert set(json.loads(shown)) == keys


def sample_names() -> set[str]:
    return {sample.name for family in families(vitals.full()).values() for sample in family.samples}


def names_in(expression: str) -> set[str]:
    """The metrics in a PromQL expression; strings and labels do not count."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b(?:(?:walstream|process|python)_\w+|up\b)", bare))


def dashboard_expressions(node: Any) -> Iterator[str]:
    match node:
        case dict():
            for key, inner in node.items():
                if key in ("expr", "definition") and isinstance(inner, str):
                    yield inner
                yield from dashboard_expressions(inner)
        case list():
            for inner in node:
                yield from dashboard_expressions(inner)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text_of("deploy/grafana/dashboards/walstream.json"))
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(text_of("deploy/prometheus/alerts.yml"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_dashboard_shows_metrics_that_exist() -> None:
    used = {name for expr in dashboard_expressions(dashboard()) for name in names_in(expr)}
    assert used - sample_names() == set()
    shown = {name for name in used if name.startswith("walstream_")}
    missing = {name for name in families(vitals.full()) if name.startswith("walstream_")} - {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in shown
    }
    assert missing == set()


def test_panels_of_the_dashboard_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_alerts_are_about_metrics_that_exist_and_say_what_to_do() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        names = names_in(rule["expr"])
        assert names, rule["alert"]
        assert names - sample_names() - {"up"} == set(), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]


def test_alerts_name_events_that_are_logged() -> None:
    documented = {
        code(row[0])[0]
        for row in tables("docs/logging-and-exit-codes.md", "event", "level", "keys")
    }
    runbooks = " ".join(rule["annotations"]["runbook"] for rule in alerts())
    named = set(re.findall(r"event `(\w+)`", runbooks))
    assert len(named) >= 4
    assert named <= documented


# ---- Listening


def at(listen: str) -> HttpConfig:
    """Also what the configuration would refuse."""
    return HttpConfig.model_construct(listen=listen)


async def test_it_listens_on_a_free_port_and_says_where(
    process: Process, logged: list[Any]
) -> None:
    async with Gateway.open(LISTEN, lambda: process[0]) as gateway:
        host, _, port = gateway.address.rpartition(":")
        assert (host, port) != ("127.0.0.1", "0")
        async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as client:
            answer = await client.get("/health/ready")
            assert answer.status_code == 200
            assert "server" not in answer.headers
            assert answer.headers["date"].endswith("GMT")
    assert [(one["event"], one["address"]) for one in logged] == [
        ("http_listening", gateway.address)
    ]


async def test_it_warns_when_others_can_reach_it(logged: list[Any]) -> None:
    async with Gateway.open(at("0.0.0.0:0"), vitals.full) as gateway:
        assert gateway.address.startswith("0.0.0.0:")
    assert [one["event"] for one in logged] == ["http_listening", "http_exposed"]


async def test_localhost_and_ipv6_are_addresses() -> None:
    async with (
        Gateway.open(at("localhost:0"), vitals.full) as gateway,
        httpx.AsyncClient() as client,
    ):
        port = gateway.address.rpartition(":")[2]
        assert (await client.get(f"http://localhost:{port}/metrics")).status_code == 200
    if socket.has_ipv6 and can_bind("::1"):
        async with (
            Gateway.open(at("[::1]:0"), vitals.full) as gateway,
            httpx.AsyncClient() as client,
        ):
            assert gateway.address.startswith("[::1]:")
            assert (await client.get(f"http://{gateway.address}/metrics")).status_code == 200


def can_bind(host: str) -> bool:
    with socket.socket(socket.AF_INET6) as one, contextlib.suppress(OSError):
        one.bind((host, 0))
        return True
    return False


async def test_a_taken_address_is_told() -> None:
    async with Gateway.open(LISTEN, vitals.full) as gateway:
        with pytest.raises(SetupError, match=f"{gateway.address}: Address already in use") as error:
            async with Gateway.open(at(gateway.address), vitals.full):
                pass
    assert "ss -ltnp" in error.value.hint
    assert error.value.exit_code == EX_CONFIG
    async with Gateway.open(at(gateway.address), vitals.full):  # free again at once
        pass


@pytest.mark.parametrize(
    ("listen", "kind", "says", "hint"),
    [
        (
            "no.such.host.invalid:80",
            ConfigError,
            "host no.such.host.invalid cannot be",
            "127.0.0.1",
        ),
        ("127.0.0.1:65536", ConfigError, "'127.0.0.1:65536'", "127.0.0.1:8432"),
        ("localhost", ConfigError, "'localhost'", "127.0.0.1:8432"),
        (f"{'a' * 70}.b:80", ConfigError, "cannot be resolved", "127.0.0.1"),
        ("192.0.2.1:0", SetupError, "Cannot assign requested address", "127.0.0.1"),
    ],
)
async def test_addresses_that_cannot_be_had_are_told(
    listen: str, kind: type[SetupError], says: str, hint: str
) -> None:
    with pytest.raises(kind, match=re.escape(says)) as error:
        async with Gateway.open(at(listen), vitals.full):
            pass
    assert hint in error.value.hint


async def test_a_privileged_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {"bind": refuse}))
    with pytest.raises(SetupError, match=r"127\.0\.0\.1:80: Permission denied") as error:
        await listening.listen_at(listening.Address("127.0.0.1", 80))
    assert "CAP_NET_BIND_SERVICE" in error.value.hint


async def test_without_the_extra_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "walstream.gateway.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SetupError, match="the module uvicorn is not installed") as error:
        async with Gateway.open(LISTEN, vitals.full):
            pass
    assert error.value.hint == 'pip install "walstream[http]"'


# ---- Clients that do not behave


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = gateway.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_it_closes_within_a_second_whatever_clients_do(
    async_wait_until: Callable[..., Awaitable[Any]],
) -> None:
    many = tuple(
        ChangeCount(Relation("public", "x" * 60 + str(number)), Operation.INSERT, Outcome.ROUTED, 1)
        for number in range(60_000)
    )
    async with contextlib.AsyncExitStack() as opened:
        gateway = await opened.enter_async_context(
            Gateway.open(LISTEN, lambda: vitals.full(changes=many))
        )
        state = gateway.server._state
        writers = []
        for request in (b"", b"GET /metr", b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"):
            _, writer = await connect(gateway)
            writer.write(request)
            writers.append(writer)
        greedy = socket.create_connection(("127.0.0.1", int(gateway.address.rpartition(":")[2])))
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")  # and does not read
        await async_wait_until(lambda: state.total_requests == 2 and len(state.connections) == 4)
        await async_wait_until(
            lambda: any(
                one.transport.get_write_buffer_size() for one in gateway.server._connections()
            )
        )
        before = time.monotonic()
    assert time.monotonic() - before < 1
    assert not state.connections
    assert not state.tasks
    greedy.close()
    for writer in writers:
        writer.close()


async def test_a_request_that_takes_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(http_connection, "REQUEST_SECONDS", 0.05)
    async with Gateway.open(LISTEN, vitals.full) as gateway:
        for request in (b"", b"GET /health/live HTTP/1.1\r\nX: "):
            reader, writer = await connect(gateway)
            writer.write(request)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as client:
            for _ in range(3):  # one that stays connected has the time for each request
                assert (await client.get("/health/live")).status_code == 200
    assert [one["event"] for one in logged] == ["http_listening", "http_refused", "http_refused"]


async def test_connections_are_bounded_and_those_that_ask_for_nothing_make_room(
    monkeypatch: pytest.MonkeyPatch, async_wait_until: Callable[..., Awaitable[Any]]
) -> None:
    monkeypatch.setattr(shared, "RESERVED", 4)
    http = HttpConfig(listen="127.0.0.1:0", max_connections=4)
    async with Gateway.open(http, vitals.full) as gateway:
        held = [await connect(gateway) for _ in range(24)]
        await async_wait_until(lambda: len(gateway.server._state.connections) == 8)
        assert await held[0][0].read() == b""
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{gateway.address}/health/live")
            assert answer.status_code == 200
        for _, writer in held:
            writer.close()
        await async_wait_until(lambda: not gateway.server._state.connections)
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{gateway.address}/health/live")
            assert answer.status_code == 200


async def test_nonsense_and_large_headers_are_refused_and_not_logged_by_uvicorn(
    logged: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    async with Gateway.open(LISTEN, vitals.full) as gateway:
        for request in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20)):
            reader, writer = await connect(gateway)
            with contextlib.suppress(ConnectionError):
                writer.write(request)
                await writer.drain()
                assert (await reader.read()).startswith(b"HTTP/1.1 4")
            writer.close()
    assert {one["event"] for one in logged} == {"http_listening", "http_refused"}
    assert all(one["log_level"] == "debug" for one in logged[1:])
    assert capfd.readouterr().err == ""


async def test_a_failure_of_our_own_is_500_and_logged_without_its_text(
    logged: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Vitals:
        raise ValueError("the secret")

    async with Gateway.open(LISTEN, fail) as gateway, httpx.AsyncClient() as client:
        answer = await client.get(f"http://{gateway.address}/metrics")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    [told] = [one for one in logged if one["event"] == "http_failed"]
    assert re.fullmatch(r"ValueError at test_gateway\.py:\d+", told["error"])
    assert "secret" not in capfd.readouterr().err


async def test_several_requests_on_one_connection_are_answered_in_order() -> None:
    async with Gateway.open(LISTEN, vitals.full) as gateway:
        reader, writer = await connect(gateway)
        one = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(one + one + last)
        answers = (await reader.read()).split(b"HTTP/1.1 ")[1:]
        assert [answer[:3] for answer in answers] == [b"200", b"200", b"404"]
        writer.close()
