"""What somebody may try to read what is not theirs, by the channels of Supabase Realtime.

The tables are those of `tests.access_scenes`, with the words of this protocol: tokens that are no
good at the connection, at a join and as a later token; scenes, live and by ``since``. Then what an
attacker would try. All that a client gets is searched for what it must not have.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import httpx
import jwt
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.access_scenes import (
    BAD_TOKENS,
    CLEAN,
    SCENES,
    SCHEMA,
    Scene,
    Site,
    perform,
    running_site,
)
from tests.conftest import StartCluster
from tests.phoenix import Heard, Phoenix, phoenix
from tests.postgres import wait_until
from walstream.testing.databases import Database

API_KEY: Final = "sb_publishable_secret_of_nobody"

ANOTHER_KEY: Final = "sb_secret_another"

ROLES: Final = """
CREATE ROLE member NOLOGIN;
CREATE ROLE asker LOGIN NOINHERIT;
GRANT member TO asker;
"""

SECURED: Final = """
CREATE TABLE secured (id int PRIMARY KEY, owner text, body text, pin text);
ALTER TABLE secured REPLICA IDENTITY FULL;
ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_owner ON secured TO member
    USING (owner = current_setting('request.jwt.claims', true)::json ->> 'sub');
GRANT SELECT (id, owner, body) ON secured TO member;
GRANT USAGE ON SCHEMA public TO member;
"""

MORE: Final = f"""
[realtime]
enabled = true
refusal_seconds = 0
joins_per_second = 1000
messages_per_second = 1000
[[realtime.private]]
topic = "user:{{claims.sub}}"
read = ["reader"]
write = ["reader"]
[[realtime.private]]
topic = "news:*"
read = ["reader", "outsider"]
write = ["reader"]

[[access.api_keys]]
key = "{API_KEY}"
role = "visitor"
[[access.roles.visitor.tables]]
table = "public.marks"
[[access.roles.visitor.tables]]
table = "public.renamed"

[access.row_security]
dsn = "%s"
[access.roles.member]
[[access.roles.member.tables]]
table = "public.marks"
[[access.roles.member.tables]]
table = "public.secured"
rls = true
columns = {{ exclude = ["pin"] }}
[access.roles.told]
postgres_role = "member"
[[access.roles.told.tables]]
table = "public.marks"
[[access.roles.told.tables]]
table = "public.secured"
rls = true
deletes = "key"
columns = {{ exclude = ["pin"] }}
"""


@pytest.fixture(scope="module")
def site(
    module_private_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """One process for all attempts; the roles of its row security are the server's."""
    with Database(module_private_cluster().conninfo(), "postgres") as database:
        for statements in (ROLES, SCHEMA, SECURED):
            database.execute(statements)
        asker = re.sub(r"user=\S+", "user=asker", database.dsn)
        folder = tmp_path_factory.mktemp("realtime_access")
        with running_site(database, folder, more=MORE % asker) as site:
            yield site


# Refused


class Refusal(NamedTuple):
    """How a token is refused at the connection, and at a join: the code there, and the text."""

    status: int
    text: str
    code: str
    joined: str = ""


MALFORMED: Final = Refusal(401, "The token provided is not a valid JWT", "MalformedJWT")
FORGED: Final = Refusal(401, "Failed to validate JWT signature", "JwtSignatureError")
ENDED: Final = Refusal(
    401, "Token has expired", "InvalidJWTToken", r"Token has expired \d+ seconds ago"
)
SHORT: Final = Refusal(401, "Fields `role` and `exp` are required in JWT", "InvalidJWTToken")


def forbidden(text: str) -> Refusal:
    return Refusal(403, text, "Unauthorized")


UNUSABLE: Final = forbidden("the claim sub is of a type that no column is compared with there")

REFUSALS: Final[dict[str, Refusal | None]] = {
    "none at all": None,
    "empty": None,
    "expired": ENDED,
    "expired long ago": ENDED,
    "expires before all time": ENDED,
    "never expires": SHORT,
    "expires at no number": MALFORMED,
    "not yet valid": MALFORMED,
    "another audience": MALFORMED,
    "no audience": MALFORMED,
    "another issuer": MALFORMED,
    "another algorithm of the same key": FORGED,
    "PSS": FORGED,
    "algorithm none": FORGED,
    "algorithm nOnE": FORGED,
    "no algorithm": FORGED,
    "RS256 without a signature": FORGED,
    "a foreign key": FORGED,
    "a key of its own": FORGED,
    "a key at an address": FORGED,
    "a key in a file": FORGED,
    "HS256 by the public key": FORGED,
    "changed behind its signature": FORGED,
    "critical headers": MALFORMED,
    "garbage": MALFORMED,
    "dots": MALFORMED,
    "huge": MALFORMED,
    "unknown role": forbidden("the token's role has no [access.roles.<name>]"),
    "no role": SHORT,
    "a list of roles": forbidden("the token's claim role is not one role's name"),
    "a role without tables": None,
    "a role with other tables": None,
    "without the claim of the condition": forbidden("the claim sub is missing"),
    "a list for the claim of the condition": UNUSABLE,
    "an object for the claim of the condition": UNUSABLE,
}

MESSAGES: Final[dict[str, Any]] = {"event": "*", "schema": "public", "table": "messages"}
MARKS: Final[dict[str, Any]] = {"event": "INSERT", "schema": "public", "table": "marks"}
NOT_ENABLED: Final = "Please check Realtime is enabled for the given connect parameters"


def test_each_bad_token_is_in_the_table() -> None:
    assert REFUSALS.keys() == BAD_TOKENS.keys()


@pytest.mark.parametrize("name", REFUSALS)
def test_who_has_no_good_token_is_not_connected(site: Site, name: str) -> None:
    """Whether it comes in the query or in the header, whatever the path and the version."""
    token, refusal = BAD_TOKENS[name][1](site.tokens), REFUSALS[name]
    if refusal is None and token:  # a role that sees nothing: it is told so when it joins
        return
    status, text = refusal[:2] if refusal else (401, "API key is missing")
    for path in ("/realtime/v1/websocket", "/socket/websocket"):
        for query, headers in (
            ({} if token is None else {"apikey": token}, {}),
            ({"vsn": "2.0.0"}, {} if token is None else {"x-api-key": token}),
        ):
            told = refused_connection(site, f"{path}?{urlencode(query)}", headers)
            assert told == (status, {"error": text})


def refused_connection(site: Site, target: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    address = site.service.url.replace("http://", "ws://")
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(f"{address}{target}", additional_headers=headers),
    ):
        pass
    response = caught.value.response
    return response.status_code, json.loads(response.body)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_join_by_a_token_that_is_no_good_is_refused(site: Site, name: str) -> None:
    token, refusal = BAD_TOKENS[name][1](site.tokens), REFUSALS[name]
    with phoenix(site.service.url, site.tokens.good()) as client:
        reply = client.join("refused", [MESSAGES], token=token)
        if refusal is None:
            assert reply.payload["status"] == "ok"
            system = client.wait_for(is_system)
            assert (system.payload["status"] == "error") == bool(token)
            assert not token or NOT_ENABLED in system.payload["message"]
            return
        assert reply.payload["status"] == "error"
        told = f"{refusal.code}: {refusal.joined or re.escape(refusal.text)}"
        assert re.fullmatch(told, reply.payload["response"]["reason"])
        client.send("realtime:refused", "heartbeat", {})
        assert client.hear().payload["response"] == {"reason": "unmatched topic"}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_later_token_that_is_no_good_ends_the_channel(site: Site, name: str) -> None:
    """Nothing that is committed after that comes."""
    token, refusal = BAD_TOKENS[name][1](site.tokens), REFUSALS[name]
    site.database.execute(CLEAN)
    marked(site, f"clean {name}")
    with phoenix(site.service.url, site.tokens.good()) as client:
        join_ref = client.join("renewed", [MESSAGES]).ref
        client.wait_for(is_system)
        client.send("realtime:renewed", "access_token", {"access_token": token}, join_ref=join_ref)
        if refusal is not None:
            system, close = client.hear(), client.hear()
            assert (system.event, system.payload["status"]) == ("system", "error")
            told = refusal.joined or re.escape(refusal.text)
            assert re.fullmatch(told, system.payload["message"])
            assert (close.event, close.ref) == ("phx_close", join_ref)
        elif token:
            client.wait_for(is_system)
        site.database.execute("INSERT INTO messages VALUES (1, 'ada', 'SECRET')")
        if refusal is None and not token:  # as if nothing had been said
            assert client.changes(1)[0]["record"]["body"] == "SECRET"
            return
        client.join("marks", [MARKS], token=site.tokens.good())
        site.mark(name)
        assert client.changes(1)[0]["record"]["note"] == name
        assert_nothing_in(client.received, "SECRET")


def is_system(heard: Heard) -> bool:
    return heard.event == "system"


def assert_nothing_in(received: Iterable[str | bytes], *never: str) -> None:
    """Search all but the answers to joins, which say what the client has said."""
    for message in received:
        assert isinstance(message, str)
        if json.loads(message)[3] != "phx_reply":
            for one in never:
                assert one not in message


# Seen in part


class Seen(NamedTuple):
    """A change as a channel has it, without the keys that begin with a ``$``."""

    type: str
    record: Any
    old_record: Any
    leaving: bool = False


def seen_of(data: Any) -> Seen:
    record, old_record = (_columns(data.get(key)) for key in ("record", "old_record"))
    return Seen(data["type"], record, old_record, data.get("leaving", False))


def _columns(row: Any) -> Any:
    return None if row is None else {name: row[name] for name in row if name[0] != "$"}


OWN_SEEN: Final = {"id": 1, "owner": "ada", "body": "hello", "card": "*" * 12 + "1234"}

BINDINGS: Final = {
    "a filter that would widen": [{**MESSAGES, "filter": "owner=in.(bob,ada)"}],
    "a row that comes and does not pass the filter that it passed before": [
        {**MESSAGES, "filter": "body=like.SECRET%"}
    ],
}
"""Where it is said in another way here than in a query."""

OTHERWISE: Final[dict[str, Sequence[Seen]]] = {
    "a second subscription of the same table": [
        Seen("INSERT", {"id": 1}, None),
        Seen("INSERT", OWN_SEEN, None),
    ],
    "rows that are truncated": [],
}
"""What is seen otherwise: each binding has its change, and no truncate comes."""

WITH_ANOTHER_KEY: Final = (
    "a row that comes with another key",
    "without the old row: one that comes",
    "an identity of its own: one that comes",
)
"""Of what came from elsewhere not even the key is told, unless it is the new row's."""


def bindings_of(scene: Scene, *, leaving: bool) -> list[dict[str, Any]]:
    """Ask for what the query of a scene asks for."""
    bindings: list[dict[str, Any]] = []
    for key, value in scene.query:
        match key:
            case "table":
                schema, table = value.split(".")
                bindings.append({"event": "*", "schema": schema, "table": table})
            case "columns":
                bindings[-1]["select"] = value.split(",")
            case "where":
                bindings[-1]["filter"] = value
    bindings = [dict(one) for one in BINDINGS.get(scene.name, bindings)]
    return [{**one, "leaving": leaving} for one in bindings] + [MARKS]


def expected(scene: Scene, *, leaving: bool) -> list[Seen]:
    """Say what Ada sees of a scene by a channel."""
    if scene.name in OTHERWISE:
        return list(OTHERWISE[scene.name])
    if scene.leaves:
        ((_, row, identity),) = scene.seen
        return [Seen("UPDATE", row or {}, identity, leaving=True)] if leaving else []
    return [_expected(scene, *one) for one in scene.seen]


def _expected(scene: Scene, operation: str, row: Any, identity: Any) -> Seen:
    if operation == "update" and identity is None:
        identity = {} if scene.name in WITH_ANOTHER_KEY else {"id": row["id"]}
    return Seen(operation.upper(), row, identity)


def until_mark(client: Phoenix, name: str, note: str) -> list[Any]:
    """Return the changes of a channel up to a mark."""
    changes: list[Any] = []
    while True:
        heard = client.hear()
        if heard.event == "system":
            message = heard.payload["message"]
            is_told = NOT_ENABLED in message or "invalid column for filter" in message
            assert heard.payload["status"] == "ok" or is_told, message
        if heard.event != "postgres_changes" or heard.topic != f"realtime:{name}":
            continue
        data = heard.payload["data"]
        if data["table"] != "marks":
            changes.append(data)
        elif data["record"]["note"] == note:
            return changes


def marked(site: Site, note: str) -> tuple[str, str]:
    """Make a moment of its own, behind all that came before; return its position and its time."""
    with phoenix(site.service.url, site.tokens.good()) as client:
        client.join("moment", [{**MARKS, "since": None}])
        site.mark(note)
        [data] = client.changes(1)
    ((moment,),) = site.database.execute("SELECT clock_timestamp()")
    return data["record"]["$position"], moment.isoformat()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_of_what_happens_a_reader_sees_what_is_theirs(site: Site, scene: Scene) -> None:
    """As it is published, and from wherever it is asked for again."""
    site.database.execute(CLEAN)
    if scene.before:
        site.database.execute(scene.before)
    begin, moment = marked(site, f"before {scene.name}")
    token = site.tokens.good(**scene.claims)
    with ExitStack() as opened:
        clients = {
            leaving: opened.enter_context(phoenix(site.service.url, token))
            for leaving in (False, True)
        }
        for leaving, client in clients.items():
            client.join("live", bindings_of(scene, leaving=leaving))
        perform(site, scene)
        for leaving, client in clients.items():
            verify(scene, until_mark(client, "live", scene.name), leaving=leaving)
            for since in (begin, begin.partition(":")[0], moment):
                bindings = bindings_of(scene, leaving=leaving)
                client.join(since, [{**one, "since": since} for one in bindings])
                verify(scene, until_mark(client, since, scene.name), leaving=leaving)
            never = "SECRET", "pin", "bob", token
            assert_nothing_in((one.replace(scene.name, "") for one in texts(client)), *never)


def texts(client: Phoenix) -> list[str]:
    return [one for one in client.received if isinstance(one, str)]


def verify(scene: Scene, changes: Sequence[Any], *, leaving: bool) -> None:
    assert [seen_of(one) for one in changes] == expected(scene, leaving=leaving)
    for one in changes:
        assert ("$leaving" in (one.get("record") or {})) == bool(one.get("leaving"))


# Many, of different roles


def changes_of(client: Phoenix, name: str, note: str, table: str) -> list[Seen]:
    return [seen_of(one) for one in until_mark(client, name, note) if one["table"] == table]


WHO: Final = [f"user{number}" for number in range(12)]
SECURED_BINDING: Final[dict[str, Any]] = {"event": "*", "schema": "public", "table": "secured"}
ALL: Final = [MESSAGES, SECURED_BINDING, MARKS]


def test_each_of_many_of_mixed_roles_sees_exactly_their_rows(site: Site) -> None:
    """Under conditions and under row security, live and again; they share what they may share."""
    # Emptied like this, rows are read in the order in which they are written.
    site.database.execute(f"{CLEAN}; TRUNCATE messages, secured")
    begin, _ = marked(site, "before many")
    people: dict[str, dict[str, Any]] = {
        **{
            f"{role} {one}": {"role": role, "sub": one}
            for one in WHO
            for role in ("reader", "member")
        },
        "a twin": {"role": "reader", "sub": "user1", "jti": "another"},
        "told": {"role": "told", "sub": "user2"},
        "admin": {"role": "admin"},
        "outsider": {"role": "outsider", "sub": "user1"},
    }
    tokens = {name: site.tokens.good(**claims) for name, claims in people.items()}
    tokens["visitor"] = API_KEY
    with ExitStack() as opened:
        clients = {
            name: opened.enter_context(phoenix(site.service.url, token))
            for name, token in tokens.items()
        }
        for client in clients.values():
            client.join("many", ALL)
        live: dict[str, list[Any]] = {name: [] for name in clients}
        for note, statements in ROUNDS.items():
            site.database.execute(statements)
            site.mark(note)
            for name, client in clients.items():
                live[name] += until_mark(client, "many", note)
        for name, client in clients.items():
            seen = [(one["table"], seen_of(one)) for one in live[name]]
            assert seen == seen_by(name, people.get(name, {})), name
            client.join("again", [{**one, "since": begin} for one in ALL])
            again = until_mark(client, "again", list(ROUNDS)[-1])
            condition = [one for one in again if one["table"] == "messages"]
            assert condition == with_positions(live[name], condition)
            if people.get(name, {}).get("role") in ("member", "told"):
                # Row security knows of no past: only what is still as it was.
                shown = [
                    one for _, one in seen if one.type != "INSERT" or one.record["id"] % 3 == 2
                ]
                assert [seen_of(one) for one in again] == shown
            if name.startswith(("reader", "member", "outsider", "visitor", "a twin")):
                mine = {people.get(name, {}).get("sub")}
                others = [f'"{one}"' for one in WHO if one not in mine]
                assert_nothing_in(client.received, "SECRET", *others)


ROWS: Final[list[dict[str, Any]]] = [
    {"id": number, "owner": WHO[number % 12], "body": f"of {number}"} for number in range(36)
]

ROUNDS: Final = {
    "many come": """
        INSERT INTO messages SELECT i, 'user' || i % 12, 'of ' || i, 'SECRET', '1234'
          FROM generate_series(0, 35) AS i;
        INSERT INTO secured SELECT i, 'user' || i % 12, 'of ' || i, 'SECRET'
          FROM generate_series(0, 35) AS i;
        """,
    "many go to others": """
        UPDATE messages SET owner = 'user' || (id + 1) % 12 WHERE id % 3 = 1;
        UPDATE secured SET owner = 'user' || (id + 1) % 12 WHERE id % 3 = 1;
        """,
    "many change where they are hidden": """
        UPDATE messages SET pin = 'SECRET too' WHERE id % 3 = 2;
        UPDATE secured SET pin = 'SECRET too' WHERE id % 3 = 2;
        """,
    "many are gone": """
        DELETE FROM messages WHERE id % 3 = 0;
        DELETE FROM secured WHERE id % 3 = 0;
        """,
}


def seen_by(name: str, claims: Mapping[str, Any]) -> list[tuple[str, Seen]]:
    """Say what somebody has to see of all rounds."""
    role, sub = claims.get("role"), claims.get("sub")
    seen: list[tuple[str, Seen]] = []
    for kind in range(4):
        for table in ("messages", "secured"):
            for row in ROWS:
                if kind and row["id"] % 3 != kind % 3:
                    continue
                moved = row["id"] % 3 == 1 and kind == 1
                one = _seen_by(role, sub, table, row, kind, is_moved=moved)
                if one is not None:
                    seen.append((table, one))
    return seen


def _seen_by(
    role: str | None,
    sub: str | None,
    table: str,
    row: Mapping[str, Any],
    kind: int,
    *,
    is_moved: bool,
) -> Seen | None:
    sees_all = role == "admin"
    if not sees_all and role not in {"messages": ("reader",), "secured": ("member", "told")}[table]:
        return None
    card = {"messages": {"card": "1234" if sees_all else "****"}, "secured": {}}[table]
    pins = [{"pin": "SECRET"} if sees_all else {}, {"pin": "SECRET too"} if sees_all else {}]
    old = {**row, **card, **pins[0]}
    new = {**row, **card, **pins[kind == 2]}
    if is_moved:
        new["owner"] = WHO[(row["id"] + 1) % 12]
    saw, sees = (sees_all or one["owner"] == sub for one in (old, new))
    key = {"id": row["id"]}
    match kind:
        case 0:
            return Seen("INSERT", old, None) if saw else None
        case 3 if role == "told":
            return Seen("DELETE", None, key)
        case 3:
            return Seen("DELETE", None, old) if saw and role != "member" else None
        case _:
            past = old if saw and role in ("reader", "admin") else key
            return Seen("UPDATE", new, past) if sees else None


def with_positions(live: Sequence[Any], again: Sequence[Any]) -> list[Any]:
    """Add to what came live the positions that a replay has."""
    mine = [one for one in live if one["table"] == "messages"]
    assert len(mine) == len(again)
    found = []
    for one, other in zip(mine, again, strict=True):
        key = "record" if "record" in one else "old_record"
        found.append({**one, key: {**one[key], "$position": other[key]["$position"]}})
    return found


# Attempts


FILL: Final = "INSERT INTO listed SELECT i, repeat('x', 9000) FROM generate_series(1, %s::int) i"
LISTED: Final[dict[str, Any]] = {"event": "*", "schema": "public", "table": "listed"}
TOLD: Final = {"type": "broadcast", "event": "done", "payload": {}}


@contextmanager
def slow_phoenix(url: str, token: str) -> Iterator[Phoenix]:
    """Connect so that little is on its way while it is not read."""
    address = urlsplit(url)
    target = f"ws://{address.netloc}/realtime/v1/websocket?apikey={token}&vsn=2.0.0"
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        one.connect((address.hostname, address.port))
        with connect(target, sock=one, max_size=None) as connection, Phoenix(connection) as client:
            yield client


def wait_until_stuck(site: Site) -> None:
    """Wait until nothing more can be sent, since the client does not read."""
    counts = [-1]

    def is_stuck() -> bool:
        metrics = httpx.get(f"{site.service.url}/metrics").text
        found = re.search(r"^walstream_live_sent_changes\S* (\S+)", metrics, re.MULTILINE)
        assert found is not None
        counts.append(int(float(found[1])))
        return counts[-1] == counts[-2]

    wait_until(is_stuck)


@pytest.mark.parametrize("leaves", [False, True])
def test_who_does_not_read_keeps_no_rights_by_that(site: Site, *, leaves: bool) -> None:
    """Another token counts from when it is taken, for what waits to be sent, too.

    The first binding has so much to send that it waits for the client, the second is live.
    """
    site.database.execute(CLEAN)
    begin, _ = marked(site, "before many rows")
    site.database.execute(FILL, 3000)
    marked(site, "behind many rows")
    bindings = [{**LISTED, "since": begin}, MESSAGES]
    admin, outsider = (site.tokens.good(role=role) for role in ("admin", "outsider"))
    url = site.service.url
    with slow_phoenix(url, admin) as slow, phoenix(url, admin) as other:
        other.join("slow", [MESSAGES])
        slow.join("slow", bindings)
        wait_until_stuck(site)
        slow.send("realtime:slow", "access_token", {"access_token": outsider}, join_ref="1")
        slow.send("realtime:slow", "broadcast", TOLD, join_ref="1")
        other.wait_for(lambda heard: heard.event == "broadcast")
        if leaves:
            slow.send("realtime:slow", "phx_leave", {}, join_ref="1")
        site.database.execute("INSERT INTO messages VALUES (1, 'ada', 'SECRET')")
        other.changes(1)
        slow.join("marks", [MARKS], token=outsider)
        site.mark("many rows")
        until_mark(slow, "marks", "many rows")
        count = sum('"table":"listed"' in one for one in texts(slow))
        assert 0 < count < 3000
        assert_nothing_in(slow.received, "SECRET")


def test_who_leaves_while_the_token_is_renewed_gets_nothing_more(site: Site) -> None:
    """Of none of the positions that the bindings began at; so it is, too, when the token ends."""
    site.database.execute(CLEAN)
    begin, moment = marked(site, "before leaving")
    bindings = [
        MESSAGES,
        {**MESSAGES, "since": begin},
        {**MESSAGES, "since": moment},
        {**MESSAGES, "since": None},
    ]
    with phoenix(site.service.url, site.tokens.good()) as client:
        for turn in range(10):
            join_ref = client.join("left", bindings).ref
            client.wait_for(is_system)
            new = {"access_token": site.tokens.good(sub="bob", jti=turn)}
            client.send("realtime:left", "access_token", new, join_ref=join_ref)
            client.send("realtime:left", "phx_leave", {}, join_ref=join_ref)
            client.wait_for(lambda heard: heard.event == "phx_close")
        client.join("marks", [MARKS])
        site.database.execute("INSERT INTO messages VALUES (1, 'ada', 'x'), (2, 'bob', 'x')")
        site.mark("after leaving")
        until_mark(client, "marks", "after leaving")
        assert [one for one in texts(client) if '"realtime:left","postgres_changes"' in one] == []


def problems(client: Phoenix, name: str, bindings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is told of bindings that cannot be had, in their order."""
    client.join(name, bindings)
    told = [client.wait_for(is_system).payload for _ in bindings]
    assert {(one["status"], one["extension"]) for one in told} == {("error", "postgres_changes")}
    return [one["message"] for one in told]


CONDITIONS: Final = [
    f"{negation}{condition}"
    for condition in (
        *("eq.x", "neq.x", "lt.x", "lte.x", "gt.x", "gte.x", "in.(x,y)", "like.x%", "ilike.x%"),
        *("is.null", "match.^x", "imatch.^x", "isdistinct.x"),
    )
    for negation in ("", "not.")
]


def test_a_hidden_column_is_as_one_that_is_not_there(site: Site) -> None:
    """In each condition, alone and behind another, and in what is selected; so is a masked one."""
    bindings = [
        *({**MESSAGES, "filter": f"COLUMN={one}"} for one in CONDITIONS),
        {**MESSAGES, "filter": "id=gt.0,COLUMN=eq.1"},
        {**MESSAGES, "filter": "COLUMN=is.true"},
        {**MESSAGES, "filter": "COLUMN=eq.1,unheard=eq.1"},
        {**MESSAGES, "filter": "COLUMN=eq.1", "select": ["id", "unheard"]},
        {**MESSAGES, "filter": "COLUMN=eq.1", "since": "no time", "leaving": True},
        {"event": "*", "schema": "public", "table": "*", "filter": "COLUMN=eq.1"},
        {"event": "*", "schema": "*", "table": "messages", "filter": "COLUMN=eq.1"},
    ]
    selecting = [{**MESSAGES, "select": ["id", "COLUMN"]}]
    with phoenix(site.service.url, site.tokens.good()) as client:

        def told(column: str, bindings: Sequence[Mapping[str, Any]]) -> list[str]:
            asked = json.loads(json.dumps(bindings).replace("COLUMN", column))
            some = [asked[place : place + 16] for place in range(0, len(asked), 16)]
            return [
                one.replace(column, "COLUMN")
                for place, few in enumerate(some)
                for one in problems(client, f"{column} {place}", few)
            ]

        expected = told("nix", bindings)
        assert all("invalid column for filter COLUMN" in one for one in expected)
        for column in ("pin", "card", "ctid", "PIN", "xmin"):
            assert told(column, bindings) == expected, column
        expected = told("nix", selecting)
        assert told("pin", selecting) == told("tableoid", selecting) == expected
        assert "invalid column for select COLUMN" in expected[0]
        # Of a table under row security, too.
        secured = [{**SECURED_BINDING, "filter": "COLUMN=like.x%"}]
        client.send("phoenix", "heartbeat", {})
    with phoenix(site.service.url, site.tokens.good(role="member")) as client:
        assert told("pin", secured) == told("nix", secured)


TABLES: Final = (
    ("public", "hidden"),
    ("public", "unheard"),
    ("app", "things"),
    ("nowhere", "nothing"),
    ("walstream", "dead_letters"),
    ("pg_catalog", "pg_authid"),
    ("information_schema", "tables"),
    ("public", "secured"),
    ("public", "Messages"),
    ("PUBLIC", "messages"),
    ("public", "messages "),
    ("public", "message_"),
    ("public", "mess%"),
    ("public", "broken"),
    ("public", "numbered"),
    ("app", "*"),
    ("nowhere", "*"),
    ("walstream", "*"),
    ("pg_catalog", "*"),
    ("*", "hidden"),
    ("*", "things"),
    ("*", "nothing"),
)


def test_a_table_that_may_not_be_read_is_as_one_that_is_not_there(site: Site) -> None:
    """With whatever is asked of it."""
    asked: list[dict[str, Any]] = [
        {},
        {"filter": "body=eq.x"},
        {"filter": "nix=eq.x"},
        {"filter": "id=eq.x"},
        {"filter": "body=match.("},
        {"since": "beginning"},
        {"since": "no time"},
        {"since": "FFFFFFFF/0", "leaving": True},
    ]
    selecting = {"select": ["id", "nix"]}
    with phoenix(site.service.url, site.tokens.good()) as client:
        told: dict[tuple[str, str], list[str]] = {}
        for schema, table in TABLES:
            few = [*asked, selecting] if "*" not in (schema, table) else asked
            bindings = [{"event": "*", "schema": schema, "table": table, **one} for one in few]
            told[schema, table] = [
                one.replace(f"schema: {schema}, table: {table}", "TABLE")
                for one in problems(client, f"{schema}.{table}", bindings)
            ]
    assert all(NOT_ENABLED in one for messages in told.values() for one in messages)
    for (schema, table), messages in told.items():
        kind = ("nowhere", "*") if "*" in (schema, table) else ("nowhere", "nothing")
        assert messages == told[kind], (schema, table)


def test_what_a_hidden_column_holds_is_not_told_by_how_large_a_change_is(site: Site) -> None:
    """Nor what the row was before it came."""
    site.database.execute(CLEAN)
    marked(site, "before large ones")
    large = "repeat('x', 1100000)"
    with phoenix(site.service.url, site.tokens.good()) as client:
        client.join("large", [MESSAGES, MARKS])
        site.database.execute(
            f"INSERT INTO messages VALUES (1, 'ada', 'x', {large}), (2, 'bob', {large}, 'x');"
            "UPDATE messages SET owner = 'ada', body = 'x' WHERE id = 2;"
            f"INSERT INTO messages VALUES (3, 'ada', {large}, 'x')"
        )
        site.mark("large ones")
        changes = until_mark(client, "large", "large ones")
    assert [(seen_of(one).record["id"], one["errors"]) for one in changes] == [
        (1, None),
        (2, None),
        (3, ["Error 413: Payload Too Large"]),
    ]


def test_one_channel_may_ask_for_what_it_may_have_and_for_what_not(site: Site) -> None:
    """Each binding has its own rights, and its own ids."""
    site.database.execute(CLEAN)
    marked(site, "before both")
    hidden = {"event": "*", "schema": "public", "table": "hidden"}
    others = {**MESSAGES, "filter": "owner=eq.bob"}
    by_pin = {**MESSAGES, "filter": "pin=eq.x"}
    wanted = [hidden, MESSAGES, others, by_pin, {**MESSAGES, "select": ["body"]}, MARKS]
    with phoenix(site.service.url, site.tokens.good()) as client:
        reply = client.join("both", wanted).payload["response"]["postgres_changes"]
        site.database.execute(
            "INSERT INTO hidden VALUES (1, 'ada', 'SECRET');"
            "INSERT INTO messages VALUES (1, 'ada', 'x', 'x'), (2, 'bob', 'SECRET', 'x')"
        )
        site.mark("both")
        until_mark(client, "both", "both")
        seen = [
            (
                payload["ids"],
                payload["data"]["record"],
                [c["name"] for c in payload["data"]["columns"]],
            )
            for _, _, _, event, payload in map(json.loads, texts(client))
            if event == "postgres_changes" and payload["data"]["table"] != "marks"
        ]
        whole = {"id": 1, "owner": "ada", "body": "x", "card": None}
        assert seen == [
            ([reply[1]["id"]], whole, ["id", "owner", "body", "card"]),
            ([reply[4]["id"]], {"id": 1, "body": "x"}, ["id", "body"]),
        ]
        assert_nothing_in((one for one in texts(client) if '"system"' not in one), "SECRET", "pin")


def test_an_api_key_stands_for_its_role_and_no_other_key_does(site: Site) -> None:
    url = site.service.url
    for key in ("sb_publishable_", API_KEY[:-1], API_KEY + "x", API_KEY.upper(), " ", "\0"):
        told = refused_connection(site, f"/socket/websocket?{urlencode({'apikey': key})}", {})
        assert told == (401, {"error": MALFORMED.text})
    with phoenix(url, API_KEY) as client:
        # A library sends any such key where a user's token is expected: the connection's counts.
        client.join("key", [MESSAGES, MARKS], token=ANOTHER_KEY)
        assert NOT_ENABLED in client.wait_for(is_system).payload["message"]
        site.database.execute("DELETE FROM messages; INSERT INTO messages VALUES (1, 'ada', 'x')")
        site.mark("by a key")
        assert until_mark(client, "key", "by a key") == []
        refused = client.join("user:ada", private=True)
        assert refused.payload["status"] == "error"
        assert client.join("news:x", private=True).payload["status"] == "error"
        # A user's token lifts it.
        assert (
            client.join("user:ada", token=site.tokens.good(), private=True).payload["status"]
            == "ok"
        )


def broadcast(event: str, **more: Any) -> dict[str, Any]:
    return {"type": "broadcast", "event": event, "payload": {"said": event}, **more}


def test_private_channels_are_for_roles_and_claims(site: Site) -> None:
    """To be in one, to say something there, to be seen there, by a socket and by HTTP."""
    url, tokens = site.service.url, site.tokens
    ada, bob, star = (tokens.good(sub=sub) for sub in ("ada", "bob", "*"))
    outsider = tokens.good(role="outsider")
    config: dict[str, Any] = {"broadcast": {"ack": True}, "presence": {"enabled": True, "key": "k"}}
    with ExitStack() as opened:
        listener, spy, reader = (
            opened.enter_context(phoenix(url, one)) for one in (ada, bob, outsider)
        )
        assert listener.join("user:ada", private=True, **config).payload["status"] == "ok"
        assert listener.join("news:x", private=True, **config).payload["status"] == "ok"
        for token in (
            bob,
            star,
            outsider,
            API_KEY,
            tokens.good(role="admin"),
            tokens.good(sub="ada*"),
        ):
            reply = spy.join("user:ada", token=token, private=True, **config).payload
            reason = "You do not have permissions to read from this Channel topic: user:ada"
            assert reply["response"] == {"reason": f"Unauthorized: {reason}"}
        # The public channel of that name is another one.
        public = spy.join("user:ada", **config).ref
        spy.send("realtime:user:ada", "broadcast", broadcast("public"), join_ref=public)
        spy.send("realtime:user:ada", "presence", track("spy"), join_ref=public)
        # Who may only read is heard and seen by nobody.
        ref = reader.join("news:x", private=True, **config).ref
        for event, payload in (("broadcast", broadcast("reader")), ("presence", track("reader"))):
            sent = reader.send("realtime:news:x", event, payload, join_ref=ref)
            answer = answer_to(reader, sent)
            assert answer.payload["status"] == "error"
            assert "permissions to write" in answer.payload["response"]["reason"]
        for poster, topic, status in (
            (bob, "user:ada", 403),
            (outsider, "news:x", 403),
            (API_KEY, "news:x", 403),
            (None, "news:x", 401),
            (ada, "user:ada", 202),
            (ada, "news:x", 202),
        ):
            assert post(site, poster, topic, f"posted {status}", is_private=True) == status
        for name in ("user:ada", "news:x"):
            said = listener.wait_for(lambda heard: heard.event == "broadcast")
            assert (said.topic, said.payload["event"]) == (f"realtime:{name}", "posted 202")
        said = reader.wait_for(lambda heard: heard.event == "broadcast")
        assert said.payload["event"] == "posted 202"
        assert post(site, outsider, "user:ada", "posted", is_private=False) == 202
        last = spy.wait_for(lambda heard: heard.event == "broadcast")
        assert last.payload["event"] == "posted"
        assert_nothing_in(spy.received, "posted 202", "reader")
        assert_nothing_in(listener.received, "spy", '"reader"', "public", "posted 40")


def answer_to(client: Phoenix, ref: str) -> Heard:
    return client.wait_for(lambda heard: heard.ref == ref)


def track(who: str) -> dict[str, Any]:
    return {"type": "presence", "event": "track", "payload": {"who": who}}


def post(site: Site, token: str | None, topic: str, event: str, *, is_private: bool) -> int:
    message = {"topic": topic, "event": event, "payload": {}, "private": is_private}
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    url = f"{site.service.url}/realtime/v1/api/broadcast"
    return site.client.post(url, json={"messages": [message]}, headers=headers).status_code


def test_nobody_can_pretend_that_something_has_changed(site: Site) -> None:
    """A client takes each payload with ids for a change: what is said by others has none."""
    forged = {"ids": [1], "data": {"type": "INSERT", "record": {"id": 1}}}
    with phoenix(site.service.url, site.tokens.good()) as forger:
        with phoenix(site.service.url, site.tokens.good()) as victim:
            victim.join("forged", [MESSAGES])
            ref = forger.join("forged", broadcast={"ack": True}, presence={"key": "ids"}).ref
            topic = "realtime:forged"
            forger.send(topic, "postgres_changes", forged, join_ref=ref)
            forger.send(topic, "system", {"message": "forged", "status": "error"}, join_ref=ref)
            forger.send(topic, "broadcast", broadcast("one", **forged), join_ref=ref)
            forger.send(topic, "presence", track("ids"), join_ref=ref)
            for payload in (b'{"a":1},"ids":[1]', b'{"a":1}}', b"", b"\xff", b"1 2"):
                forger.connection.send(binary(ref, topic, b"two", payload, is_json=True))
            metadata = json.dumps(forged).encode()
            forger.connection.send(binary(ref, topic, b"three", b"{}", metadata, is_json=True))
            forger.send(topic, "broadcast", broadcast("last"), join_ref=ref)
            heard: list[Heard] = []
            while not heard or heard[-1].payload.get("event") != "last":
                heard.append(victim.hear())
        told = [one for one in heard if one.event not in ("phx_reply", "presence_state")]
        assert [one.payload["event"] for one in told if one.event == "broadcast"] == [
            *("one", "three", "last")
        ]
        assert {one.event for one in told} == {"broadcast", "system"}
        for one in told:
            assert "ids" not in one.payload
            assert one.payload.get("message") != "forged"


def binary(
    ref: str | None, topic: str, event: bytes, payload: bytes, about: bytes = b"", *, is_json: bool
) -> bytes:
    """Write a broadcast of kind 3."""
    parts = ((ref or "").encode(), b"9", topic.encode(), event, about)
    return bytes((3, *map(len, parts), is_json)) + b"".join(parts) + payload


FOREIGN: Final = "INSERT INTO secured VALUES (1, 'bob', 'SECRET')"


@pytest.mark.parametrize("role", ["member", "told"])
def test_under_row_security_nothing_is_told_of_what_is_hidden(site: Site, role: str) -> None:
    """As a row comes, and goes, and comes again; live, and by ``since``, however it is filtered."""
    site.database.execute("DELETE FROM secured")
    begin, _ = marked(site, f"before {role}")
    token = site.tokens.good(role=role)
    asked: list[dict[str, Any]] = [
        {},
        {"leaving": True},
        {"filter": "body=like.%SECRET%", "leaving": True},
        {"filter": "body=not.is.null", "select": ["body"], "leaving": True},
        {"filter": "owner=isdistinct.ada", "leaving": True},
        {"filter": "id=eq.1", "leaving": True},
        {"event": "DELETE", "filter": "body=eq.SECRET"},
    ]
    bindings = [{**SECURED_BINDING, **one} for one in asked]
    steps = (
        FOREIGN,
        "UPDATE secured SET body = 'SECRET again'",
        "UPDATE secured SET owner = 'ada', body = 'hers'",
        "UPDATE secured SET id = 2",
        "UPDATE secured SET owner = 'bob', body = 'SECRET'",
        "UPDATE secured SET id = 1",
        "DELETE FROM secured",
        f"BEGIN; {FOREIGN}; UPDATE secured SET owner = 'ada', body = 'at last'; COMMIT",
        "TRUNCATE secured",
    )
    whole = {"id": 1, "owner": "ada", "body": "hers"}
    with phoenix(site.service.url, token) as client:
        reply = client.join("live", [*bindings, MARKS]).payload["response"]["postgres_changes"]
        for place, step in enumerate(steps):
            site.database.execute(step)
            site.mark(f"{role} {place}")
            until_mark(client, "live", f"{role} {place}")
        all_ids = [one["id"] for one in reply]
        seen = [
            (seen_of(payload["data"]), [all_ids.index(one) for one in payload["ids"]])
            for _, _, _, event, payload in map(json.loads, texts(client))
            if event == "postgres_changes" and payload["data"]["table"] == "secured"
        ]
        deletes = [(Seen("DELETE", None, {"id": 1}), [0, 1, 5])] if role == "told" else []
        moved = {**whole, "id": 2}
        assert [one for one in seen if one[0].type != "DELETE"][:4] == [
            (Seen("UPDATE", whole, {"id": 1}), [0, 1, 5]),
            (Seen("UPDATE", {"id": 1, "body": "hers"}, {"id": 1}), [3]),
            (Seen("UPDATE", moved, {}), [0, 1]),
            (Seen("UPDATE", {"id": 2, "body": "hers"}, {}), [3]),
        ]
        assert [one for one in seen if one[0].type == "DELETE"] == deletes
        client.join("again", [{**one, "since": begin} for one in [*bindings, MARKS]])
        again = until_mark(client, "again", f"{role} {len(steps) - 1}")
        assert {one["type"] for one in again} == ({"DELETE"} if role == "told" else set())
        assert_nothing_in(client.received, "SECRET", "bob", "pin", token)


def test_a_replay_ends_when_its_token_does(site: Site) -> None:
    """Nothing comes behind the end of the channel, of what waits to be sent neither."""
    site.database.execute(CLEAN)
    begin, _ = marked(site, "before a long replay")
    site.database.execute(FILL, 3000)
    marked(site, "behind a long replay")
    bindings = [{**LISTED, "since": begin}, {**LISTED, "since": begin.partition(":")[0]}]
    short = site.tokens.good(exp=int(time.time()) + 2)
    with slow_phoenix(site.service.url, site.tokens.good()) as client:
        client.join("long", bindings, token=short)
        wait_until_stuck(site)
        wait_until(lambda: is_expired(short))
        system = client.wait_for(
            lambda heard: is_system(heard) and heard.payload["extension"] == "system"
        )
        assert re.fullmatch(ENDED.joined, system.payload["message"])
        assert client.hear().event == "phx_close"
        count = sum('"table":"listed"' in one for one in texts(client))
        assert 0 < count < 6000
        client.join("marks", [MARKS])
        site.mark("after the end")
        until_mark(client, "marks", "after the end")
        assert sum('"table":"listed"' in one for one in texts(client)) == count


def is_expired(token: str) -> bool:
    claims = jwt.decode(token, options={"verify_signature": False})
    return bool(time.time() > claims["exp"] + 0.5)


def test_no_other_place_of_a_token_counts(site: Site) -> None:
    """Neither that of other protocols, nor a good one behind a bad one."""
    good, bad = site.tokens.good(), site.tokens.by_foreign_key()
    for query, headers, status in (
        ({"token": good}, {}, "API key is missing"),
        ({"access_token": good}, {}, "API key is missing"),
        ({}, {"Authorization": f"Bearer {good}"}, "API key is missing"),
        ({}, {"Sec-WebSocket-Protocol": good}, "API key is missing"),
        ({"apikey": good}, {"x-api-key": bad}, FORGED.text),
        ({"apikey": bad, "token": good}, {}, FORGED.text),
    ):
        target = f"/realtime/v1/websocket?{urlencode(query)}"
        assert refused_connection(site, target, headers) == (401, {"error": status})


def test_the_connections_token_lets_nobody_join_when_it_has_ended(site: Site) -> None:
    token = site.tokens.good(exp=int(time.time()) + 2)
    with phoenix(site.service.url, token) as client:
        wait_until(lambda: is_expired(token))
        reply = client.join("late", [MESSAGES]).payload
        assert re.fullmatch(f"InvalidJWTToken: {ENDED.joined}", reply["response"]["reason"])
        assert client.join("later", [MESSAGES], token=site.tokens.good()).payload["status"] == "ok"


def test_each_channel_of_a_socket_has_its_own_token(site: Site) -> None:
    """Another one of one channel changes no other; who joins again has but the new one."""
    site.database.execute(CLEAN)
    marked(site, "before channels")
    ada, bob = (site.tokens.good(sub=sub) for sub in ("ada", "bob"))
    with phoenix(site.service.url, site.tokens.good(role="admin")) as client:
        refs = {
            "ada": client.join("ada", [MESSAGES, MARKS], token=ada).ref,
            "bob": client.join("bob", [MESSAGES, MARKS], token=bob).ref,
            "all": client.join("all", [MESSAGES, MARKS]).ref,
            "was all": client.join("was all", [MESSAGES, MARKS]).ref,
        }
        client.join("was all", [MESSAGES, MARKS], token=bob)
        new = {"access_token": site.tokens.good(role="outsider")}
        client.send("realtime:all", "access_token", new, join_ref=refs["bob"])  # a stale ref
        client.send("realtime:bob", "access_token", new, join_ref=refs["bob"])
        client.wait_for(lambda heard: heard.topic == "realtime:bob" and is_system(heard))
        site.database.execute("INSERT INTO messages VALUES (1, 'ada', 'a'), (2, 'bob', 'b')")
        seen: dict[str, list[int]] = {name: [] for name in refs}
        site.mark("channels")
        marks = 0
        while marks < len(refs):
            heard = client.wait_for(lambda heard: heard.event == "postgres_changes")
            data = heard.payload["data"]
            if data["table"] == "marks":
                marks += 1
            else:
                seen[heard.topic.removeprefix("realtime:")].append(data["record"]["id"])
        assert seen == {"ada": [1], "bob": [], "all": [], "was all": [2]}


def test_who_may_no_more_be_in_a_private_channel_by_another_token_is_out(site: Site) -> None:
    with (
        phoenix(site.service.url, site.tokens.good()) as client,
        phoenix(site.service.url, site.tokens.good()) as other,
    ):
        ref = client.join("user:ada", private=True).ref
        new = {"access_token": site.tokens.good(sub="bob")}
        client.send("realtime:user:ada", "access_token", new, join_ref=ref)
        system = client.wait_for(is_system)
        assert "permissions to read from this Channel topic" in system.payload["message"]
        assert client.hear().event == "phx_close"
        ref = other.join("user:ada", private=True, broadcast={"self": True}).ref
        other.send("realtime:user:ada", "broadcast", broadcast("secret"), join_ref=ref)
        other.wait_for(lambda heard: heard.event == "broadcast")
        client.send("phoenix", "heartbeat", {})
        client.wait_for(lambda heard: heard.topic == "phoenix")
        assert_nothing_in(client.received, "secret")


def test_who_is_who_in_turn_gets_of_each_turn_what_is_theirs(site: Site) -> None:
    """While much is replayed, and the token is another all the time: no row too many or twice."""
    site.database.execute(CLEAN)
    begin, _ = marked(site, "before turns")
    site.database.execute(
        "INSERT INTO messages SELECT i, CASE i % 2 WHEN 0 THEN 'ada' ELSE 'bob' END,"
        " repeat('x', 1000) FROM generate_series(1, 6000) i"
    )
    marked(site, "turns")
    bindings = [{**one, "since": begin} for one in (MESSAGES, MARKS)]
    with phoenix(site.service.url, site.tokens.good()) as client:
        ref = client.join("turns", bindings).ref
        for turn in range(40):
            new = {"access_token": site.tokens.good(sub="bob" if turn % 2 else "ada", jti=turn)}
            client.send("realtime:turns", "access_token", new, join_ref=ref)
        rows = [one["record"] for one in until_mark(client, "turns", "turns")]
    ids = [row["id"] for row in rows]
    assert ids == sorted(set(ids))
    changes = sum(one["owner"] != other["owner"] for one, other in pairwise(rows))
    assert changes <= 40, "each is whole up to where the next begins"
    for one, other in pairwise(rows):
        assert one["owner"] != other["owner"] or other["id"] == one["id"] + 2


def test_another_token_of_the_same_rights_promises_no_more(site: Site) -> None:
    hidden = {"event": "*", "schema": "public", "table": "hidden"}
    with phoenix(site.service.url, site.tokens.good()) as client:
        [told] = problems(client, "promised", [hidden])
        for turn in range(2):
            new = {"access_token": site.tokens.good(jti=turn)}
            client.send("realtime:promised", "access_token", new)
            system = client.wait_for(is_system).payload
            assert (system["status"], system["message"]) == ("error", told)


@pytest.mark.parametrize(("role", "binding"), [("reader", MESSAGES), ("member", SECURED_BINDING)])
def test_nothing_is_lost_or_comes_twice_while_claims_change(
    site: Site, role: str, binding: Mapping[str, Any]
) -> None:
    """Also where the server is asked about what waits, as who had the token by then."""
    site.database.execute(f"{CLEAN}; DELETE FROM secured")
    marked(site, f"before claims {role}")
    table = binding["table"]
    with phoenix(site.service.url, site.tokens.good(role=role)) as client:
        ref = client.join("claims", [binding, MARKS]).ref
        for turn in range(30):
            new = {"access_token": site.tokens.good(role=role, turn=turn)}
            client.send("realtime:claims", "access_token", new, join_ref=ref)
            site.database.execute(
                f"INSERT INTO {table} VALUES (%s, 'ada', 'x'), (%s, 'bob', 'SECRET')",
                turn,
                turn + 1000,
            )
        site.mark(f"claims {role}")
        changes = until_mark(client, "claims", f"claims {role}")
        assert [one["record"]["id"] for one in changes] == list(range(30))
        assert_nothing_in(client.received, "SECRET")
