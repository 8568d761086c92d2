"""The section ``[access]``: what it refuses, what of it is shown, and what is said of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from typer.testing import CliRunner

from tests.checks import SLOT, mend
from tests.postgres import Database
from tests.test_access import EC_KEY, RSA_KEY, SECRET, answering, jwk, layout, pem, serving
from walstream import config as configuration
from walstream.access import Gate
from walstream.check import Finding, Status, check
from walstream.cli import app
from walstream.config import Config
from walstream.errors import ConfigError, UsageError, WalstreamError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configuration.parse(tomllib.loads(text), source="f")
    assert "hunter2" not in str(caught.value)
    return [problem.removeprefix("f: ") for problem in caught.value.problems]


# ---- What is refused


def test_mistakes_are_told_all_at_once() -> None:
    found = mistakes(
        """
        [access]
        secret = "hunter2"
        algorithms = ["none"]
        leeway_seconds = -1
        role_claim = "a..b"
        tokens = 1
        [access.roles.viewer]
        stat = true
        tables = [
            { table = "messages", where = "id=like.{claims.sub}", columns = { excl = [] } },
            {},
        ]
        """
    )
    keys = [problem.partition(": ")[0] for problem in found]
    assert keys == [
        "access.secret",
        "access.algorithms[0]",
        "access.leeway_seconds",
        "access.role_claim",
        "access.roles.viewer.tables[0].table",
        "access.roles.viewer.tables[0].columns.excl",
        "access.roles.viewer.tables[0].where",
        "access.roles.viewer.tables[1].table",
        "access.roles.viewer.stat",
        "access.tokens",
    ]
    assert "is not a key; allowed: include, exclude, mask" in found[5]
    assert "is not a key; allowed: status, operate, tables" in found[8]
    assert "is not a key; allowed: secret, secret_file, jwks_url" in found[9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("secret = 'hunter2'", "access.secret: found a value of 7 bytes; allowed for HS256: 32"),
        ("secret = 5", "access.secret: found a value; allowed: a string"),
        ("secret = '-----BEGIN hunter2'", "access.secret: found a key or certificate in PEM"),
        ("secret = 'SECRET'\nalgorithms = ['HS512']", "access.algorithms: found a value of 44"),
        ("secret = 'SECRET'\nsecret_file = 'a'", "access.secret_file: found beside secret"),
        ("secret = 'SECRET'\njwks_url = 'https://a'", "access.jwks_url: found beside secret"),
        ("jwks_file = 'b'\npublic_key_file = 'a'", "access.public_key_file: found beside jwks_f"),
        (
            "secret = 'SECRET'\nalgorithms = ['RS256']",
            "access.algorithms: found 'RS256'; allowed w",
        ),
        ("jwks_url = 'https://a'\nalgorithms = ['ES256', 'HS256']", "access.algorithms: found 'HS"),
        ("public_key_file = 'a'\nalgorithms = ['HS256']", "access.algorithms: found 'HS256'"),
        ("algorithms = []", "access.algorithms: found []; allowed: at least one"),
        ("algorithms = ['hs256']", "access.algorithms[0]: found 'hs256'; allowed: 'HS256', "),
        ("jwks_url = 'ftp://a'", "access.jwks_url: found a value; allowed: a URL"),
        ("jwks_url = 'file:///etc/passwd'", "access.jwks_url: found a value; allowed: a URL"),
        ("jwks_url = 'https://me:hunter2@a/'", "access.jwks_url: found a value; allowed: a URL"),
        ("jwks_url = 'https://a/ b'", "access.jwks_url: found a value; allowed: a URL"),
        ("jwks_url = 'https://a:b/'", "access.jwks_url: found a value; allowed: a URL"),
        ("jwks_url = 'https://'", "access.jwks_url: found a value; allowed: a URL"),
        ("audience = []", "access.audience"),
        ("audience = ''", "access.audience"),
        ("issuer = ''", "access.issuer: found ''; allowed: at least one character"),
        ("leeway_seconds = nan", "access.leeway_seconds"),
        ("max_token_bytes = 0", "access.max_token_bytes: found 0; allowed: more than 0"),
        ("anonymous_role = 'x'", "access.anonymous_role: found 'x'; allowed: none, there is no"),
        ("anonymous_role = 'x'\nroles.y = {}", "access.anonymous_role: found 'x'; allowed: y"),
        (
            "anonymous_role = 'x'\nroles.x.tables = [{ table = 'a.b', where = 'd=eq.{claims.e}' }]",
            "access.anonymous_role: found 'x', whose tables[0].where needs the claim e; allowed",
        ),
        ("roles = ['viewer']", "access.roles: found ['viewer']; allowed: a table"),
        ("roles.x = true", "access.roles.x: found True; allowed: a table"),
        ("roles.x.tables = { table = 'a.b' }", "access.roles.x.tables: found"),
        ("roles.x.status = 'please'", "access.roles.x.status: found 'please'; allowed: true or"),
    ],
)
def test_what_cannot_be_is_refused(text: str, said: str) -> None:
    [problem] = mistakes(f"[access]\n{text.replace('SECRET', SECRET)}")
    assert problem.startswith(said)
    assert SECRET not in problem


@pytest.mark.parametrize("text", ["access = 'hunter2'", "access = ['hunter2']"])
def test_a_secret_in_the_place_of_the_section_is_not_printed(text: str) -> None:
    [problem] = mistakes(text)
    assert problem.startswith("access: found a value")


def test_keys_can_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALSTREAM_ACCESS_SECRET", SECRET)
    monkeypatch.setenv("WALSTREAM_ACCESS_AUDIENCE", "web")
    monkeypatch.setenv("WALSTREAM_ACCESS_ALGORITHMS", '["HS256"]')
    monkeypatch.setenv("WALSTREAM_ACCESS_ROLES", '{"viewer": {"status": true}}')
    access = configuration.parse({}).access
    assert access.signing_secret() == SECRET.encode()
    assert access.audience == ["web"]
    assert access.roles["viewer"].status
    monkeypatch.setenv("WALSTREAM_ACCESS_SECRET", "hunter2")
    with pytest.raises(ConfigError, match=r"^WALSTREAM_ACCESS_SECRET: .* of 7 bytes"):
        configuration.parse({})


def test_a_secret_can_be_in_a_file(folder: Path) -> None:
    file = folder / "secret.txt"
    content = {"access": {"secret_file": str(file), "algorithms": ["HS384"]}}
    access = configuration.parse(content).access
    for text, said in (
        (None, "cannot be read: No such file"),
        ("short", r"access\.secret_file: found a value of 5 bytes; allowed for HS384: 48 bytes"),
        ("x" * 47, "of 47 bytes"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            Gate(access)
    file.write_text("x" * 48 + "\n")
    assert access.signing_secret() == b"x" * 48


@pytest.mark.parametrize("key", ["jwks_file", "public_key_file"])
def test_a_file_of_keys_that_cannot_be_read_is_a_mistake(folder: Path, key: str) -> None:
    for name in ("nothing.pem", "a\0b"):
        access = configuration.parse({"access": {key: name}}).access
        with pytest.raises(ConfigError, match=rf"^access\.{key}: "):
            Gate(access)
    access = configuration.parse(
        {"access": {key: "-----BEGIN RSA PRIVATE KEY----- hunter2"}}
    ).access
    with pytest.raises(ConfigError) as caught:
        Gate(access)
    assert "hunter2" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jwt", None)
    with pytest.raises(WalstreamError, match="the module jwt is not installed") as caught:
        Gate(configuration.parse({"access": {"secret": SECRET}}).access)
    assert caught.value.hint == 'pip install "walstream[http]"'
    Gate(configuration.parse({}).access)  # which needs none


# ---- What is shown

EVERYTHING: Final = f"""
[access]
secret = "{SECRET}"
audience = "web"
anonymous_role = "guest"
[access.roles.viewer]
status = true
tables = [
    {{ table = "public.messages", where = "user_id=eq.{{claims.sub}}" }},
    {{ table = "public.users", columns = {{ exclude = ["ssn"], mask = {{ email = "redact" }} }} }},
]
[access.roles.guest]
"""


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_secret_is_not_shown_and_the_rest_can_be_read_again(folder: Path) -> None:
    (folder / "walstream.toml").write_text(EVERYTHING)
    text = shown("show")
    assert 'secret = "***"  # walstream.toml' in text.splitlines()
    assert SECRET not in text + shown("show", "--json")
    again = configuration.parse(tomllib.loads(text.replace('"***"', f'"{SECRET}"')))
    assert again == configuration.load()


# ---- walstream access token


def token(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["access", "token", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.strip()


async def admitted(text: str) -> Any:
    return await Gate(configuration.load().access).admit(text)


def test_a_token_is_made_that_is_let_in(folder: Path) -> None:
    import asyncio  # noqa: PLC0415

    (folder / "walstream.toml").write_text(
        EVERYTHING.replace("[access]", '[access]\nrole_claim = "app.role"\nissuer = "us"')
    )
    made = token(
        *("--role", "viewer", "--claim", "sub=a=b", "--claim", 'app.teams:=["x"]'),
        *("--expires", "2d"),
    )
    reader = asyncio.run(admitted(made))
    assert reader.claims["sub"] == "a=b"
    assert reader.claims["app"] == {"teams": ["x"], "role": "viewer"}
    assert reader.claims["exp"] - reader.claims["iat"] == 2 * 86400
    sight = reader.sight(layout("messages"))
    assert str(sight.where) == "user_id=eq.a=b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--role", "nobody"), "there is no role 'nobody'"),
        (("--role", "viewer"), "would be refused: the claim sub is missing"),
        (("--role", "viewer", "--claim", "sub"), "--claim: found 'sub'"),
        (("--role", "viewer", "--claim", "sub:=abc"), "is not JSON"),
        (("--role", "viewer", "--claim", "a..b=abc"), "--claim: found 'a..b'"),
        (("--role", "viewer", "--claim", "sub=a", "--claim", "sub.b=c"), "sub is a value"),
        (("--role", "viewer", "--claim", "sub=a", "--expires", "soon"), "--expires: found 'soon'"),
        (("--role", "viewer", "--claim", "sub=a", "--expires", "0s"), "--expires: found '0s'"),
        (("--role", "viewer", "--claim", "sub=a", "--claim", "exp:=1"), "has expired"),
    ],
)
def test_a_token_that_would_be_refused_is_not_made(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    (folder / "walstream.toml").write_text(EVERYTHING)
    with pytest.raises(UsageError) as caught:
        token(*arguments)
    assert said in caught.value.message
    assert caught.value.hint or "sub is a value" in said or "a..b" in said


def test_without_a_secret_no_token_can_be_made(folder: Path) -> None:
    (folder / "walstream.toml").write_text('access.jwks_url = "https://id.example.org/keys"')
    with pytest.raises(UsageError, match="no secret to sign with"):
        token("--role", "viewer")


# ---- walstream check


def live(database: Database, access: Mapping[str, Any], **others: Any) -> Config:
    return configuration.parse(
        {
            "postgres": {"dsn": database.dsn},
            "slot": SLOT,
            "http": {"listen": "127.0.0.1:8432"},
            "routes": [{"table": "public.*", "to": "web"}],
            "sinks": {"web": {"type": "live"}},
            "access": access,
            **others,
        }
    )


async def of_access(config: Config) -> list[Finding]:
    return [found for found in (await check(config)).findings if found.group == "access"]


async def of_a_table(database: Database, *, routes: Any = None, **table: Any) -> list[Finding]:
    access = {"secret": SECRET, "roles": {"viewer": {"tables": [table]}}}
    others = {} if routes is None else {"routes": routes}
    tokens, *found = await of_access(live(database, access, **others))
    assert (tokens.name, tokens.status, tokens.found) == ("tokens", Status.OK, "secret: HS256")
    assert {one.name for one in found} == {f"viewer: {table['table']}"}
    return found


@pytest.fixture
def messages(database: Database) -> Database:
    database.execute(
        "CREATE TABLE messages (id int PRIMARY KEY, user_id uuid, content text);"
        "CREATE TABLE users (id int PRIMARY KEY, team text, doc json)"
    )
    return database


async def test_a_role_whose_tables_come_is_fine(messages: Database) -> None:
    messages.execute("ALTER TABLE messages REPLICA IDENTITY FULL")
    [found] = await of_a_table(messages, table="public.messages", where="user_id=eq.{claims.sub}")
    assert (found.status, found.found) == (Status.OK, "the table is there, rows by sub")
    [found] = await of_a_table(messages, table="public.messages", where="id=gt.5")
    assert found.found == "the table is there, some rows"
    [found] = await of_a_table(messages, table="public.*")
    assert (found.status, found.found) == (Status.OK, "2 tables, all rows")


async def test_what_old_rows_do_not_carry_is_told_and_mended(messages: Database) -> None:
    table = {"table": "public.messages", "where": "id=gt.1,user_id=eq.{claims.sub}"}
    [found] = await of_a_table(messages, **table)
    assert found.status is Status.WARNING
    assert found.found.startswith("of an old row only id is sent, and the condition reads id, user")
    mend(messages, found)
    [found] = await of_a_table(messages, **table)
    assert found.status is Status.OK


async def test_where_the_key_is_enough_nothing_is_told(messages: Database) -> None:
    [found] = await of_a_table(messages, table="public.users", where="id=eq.{claims.user_id}")
    assert found.status is Status.OK
    messages.execute("ALTER TABLE users REPLICA IDENTITY NOTHING")
    [found] = await of_a_table(messages, table="public.users", where="id=eq.{claims.user_id}")
    assert found.mend == 'ALTER TABLE "public"."users" REPLICA IDENTITY DEFAULT;'
    mend(messages, found)
    [found] = await of_a_table(messages, table="public.users", where="id=eq.{claims.user_id}")
    assert found.status is Status.OK


@pytest.mark.parametrize(
    ("table", "status", "said"),
    [
        ({"table": "public.nothing"}, Status.WARNING, "there is no such table now"),
        ({"table": "shop.*"}, Status.WARNING, "there is no such table now"),
        (
            {"table": "public.users", "where": "tenant=eq.{claims.tenant}"},
            Status.PROBLEM,
            "there is no column 'tenant' of public.users",
        ),
        (
            {"table": "public.users", "columns": {"exclude": ["ssn"]}},
            Status.PROBLEM,
            "public.users has no column 'ssn'",
        ),
        (
            {"table": "public.users", "where": "doc=eq.{claims.doc}"},
            Status.PROBLEM,
            ": eq is not an operator for it",
        ),
        ({"table": "public.users", "where": "id=eq.five"}, Status.PROBLEM, "column id of type"),
        (
            {"table": "public.users", "columns": {"mask": {"team": "hash"}}},
            Status.PROBLEM,
            "columns: the mask hash of column 'team' needs a key",
        ),
        (
            {"table": "public.*", "where": "id=eq.1,content=eq.x"},
            Status.WARNING,
            "public.users: has no content: no row of it is seen",
        ),
        (
            {"table": "public.users", "routes": [{"table": "public.messages", "to": "web"}]},
            Status.WARNING,
            "no [[routes]] takes it to a sink of type live",
        ),
        (
            {
                "table": "public.users",
                "where": "id=eq.1,team=eq.{claims.team}",
                "routes": [
                    {"table": "public.users", "to": "web", "columns": {"exclude": ["team"]}}
                ],
            },
            Status.PROBLEM,
            "the route leaves out or masks team, which the condition reads: no row is seen",
        ),
    ],
)
async def test_what_a_role_would_not_see_is_told(
    messages: Database, table: dict[str, Any], status: Status, said: str
) -> None:
    found = await of_a_table(messages, **table)
    assert [one for one in found if one.status is status and said in one.found], found


async def test_the_partitions_of_a_table_are_looked_at(messages: Database) -> None:
    messages.execute(
        "CREATE TABLE events (id int, org text) PARTITION BY LIST (org);"
        "CREATE TABLE events_a PARTITION OF events FOR VALUES IN ('a');"
        "CREATE TABLE events_b PARTITION OF events FOR VALUES IN ('b');"
        "ALTER TABLE events_b REPLICA IDENTITY FULL"
    )
    [found] = await of_a_table(messages, table="public.events", where="org=eq.{claims.org}")
    assert found.found.startswith("public.events_a: of an old row only nothing is sent")


async def test_roles_without_any_key_let_nobody_in(messages: Database) -> None:
    [tokens, _] = await of_access(
        live(messages, {"roles": {"viewer": {"tables": [{"table": "public.users"}]}}})
    )
    assert (tokens.status, "nobody is let in" in tokens.found) == (Status.WARNING, True)


async def test_who_has_no_token_on_a_network_is_told(messages: Database) -> None:
    access = {"anonymous_role": "guest", "roles": {"guest": {}}}
    [found] = await of_access(live(messages, access))
    assert (found.name, found.status) == ("anonymous", Status.OK)
    for address in ("0.0.0.0:8432", "[::]:8432", "walstream:8432"):
        [found] = await of_access(live(messages, access, http={"listen": address}))
        assert (found.name, found.status) == ("anonymous", Status.WARNING)


async def test_a_secret_that_is_too_short_is_a_problem(messages: Database, folder: Path) -> None:
    (folder / "secret").write_text("short")
    [found] = await of_access(live(messages, {"secret_file": "secret"}))
    assert (found.name, found.status) == ("tokens", Status.PROBLEM)
    assert "32 bytes or more" in found.found


async def test_a_public_key_is_read(messages: Database, folder: Path) -> None:
    (folder / "key.pem").write_bytes(pem(RSA_KEY))
    [found] = await of_access(live(messages, {"public_key_file": "key.pem"}))
    assert found.status is Status.OK
    (folder / "key.pem").write_bytes(b"")
    [found] = await of_access(live(messages, {"public_key_file": "key.pem"}))
    assert found.status is Status.PROBLEM


async def test_a_set_of_keys_is_fetched(messages: Database) -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - which is left out
    for keys, more, status, said in (
        ([RSA_KEY, EC_KEY], {"issuer": "us"}, Status.OK, "jwks_url: 2 keys, ES256, PS256, PS384"),
        ([EC_KEY], {"audience": "web"}, Status.OK, "jwks_url: one key, ES256"),
        ([EC_KEY], {}, Status.WARNING, "all tokens that are signed with its keys are taken"),
        ([weak], {"issuer": "us"}, Status.PROBLEM, "none of its 0 keys verifies tokens"),
        ([EC_KEY], {"algorithms": ["RS256"]}, Status.PROBLEM, "none of its 1 keys verifies"),
    ):
        text = json.dumps({"keys": [jwk(key, str(place)) for place, key in enumerate(keys)]})
        with serving(answering(200, text.encode())) as url:
            [found] = await of_access(live(messages, {"jwks_url": url, **more}))
        assert (found.status, said in found.found) == (status, True), found


async def test_a_provider_that_is_away_is_unreachable(messages: Database) -> None:
    [found] = await of_access(live(messages, {"jwks_url": "http://127.0.0.1:1/"}))
    assert (found.status, found.found) == (
        Status.UNREACHABLE,
        "jwks_url: 127.0.0.1: Connection refused",
    )
