"""What somebody may try to read what is not theirs, against the running process.

A table of attempts that are refused, and a table of scenes of which a reader sees a part. Whatever
is received is searched, byte by byte, for what must not be in it: all that is secret has `SECRET`
in its value. Both tables hold for what is published, for what is replayed, and for pages.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import httpx
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import Event, LiveService, events_of, live_service
from tests.postgres import wait_until
from tests.tokens import AUDIENCE, ISSUER, Tokens
from walstream.testing.databases import Database, create_database, drop_database

SECRET: Final = "SECRET"  # noqa: S105 - of nobody
LONG: Final = "x" * 9000
"""Long enough to be stored out of line, where it is not compressed."""

SCHEMA: Final = f"""
CREATE TABLE marks (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, note text);
CREATE TABLE messages (id int PRIMARY KEY, owner text, body text, pin text, card text);
ALTER TABLE messages REPLICA IDENTITY FULL;
CREATE TABLE defaults (id int PRIMARY KEY, owner text, body text);
CREATE TABLE hidden (id int PRIMARY KEY, owner text, body text);
ALTER TABLE hidden REPLICA IDENTITY FULL;
CREATE TABLE events (id int, owner text, body text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE events_low PARTITION OF events FOR VALUES FROM (0) TO (1000);
CREATE TABLE events_high PARTITION OF events FOR VALUES FROM (1000) TO (2000);
ALTER TABLE events_low REPLICA IDENTITY FULL;
ALTER TABLE events_high REPLICA IDENTITY FULL;
CREATE TABLE wide (id int PRIMARY KEY, body text, owner text);
ALTER TABLE wide ALTER owner SET STORAGE EXTERNAL;
CREATE TABLE wide_full (id int PRIMARY KEY, body text, owner text);
ALTER TABLE wide_full ALTER owner SET STORAGE EXTERNAL;
ALTER TABLE wide_full REPLICA IDENTITY FULL;
CREATE TABLE listed (id int PRIMARY KEY, body text);
ALTER TABLE listed REPLICA IDENTITY FULL;
CREATE TABLE renamed (id int PRIMARY KEY, body text);
CREATE TABLE broken (id int PRIMARY KEY, body text, {SECRET}_column text);
CREATE TABLE numbered (id int PRIMARY KEY, {SECRET}_owner int);
CREATE TABLE keyed (id int, code text UNIQUE NOT NULL, owner text, body text, PRIMARY KEY (id));
ALTER TABLE keyed REPLICA IDENTITY USING INDEX keyed_code_key;
CREATE TABLE unkeyed (id int, owner text, body text);
ALTER TABLE unkeyed REPLICA IDENTITY FULL;
CREATE SCHEMA app;
CREATE TABLE app.things (id int PRIMARY KEY, body text);
CREATE SCHEMA walstream;
CREATE TABLE walstream.dead_letters (id int PRIMARY KEY, body text);
"""

ROUTES: Final = """
[[routes]]
table = "*.*"
to = "live"
[[routes]]
table = "walstream.dead_letters"
to = "live"
"""

OWN_ROWS: Final = 'where = "owner=eq.{claims.sub}"'

ACCESS: Final = f"""
[access]
public_key_file = "%s"
algorithms = ["RS256"]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
leeway_seconds = 0

[[access.roles.reader.tables]]
table = "public.marks"
[[access.roles.reader.tables]]
table = "public.messages"
columns = {{ exclude = ["pin"], mask = {{ card = "keep-last-4" }} }}
{OWN_ROWS}
[[access.roles.reader.tables]]
table = "public.defaults"
{OWN_ROWS}
[[access.roles.reader.tables]]
table = "public.events"
{OWN_ROWS}
[[access.roles.reader.tables]]
table = "public.keyed"
{OWN_ROWS}
[[access.roles.reader.tables]]
table = "public.unkeyed"
{OWN_ROWS}
[[access.roles.reader.tables]]
table = "public.wide"
where = "owner=like.ada*"
[[access.roles.reader.tables]]
table = "public.wide_full"
where = "owner=like.ada*"
[[access.roles.reader.tables]]
table = "public.listed"
columns = {{ include = ["id", "body"] }}
[[access.roles.reader.tables]]
table = "public.renamed"
[[access.roles.reader.tables]]
table = "public.broken"
columns = {{ exclude = ["{SECRET.lower()}_column"] }}
where = "gone=eq.{{claims.sub}}"
[[access.roles.reader.tables]]
table = "public.numbered"
columns = {{ exclude = ["{SECRET.lower()}_owner"] }}
where = "{SECRET.lower()}_owner=eq.{{claims.sub}}"

[[access.roles.admin.tables]]
table = "*.*"

[[access.roles.outsider.tables]]
table = "public.marks"

[access.roles.nothing]

[log]
level = "debug"
"""


@dataclass
class Site:
    """The running process, its database, and tokens for it."""

    service: LiveService
    database: Database
    tokens: Tokens
    client: httpx.Client
    begin: str

    def mark(self, note: str) -> None:
        self.database.execute("INSERT INTO marks (note) VALUES (%s)", note)


@pytest.fixture(scope="module")
def site(
    server_dsn: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """One process for all attempts; at its end its log and its metrics are searched too."""
    database = create_database(server_dsn, database_template)
    tokens = Tokens()
    folder = CommandLine(tmp_path_factory.mktemp("access"))
    key = folder.folder / "key.pem"
    key.write_bytes(tokens.public_pem)
    try:
        with database, ExitStack() as opened:
            database.execute(SCHEMA)
            with live_service(
                folder, database.dsn, slot_name(), more=ACCESS % key, routes=ROUTES
            ) as service:
                site = Site(service, database, tokens, opened.enter_context(httpx.Client()), "")
                with stream(site, [("table", "public.marks")]) as got:
                    site.begin = got.begin
                    site.mark("first")
                    got.until_mark("first")
                yield site
                metrics = httpx.get(f"{service.url}/metrics").text
        log = (folder.folder / "log").read_text()
    finally:
        drop_database(server_dsn, database.name)
    for text in (log, metrics):
        assert_nothing_told(text.encode())


def assert_nothing_told(received: bytes) -> None:
    """Neither values, nor tokens (which all begin so), nor the filters of clients."""
    for never in (b"SECRET", b"secret_", b"eyJ", b"FILTER", b"ada"):
        assert never not in received


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


MESSAGES: Final = [("table", "public.messages")]

BAD_TOKENS: Final[dict[str, tuple[int, Callable[[Tokens], str | None]]]] = {
    "none at all": (401, lambda _: None),
    "empty": (401, lambda _: ""),
    "expired": (401, lambda t: t.good(exp=int(time.time()) - 1)),
    "expired long ago": (401, lambda t: t.good(exp=1)),
    "expires before all time": (401, lambda t: t.good(exp=-(10**30))),
    "never expires": (401, lambda t: t.good(exp=None)),
    "expires at no number": (401, lambda t: t.good(exp="tomorrow")),
    "not yet valid": (401, lambda t: t.good(nbf=int(time.time()) + 600)),
    "another audience": (401, lambda t: t.good(aud="others")),
    "no audience": (401, lambda t: t.good(aud=None)),
    "another issuer": (401, lambda t: t.good(iss="https://issuer.example.evil")),
    "another algorithm of the same key": (401, lambda t: t.by_foreign_key("RS512")),
    "PSS": (401, lambda t: t.by_foreign_key("PS256")),
    "algorithm none": (401, lambda t: t.unsigned("none")),
    "algorithm nOnE": (401, lambda t: t.unsigned("nOnE")),
    "no algorithm": (401, lambda t: t.unsigned("")),
    "RS256 without a signature": (401, lambda t: t.unsigned("RS256")),
    "a foreign key": (401, lambda t: t.by_foreign_key()),
    "a key of its own": (401, lambda t: t.with_its_own_key()),
    "a key at an address": (401, lambda t: t.by_foreign_key(jku="http://127.0.0.1/keys")),
    "a key in a file": (401, lambda t: t.by_foreign_key(kid="/dev/null")),
    "HS256 by the public key": (401, lambda t: t.by_public_key()),
    "changed behind its signature": (401, lambda t: t.tampered()),
    "critical headers": (401, lambda t: t.signed(t.claims(), crit=["exp"])),
    "garbage": (401, lambda _: "garbage"),
    "dots": (401, lambda _: "..."),
    "huge": (401, lambda t: t.good(junk="x" * 9000)),
    "unknown role": (403, lambda t: t.good(role="root")),
    "no role": (403, lambda t: t.good(role=None)),
    "a list of roles": (403, lambda t: t.good(role=["reader", "admin"])),
    "a role without tables": (403, lambda t: t.good(role="nothing")),
    "a role with other tables": (403, lambda t: t.good(role="outsider")),
    "without the claim of the condition": (403, lambda t: t.good(sub=None)),
    "a list for the claim of the condition": (403, lambda t: t.good(sub=["ada", "bob"])),
    "an object for the claim of the condition": (403, lambda t: t.good(sub={"a": 1})),
}


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


@dataclass(frozen=True)
class Scene:
    """What happens, and what Ada sees of it: operation, row, identity, for each change."""

    name: str
    sql: str
    seen: Sequence[tuple[str, Any, Any]] = ()
    query: Sequence[tuple[str, str]] = field(default_factory=lambda: MESSAGES)
    claims: dict[str, Any] = field(default_factory=dict)
    before: str = ""
    leaves: int = 0
    """So many of what is seen say that a row has left."""


OWN: Final = "INSERT INTO messages VALUES (1, 'ada', 'hello', 'SECRET-pin', 'SECRET-card-1234')"
FOREIGN: Final = "INSERT INTO messages VALUES (1, 'bob', 'SECRET-body', 'SECRET-pin', 'SECRET')"
OWN_SEEN: Final = {"id": 1, "owner": "ada", "body": "hello", "card": "*" * 12 + "1234"}

SCENES: Final = [
    Scene("a row of one's own", OWN, [("insert", OWN_SEEN, None)]),
    Scene("a row of another's", FOREIGN),
    Scene("a row of nobody's", "INSERT INTO messages VALUES (1, NULL, 'SECRET')"),
    Scene("a row of one in capitals", "INSERT INTO messages VALUES (1, 'Ada', 'SECRET')"),
    Scene(
        "a row that comes",
        "UPDATE messages SET owner = 'ada', body = 'hello', card = 'SECRET-card-1234'",
        [("update", OWN_SEEN, None)],
        before=FOREIGN,
    ),
    Scene(
        "a row that comes with another key",
        "UPDATE messages SET id = 2, owner = 'ada', body = 'hello', card = 'SECRET-card-1234'",
        [("update", OWN_SEEN | {"id": 2}, None)],
        before=FOREIGN,
    ),
    Scene(
        "a row that goes",
        "UPDATE messages SET owner = 'bob', body = 'SECRET-body'",
        [("update", None, {"id": 1})],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that goes to nobody",
        "UPDATE messages SET owner = NULL, body = 'SECRET-body'",
        [("update", None, {"id": 1})],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that goes with another key",
        "UPDATE messages SET id = 2, owner = 'bob', body = 'SECRET-body'",
        [("update", None, {"id": 1})],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that goes and would leave a filter",
        "UPDATE messages SET owner = 'bob', body = 'SECRET-body'",
        [("update", None, {"id": 1})],
        [*MESSAGES, ("where", "body=eq.hello"), ("leaving", "true")],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that goes and was not asked for",
        "UPDATE messages SET owner = 'bob', body = 'SECRET-body'",
        query=[*MESSAGES, ("where", "body=eq.other"), ("leaving", "true")],
        before=OWN,
    ),
    Scene(
        "a row that goes, its key not asked for",
        "UPDATE messages SET owner = 'bob', body = 'SECRET-body'",
        [("update", None, {"id": 1})],
        [*MESSAGES, ("columns", "body")],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that leaves a filter",
        "UPDATE messages SET body = 'bye'",
        [("update", OWN_SEEN | {"body": "bye"}, OWN_SEEN)],
        [*MESSAGES, ("where", "body=eq.hello"), ("leaving", "true")],
        before=OWN,
        leaves=1,
    ),
    Scene(
        "a row that comes and does not pass the filter that it passed before",
        "UPDATE messages SET owner = 'ada', body = 'bye'",
        query=[*MESSAGES, ("where", "body=like.SECRET*"), ("leaving", "true")],
        before=FOREIGN,
    ),
    Scene(
        "a hidden value that changes",
        "UPDATE messages SET pin = 'SECRET-other'",
        [("update", OWN_SEEN, OWN_SEEN)],
        before=OWN,
    ),
    Scene("another's row that changes", "UPDATE messages SET id = 3", before=FOREIGN),
    Scene("another's row that is deleted", "DELETE FROM messages", before=FOREIGN),
    Scene(
        "one's own row that is deleted",
        "DELETE FROM messages",
        [("delete", None, OWN_SEEN)],
        before=OWN,
    ),
    Scene("rows that are truncated", "TRUNCATE messages", [("truncate", None, None)], before=OWN),
    Scene(
        "a filter that would widen",
        f"{OWN};{FOREIGN.replace('(1', '(2')}",
        [("insert", OWN_SEEN, None)],
        [*MESSAGES, ("where", "or(owner.eq.bob,owner.eq.ada,owner.is.null)")],
    ),
    Scene("a filter for another's", FOREIGN, query=[*MESSAGES, ("where", "owner=eq.bob")]),
    Scene("a filter against one's own", FOREIGN, query=[*MESSAGES, ("where", "owner=neq.ada")]),
    Scene(
        "a second subscription of the same table",
        f"{OWN};{FOREIGN.replace('(1', '(2')}",
        [("insert", {"id": 1}, None)],
        [*MESSAGES, ("columns", "id"), *MESSAGES],
    ),
    Scene(
        "all tables, by a pattern",
        f"{OWN};{FOREIGN.replace('(1', '(2')};"
        "INSERT INTO hidden VALUES (1, 'ada', 'SECRET');"
        "INSERT INTO app.things VALUES (1, 'SECRET');"
        "INSERT INTO walstream.dead_letters VALUES (1, 'SECRET')",
        [("insert", OWN_SEEN, None)],
        [("table", "*.*")],
    ),
    Scene(
        "dead letters, for who may read all tables",
        "INSERT INTO walstream.dead_letters VALUES (1, 'SECRET');"
        "UPDATE walstream.dead_letters SET body = 'SECRET';"
        "DELETE FROM walstream.dead_letters; TRUNCATE walstream.dead_letters",
        query=[("table", "*.*")],
        claims={"role": "admin"},
    ),
    Scene(
        "claims that look like a filter",
        OWN,
        claims={"sub": "ada,owner=eq.ada"},
    ),
    Scene(
        "claims that look like a list",
        OWN,
        claims={"sub": "x),or(owner.eq.ada"},
    ),
    Scene("a claim with a star", OWN, claims={"sub": "*"}),
    Scene("a claim of null in letters", "INSERT INTO messages VALUES (1)", claims={"sub": "null"}),
    Scene("an empty claim", FOREIGN, claims={"sub": ""}),
    # Where the old row is not known, nothing is told of it.
    Scene(
        "without the old row: one's own",
        "UPDATE defaults SET body = 'x'",
        [("update", {"id": 1, "owner": "ada", "body": "x"}, None)],
        [("table", "public.defaults")],
        before="INSERT INTO defaults VALUES (1, 'ada', 'hello')",
    ),
    Scene(
        "without the old row: one that comes",
        "UPDATE defaults SET id = 2, owner = 'ada', body = 'x'",
        [("update", {"id": 2, "owner": "ada", "body": "x"}, None)],
        [("table", "public.defaults")],
        before="INSERT INTO defaults VALUES (1, 'bob', 'SECRET')",
    ),
    Scene(
        "without the old row: one that goes",
        "UPDATE defaults SET owner = 'bob', body = 'SECRET'",
        query=[("table", "public.defaults")],
        before="INSERT INTO defaults VALUES (1, 'ada', 'hello')",
    ),
    Scene(
        "without the old row: deleted ones",
        "DELETE FROM defaults",
        query=[("table", "public.defaults")],
        before="INSERT INTO defaults VALUES (1, 'ada', 'SECRET'), (2, 'bob', 'SECRET')",
    ),
    Scene(
        "an identity of its own: deleted",
        "DELETE FROM keyed",
        query=[("table", "public.keyed")],
        before="INSERT INTO keyed VALUES (1, 'SECRET-code', 'ada', 'x')",
    ),
    Scene(
        "an identity of its own: one that comes",
        "UPDATE keyed SET owner = 'ada', code = 'c'",
        [("update", {"id": 1, "code": "c", "owner": "ada", "body": "x"}, None)],
        [("table", "public.keyed")],
        before="INSERT INTO keyed VALUES (1, 'SECRET-code', 'bob', 'x')",
    ),
    Scene(
        "no key: one that goes",
        "UPDATE unkeyed SET owner = 'bob', body = 'SECRET'",
        [("update", None, {})],
        [("table", "public.unkeyed")],
        before="INSERT INTO unkeyed VALUES (1, 'ada', 'SECRET')",
        leaves=1,
    ),
    # A value that Postgres leaves out because it has not changed.
    Scene(
        "an unchanged long value in the condition, not sent",
        "UPDATE wide SET body = 'SECRET'",
        query=[("table", "public.wide")],
        before=f"INSERT INTO wide VALUES (1, 'x', 'ada{LONG}'), (2, 'x', 'bob{LONG}')",
    ),
    Scene(
        "an unchanged long value in the condition, sent with the old row",
        "UPDATE wide_full SET body = CASE id WHEN 1 THEN 'y' ELSE 'SECRET' END",
        [("update", {"id": 1, "body": "y"}, {"id": 1, "body": "x"})],
        [("table", "public.wide_full"), ("columns", "id,body")],
        before=f"INSERT INTO wide_full VALUES (1, 'x', 'ada{LONG}'), (2, 'x', 'bob{LONG}')",
    ),
    # Partitions.
    Scene(
        "partitions by the name of the root",
        "INSERT INTO events VALUES (1, 'ada', 'x'), (2, 'bob', 'SECRET'), (1001, 'ada', 'y');"
        "DELETE FROM events WHERE id = 2;"
        "UPDATE events SET id = 1002 WHERE id = 1;"
        "DELETE FROM events_high WHERE id = 1001",
        [
            ("insert", {"id": 1, "owner": "ada", "body": "x"}, None),
            ("insert", {"id": 1001, "owner": "ada", "body": "y"}, None),
            ("delete", None, {"id": 1, "owner": "ada", "body": "x"}),
            ("insert", {"id": 1002, "owner": "ada", "body": "x"}, None),
            ("delete", None, {"id": 1001, "owner": "ada", "body": "y"}),
        ],
        [("table", "public.events")],
    ),
    Scene(
        "a partition by its own name",
        "INSERT INTO events VALUES (1, 'ada', 'x'), (2, 'bob', 'SECRET'), (1001, 'ada', 'SECRET')",
        [("insert", {"id": 1, "owner": "ada", "body": "x"}, None)],
        [("table", "public.events_low")],
    ),
    # Tables that change.
    Scene(
        "a column that is added",
        "ALTER TABLE listed ADD added text DEFAULT 'SECRET';"
        "INSERT INTO listed VALUES (1, 'x', 'SECRET');"
        "UPDATE listed SET added = 'SECRET-2';"
        "ALTER TABLE listed DROP added",
        [
            ("insert", {"id": 1, "body": "x"}, None),
            ("update", {"id": 1, "body": "x"}, {"id": 1, "body": "x"}),
        ],
        [("table", "public.listed")],
    ),
    Scene(
        "a column that is renamed to a hidden one's name",
        "ALTER TABLE messages RENAME body TO was_body;"
        "ALTER TABLE messages RENAME pin TO body;"
        "ALTER TABLE messages RENAME was_body TO pin;"
        "INSERT INTO messages VALUES (1, 'ada', 'SECRET-now-pin', 'now body', '1234');"
        "ALTER TABLE messages RENAME pin TO was_body;"
        "ALTER TABLE messages RENAME body TO pin;"
        "ALTER TABLE messages RENAME was_body TO body",
        [("insert", {"id": 1, "owner": "ada", "body": "now body", "card": "****"}, None)],
    ),
    Scene(
        "a table that is renamed",
        "INSERT INTO renamed VALUES (1, 'x');"
        "ALTER TABLE renamed RENAME TO elsewhere;"
        "INSERT INTO elsewhere VALUES (2, 'SECRET');"
        "ALTER TABLE elsewhere RENAME TO renamed;"
        "INSERT INTO renamed VALUES (3, 'z')",
        [
            ("insert", {"id": 1, "body": "x"}, None),
            ("insert", {"id": 3, "body": "z"}, None),
        ],
        [("table", "public.renamed")],
    ),
]
TABLES: Final = (
    *("messages", "defaults", "hidden", "events", "wide", "wide_full", "listed", "renamed"),
    *("keyed", "unkeyed", "app.things", "walstream.dead_letters"),
)
CLEAN: Final = ";".join(f"DELETE FROM {table}" for table in TABLES)


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
        _perform(site, scene)
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


def _perform(site: Site, scene: Scene) -> None:
    with site.database.connect() as connection:
        for statement in scene.sql.split(";"):
            connection.execute(statement.encode())
    site.mark(scene.name)


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
