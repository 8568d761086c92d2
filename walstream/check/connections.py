"""The connections: whether they come about, where they lead, and who stands in between."""

from __future__ import annotations

import ipaddress
import time
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from walstream.check.findings import Outcome, in_words, ok, problem, skipped, warning
from walstream.check.site import Link, Question, Site, Walsender
from walstream.connection import ReplicationConnection
from walstream.postgres import NO_POOLER

SKEW_SECONDS: Final = 1.0
"""How far clocks may differ; lag in seconds and signatures of webhooks are told by both."""

_TIMES: Final = 3
"""So often the clocks are compared; the quickest answer says most."""


async def _catalog(site: Site) -> Outcome:
    async with await site.connect(site.config.postgres.catalog_dsn()) as connection:
        site.links["catalog"] = link = await _link(connection)
        site.catalog_user = link.user
        return ok(_describe(link))


async def _replication(site: Site) -> Outcome:
    connection = await site.connect(site.config.postgres.streaming_dsn(), replication=True)
    link = await _link(connection)
    site.links["replication"] = link
    site.walsender = Walsender(
        ReplicationConnection(connection),
        connection,
        link.user,
        link.backend_pid,
        connection.info.server_version // 10_000,
    )
    return ok(_describe(link))


async def _link(connection: AsyncConnection[TupleRow]) -> Link:
    info = connection.info
    pid, started_at, in_recovery, gss = await _row(connection, _WHO)
    ahead, error = await _compare_clocks(connection)
    return Link(
        user=info.user,
        host=info.host if info.host.startswith("/") else f"{info.host}:{info.port}",
        address=info.hostaddr,
        database=info.dbname,
        is_encrypted=connection.pgconn.ssl_in_use or bool(gss),
        sslmode=info.get_parameters().get("sslmode", "prefer"),
        announced_pid=info.backend_pid,
        backend_pid=pid,
        started_at=started_at,
        in_recovery=in_recovery,
        ahead_seconds=ahead,
        error_seconds=error,
    )


async def _compare_clocks(connection: AsyncConnection[TupleRow]) -> tuple[float, float]:
    """Return how far the server's clock is ahead, and by how much that may be wrong."""
    answers = []
    for _ in range(_TIMES):
        asked = time.time()
        began = time.perf_counter()
        (theirs,) = await _row(connection, _CLOCK)
        half = (time.perf_counter() - began) / 2
        answers.append((half, theirs - (asked + half)))
    error, ahead = min(answers)
    return ahead, error


async def _row(connection: AsyncConnection[TupleRow], query: bytes) -> TupleRow:
    """Ask without parameters, which a walsender does not take."""
    cursor = await connection.execute(query)
    (row,) = await cursor.fetchall()
    return row


def _describe(link: Link) -> str:
    return f"database {link.database} as {link.user} {_way(link)}"


def _way(link: Link) -> str:
    if not link.address:
        return f"through the socket in {link.host}"
    return f"at {link.host} {'with' if link.is_encrypted else 'without'} TLS"


async def _tls(site: Site) -> Outcome:
    if not site.links:
        return skipped("there is no connection")
    exposed = [name for name, link in site.links.items() if is_exposed(link)]
    if exposed:
        return warning(
            f"{' and '.join(exposed)}: rows and passwords cross the network unencrypted",
            "-- let the server have ssl = on, and the dsn sslmode=verify-full and sslrootcert"
            " (sslmode=require encrypts, and does not ask whom it talks to)",
        )
    encrypted = [link for link in site.links.values() if link.is_encrypted]
    if not encrypted:
        return ok("nothing leaves this machine")
    if any(link.sslmode not in {"verify-ca", "verify-full"} for link in encrypted):
        return ok("encrypted; the server's certificate is not verified (sslmode=verify-full does)")
    return ok("encrypted, and the server's certificate is verified")


def is_exposed(link: Link) -> bool:
    """Whether what goes through a connection can be read on the way."""
    if link.is_encrypted or not link.address:
        return False
    return not ipaddress.ip_address(link.address.partition("%")[0]).is_loopback


async def _pooler(site: Site) -> Outcome:
    catalog, replication = site.links.get("catalog"), site.links.get("replication")
    if replication is not None and replication.is_pooled:
        return warning(
            "replication goes through a pooler: whenever it restarts, the stream is cut",
            *in_words(_OWN_ADDRESS),
        )
    if catalog is None:
        return skipped("there is no connection to the catalog")
    if not catalog.is_pooled:
        return ok("none")
    if replication is not None:
        return ok("queries go through one, replication does not: as it should be")
    if site.config.postgres.streaming_dsn() == site.config.postgres.catalog_dsn():
        return problem(
            f"{catalog.host} is a pooler such as PgBouncer, which cannot carry replication",
            *in_words(NO_POOLER),
        )
    return ok("queries go through one, which is fine")


_OWN_ADDRESS: Final = "give the server's own address as replication_dsn under [postgres]"


async def _same_server(site: Site) -> Outcome:
    """Ask both connections where they lead: another database's catalog describes other tables."""
    streamed = await site.replication.identify_system()
    ((systemid, database),) = await site.catalog.rows(_IDENTITY)
    if streamed.systemid != systemid:
        return problem(
            "dsn and replication_dsn lead to two different clusters",
            "-- let both lead to the same server",
        )
    if streamed.database != database:
        return problem(
            f"dsn leads to the database {database}, replication_dsn to {streamed.database}",
            "-- let both name the same database",
        )
    catalog, replication = site.links["catalog"], site.links["replication"]
    if catalog.started_at != replication.started_at:
        return problem(
            f"dsn leads to {_role(catalog)}, replication_dsn to {_role(replication)}, another"
            " server of the same cluster",
            "-- let both lead to the same server; with several hosts in them, add"
            " target_session_attrs=read-write",
        )
    return ok(f"both connections lead to {database} of the cluster {systemid}")


def _role(link: Link) -> str:
    return "a standby" if link.in_recovery else "a primary"


async def _several_hosts(site: Site) -> Outcome | None:
    """Look at a list of hosts: libpq takes the first that answers, a standby too."""
    for dsn in (site.config.postgres.catalog_dsn(), site.config.postgres.streaming_dsn()):
        given = conninfo_to_dict(dsn)
        if "," in str(given.get("host", "")) and "target_session_attrs" not in given:
            return warning(
                "the dsn names several hosts, and the first that answers is taken, be it a standby",
                "-- add target_session_attrs=read-write to it",
            )
    return None


async def _clock(site: Site) -> Outcome:
    link = min(site.links.values(), key=lambda link: link.error_seconds)
    ahead = link.ahead_seconds
    if abs(ahead) - link.error_seconds <= SKEW_SECONDS:
        return ok(f"as the server's, within {abs(ahead) + link.error_seconds:.3f} s")
    side = "behind" if ahead > 0 else "ahead of"
    return warning(
        f"{abs(ahead):.1f} s {side} the server's: lag in seconds is wrong by as much",
        "-- let NTP set both clocks (timedatectl set-ntp true), here and on the server",
    )


QUESTIONS: Final = (
    Question("connection", "catalog", _catalog),
    Question("connection", "replication", _replication),
    Question("connection", "TLS", _tls),
    Question("connection", "pooler", _pooler),
    Question("connection", "hosts", _several_hosts),
    Question("connection", "same database", _same_server, ("catalog", "replication")),
    Question("connection", "clock", _clock, ("catalog",)),
)

_WHO: Final = b"""
    SELECT pg_backend_pid(), pg_postmaster_start_time()::text, pg_is_in_recovery(),
           (SELECT encrypted FROM pg_stat_gssapi WHERE pid = pg_backend_pid())
"""

_CLOCK: Final = b"SELECT extract(epoch FROM clock_timestamp())::float8"

_IDENTITY: Final = sql.SQL(
    "SELECT system_identifier::text, current_database() FROM pg_control_system()"
)
