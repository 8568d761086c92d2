"""What somebody may try to read what is not theirs, by the channels of Supabase Realtime.

The tables are those of `tests.access_scenes`, with the words of this protocol: tokens that are no
good at the connection, at a join and as a later token; scenes, live and by ``since``. Then what an
attacker would try. All that a client gets is searched for what it must not have.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import httpx
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

MESSAGES: Final = {"event": "*", "schema": "public", "table": "messages"}
MARKS: Final = {"event": "INSERT", "schema": "public", "table": "marks"}
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
    rows = [
        None if row is None else {name: row[name] for name in row if name[0] != "$"}
        for row in (data.get("record"), data.get("old_record"))
    ]
    return Seen(data["type"], *rows, data.get("leaving", False))


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
            assert heard.payload["status"] == "ok" or NOT_ENABLED in message, message
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
SECURED_BINDING: Final = {"event": "*", "schema": "public", "table": "secured"}
ALL: Final = [MESSAGES, SECURED_BINDING, MARKS]


def test_each_of_many_of_mixed_roles_sees_exactly_their_rows(site: Site) -> None:
    """Under conditions and under row security, live and again; they share what they may share."""
    site.database.execute(f"{CLEAN}; DELETE FROM secured")
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


ROWS: Final = [
    {"id": number, "owner": WHO[number % 12], "body": f"of {number}"} for number in range(36)
]

_EACH: Final = "FROM generate_series(0, 35) AS i"
ROUNDS: Final = {
    f"many {place}": statement
    for place, statement in enumerate(
        (
            f"INSERT INTO messages SELECT i, 'user' || i % 12, 'of ' || i, 'SECRET', '1234' {_EACH};"
            f"INSERT INTO secured SELECT i, 'user' || i % 12, 'of ' || i, 'SECRET' {_EACH}",
            "UPDATE messages SET owner = 'user' || (id + 1) % 12 WHERE id % 3 = 1;"
            "UPDATE secured SET owner = 'user' || (id + 1) % 12 WHERE id % 3 = 1",
            "UPDATE messages SET pin = 'SECRET too' WHERE id % 3 = 2;"
            "UPDATE secured SET pin = 'SECRET too' WHERE id % 3 = 2",
            "DELETE FROM messages WHERE id % 3 = 0; DELETE FROM secured WHERE id % 3 = 0",
        )
    )
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
LISTED: Final = {"event": "*", "schema": "public", "table": "listed"}
TOLD: Final = {"type": "broadcast", "event": "done", "payload": {}}


def wait_until_stuck(site: Site) -> None:
    """Wait until nothing more can be sent, since the client does not read."""
    counts = [-1]

    def is_stuck() -> bool:
        metrics = httpx.get(f"{site.service.url}/metrics").text
        found = re.search(r"^walstream_live_sent_changes_total (\S+)", metrics, re.MULTILINE)
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
    bindings = [{**LISTED, "since": begin}, MESSAGES]
    admin, outsider = (site.tokens.good(role=role) for role in ("admin", "outsider"))
    url = site.service.url
    with phoenix(url, admin) as slow, phoenix(url, admin) as other:
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
