"""What somebody may try to read what is not theirs, against the running process.

A table of attempts that are refused, and a table of scenes of which a reader sees a part. Whatever
is received is searched, byte by byte, for what must not be in it: all that is secret has `SECRET`
in its value. Both tables hold for what is published, for what is replayed, and for pages.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import httpx
import pytest

from tests.access_scenes import (
    BAD_TOKENS,
    CLEAN,
    MESSAGES,
    SCENES,
    SCHEMA,
    Scene,
    Site,
    assert_nothing_told,
    perform,
    running_site,
)
from tests.live_service import Event, events_of
from tests.postgres import wait_until
from walstream.testing.databases import create_database, drop_database


@pytest.fixture(scope="module")
def site(
    server_dsn: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """One process for all attempts."""
    database = create_database(server_dsn, database_template)
    try:
        with database:
            database.execute(SCHEMA)
            with running_site(database, tmp_path_factory.mktemp("access")) as site:
                with stream(site, [("table", "public.marks")]) as got:
                    site.begin = got.begin
                    site.mark("first")
                    got.until_mark("first")
                yield site
    finally:
        drop_database(server_dsn, database.name)


# Reading


class Got:
    """What is read from a stream: its events, and all bytes that came."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.received = b""
        self.events = events_of(self._lines()) if _is_stream(response) else self._notes()
        first = next(self.events)
        assert first.name == "streaming" or not _is_stream(response)
        self.begin = first.id

    def _pieces(self) -> Iterator[bytes]:
        for piece in self.response.iter_bytes():
            self.received += piece
            yield piece

    def _lines(self) -> Iterator[str]:
        rest = b""
        for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line.decode() for line in lines)

    def _notes(self) -> Iterator[Event]:
        yield Event("page", "", "")
        for line in filter(None, self._lines()):
            content = json.loads(line)
            name = content.get("operation", content.get("event"))
            yield Event(name, content.get("id", ""), line)

    def until_mark(self, note: str) -> list[Event]:
        """Read to a row of the table of marks, which everybody sees."""
        events: list[Event] = []
        for event in self.events:
            assert event.name not in ("reset", "end"), event
            if event.name == "position":
                continue
            if event.name == "streaming":
                continue
            content = event.content
            if content["table"] == "marks":
                if content["row"]["note"] == note:
                    return events
                continue
            events.append(event)
        pytest.fail(f"the stream has ended before {note}: {events}")


def _is_stream(response: httpx.Response) -> bool:
    return response.headers["content-type"] == "text/event-stream"


@contextmanager
def stream(
    site: Site,
    parameters: Sequence[tuple[str, str]],
    *,
    path: str = "/changes",
    token: str | None = None,
    **headers: str,
) -> Iterator[Got]:
    headers["Authorization"] = f"Bearer {token or site.tokens.good()}"
    url = f"{site.service.url}{path}?{urlencode(parameters)}"
    with site.client.stream("GET", url, headers=headers, timeout=10) as response:
        if response.status_code != httpx.codes.OK:
            pytest.fail(f"{response.status_code}: {response.read()!r}")
        yield Got(response)


class Answer(NamedTuple):
    status: int
    received: bytes


@contextmanager
def asking(
    site: Site,
    target: bytes,
    headers: Sequence[bytes],
    *,
    method: bytes = b"GET",
) -> Iterator[socket.socket]:
    address = urlsplit(site.service.url)
    with socket.socket() as one:
        one.settimeout(10)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        one.connect((address.hostname, address.port))
        lines = [
            b"%b %b HTTP/1.1" % (method, target),
            b"Host: " + address.netloc.encode(),
            b"Connection: close",
            *headers,
        ]
        one.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        yield one


def ask(
    site: Site, target: bytes, headers: Sequence[bytes] = (), *, method: bytes = b"GET"
) -> Answer:
    """Send a request as it is written here, and read all that comes back."""
    with asking(site, target, headers, method=method) as one:
        received = b""
        while piece := one.recv(1 << 16):
            received += piece
            assert b"event: streaming" not in received, "it was let in"
    return Answer(int(received.split(b" ", 2)[1]), received)


# Refused


WAYS: Final = ("live", "replayed", "page")


def target(way: str, parameters: Sequence[tuple[str, str]], begin: str) -> bytes:
    query = list(parameters)
    if way in ("replayed", "page"):
        query.append(("since", begin))
    if way == "page":
        query.append(("until", "now"))
    path = "/changes.jsonl" if way == "page" else "/changes"
    return f"{path}?{urlencode(query)}".encode()


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_who_has_no_good_token_gets_nothing(site: Site, name: str) -> None:
    """Whether it comes in the header or in the query."""
    status, make = BAD_TOKENS[name]
    token = make(site.tokens)
    for way, carried in product(WAYS, ("header", "query")):
        headers, parameters = [], [*MESSAGES]
        if token is not None:
            if carried == "header":
                headers = [f"Authorization: Bearer {token}".encode()]
            else:
                parameters.append(("token", token))
        answer = ask(site, target(way, parameters, site.begin), headers)
        assert answer.status == status
        assert (b"www-authenticate: Bearer" in answer.received) == (status == 401)
        assert_nothing_told(answer.received)


def test_a_bad_token_in_the_header_is_not_mended_by_a_good_one_in_the_query(site: Site) -> None:
    parameters = [*MESSAGES, ("token", site.tokens.good())]
    header = f"Authorization: Bearer {site.tokens.by_foreign_key()}".encode()
    assert ask(site, target("live", parameters, ""), [header]).status == 401


@dataclass(frozen=True)
class Wish:
    """A request of Ada's, and the status that it gets."""

    name: str
    status: int
    query: Sequence[tuple[str, str]] = ()
    """After the table of messages, unless it names one."""
    role: str = "reader"

    @property
    def parameters(self) -> list[tuple[str, str]]:
        own = [] if any(key == "table" for key, _ in self.query) else MESSAGES
        return [*own, *self.query]


BAD_WISHES: Final = [
    Wish("a hidden column in where", 403, [("where", "pin=eq.FILTER")]),
    Wish("a masked column in where", 403, [("where", "card=like.*FILTER")]),
    Wish("a hidden column in or", 403, [("where", "or(pin.eq.FILTER,owner.eq.x)")]),
    Wish("a hidden column in not", 403, [("where", "not.and(owner.eq.x,pin.eq.FILTER)")]),
    Wish("a hidden column negated", 403, [("where", "pin=not.eq.FILTER")]),
    Wish("a hidden column quoted", 403, [("where", '"pin"=is.null')]),
    Wish("a hidden column deep down", 403, [("where", "or(and(or(and(pin.is.null))))")]),
    Wish("a hidden column behind good ones", 403, [("where", "id=gt.0,body=eq.x,pin=eq.FILTER")]),
    Wish("a hidden column in columns", 403, [("columns", "id,pin")]),
    Wish("a column that is not there in columns", 403, [("columns", "id,FILTER")]),
    Wish("a column that is not there in where", 403, [("where", "FILTER=eq.1")]),
    Wish("a system column", 403, [("where", "ctid=eq.x")]),
    Wish("another table", 403, [("table", "public.hidden")]),
    Wish("another table in second place", 403, [*MESSAGES, ("table", "public.hidden")]),
    Wish("a table that is not there", 403, [("table", "public.nowhere")]),
    Wish("a table of another schema", 403, [("table", "app.things")]),
    Wish("all of another schema", 403, [("table", "app.*")]),
    Wish("all of no schema", 403, [("table", "nowhere.*")]),
    Wish("the catalog", 403, [("table", "pg_catalog.pg_authid")]),
    Wish("the catalog, all of it", 403, [("table", "pg_catalog.*")]),
    Wish("walstream's tables", 403, [("table", "walstream.*")]),
    Wish("walstream's dead letters", 403, [("table", "walstream.dead_letters")]),
    Wish("walstream's, for all", 403, [("table", "walstream.*")], role="admin"),
    Wish("dead letters, for all", 403, [("table", "walstream.dead_letters")], role="admin"),
    Wish("a name in another case", 403, [("table", "PUBLIC.MESSAGES")]),
    Wish("a quoted name in another case", 403, [("table", '"public"."Messages"')]),
    Wish("a name with a blank", 403, [("table", "public.messages ")]),
    Wish("a condition that does not fit", 403, [("table", "public.broken")]),
    Wish("a claim that does not fit", 403, [("table", "public.numbered")]),
    Wish("a filter for several tables", 400, [("table", "public.*"), ("where", "pin=eq.FILTER")]),
    Wish("columns of several tables", 400, [("table", "public.*"), ("columns", "pin")]),
    Wish("a pattern that looks ahead", 400, [("where", "body=match.(?=FILTER)")]),
    Wish("a pattern of the edges of words", 400, [("where", r"body=not.imatch.\mFILTER")]),
    Wish("a pattern that is too long", 400, [("where", "body=match." + "x" * 201)]),
    Wish("a pattern that costs too much", 400, [("where", r"body=match.(\w{20}){10}FILTER")]),
    Wish("a masked column in a pattern", 403, [("where", "card=match.FILTER")]),
    Wish("no filter", 400, [("where", "FILTER")]),
    Wish("a filter without end", 400, [("where", "or(" * 900)]),
    Wish("a filter that is too long", 400, [("where", "body=eq." + "x" * 4096)]),
    Wish("a value that the type cannot have", 400, [("where", "id=eq.FILTER")]),
    Wish("a value with NUL", 400, [("where", "id=eq.1\0")]),
    Wish("an operation that is none", 400, [("operations", "insert,select")]),
    Wish("leaving that is neither", 400, [("leaving", "perhaps")]),
    Wish("where twice", 400, [("where", "id=gt.1"), ("where", "id=gt.2")]),
    Wish("columns twice", 400, [("columns", "id"), ("columns", "pin")]),
    Wish("no table name", 400, [("table", "messages")]),
    Wish("an empty table name", 400, [("table", "")]),
    Wish("three names", 400, [("table", "a.b.c")]),
    Wish("too many tables", 429, MESSAGES * 21),
    Wish("an unknown parameter", 400, [("role", "admin")]),
    Wish("an unknown parameter in another case", 400, [("Where", "id=gt.1")]),
    Wish("a table with NUL", 400, [("table", "public.mess\0ages")]),
    Wish("a table with a line end", 403, [("table", "public.messages\r\nX-Evil: 1")]),
    Wish("a table with a quote", 400, [("table", "public.messages'; DROP TABLE marks --\"")]),
    Wish("since that is none", 400, [("since", "FILTER")]),
    Wish("since without a zone", 400, [("since", "2026-01-01T00:00:00")]),
    Wish("since with a huge ordinal", 400, [("since", "0/1:" + "9" * 5000)]),
    Wish("since twice", 400, [("since", "0/1"), ("since", "0/2")]),
    Wish("until something", 400, [("until", "tomorrow")]),
    Wish("a token twice", 400, [("token", "a"), ("token", "b")]),
]


@pytest.mark.parametrize("wish", BAD_WISHES, ids=lambda wish: wish.name)
def test_what_may_not_be_asked_for_is_refused(site: Site, wish: Wish) -> None:
    token = site.tokens.good(role=wish.role)
    header = f"Authorization: Bearer {token}".encode()
    for way in WAYS:
        answer = ask(site, target(way, wish.parameters, site.begin), [header])
        assert answer.status == wish.status, answer.received
        assert b"x-evil" not in answer.received.partition(b"\r\n\r\n")[0].lower()
        for never in (b"SECRET", b"secret_", b"gone", token.encode()):
            assert never not in answer.received


@pytest.mark.parametrize("way", WAYS)
def test_a_table_that_may_not_be_read_is_as_one_that_is_not_there(site: Site, way: str) -> None:
    header = f"Authorization: Bearer {site.tokens.good()}".encode()

    def told(table: str) -> bytes:
        answer = ask(site, target(way, [("table", table)], site.begin), [header])
        head, _, body = answer.received.partition(b"\r\n\r\n")
        lines = [line for line in head.splitlines() if not line.startswith((b"date", b"content-l"))]
        return b"\n".join(lines) + body.replace(table.encode(), b"TABLE")

    assert told("public.hidden") == told("public.nowhere") == told("nowhere.nothing")
    assert told("app.*") == told("nowhere.*")

    def column(name: str, key: str) -> bytes:
        query = [*MESSAGES, (key, f"{name}=eq.1" if key == "where" else name)]
        received = ask(site, target(way, query, site.begin), [header]).received
        return received.partition(b"\r\n\r\n")[2].replace(name.encode(), b"COLUMN")

    for key in ("where", "columns"):
        assert column("pin", key) == column("nix", key)


PATHS: Final = {
    b"/changes/": 404,
    b"//changes": 404,
    b"/changes//": 404,
    b"/changes%2f": 404,
    b"/changes%00": 404,
    b"/changes.": 404,
    b"/changes..": 404,
    b"/changes;x=1": 404,
    b"/changes.json": 404,
    b"/changes.jsonl/": 404,
    b"/CHANGES": 404,
    b"/Changes": 404,
    b"/changes%20": 404,
    b"/./changes": 404,
    b"/x/../changes": 404,
    b"/%2e%2e/changes": 404,
    b"/..%2fchanges": 404,
    b"/changes\\": 404,
    b"/health/../changes": 404,
    b"/metrics/../changes": 404,
    b"/metrics/changes": 404,
    b"/health/changes": 404,
    b"/%63hanges": 401,  # it is the same path (RFC 3986, 6.2.2.2), with the same gate
    b"/changes": 401,
    b"/changes.jsonl": 401,
    b"/changes%2ejsonl": 401,
}


@pytest.mark.parametrize("path", PATHS)
def test_no_other_spelling_of_the_path_leads_past_the_gate(site: Site, path: bytes) -> None:
    for query in (b"?table=public.messages", b""):
        answer = ask(site, path + query)
        assert answer.status == PATHS[path]
        assert_nothing_told(answer.received)


@pytest.mark.parametrize(
    "method", [b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PROPFIND", b"get"]
)
def test_other_methods_are_refused(site: Site, method: bytes) -> None:
    answer = ask(site, b"/changes?table=public.messages", method=method)
    assert answer.status in (400, 401, 405)
    assert_nothing_told(answer.received)


@pytest.mark.parametrize(
    "query",
    [
        b"table=public.%ff",
        b"table=public.%c3",
        b"table=public.%ed%a0%80",
        b"table=public.messages&where=body%3deq.%fe",
        b"table=public.messages&%ff=1",
        b"table=public.messages&since=%ff",
    ],
)
def test_what_is_no_text_is_refused(site: Site, query: bytes) -> None:
    header = f"Authorization: Bearer {site.tokens.good()}".encode()
    for path in (b"/changes?", b"/changes.jsonl?until=now&"):
        answer = ask(site, path + query, [header])
        assert answer.status == 400


def test_header_lines_cannot_be_brought_in_by_parameters(site: Site) -> None:
    for text in (b"a%0d%0aX-Evil:%201", b"a%0aX-Evil:%201", b"%00"):
        answer = ask(site, b"/changes?table=public.messages&token=" + text)
        assert answer.status == 401
        assert b"x-evil" not in answer.received.lower().partition(b"\r\n\r\n")[0]


def test_the_head_of_a_stream_can_be_had_and_no_more(site: Site) -> None:
    header = f"Authorization: Bearer {site.tokens.good()}".encode()
    answer = ask(site, target("live", MESSAGES, ""), [header], method=b"HEAD")
    assert answer.status == 200
    assert answer.received.endswith(b"\r\n\r\n")
    assert ask(site, target("live", MESSAGES, ""), method=b"HEAD").status == 401


# Seen in part


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_of_what_happens_a_reader_sees_what_is_theirs(site: Site, scene: Scene) -> None:
    """As it is published, and by whatever way it is asked for again."""
    database = site.database
    database.execute(CLEAN)
    if scene.before:
        database.execute(scene.before)
    query = [*scene.query, ("table", "public.marks")]
    token = site.tokens.good(**scene.claims)
    with stream(site, [("table", "public.marks")]) as marks:
        # What came before is published, and the moment is one of its own.
        site.mark(f"before {scene.name}")
        begin = _mark_id(marks, f"before {scene.name}")
        ((moment,),) = database.execute("SELECT clock_timestamp()")
    with stream(site, query, token=token) as got:
        perform(site, scene)
        _verify(scene, got, token)
    headers = {"Last-Event-ID": begin}
    page = ("until", "now")
    for since in (begin, begin.partition(":")[0], moment.isoformat()):
        asked = [*query, ("since", since)]
        with stream(site, asked, token=token) as got:
            _verify(scene, got, token)
        with stream(site, [*asked, page], path="/changes.jsonl", token=token) as got:
            _verify(scene, got, token)
    with stream(site, query, token=token, **headers) as got:
        _verify(scene, got, token)
    with stream(site, query, path="/changes.jsonl", token=token, **headers) as got:
        _verify(scene, got, token)


def _verify(scene: Scene, got: Got, token: str) -> None:
    events = got.until_mark(scene.name)
    for never in (b"SECRET", b"pin", b"bob", token.encode()):
        assert never not in got.received.replace(scene.name.encode(), b"")
    seen = [(one.name, one.content["row"], one.content["identity"]) for one in events]
    assert seen == list(scene.seen)
    assert [one.content.get("leaving") for one in events].count(True) == scene.leaves


def _mark_id(marks: Got, note: str) -> str:
    for event in marks.events:
        if event.content.get("row", {}).get("note") == note:
            return event.id
    pytest.fail("the mark did not come")


# While it streams


@pytest.mark.parametrize("path", ["/changes", "/changes.jsonl"])
def test_a_stream_ends_when_its_token_does(site: Site, path: str) -> None:
    """It says so, nothing comes behind that, and the token opens no other."""
    expires_at = int(time.time()) + 2
    token = site.tokens.good(exp=expires_at)
    query = [*MESSAGES, ("table", "public.marks")]
    with stream(site, query, path=path, token=token) as got:
        *_, last = got.events
    assert (last.name, last.content["reason"]) == ("end", "expired")
    assert expires_at <= time.time() < expires_at + 5
    header = f"Authorization: Bearer {token}".encode()
    assert ask(site, target("live", query, ""), [header]).status == 401


@pytest.mark.parametrize("way", ["replayed", "page"])
def test_what_was_missed_ends_when_the_token_does(site: Site, way: str) -> None:
    """Also for who reads it so slowly that it lasts; a page that is cut says that it is."""
    count = 1200
    site.database.execute(CLEAN)
    with stream(site, [("table", "public.marks")]) as marks:
        site.mark(f"long {way}")
        begin = _mark_id(marks, f"long {way}")
        site.database.execute(
            "INSERT INTO listed SELECT i, repeat('x', 9000) FROM generate_series(1, %s::int) i",
            count,
        )
        site.mark(f"end of long {way}")
        marks.until_mark(f"end of long {way}")
    expires_at = int(time.time()) + 2
    header = f"Authorization: Bearer {site.tokens.good(exp=expires_at)}".encode()
    asked = target(way, [("table", "public.listed")], begin)
    with asking(site, asked, [header]) as one:
        received = one.recv(1000)
        wait_until(lambda: time.time() > expires_at + 0.5)
        while piece := one.recv(1 << 16):
            received += piece
    assert 0 < received.count(b'"operation":"insert"') < count
    assert b'"reason":"expired"' in received[-200:]
