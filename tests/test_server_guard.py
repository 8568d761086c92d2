"""Who may ask and read: hosts, origins, headers, what is told of tokens; and other servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest
import structlog
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from tests import vitals
from tests.serving import FAREWELL, Streams, connect, get, serving
from walstream.config.live import HttpConfig
from walstream.gateway.app import make_app
from walstream.gateway.compression import accepts_gzip
from walstream.gateway.hosts import Hosts
from walstream.gateway.streams import Ended

PREFLIGHT: Final = {
    "Access-Control-Request-Method": "GET",
    "Access-Control-Request-Headers": "authorization, last-event-id",
}
ORIGIN: Final = "https://app.example.org"


async def hello(request: Request) -> Response:
    return JSONResponse({"hello": request.url.path})


async def page(_request: Request) -> Response:
    return HTMLResponse("<p>", headers={"Content-Security-Policy": "default-src 'self'"})


async def failing(request: Request) -> Response:
    raise ValueError(f"no {request.url} for {request.query_params['token']}")


ROUTES: Final = [Route("/hello", hello), Route("/page", page), Route("/failing", failing)]


@asynccontextmanager
async def asking(host: str = "localhost", **http: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = HttpConfig(**{"listen": "127.0.0.1:8432", **http})
    transport = httpx.ASGITransport(
        make_app(vitals.full, ROUTES, config), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        yield client


# ---- Hosts


@pytest.mark.parametrize(
    ("listen", "hosts", "allowed", "refused"),
    [
        (
            "127.0.0.1:8432",
            [],
            ["127.0.0.1:8432", "127.0.0.1", "127.0.0.2", "localhost:1", "LOCALHOST", "[::1]:8432"],
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", ""],
        ),
        ("[::1]:80", [], ["[::1]", "localhost"], ["[::2]", "::1", "[::1", "a b", "a@localhost"]),
        ("localhost:80", ["walstream.test"], ["localhost", "Walstream.Test:99"], ["test", "x."]),
        ("10.1.2.3:80", [], ["10.1.2.3"], ["localhost", "10.1.2.4"]),
        ("box.example:80", [], ["box.example.", "10.1.2.3"], ["evil.example"]),
        ("0.0.0.0:80", [], ["any.example", "10.1.2.3", "[::1]"], ["", "a/b", "a:b"]),
        (
            "0.0.0.0:80",
            ["one.example", "[fe80::1]"],
            ["one.example", "[fe80::1]:80"],
            ["localhost"],
        ),
        ("[::]:80", [], ["any.example"], []),
        ("127.0.0.1:80", ["*"], ["any.example"], [""]),
    ],
)
def test_hosts_are_those_of_the_address_and_those_that_are_listed(
    listen: str, hosts: list[str], allowed: list[str], refused: list[str]
) -> None:
    rules = Hosts(listen, hosts)
    assert [one for one in allowed if not rules.allows(one)] == []
    assert [one for one in refused if rules.allows(one)] == []


async def test_a_request_for_another_host_is_refused_but_not_for_health_and_metrics() -> None:
    async with asking("evil.example") as client:
        answer = await client.get("/hello", headers={"Origin": "http://evil.example"})
        assert answer.status_code == 421
        assert answer.json() == {
            "error": "the request is for the host 'evil.example', which is none of this server's",
            "hint": "ask for the address in http.listen, or add the name to http.hosts",
        }
        assert not [name for name in answer.headers if name.startswith("access-control")]
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        preflight = await client.options("/hello", headers=PREFLIGHT | {"Origin": ORIGIN})
        assert preflight.status_code == 421


# ---- Origins


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    prefix = "access-control-"
    return {
        name.removeprefix(prefix): value
        for name, value in answer.headers.items()
        if name.startswith(prefix)
    }


async def test_pages_of_listed_origins_may_read() -> None:
    async with asking(cors_origins=[ORIGIN, "null"]) as client:
        for path, status in (("/hello", 200), ("/hello?x", 200)):
            answer = await client.get(path, headers={"Origin": ORIGIN})
            assert answer.status_code == status
            assert cors_headers(answer) == {
                "allow-origin": ORIGIN,
                "allow-credentials": "true",
                "expose-headers": "Retry-After, WWW-Authenticate",
            }
            assert "Origin" in answer.headers["vary"]
        answer = await client.get("/hello", headers={"Origin": "null"})
        assert cors_headers(answer)["allow-origin"] == "null"


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://app.example.org", ORIGIN + ":8443", ORIGIN + ".evil", "null"],
)
async def test_others_get_no_header_of_it(origin: str) -> None:
    async with asking(cors_origins=[ORIGIN]) as client:
        answer = await client.get("/hello", headers={"Origin": origin})
        assert (answer.status_code, cors_headers(answer)) == (200, {})
        assert answer.headers["vary"] == "Origin"
        preflight = await client.options("/hello", headers=PREFLIGHT | {"Origin": origin})
        assert (preflight.status_code, cors_headers(preflight)) == (403, {})
        assert "http.cors_origins" in preflight.json()["hint"]


async def test_without_origins_there_are_no_headers_of_it_at_all() -> None:
    async with asking() as client:
        answer = await client.get("/hello", headers={"Origin": ORIGIN})
        assert (cors_headers(answer), "vary" in answer.headers) == ({}, False)


async def test_any_origin_may_read_without_credentials() -> None:
    async with asking(cors_origins=["*"]) as client:
        answer = await client.get("/hello", headers={"Origin": "https://any.example"})
        assert cors_headers(answer) == {
            "allow-origin": "*",
            "expose-headers": "Retry-After, WWW-Authenticate",
        }
        assert "vary" not in answer.headers
        assert cors_headers(await client.get("/hello")) == {}


async def test_a_preflight_says_what_may_be_sent() -> None:
    for origins in ([ORIGIN], ["*"]):
        async with asking(cors_origins=origins) as client:
            answer = await client.options("/hello", headers=PREFLIGHT | {"Origin": ORIGIN})
            assert answer.status_code == 204
            headers = cors_headers(answer)
            assert headers["allow-methods"] == "GET, HEAD, POST"
            assert {"Authorization", "Last-Event-ID", "Content-Type"} <= set(
                headers["allow-headers"].split(", ")
            )
            assert headers["max-age"] == "600"
            assert "allow-private-network" not in headers
            plain = await client.options("/hello", headers={"Origin": ORIGIN})
            assert plain.status_code == 405


async def test_a_private_network_is_opened_to_origins_that_are_listed_by_name() -> None:
    asked = PREFLIGHT | {"Origin": ORIGIN, "Access-Control-Request-Private-Network": "true"}
    for origins, status in (([ORIGIN], 204), ([ORIGIN, "*"], 204), (["*"], 403), ([], 403)):
        async with asking(cors_origins=origins) as client:
            answer = await client.options("/hello", headers=asked)
            assert answer.status_code == status
            allowed = cors_headers(answer).get("allow-private-network")
            assert allowed == ("true" if status == 204 else None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cors_origins", "app.example.org"),
        ("cors_origins", "https://app.example.org/"),
        ("cors_origins", "https://*.example.org"),
        ("cors_origins", "https://user@app.example.org"),
        ("hosts", "https://app.example.org"),
        ("hosts", "app.example.org:8432"),
        ("hosts", "*.example.org"),
        ("hosts", ""),
    ],
)
def test_origins_and_hosts_that_can_never_match_are_refused(key: str, value: str) -> None:
    with pytest.raises(ValidationError, match="allowed:"):
        HttpConfig(**{key: [value]})


def test_origins_and_hosts_are_read() -> None:
    config = HttpConfig(
        cors_origins=["*", "null", "http://localhost:3000", "https://[::1]:8", "tauri://localhost"],
        hosts=["*", "a.example", "::1", "[::1]", "10.0.0.1", "my_host"],
    )
    assert len(config.cors_origins) == 5
    assert len(config.hosts) == 6


# ---- Headers and errors


async def test_answers_are_not_stored_sniffed_framed_or_named_to_others() -> None:
    async with asking() as client:
        for path in ("/hello", "/page", "/nowhere", "/failing?token=x", "/health/live", "/metrics"):
            headers = (await client.get(path)).headers
            assert headers["cache-control"] == "no-store", path
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-content-type-options"] == "nosniff"
            own = "default-src 'self'" if path == "/page" else "default-src 'none'"
            assert headers["content-security-policy"].startswith(own)


async def test_errors_are_json_and_no_redirect_has_the_token() -> None:
    async with asking() as client:
        for path, status in (("/hello/?token=secret", 404), ("/failing?token=secret", 500)):
            answer = await client.get(path)
            assert answer.status_code == status
            assert set(answer.json()) == {"error", "hint"}
            assert "secret" not in answer.text
            assert "location" not in answer.headers
        answer = await client.post("/hello")
        assert (answer.status_code, answer.json()["hint"]) == (405, "use GET, HEAD")


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """All that is logged by anybody at any level, as text."""
    lines: list[str] = []

    def keep(_logger: object, _name: str, event: Any) -> Any:
        lines.append(repr(event))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(0))
    caplog.set_level(logging.DEBUG)
    with caplog.at_level(1):
        yield lines
    lines.extend(caplog.messages)
    structlog.configure(**before)


async def test_tokens_in_addresses_are_told_nowhere(
    all_logs: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0"  # noqa: S105 - of nobody
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    streams = Streams()
    bodies = ""
    async with serving(streams, more=ROUTES, max_connections=1) as gateway:
        for path in ("failing", "hello/", "nowhere", "echo", "\x7f", "stream", "echo"):
            reader, writer = await connect(gateway, get(f"/{path}?token={token}"))
            bodies += (await reader.read(1 << 12)).decode()
            if path != "stream":
                writer.close()
                await writer.wait_closed()
        reader, _ = await connect(gateway, get(f"/echo?token={token}", "X: " + "x" * 40_000))
        bodies += (await reader.read(1 << 12)).decode()
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"http://{gateway.address}/metrics?token=m")).text
    assert [bodies.count(f"HTTP/1.1 {status}") for status in (500, 404, 400, 503, 431)] == [
        *(1, 2, 1, 1, 1)
    ]
    told = "\n".join([*all_logs, *caplog.messages, bodies, metrics, *capfd.readouterr()])
    told = told.replace(f"GET http://{gateway.address}/metrics?token=m", "")  # httpx's own
    assert "http_failed" in told
    assert "http_refused" in told
    assert token not in told
    assert "token=" not in told


# ---- In other programs


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_streams_go_through_any_asgi_server_under_a_prefix(http: str) -> None:
    streams = Streams(compress=True)
    inner = make_app(vitals.full, [Route("/stream", streams), Route("/hello", hello)])
    app = Starlette(routes=[Mount("/walstream", inner)])
    config = uvicorn.Config(app, port=0, log_config=None, http=http, lifespan="off")
    own = uvicorn.Server(config)
    own.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(own._serve())
    while not own.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = own.servers[0].sockets[0].getsockname()[1]
    base = f"http://127.0.0.1:{port}/walstream"
    async with httpx.AsyncClient(base_url=base) as client:
        assert (await client.get("/hello")).json() == {"hello": "/walstream/hello"}
        assert (await client.get("/health/live")).status_code == 200
        assert "walstream_ready" in (await client.get("/metrics")).text
        assert (await client.get("/nowhere")).status_code == 404
        async with client.stream("GET", "/stream") as answer:
            pieces = answer.aiter_text()
            streams.open[0].write(b"one;")
            streams.open[0].write(b"two;")
            assert await anext(pieces) == "one;two;"
            await streams.open[0].room()
            streams.open[0].write(FAREWELL)
            streams.leave.set()
            assert "".join([piece async for piece in pieces]) == FAREWELL.decode()
        streams.leave.clear()
        async with client.stream("GET", "/stream", headers={"Accept-Encoding": "identity"}):
            assert len(streams.open) == 2
        while not streams.ended:  # noqa: ASYNC110 - the server tells it when it does
            await asyncio.sleep(0.01)
        assert streams.ended == [Ended.GONE]
        assert (await client.head("/stream")).status_code == 200
    own.should_exit = True
    await task


def test_gzip_is_accepted_by_name_or_star() -> None:
    def accepts(*values: str) -> bool:
        return accepts_gzip([(b"accept-encoding", value.encode()) for value in values])

    assert accepts("gzip")
    assert accepts("br, GZIP ; q=0.1")
    assert accepts("deflate", "gzip")
    assert accepts("*")
    assert accepts("identity;q=1, *;q=0.5")
    assert not accepts("")
    assert not accepts()
    assert not accepts("gzip;q=0, *")
    assert not accepts("gzipped")
