"""The webhook sink: what a receiver gets, when it counts as taken, and what nobody gets to see."""

from __future__ import annotations

import asyncio
import base64
import builtins
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from tests.postgres import Database, async_wait_until
from tests.receiver import DROPPED, Answer, Received, Receiver, receiving
from tests.test_delivery import Line
from tests.test_documents import blocks
from walstream import Walstream, config
from walstream.assembly import Assembly
from walstream.changes import Change
from walstream.errors import ConfigError, SinkFailed, SinkRefused
from walstream.policy import FailurePolicy, OnFailure, Retry
from walstream.reload import exchange_sinks
from walstream.sinks import redirects
from walstream.sinks.envelopes import Packing
from walstream.sinks.file import FileSink
from walstream.sinks.redirects import Target, is_public
from walstream.sinks.webhook import WebhookSink, retry_after_seconds
from walstream.testing import insert, new_transaction, update

ROOT = Path(__file__).parent.parent
NEW, OLD = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


def changes(count: int) -> list[Change]:
    transaction = new_transaction()
    return [insert("public.t", {"id": n}, transaction=transaction) for n in range(count)]


def ids(given: list[Change]) -> list[str]:
    return [change.id for change in given]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as one:
        yield one


@pytest.fixture
async def stack(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncExitStack]:
    for variable in [one for one in os.environ if one.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    async with AsyncExitStack() as one:
        yield one


def configured(url: str, **keys: Any) -> WebhookSink:
    """A sink as the configuration makes it."""
    settings = config.parse(
        {
            "slot": {"name": "shop"},
            "sinks": {"hook": {"type": "webhook", "url": url, **keys}},
            "routes": [{"table": "public.t", "to": "hook"}],
        }
    )
    [sink] = Assembly(settings).sinks
    assert isinstance(sink, WebhookSink)
    return sink


async def opened(stack: AsyncExitStack, url: str, **keys: Any) -> WebhookSink:
    sink = configured(url, **keys)
    await sink.open()
    stack.push_async_callback(sink.close)
    return sink


# ---- What is sent


async def test_a_request_holds_changes_up_to_its_bounds(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    given = [*changes(5), insert("public.t", {"id": 1, "text": "x" * 5000}), *changes(6)]
    size = len(given[0].to_json())
    sink = await opened(
        stack, receiver.url, max_changes=4, max_request_bytes=len('{"changes":[]}') + 3 * size + 2
    )
    await sink.take(given)
    assert [len(request.ids) for request in receiver.requests] == [3, 2, 1, 3, 3]
    assert receiver.ids == ids(given)
    assert {request.connection for request in receiver.requests} == {1}
    request = receiver.requests[0]
    assert (request.method, request.target) == ("POST", "/changes")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("walstream/")
    assert len(receiver.requests[0].body) == sink._options.packing.max_request_bytes


async def test_headers_and_a_user_of_the_url_are_sent(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    url = receiver.url.replace("http://", "http://us%40er:pa%3Ass@") + "?token=1"
    sink = await opened(stack, url, headers={"X-Key": "v"})
    await sink.take(changes(1))
    [request] = receiver.requests
    assert request.target == "/changes?token=1"
    assert request.headers["x-key"] == "v"
    assert base64.b64decode(request.headers["authorization"].removeprefix("Basic ")) == (
        b"us@er:pa:ss"
    )
    assert "webhook-signature" not in request.headers


async def test_cloudevents_have_their_attributes(receiver: Receiver, stack: AsyncExitStack) -> None:
    """https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md"""
    change = update("public.t", {"id": 1})
    for source, keys in {"/walstream/shop": {}, "urn:a": {"source": "urn:a"}}.items():
        sink = await opened(stack, receiver.url, format="cloudevents", **keys)
        await sink.take([change])
        request = receiver.requests.pop()
        assert request.headers["content-type"] == "application/cloudevents-batch+json"
        assert json.loads(request.body) == [
            {
                "specversion": "1.0",
                "id": change.id,
                "source": source,
                "type": "walstream.update",
                "subject": "public.t",
                "time": change.commit_time.isoformat(timespec="microseconds"),
                "datacontenttype": "application/json",
                "data": json.loads(change.to_json()),
            }
        ]


async def test_cookies_of_a_receiver_are_not_kept(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    receiver.answers.append(Answer(204, {"set-cookie": "session=1"}))
    sink = await opened(stack, receiver.url, max_changes=1)
    await sink.take(changes(2))
    assert all("cookie" not in request.headers for request in receiver.requests)


# ---- Signatures


def verified(request: Received, secret: str) -> bool:
    """As https://github.com/standard-webhooks/standard-webhooks describes it for receivers."""
    signed = ".".join(
        [request.headers["webhook-id"], request.headers["webhook-timestamp"], request.body.decode()]
    )
    key = base64.b64decode(secret.split("_")[1])
    own = base64.b64encode(hmac.new(key, signed.encode(), hashlib.sha256).digest()).decode()
    return f"v1,{own}" in request.headers["webhook-signature"].split(" ")


@pytest.mark.parametrize("given", [NEW, [NEW], [NEW, OLD]])
async def test_requests_are_signed_with_each_secret(
    receiver: Receiver, stack: AsyncExitStack, given: str | list[str]
) -> None:
    sink = await opened(stack, receiver.url, secret=given)
    await sink.take(changes(3))
    [request] = receiver.requests
    assert verified(request, NEW)
    assert verified(request, OLD) == (OLD in given)
    sent_at = int(request.headers["webhook-timestamp"])
    assert abs(datetime.now(UTC).timestamp() - sent_at) < 10


async def test_secrets_of_a_file_are_read_again_at_a_reload(
    receiver: Receiver, stack: AsyncExitStack, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{OLD}\n")
    sink = await opened(stack, receiver.url, secret_file=str(file))
    await sink.take(changes(1))
    file.write_text(f"{NEW}\n{OLD}\n")
    await sink.reopen()
    await sink.take(changes(1))
    file.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"sinks\.hook\.secret_file: found a value; allowed"):
        await sink.reopen()
    await sink.take(changes(1))
    assert [verified(request, NEW) for request in receiver.requests] == [False, True, True]
    assert all(verified(request, OLD) for request in receiver.requests)


async def test_the_receiver_of_the_documents_verifies_and_does_nothing_twice(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    [block] = blocks("python", "receiver", [ROOT / "docs" / "sinks.md"])
    script = tmp_path / "receiver.py"
    script.write_text(block.text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, script),
        env={"SECRET": f"{OLD} {NEW}", "PORT": "0"},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int((await process.stdout.readline()).split()[-1])
        url = f"http://127.0.0.1:{port}/"
        given = changes(3)
        for secret in (NEW, OLD, [NEW, OLD]):
            await (await opened(stack, url, secret=secret)).take(given)
        stranger = "whsec_" + base64.b64encode(bytes(32)).decode()
        for keys in ({"secret": stranger}, {}):
            with pytest.raises(SinkRefused, match="status 401"):
                await (await opened(stack, url, **keys)).take(changes(1))
    finally:
        process.terminate()
        out, _ = await process.communicate()
    assert out.decode().splitlines() == [f"insert t {{'id': {n}}}" for n in range(3)]


# ---- What is taken, and what comes again


@pytest.mark.parametrize("trouble", [DROPPED, Answer(503), Answer(500), Answer(429), Answer(302)])
async def test_a_request_that_comes_again_is_the_same(
    receiver: Receiver, stack: AsyncExitStack, trouble: Answer
) -> None:
    """The receiver may have taken it and its answer got lost."""
    sink = await opened(stack, receiver.url, secret=NEW, max_changes=2)
    given = changes(4)
    receiver.answers += [Answer(), trouble]
    with pytest.raises(SinkFailed) as failed:
        await sink.take(given)
    assert not isinstance(failed.value, SinkRefused)
    await sink.take(given)
    first, second, again = receiver.requests
    assert again.body == second.body
    assert again.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    assert re.fullmatch(r"[\w-]+", first.headers["webhook-id"])
    assert receiver.ids == ids(given[:2] + given[2:] + given[2:])


async def test_the_id_is_the_same_after_a_restart(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    given = changes(2)
    for _ in range(2):
        await (await opened(stack, receiver.url)).take(given)
    one, other = receiver.requests
    assert one.headers["webhook-id"] == other.headers["webhook-id"]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226])
async def test_every_success_is_one(receiver: Receiver, stack: AsyncExitStack, status: int) -> None:
    receiver.answers.append(Answer(status))
    await (await opened(stack, receiver.url)).take(changes(1))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 451])
async def test_what_is_refused_is_not_worth_another_attempt(
    receiver: Receiver, stack: AsyncExitStack, status: int
) -> None:
    sink = await opened(stack, receiver.url)
    receiver.answers.append(Answer(status, {"retry-after": "1"}, b"hunter2"))
    given = changes(2)
    with pytest.raises(SinkRefused) as refused:
        await sink.take(given)
    assert str(refused.value).partition("\n")[0] == (
        f"sink hook: {receiver.url} did not accept changes"
        f" {given[0].id} to {given[1].id}: status {status}"
    )


async def test_what_was_accepted_of_a_failed_batch_is_not_sent_again(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    """Also when its changes come one at a time then; in another session they are sent again."""
    sink = await opened(stack, receiver.url, max_changes=2)
    given = changes(6)
    receiver.answers += [Answer(), Answer(), Answer(400)]
    with pytest.raises(SinkRefused):
        await sink.take(given)
    for change in given:
        await sink.take([change])
    assert receiver.ids == ids(given + given[4:])
    receiver.answers += [Answer(), Answer(400)]
    with pytest.raises(SinkRefused):
        await sink.take(given)
    receiver.requests.clear()
    others = changes(2)
    await sink.take(others)
    await sink.take(given)
    assert receiver.ids == ids(others + given)


async def test_one_request_at_a_time(receiver: Receiver, stack: AsyncExitStack) -> None:
    sink = await opened(stack, receiver.url, max_changes=1)
    given = changes(10)
    await asyncio.gather(sink.take(given[:5]), sink.take(given[5:]))
    assert receiver.most_at_once == 1
    assert receiver.ids == ids(given)


async def test_a_connection_that_was_closed_meanwhile_is_opened_again(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    sink = await opened(stack, receiver.url)
    await sink.take(changes(1))
    receiver.hang_up()
    await async_wait_until(lambda: not receiver._writers)
    await asyncio.sleep(0)
    await sink.take(changes(1))
    assert [request.connection for request in receiver.requests] == [1, 2]


async def test_an_answer_without_end_is_not_waited_for(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    """Its status has said that the changes are accepted."""
    sink = await opened(stack, receiver.url, timeout_seconds=5)
    receiver.answers += [Answer(200, {"content-length": "1000000"}, b"x" * 100_000)]
    await sink.take(changes(1))
    await sink.take(changes(1))
    assert [request.connection for request in receiver.requests] == [1, 2]


# ---- Time


@pytest.mark.parametrize("status", [429, 503])
async def test_a_receiver_says_when_to_try_again(
    receiver: Receiver, stack: AsyncExitStack, status: int
) -> None:
    sink = await opened(stack, receiver.url, max_retry_after_seconds=60)
    for said, seconds in [("7", 7.0), ("100000", 60.0), ("0", None), ("soon", None)]:
        receiver.answers.append(Answer(status, {"retry-after": said}))
        with pytest.raises(SinkFailed) as failed:
            await sink.take(changes(1))
        assert getattr(failed.value, "delay_seconds", None) == seconds
        assert isinstance(failed.value, Retry) == (seconds is not None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "Sun, 22 Nov 2026 17:40:30 GMT"}, 30),
        ({"retry-after": "Sun, 22 Nov 2026 17:39:30 GMT"}, None),
        (
            {
                "retry-after": "Sun, 22 Nov 2026 20:00:09 GMT",
                "date": "Sun, 22 Nov 2026 20:00:00 GMT",
            },
            9,
        ),
        ({"retry-after": "Sun, 22 Nov 2026 17:40:30 GMT", "date": "today"}, 30),
        ({"retry-after": " 12 "}, 12),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "9" * 400}, None),
        ({}, None),
    ],
)
def test_seconds_and_dates_are_understood(headers: dict[str, str], seconds: float | None) -> None:
    now = datetime(2026, 11, 22, 17, 40, tzinfo=UTC)
    assert format_datetime(now, usegmt=True) == "Sun, 22 Nov 2026 17:40:00 GMT"
    assert retry_after_seconds(headers, now=now) == seconds


async def test_the_pause_that_a_receiver_asks_for_is_made(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    receiver.answers.append(Answer(429, {"retry-after": "1"}))
    line = Line()
    line.transaction(await opened(stack, receiver.url))
    with capture_logs() as logs:
        await line.deliver()
    [retried] = [one for one in logs if one["event"] == "delivery_retried"]
    assert retried["pause_seconds"] == 1.0
    assert "status 429, try again in 1 s" in retried["error"]
    assert line.acknowledger.flush_lsn == line.end


async def test_a_slow_receiver_is_given_up(receiver: Receiver, stack: AsyncExitStack) -> None:
    sink = await opened(stack, receiver.url, timeout_seconds=0.1)
    receiver.answers.append(Answer(hold=asyncio.Event()))
    given = changes(1)
    with pytest.raises(SinkFailed, match=r"no answer within 0\.1 s"):
        await sink.take(given)
    await sink.take(given)
    assert receiver.ids == ids(given + given)
    assert receiver.most_at_once == 2  # the first one is still at it; it was told by the id


async def test_a_receiver_that_is_not_there_is_told(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    closed = receiver.url.replace(str(receiver.port), "1")
    with pytest.raises(SinkFailed, match=f"{closed} did not accept .*: Connection refused"):
        await (await opened(stack, closed)).take(changes(1))
    with pytest.raises(SinkFailed, match="its name cannot be resolved: "):
        await (await opened(stack, "http://nowhere.invalid/")).take(changes(1))


@pytest.mark.parametrize(
    ("is_read", "why"),
    [(True, "none of HTTP"), (False, "Broken pipe|was cut|Connection reset|none of HTTP")],
)
async def test_what_is_no_http_is_told(stack: AsyncExitStack, *, is_read: bool, why: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_read:
            await reader.readuntil(b"]}")
        writer.write(b"220 hunter2 ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        sink = await opened(stack, f"http://127.0.0.1:{port}")
        with pytest.raises(SinkFailed, match=why) as failed:
            await sink.take(changes(1))
        assert "hunter2" not in str(failed.value)


# ---- Policies


@pytest.mark.parametrize(("on_failure", "skipped"), [(OnFailure.SKIP, 1), (OnFailure.STOP, 0)])
async def test_the_policy_decides_about_what_is_refused(
    receiver: Receiver, stack: AsyncExitStack, on_failure: OnFailure, skipped: int
) -> None:
    """Of a batch only the change that is refused alone is skipped."""
    line = Line()
    line.policy = FailurePolicy(attempts=5, on_failure=on_failure)
    sink = await opened(stack, receiver.url, max_changes=2)
    line.transaction(*[sink] * 6)
    receiver.answers += [Answer(), Answer(422), Answer(422), Answer(200)]
    if on_failure is OnFailure.STOP:
        with pytest.raises(SinkFailed, match="status 422"):
            await line.deliver()
    else:
        with capture_logs() as logs:
            await line.deliver()
        [one] = [entry for entry in logs if entry["event"] == "change_skipped"]
        assert one["change"] == line.handed[2][1].id
    assert line.delivery.counts["hook"].skipped == skipped
    assert len(receiver.requests) == (5 if skipped else 2)  # one, one refused; its two alone; one


# ---- From the database


async def test_committed_changes_get_to_the_receiver_and_are_confirmed(
    database: Database, receiver: Receiver
) -> None:
    """In commit order; with answers that get lost, none missing."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    slot = f"hooked_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    for start in range(0, 300, 30):
        database.execute("INSERT INTO t SELECT generate_series(%s::int, %s)", start + 1, start + 30)
    receiver.answers += [Answer(), DROPPED, Answer(500), Answer(), Answer(429)]
    settings = {
        "postgres": {"dsn": database.dsn},
        "slot": {"name": slot},
        "handlers": {"backoff_seconds": 0.01},
        "routes": [{"table": "public.t", "to": "hook"}],
        "sinks": {"hook": {"type": "webhook", "url": receiver.url, "max_changes": 40}},
    }
    try:
        await Walstream().run(config.parse(settings), until="now")
    finally:
        database.execute("SELECT pg_drop_replication_slot(%s)", slot)
    rows = [
        change["row"]["id"]
        for request in receiver.requests
        for change in json.loads(request.body)["changes"]
    ]
    assert list(dict.fromkeys(rows)) == list(range(1, 301))


# ---- Redirects


async def test_a_redirect_to_a_private_address_is_refused(
    receiver: Receiver, stack: AsyncExitStack
) -> None:
    """However it is written."""
    sink = await opened(stack, receiver.url)
    port = receiver.port
    for location in [
        "/elsewhere",
        f"http://127.0.0.1:{port}/?token=hunter2",
        f"//localhost:{port}/",
        f"http://2130706433:{port}/",
        f"http://[::1]:{port}/",
        f"http://[::ffff:127.0.0.1]:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
    ]:
        receiver.answers.append(Answer(307, {"location": location}))
        with pytest.raises(SinkFailed, match=r"a redirect to .*, which has a private address"):
            await sink.take(changes(1))
    assert {request.target for request in receiver.requests} == {"/changes"}


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("", "without a location"),
        ("ftp://example.org/", "to something else than HTTP"),
        ("http://a b:x/", "no answer, or none of HTTP"),
        ("http://nowhere.invalid/", "which has no address"),
    ],
)
async def test_a_redirect_to_nowhere_is_refused(
    receiver: Receiver, stack: AsyncExitStack, location: str, why: str
) -> None:
    receiver.answers.append(Answer(308, {"location": location} if location else {}))
    with pytest.raises(SinkFailed, match=why) as failed:
        await (await opened(stack, receiver.url)).take(changes(1))
    assert failed.value.hint.startswith("set the sink's url to") or "none of HTTP" in why


@pytest.mark.parametrize("status", [307, 308])
async def test_an_allowed_redirect_keeps_the_request_and_loses_credentials(
    receiver: Receiver, stack: AsyncExitStack, status: int
) -> None:
    other = await stack.enter_async_context(receiving())
    url = receiver.url.replace("http://", "http://user:hunter2@")
    sink = await opened(
        stack, url, allow_private_redirects=True, secret=NEW, headers={"X-Key": "hunter2"}
    )
    given = changes(2)
    receiver.answers += [
        Answer(status, {"location": "/same"}),
        Answer(status, {"location": f"http://u:p@127.0.0.1:{other.port}/other"}),
    ]
    other.answers += [Answer(status, {"location": f"{receiver.url}/back"})]
    await sink.take(given)
    first, same, back = receiver.requests
    [elsewhere] = other.requests
    assert [one.target for one in (first, same, elsewhere, back)] == [
        *("/changes", "/same", "/other", "/changes/back")
    ]
    for request in (first, same):
        assert request.headers["x-key"] == "hunter2"
        assert "authorization" in request.headers
    for request in (elsewhere, back):
        assert "hunter2" not in str(request)
        assert "authorization" not in request.headers
    for request in (same, elsewhere, back):
        assert (request.method, request.body) == ("POST", first.body)
        assert request.headers["webhook-id"] == first.headers["webhook-id"]
        assert verified(request, NEW)


async def test_redirects_come_to_an_end(receiver: Receiver, stack: AsyncExitStack) -> None:
    sink = await opened(stack, receiver.url, allow_private_redirects=True)
    receiver.answers += [Answer(307, {"location": "/changes"})] * 10
    with pytest.raises(SinkFailed, match="more than 3 redirects"):
        await sink.take(changes(1))
    assert len(receiver.requests) == 4


async def test_a_redirect_goes_to_the_address_that_was_looked_at(
    receiver: Receiver, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the name means a moment later."""
    other = await stack.enter_async_context(receiving())
    monkeypatch.setattr(redirects, "is_public", lambda address: address.is_loopback)
    looked_up = []

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        return [(None, None, None, "", ("127.0.0.1", port))]

    sink = await opened(stack, receiver.url, headers={"X-Key": "hunter2"})
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    receiver.answers.append(Answer(307, {"location": f"http://public.invalid:{other.port}/x"}))
    await sink.take(changes(1))
    [request] = other.requests
    assert request.headers["host"] == f"public.invalid:{other.port}"
    assert "x-key" not in request.headers
    assert looked_up == ["public.invalid"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - nobody binds to it
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff0e::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("2002:808:808::1", True),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("64:ff9b:1::808:808", False),
        ("100::1", False),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("fec0::1", False),
        ("192.0.0.170", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
    ],
)
def test_addresses_that_only_the_operators_network_reaches(address: str, *, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


# ---- TLS and proxies


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 with its key, signed by itself."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = (
        f"/usr/bin/env openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {file} -out {file}.crt"
    )
    made = subprocess.run(command.split(), capture_output=True, timeout=30, check=False)
    if made.returncode:
        pytest.skip(f"openssl makes no certificate here: {made.stderr.decode()[-200:]}")
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.fixture
async def encrypted(certificate: Path) -> AsyncIterator[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with receiving(context) as one:
        yield one


async def test_a_certificate_is_verified_unless_that_is_switched_off(
    encrypted: Receiver, stack: AsyncExitStack, certificate: Path
) -> None:
    with pytest.raises(SinkFailed, match=r"its certificate is not accepted: self.signed"):
        await (await opened(stack, encrypted.url)).take(changes(1))
    await (await opened(stack, encrypted.url, ca_file=f"{certificate}.crt")).take(changes(1))
    with capture_logs() as logs:
        unverified = await opened(stack, encrypted.url + "?token=hunter2", verify=False)
    assert [(one["event"], one["url"]) for one in logs] == [("webhook_not_verified", encrypted.url)]
    await unverified.take(changes(1))
    assert len(encrypted.requests) == 2
    wrong_name = encrypted.url.replace("127.0.0.1", "localhost")
    with pytest.raises(SinkFailed, match="Hostname mismatch"):
        await (await opened(stack, wrong_name, ca_file=f"{certificate}.crt")).take(changes(1))


async def test_a_redirect_from_encrypted_to_plain_is_refused(
    encrypted: Receiver, receiver: Receiver, stack: AsyncExitStack, certificate: Path
) -> None:
    sink = await opened(
        stack, encrypted.url, ca_file=f"{certificate}.crt", allow_private_redirects=True
    )
    encrypted.answers.append(Answer(307, {"location": receiver.url}))
    with pytest.raises(SinkFailed, match="a redirect from https to http://127"):
        await sink.take(changes(1))
    assert receiver.requests == []


@pytest.mark.parametrize("content", [None, "nonsense"])
async def test_authorities_that_cannot_be_read_are_a_mistake(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "ca").write_text(content)
    sink = configured("https://example.org", ca_file=str(tmp_path / "ca"))
    with pytest.raises(ConfigError, match=r"sinks\.hook\.ca_file: "):
        await sink.open()
    await sink.close()


@pytest.mark.parametrize("content", [None, "nonsense"])
async def test_authorities_of_the_environment_that_cannot_be_read_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Also of a reload, which leaves all as it was."""
    file = tmp_path / "ca"
    if content is not None:
        file.write_text(content)
    before = FileSink("out", tmp_path / "out.jsonl")
    await before.open()
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    sink = configured("https://example.org")
    with pytest.raises(ConfigError, match=r"sinks\.hook: .*SSL_CERT_FILE: '.*/ca' ") as failed:
        await exchange_sinks([before], [sink])
    assert "SSL_CERT_FILE" in failed.value.hint
    await sink.close()
    await before.take(changes(1))
    await before.close()
    unverified = configured("https://example.org", verify=False)
    await unverified.open()
    await unverified.close()


@pytest.mark.parametrize("where", ["configuration", "environment"])
async def test_a_proxy_is_used(
    receiver: Receiver, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A proxy gets the whole URL of a plain request."""
    address = f"http://us:er@127.0.0.1:{receiver.port}"
    if where == "environment":
        monkeypatch.setenv("HTTP_PROXY", address)
    keys = {"proxy": address} if where == "configuration" else {}
    sink = await opened(stack, "http://example.org/changes", **keys)
    await sink.take(changes(1))
    [request] = receiver.requests
    assert request.target == "http://example.org/changes"
    assert request.headers["proxy-authorization"].startswith("Basic ")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if where == "environment":
        direct = await opened(stack, receiver.url)
        await direct.take(changes(1))
        assert receiver.requests[-1].target == "/changes"


async def test_a_proxy_that_refuses_is_told(receiver: Receiver, stack: AsyncExitStack) -> None:
    sink = await opened(
        stack, "https://example.org/", proxy=f"http://u:p@127.0.0.1:{receiver.port}"
    )
    receiver.answers.append(Answer(407, body=b"hunter2"))
    with pytest.raises(SinkFailed, match="the proxy answered 407"):
        await sink.take(changes(1))
    assert receiver.requests[0].method == "CONNECT"


async def test_a_proxy_that_cannot_be_used_is_a_mistake(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://us:hunter2@example.org")
    with pytest.raises(ConfigError, match="a proxy of the environment") as failed:
        await opened(stack, "https://example.org/")
    assert "hunter2" not in str(failed.value)


# ---- What nobody gets to see


async def test_secrets_reach_neither_logs_nor_errors(
    receiver: Receiver, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """httpx logs URLs at info, and httpcore headers at debug: not those of the sink."""
    url = receiver.url.replace("http://", "http://user:hunter2@") + "?token=hunter2"
    sink = await opened(
        stack, url, headers={"X-Key": "hunter2"}, secret=NEW, allow_private_redirects=True
    )
    receiver.answers += [
        Answer(307, {"location": "/a?token=hunter2"}),
        Answer(500, {"retry-after": "1", "x": "hunter2"}, b"hunter2"),
        Answer(404, {}, b"hunter2"),
        DROPPED,
        Answer(307, {"location": "ftp://hunter2@hunter2/hunter2?hunter2"}),
    ]
    texts = [repr(sink), repr(sink._options)]
    with caplog.at_level(logging.DEBUG), capture_logs() as logs:
        for _ in range(4):
            with pytest.raises(SinkFailed) as failed:
                await sink.take(changes(1))
            texts += [str(failed.value), repr(failed.value), repr(failed.value.__cause__)]
        await sink.take(changes(1))
        await sink.close()
    seen = "\n".join([*texts, caplog.text, str(logs)])
    assert "hunter2" not in seen
    assert NEW not in seen
    assert NEW.removeprefix("whsec_") not in seen


def test_what_is_printed_holds_neither_values_nor_tokens() -> None:
    change = insert("public.t", {"id": "hunter2"}, transaction=new_transaction())
    [envelope] = Packing().pack([change])
    assert repr(envelope) == f"Envelope(1 changes, {len(envelope.body)} bytes)"
    target = Target(httpx.URL("https://us:hunter2@example.org/a?token=hunter2"))
    assert repr(target) == str(target) == "Target(https://example.org/a)"


async def test_what_others_do_with_httpx_is_logged(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(receiver.url)
    assert "HTTP Request: POST" in caplog.text


# ---- Configuration


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "sinks.hook.url: is missing"),
        ({"url": "hunter2"}, "sinks.hook.url: found a value; allowed: a URL that begins with"),
        ({"url": "https://hunter2:x/"}, "sinks.hook.url: found a value; allowed: a URL that"),
        ({"url": 7}, "sinks.hook.url: found a value; allowed: a string"),
        ({"secret": "hunter2"}, "sinks.hook.secret: found a value; allowed: whsec_ and 24 to 64"),
        ({"secret": "whsec_aHVudGVyMg=="}, "sinks.hook.secret: found a value; allowed: whsec_"),
        ({"secret": [NEW, "hunter2"]}, "sinks.hook.secret: found a value; allowed: whsec_"),
        ({"secret_file": ["whsec_hunter2"]}, "sinks.hook.secret_file: found a value; allowed: a p"),
        ({"secret": []}, "sinks.hook.secret: found a value; allowed: at least one"),
        ({"secret": NEW, "secret_file": "x"}, "sinks.hook: the secret is given twice"),
        ({"headers": "hunter2"}, "sinks.hook.headers: found a value; allowed: a table"),
        ({"headers": {"a b": "hunter2"}}, "sinks.hook.headers: found a name that no header"),
        ({"headers": {"a": "hunter2\n"}}, "sinks.hook.headers: the value of a is not one of"),
        ({"headers": {"Webhook-Id": "1"}}, "sinks.hook.headers: Webhook-Id is set by walstream"),
        ({"proxy": "hunter2"}, "sinks.hook.proxy: found a value; allowed: a URL"),
        ({"source": "urn:x"}, 'sinks.hook: source is a key of CloudEvents: it needs format = "cl'),
        ({"verify": False, "ca_file": "x"}, "sinks.hook: verify = false makes no use of ca_file"),
        ({"max_request_bytes": "much"}, "sinks.hook.max_request_bytes: found 'much'; allowed: by"),
        ({"path": "x"}, "sinks.hook.path: is not a key; allowed: type, url, headers, secret, "),
        ({"format": "xml"}, "sinks.hook.format: found 'xml'; allowed: 'json', 'ndjson' or 'cloud"),
    ],
)
def test_mistakes_are_told_without_secrets(keys: dict[str, Any], problem: str) -> None:
    sink = {"type": "webhook", "url": "https://example.org", **keys}
    if not keys:
        del sink["url"]
    with pytest.raises(ConfigError) as failed:
        config.parse({"sinks": {"hook": sink}})
    assert str(failed.value).startswith(f"environment: {problem}")
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("/shop/orders", True),
        ("orders", True),
        ("urn:example:shop", True),
        ("https://shop.example.org:8443/a?b=c#d", True),
        ("//[2001:db8::1]:80/a", True),
        ("mailto:a@example.org", True),
        ("/a%20b", True),
        ("./a:b", True),
        ("my shop <>", False),
        ("/a b", False),
        ("/a%2", False),
        ("/a\n", False),
        ("/caf\u00e9", False),
        ("1a:b", False),
        ("a#b#c", False),
    ],
)
def test_the_source_of_events_is_a_uri_reference(source: str, *, is_one: bool) -> None:
    hook = {"type": "webhook", "url": "https://e.org", "format": "cloudevents", "source": source}
    if is_one:
        config.parse({"sinks": {"hook": hook}})
        return
    with pytest.raises(ConfigError, match=r"sinks\.hook\.source: found '.* a URI-reference"):
        config.parse({"sinks": {"hook": hook}})


def test_a_secret_in_the_place_of_a_sink_or_a_file_is_not_shown() -> None:
    with pytest.raises(ConfigError) as failed:
        config.parse({"sinks": {"hook": "hunter2"}})
    assert "hunter2" not in str(failed.value)
    hook: dict[str, Any] = {"type": "webhook", "url": "https://example.org", "secret_file": NEW}
    sink = config.parse({"sinks": {"hook": hook}}).sinks["hook"]
    assert isinstance(sink, config.WebhookSinkConfig)
    with pytest.raises(ConfigError, match=r"sinks\.hook\.secret_file: .* cannot be read") as failed:
        sink.signing_keys("hook")
    assert NEW not in str(failed.value)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"keep": 3}, "sinks.out: keep and compress are about rotated files"),
        ({"fsync_seconds": 1}, "sinks.out: fsync_seconds is how often an interval ends"),
        ({"fsync": "sometimes"}, "sinks.out.fsync: found 'sometimes'; allowed: 'always', "),
        ({"max_bytes": "0kB"}, "sinks.out.max_bytes: found '0kB'; allowed: more than 0"),
        ({"url": "x"}, "sinks.out.url: is not a key; allowed: type, path, fsync, fsync_seconds,"),
    ],
)
def test_mistakes_of_a_file_sink_are_told(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as failed:
        config.parse({"sinks": {"out": {"type": "file", "path": "x", **keys}}})
    assert str(failed.value).startswith(f"environment: {problem}")


def test_without_httpx_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "walstream.sinks.webhook")
    monkeypatch.delitem(sys.modules, "walstream.sinks.redirects")
    real: Callable[..., Any] = builtins.__import__

    def without_httpx(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "httpx":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_httpx)
    with pytest.raises(
        ConfigError, match=r"sinks\.hook: a webhook needs the package httpx"
    ) as failed:
        configured("https://example.org")
    assert failed.value.hint == 'pip install "walstream[webhook]"'


def test_other_sinks_do_not_load_httpx() -> None:
    script = (
        "import sys; import walstream.cli, walstream.assembly; sys.exit('httpx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 0
