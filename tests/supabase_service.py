"""walstream as a process, for the clients of Supabase: roles, tokens, tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from tests.command_line import CommandLine, slot_name
from tests.live_service import live_service
from tests.postgres import Database, create_database, drop_database
from tests.proxy import Proxy
from tests.tokens import signed

SECRET: Final = "a secret that only the service and the tests know"  # noqa: S105 - of nobody

ACCESS: Final = f"""
[access]
secret = "{SECRET}"
leeway_seconds = 0
[access.roles.anon]
tables = [{{ table = "hidden.*", columns = {{ include = ["id"] }} }}, {{ table = "*.*" }}]
[access.roles.authenticated]
tables = [{{ table = "*.*", where = "owner=eq.{{claims.sub}}" }}]
[access.roles.nobody]
"""

REALTIME: Final = """
[realtime]
enabled = true
refusal_seconds = 0
%s
[[realtime.private]]
topic = "team:*"
read = ["authenticated"]
write = ["authenticated"]
"""


def token(role: str = "anon", *, seconds: float = 3600, **claims: Any) -> str:
    """Sign a token that expires so soon."""
    return signed(SECRET, role, seconds=seconds, **claims)


class SupabaseService:
    """A running process, its database, and a proxy in front of it, so that it may move."""

    def __init__(self, database: Database, proxy: Proxy) -> None:
        self.database = database
        self.proxy = proxy
        self.url = f"http://127.0.0.1:{proxy.port}"
        self.key = token()
        self._numbers = itertools.count(1)

    def table(self, columns: str, *, identity: str = "DEFAULT", schema: str = "public") -> str:
        """Make a table of its own for a test, and return its name."""
        name = f"table{next(self._numbers)}"
        self.database.execute(f"CREATE TABLE {schema}.{name} ({columns})")
        self.database.execute(f"ALTER TABLE {schema}.{name} REPLICA IDENTITY {identity}")
        return name

    def topic(self) -> str:
        """Return a name for a channel that no other test uses."""
        return f"room{next(self._numbers)}"

    def execute(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.database.execute(query, *parameters)


@contextmanager
def supabase_service(
    folder: Path,
    database: Database,
    proxy: Proxy,
    *,
    slot: str = "",
    limits: str = "",
    more: str = "",
    origin: str = "",
) -> Iterator[SupabaseService]:
    """Run walstream, and lead the proxy to it.

    Args:
        folder: where.
        database: whose changes.
        proxy: clients come through it, wherever walstream listens.
        slot: its name; a new one by default.
        limits: further keys of the section [realtime].
        more: further sections of the configuration.
        origin: of the pages that may connect.
    """
    line = CommandLine(folder)
    if origin:
        line.environment["WALSTREAM_HTTP_CORS_ORIGINS"] = json.dumps([origin])
    config = f"{ACCESS}{REALTIME % limits}{more}"
    with live_service(line, database.dsn, slot or slot_name(), more=config) as service:
        url = httpx.URL(service.url)
        proxy.lead_to(f"host={url.host} port={url.port}")
        yield SupabaseService(database, proxy)


@contextmanager
def module_service(
    folder: Path, server_dsn: str, template: str, *, origin: str = ""
) -> Iterator[SupabaseService]:
    """Run walstream over a database for all tests of a module together."""
    with (
        create_database(server_dsn, template) as database,
        Proxy("host=127.0.0.1 port=1", is_postgres=False) as proxy,
        supabase_service(folder, database, proxy, origin=origin) as service,
    ):
        yield service
    drop_database(server_dsn, database.name)
