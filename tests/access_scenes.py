"""Who may see what, as a table: tokens that are no good, and scenes of which a reader sees a part.

Both are tried by every way to the changes. All that is secret has `SECRET` in its value, so that
whatever is received can be searched, byte by byte, for what must not be in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from tests.command_line import CommandLine, slot_name
from tests.live_service import LiveService, live_service
from tests.tokens import AUDIENCE, ISSUER, Tokens
from walstream.testing.databases import Database

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
    folder: Path
    begin: str = ""

    def mark(self, note: str) -> None:
        self.database.execute("INSERT INTO marks (note) VALUES (%s)", note)


@contextmanager
def running_site(database: Database, folder: Path, *, more: str = "") -> Iterator[Site]:
    """Run one process for all attempts; at its end its log and its metrics are searched too."""
    tokens = Tokens()
    command_line = CommandLine(folder)
    key = folder / "key.pem"
    key.write_bytes(tokens.public_pem)
    configuration = ACCESS % key + more
    with (
        httpx.Client() as client,
        live_service(
            command_line, database.dsn, slot_name(), more=configuration, routes=ROUTES
        ) as service,
    ):
        yield Site(service, database, tokens, client, folder)
        metrics = httpx.get(f"{service.url}/metrics").text
    for text in ((folder / "log").read_text(), metrics):
        assert_nothing_told(text.encode())


def assert_nothing_told(received: bytes) -> None:
    """Neither values, nor tokens (which all begin so), nor the filters of clients."""
    for never in (b"SECRET", b"secret_", b"eyJ", b"FILTER", b"ada"):
        assert never not in received


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


def perform(site: Site, scene: Scene) -> None:
    """Let it happen, and mark that it has."""
    with site.database.connect() as connection:
        for statement in scene.sql.split(";"):
            connection.execute(statement.encode())
    site.mark(scene.name)
