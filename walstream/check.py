"""``walstream check``: everything that could go wrong, each with what mends it.

Each check answers for itself: one that finds a problem, or cannot be asked because a connection is
missing, does not keep the others from being asked. Nothing is left behind on the server: all that is
ever made there, to see whether it has wal2json and allows it, is a temporary slot.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final, Literal, TypeAlias

import msgspec
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from walstream.catalog import Catalog, Table
from walstream.changes import Operation, Relation
from walstream.config import Config, RouteSpec
from walstream.connection import ReplicationConnection
from walstream.decoder import START_OPTIONS
from walstream.errors import (
    EX_CONFIG,
    EX_OK,
    EX_TEMPFAIL,
    PluginMissing,
    PluginRefused,
    PluginTooOld,
    SlotBusy,
    SlotCreationBlocked,
    SlotLost,
    SlotMissing,
    SlotUnfit,
    Unavailable,
    WalstreamError,
)
from walstream.filters import And, Comparison, Filter, Not, Or, columns
from walstream.postgres import RAISE_WAL_LEVEL, connect, python_encoding, server_error
from walstream.preflight import OLDEST_VERSION, verify_route
from walstream.router import Route, TablePattern
from walstream.slots import PLUGIN, create_slot, slot_status, usable_slot

PROBE_WAIT_SECONDS: Final = 2
"""How long the temporary slot waits for running transactions before that is what is reported."""

FINISH_SECONDS: Final = 5.0

OLDEST_DECODING_STANDBY: Final = 160_000
"""Standbys decode since PostgreSQL 16."""


class Status(StrEnum):
    """What a check comes to. ``unreachable`` may mend itself, a ``problem`` does not."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    UNREACHABLE = "unreachable"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report; ``mend`` is SQL, a command, or what to do, one a line."""

    group: str
    name: str
    status: Status
    found: str
    mend: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings, in the order in which they are best read."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The gravest of all."""
        found = {finding.status for finding in self.findings} - {Status.SKIPPED}
        return max(found, key=list(Status).index, default=Status.OK)

    @property
    def exit_code(self) -> int:
        """What the command exits with: warnings are allowed."""
        match self.status:
            case Status.PROBLEM:
                return EX_CONFIG
            case Status.UNREACHABLE:
                return EX_TEMPFAIL
            case _:
                return EX_OK

    def to_json(self) -> bytes:
        """Return the report as one JSON object."""
        return msgspec.json.encode({"status": self.status, "findings": self.findings})


async def check(config: Config, routes: Sequence[tuple[str, RouteSpec]]) -> Report:
    """Look at the server, the slot and the routes.

    Args:
        config: what `Daemon` would run with.
        routes: all that would be routed, each with the name that it is reported by.

    Raises:
        ConfigError: a file that a secret is in cannot be read.
    """
    site = _Site(config)
    try:
        findings = [await _ask(site, question) for question in _QUESTIONS]
        findings += await _routes(site, routes)
    finally:
        await site.close()
    return Report(tuple(findings))


class _Site:
    """What the checks look at: the configuration, and the connections as far as they came about."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.masking_key = config.masking.secret()
        self.catalog = Catalog(
            config.postgres.catalog_dsn(), application_name=self.application_name
        )
        self.catalog_info: psycopg.ConnectionInfo | None = None
        self.replication: ReplicationConnection | None = None
        self.replication_info: psycopg.ConnectionInfo | None = None
        self.probe_slot = ""

    @property
    def application_name(self) -> str:
        return f"{self.config.postgres.application_name} check"[:63]

    def lacks(self, needs: Iterable[_Need]) -> str:
        """Say what a check would need and is not there; nothing when all is."""
        missing = {
            "catalog": not self.catalog_info and "there is no connection to the catalog",
            "replication": not self.replication and "there is no replication connection",
            "probe": not self.probe_slot and "no slot could be created",
        }
        return next((reason for need in needs if (reason := missing[need])), "")

    async def close(self) -> None:
        if self.replication is not None:
            await self.replication.close()
        await self.catalog.close()


_Need: TypeAlias = Literal["catalog", "replication", "probe"]


class _Outcome(msgspec.Struct, frozen=True):
    status: Status
    found: str
    mend: str = ""


class _Question(msgspec.Struct, frozen=True):
    """One check; it is skipped unless what it ``needs`` is there."""

    group: str
    name: str
    ask: Callable[[_Site], Awaitable[_Outcome]]
    needs: tuple[_Need, ...]


def _ok(found: str) -> _Outcome:
    return _Outcome(Status.OK, found)


def _skipped(reason: str) -> _Outcome:
    return _Outcome(Status.SKIPPED, reason)


def _warning(found: str, mend: str = "") -> _Outcome:
    return _Outcome(Status.WARNING, found, mend)


def _problem(found: str, mend: str = "") -> _Outcome:
    return _Outcome(Status.PROBLEM, found, mend)


def _failed(error: WalstreamError) -> _Outcome:
    status = Status.UNREACHABLE if isinstance(error, Unavailable) else Status.PROBLEM
    return _Outcome(status, error.message, error.hint)


async def _ask(site: _Site, question: _Question) -> Finding:
    reason = site.lacks(question.needs)
    outcome = _skipped(reason) if reason else await _answer(question.ask(site))
    return _finding(question.group, question.name, outcome)


async def _answer(asked: Awaitable[_Outcome]) -> _Outcome:
    try:
        return await asked
    except psycopg.Error as error:
        return _failed(server_error(error))
    except WalstreamError as error:
        return _failed(error)


def _finding(group: str, name: str, outcome: _Outcome) -> Finding:
    return Finding(group, name, outcome.status, outcome.found, outcome.mend)


# ---- Connections


async def _catalog_connection(site: _Site) -> _Outcome:
    dsn = site.config.postgres.catalog_dsn()
    async with await connect(dsn, application_name=site.application_name) as connection:
        site.catalog_info = connection.info
        return _ok(_describe(connection))


async def _replication_connection(site: _Site) -> _Outcome:
    dsn = site.config.postgres.streaming_dsn()
    connection = await connect(dsn, application_name=site.application_name, replication=True)
    site.replication = ReplicationConnection(connection)
    site.replication_info = connection.info
    return _ok(_describe(connection))


def _describe(connection: psycopg.AsyncConnection[psycopg.rows.TupleRow]) -> str:
    info = connection.info
    if info.host.startswith("/"):
        way = f"through the socket in {info.host}"
    else:
        tls = "with TLS" if connection.pgconn.ssl_in_use else "without TLS"
        way = f"at {info.host}:{info.port}, {tls}"
    return f"database {info.dbname} as {info.user} {way}"


async def _same_database(site: _Site) -> _Outcome:
    """A catalog of another database would describe the wrong tables."""
    assert site.replication is not None  # noqa: S101 - asked for in _QUESTIONS
    streamed = await site.replication.identify_system()
    ((systemid, database),) = await site.catalog.rows(_IDENTITY)
    if streamed.systemid != systemid:
        return _problem(
            "dsn and replication_dsn lead to two different clusters",
            "let both lead to the same server",
        )
    if streamed.database != database:
        return _problem(
            f"dsn leads to the database {database}, replication_dsn to {streamed.database}",
            "let both name the same database",
        )
    return _ok(f"database {database} of cluster {systemid}")


# ---- The server


async def _version(site: _Site) -> _Outcome:
    server = await site.catalog.server()
    named = f"PostgreSQL {server.version // 10_000}.{server.version % 10_000}"
    if server.version < OLDEST_VERSION:
        return _problem(f"{named}; walstream needs 14 or later", "upgrade the server")
    if not server.in_recovery:
        return _ok(named)
    if server.version < OLDEST_DECODING_STANDBY:
        return _problem(
            f"{named}, a standby: standbys decode since PostgreSQL 16", "stream from the primary"
        )
    return _ok(f"{named}, a standby")


async def _wal_level(site: _Site) -> _Outcome:
    level = (await site.catalog.server()).wal_level
    return _ok(level) if level == "logical" else _problem(level, RAISE_WAL_LEVEL)


async def _encoding(site: _Site) -> _Outcome:
    encoding = (await site.catalog.server()).encoding
    python_encoding(encoding)
    return _ok(encoding)


async def _kept_wal(site: _Site) -> _Outcome:
    ((size,),) = await site.catalog.rows(_KEPT_WAL)
    if size != "-1":
        return _ok(f"{size}: a slot that falls further behind is lost")
    return _warning(
        "-1: nothing bounds the WAL that slots retain, one that nobody reads fills the disk",
        "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';\nSELECT pg_reload_conf();",
    )


async def _free_slots(site: _Site) -> _Outcome:
    ((most, used, exists),) = await site.catalog.rows(
        _SLOTS_IN_USE, {"name": site.config.slot.name}
    )
    return _room("max_replication_slots", most, used, is_needed=not exists)


async def _free_walsenders(site: _Site) -> _Outcome:
    own = site.replication_info.backend_pid if site.replication_info else 0
    ((most, used, streaming),) = await site.catalog.rows(
        _WALSENDERS_IN_USE, {"name": site.config.slot.name, "own": own}
    )
    return _room("max_wal_senders", most, used, is_needed=not streaming)


def _room(setting: str, most: int, used: int, *, is_needed: bool) -> _Outcome:
    """Judge what is left; ``is_needed`` says that walstream still has to get one of them."""
    found = f"{used} of {most} in use"
    more = f"ALTER SYSTEM SET {setting} = {most + 10};\n-- then restart the server"
    free = most - used
    if free <= 0 and is_needed:
        return _problem(f"{found}, none is left for walstream", more)
    if free <= 1:
        return _warning(f"{found}, {'one is' if free == 1 else 'none is'} left", more)
    return _ok(found)


# ---- The role and the output plugin


async def _role(site: _Site) -> _Outcome:
    name = _role_name(site)
    rows = await site.catalog.rows(_ROLE, {"name": name})
    if not rows:
        return _skipped(f"the catalog does not know {name}")
    ((is_superuser, may_replicate),) = rows
    if is_superuser:
        return _ok(f"{name} is a superuser; LOGIN and REPLICATION would be enough")
    if may_replicate:
        return _ok(f"{name} has REPLICATION")
    if site.replication is not None:  # hosted servers have ways of their own
        return _ok(f"{name} is let in for replication")
    return _problem(f"{name} lacks REPLICATION", f"ALTER ROLE {_quoted(name)} REPLICATION;")


def _role_name(site: _Site) -> str:
    """Whom replication connects as, or would if it were let in."""
    if site.replication_info is not None:
        return site.replication_info.user
    assert site.catalog_info is not None  # noqa: S101 - asked for in _QUESTIONS
    named = conninfo_to_dict(site.config.postgres.streaming_dsn()).get("user")
    return str(named or site.catalog_info.user)


async def _plugin_allowed(site: _Site) -> _Outcome:
    rows = await site.catalog.rows(_PLUGIN_LIBRARIES)
    if not rows:
        return _ok("this server does not restrict output plugins")
    setting = rows[0][0]
    libraries = [name.strip(' "') for name in setting.split(",") if name.strip()]
    if PLUGIN in libraries:
        return _ok(f"output_plugin_libraries is {setting}")
    # SET replaces the list: keep what is in it.
    listed = ", ".join(sql.Literal(name).as_string() for name in [*libraries, PLUGIN])
    return _problem(
        f"output_plugin_libraries is {setting or 'empty'}, without {PLUGIN}",
        f"ALTER SYSTEM SET output_plugin_libraries = {listed};\nSELECT pg_reload_conf();",
    )


async def _plugin_installed(site: _Site) -> _Outcome:
    """Ask by making a slot: the server has no catalog of output plugins."""
    try:
        await _make_probe(site)
    except PluginMissing as missing:
        return _problem(missing.message, f"{_install(site)}\n{missing.hint}")
    except PluginRefused as refused:
        return _problem(refused.message, refused.hint)
    except SlotCreationBlocked as blocked:
        return _warning(blocked.message, blocked.hint)
    except WalstreamError as error:
        return _skipped(f"cannot be tried: {error.message}")
    return _ok("the server creates slots for it")


async def _plugin_version(site: _Site) -> _Outcome:
    """Ask by starting a stream with what each version has brought: none of them tells its number."""
    try:
        await _start_probe(site, {**START_OPTIONS, "numeric-data-types-as-string": "1"})
    except PluginTooOld:
        await _make_probe(site)  # an error ends a session's temporary slots
    else:
        return _ok("2.6 or later")
    try:
        await _start_probe(site, START_OPTIONS)
    except PluginTooOld as too_old:
        return _problem(too_old.message, too_old.hint)
    return _warning(
        "before 2.6: NaN and infinity in float and numeric columns arrive as null",
        "install wal2json 2.6 or later on the server; no restart is needed",
    )


async def _make_probe(site: _Site) -> None:
    assert site.replication is not None  # noqa: S101 - asked for in _QUESTIONS
    name = f"walstream_check_{secrets.token_hex(8)}"
    await create_slot(
        site.replication, site.catalog, name, temporary=True, wait_seconds=PROBE_WAIT_SECONDS
    )
    site.probe_slot = name


async def _start_probe(site: _Site, options: dict[str, str]) -> None:
    """Start to stream and stop at once; the connection is of no further use after that."""
    assert site.replication is not None  # noqa: S101 - asked for in _QUESTIONS
    await site.replication.start(site.probe_slot, options)
    try:
        async with asyncio.timeout(FINISH_SECONDS):
            await site.replication.finish()
    except (TimeoutError, WalstreamError):
        pass  # it started, and that was the question


def _install(site: _Site) -> str:
    assert site.replication_info is not None  # noqa: S101 - asked for in _QUESTIONS
    return f"apt-get install postgresql-{site.replication_info.server_version // 10_000}-wal2json"


# ---- The slot


async def _slot(site: _Site) -> _Outcome:
    name = site.config.slot.name
    try:
        await usable_slot(site.catalog, name)
    except SlotMissing as missing:
        if site.config.slot.create:
            return _ok(f"{name} does not exist yet, the first start creates it")
        return _problem(missing.message, _create(name))
    except SlotUnfit as unfit:
        return _problem(unfit.message, unfit.hint)
    except SlotLost as lost:
        drop = f"SELECT pg_drop_replication_slot({_literal(name)});"
        return _problem(lost.message, f"{drop}\n{_create(name)}")
    except SlotBusy:
        holder = (await slot_status(site.catalog, name)).holder
        return _ok(f"{name} is in use by {holder}")
    return _ok(f"{name} is there, nobody streams from it")


async def _slot_position(site: _Site) -> _Outcome:
    """A position beyond the server's own is stored without a word; nothing before it is ever sent."""
    name = site.config.slot.name
    try:
        status = await slot_status(site.catalog, name)
    except SlotMissing:
        return _skipped("there is no slot")
    if status.lag_bytes is not None and status.lag_bytes < 0:
        return _problem(
            f"the slot {name} stands at {status.confirmed_flush_lsn}, beyond the server's own"
            " position: until that is reached no change is sent",
            f"SELECT pg_drop_replication_slot({_literal(name)});\n{_create(name)}",
        )
    return _ok(f"{status.confirmed_flush_lsn}, {_size(status.lag_bytes)} behind the server")


async def _slot_wal(site: _Site) -> _Outcome:
    name = site.config.slot.name
    try:
        status = await slot_status(site.catalog, name)
    except SlotMissing:
        return _skipped("there is no slot")
    found = f"{_size(status.retained_wal_bytes)}, wal_status {status.wal_status}"
    match status.wal_status:
        case "unreserved":
            return _warning(f"{found}: the slot is about to be lost", "start walstream now")
        case "extended":
            return _warning(
                f"{found}: more than max_wal_size is kept for the slots", "start walstream"
            )
        case "lost":
            return _problem(found)
        case _:
            return _ok(found)


def _create(name: str) -> str:
    return f"SELECT pg_create_logical_replication_slot({_literal(name)}, '{PLUGIN}');"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "an unknown distance"
    scaled = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if scaled < 1024:  # noqa: PLR2004 - binary units, named as Postgres names them
            return f"{scaled:.0f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} GB"


_QUESTIONS: Final = (
    _Question("connection", "catalog", _catalog_connection, ()),
    _Question("connection", "replication", _replication_connection, ()),
    _Question("connection", "same database", _same_database, ("catalog", "replication")),
    _Question("server", "version", _version, ("catalog",)),
    _Question("server", "wal_level", _wal_level, ("catalog",)),
    _Question("server", "encoding", _encoding, ("catalog",)),
    _Question("server", "max_slot_wal_keep_size", _kept_wal, ("catalog",)),
    _Question("server", "replication slots", _free_slots, ("catalog",)),
    _Question("server", "walsenders", _free_walsenders, ("catalog",)),
    _Question("role", "replication", _role, ("catalog",)),
    _Question("wal2json", "allowed", _plugin_allowed, ("catalog",)),
    _Question("wal2json", "installed", _plugin_installed, ("replication",)),
    _Question("wal2json", "version", _plugin_version, ("replication", "probe")),
    _Question("slot", "state", _slot, ("catalog",)),
    _Question("slot", "position", _slot_position, ("catalog",)),
    _Question("slot", "retained WAL", _slot_wal, ("catalog",)),
)


# ---- The routes


async def _routes(site: _Site, specs: Sequence[tuple[str, RouteSpec]]) -> list[Finding]:
    if not specs:
        nothing = _warning(
            "nothing is routed anywhere",
            "attach a handler (walstream check module:name), or write a [[routes]]",
        )
        return [_finding("routes", "routes", nothing)]
    return [
        _finding("routes", f"{name}: {spec.table}", outcome)
        for name, spec in specs
        for outcome in await _route(site, name, spec)
    ]


async def _route(site: _Site, name: str, spec: RouteSpec) -> list[_Outcome]:
    reason = site.lacks(("catalog",))
    if reason:
        return [_skipped(reason)]
    try:
        route = spec.route(name, None, site.masking_key)
        await verify_route(site.catalog, route)
        tables = await _covered(site.catalog, route.pattern)
    except psycopg.Error as error:
        return [_failed(server_error(error))]
    except WalstreamError as error:
        return [_failed(error)]
    return _judge(tables, route, frozenset(spec.columns.mask))


async def _covered(catalog: Catalog, pattern: TablePattern) -> list[Table]:
    """List what a pattern covers; in place of partitioned tables their partitions, which hold rows."""
    relations = (
        [pattern.relation]
        if pattern.relation is not None
        else await catalog.tables(pattern.schema, pattern.name)
    )
    found: dict[Relation, Table] = {}
    for relation in relations:
        table = await catalog.table(relation)
        if table is not None and table.is_partitioned:
            for partition in await _partitions(catalog, relation):
                leaf = await catalog.table(partition)
                found |= {partition: leaf} if leaf is not None else {}
        elif table is not None:
            found[relation] = table
    return list(found.values())


async def _partitions(catalog: Catalog, root: Relation) -> list[Relation]:
    rows = await catalog.rows(_PARTITIONS, {"schema": root.schema, "name": root.name})
    return [Relation(*row) for row in rows]


class _Concern(msgspec.Struct, frozen=True):
    """What is wrong with a table for a route; ``clause`` is the ALTER TABLE that mends it."""

    status: Status
    text: str
    clause: str = ""


def _judge(tables: Sequence[Table], route: Route, masked: frozenset[str]) -> list[_Outcome]:
    """Tell each concern once, with all tables that have it."""
    if not tables:
        return [_warning("there is no such table or partition now, nothing will come")]
    concerned: dict[_Concern, list[Table]] = {}
    for table in tables:
        for concern in _concerns(table, route, masked):
            concerned.setdefault(concern, []).append(table)
    if not concerned:
        return [_ok(_summed(tables))]
    return [
        _Outcome(
            concern.status,
            f"{_named(having)}: {concern.text}",
            "\n".join(_alter(table, concern.clause) for table in having if concern.clause),
        )
        for concern, having in concerned.items()
    ]


_IDENTITIES: Final = {"d": "default", "f": "full", "i": "using index", "n": "nothing"}

_KINDS: Final = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}

_SHOWN: Final = 3


def _summed(tables: Sequence[Table]) -> str:
    identities = sorted({_IDENTITIES[table.replica_identity] for table in tables})
    count = f"{len(tables)} tables, " if len(tables) > 1 else ""
    return f"{count}replica identity {' and '.join(identities)}"


def _named(tables: Sequence[Table]) -> str:
    names = ", ".join(str(table.relation) for table in tables[:_SHOWN])
    rest = len(tables) - _SHOWN
    return f"{names} and {rest} more" if rest > 0 else names


def _alter(table: Table, clause: str) -> str:
    return f"ALTER TABLE {_quoted(table.relation.schema, table.relation.name)} {clause};"


_FULL: Final = "REPLICA IDENTITY FULL"


def _concerns(table: Table, route: Route, masked: frozenset[str]) -> Iterator[_Concern]:
    if table.kind != "r":
        kind = _KINDS.get(table.kind, "not a table")
        yield _Concern(Status.PROBLEM, f"is {kind}: no change is ever recorded of it")
        return
    match table.persistence:
        case "u":
            yield _Concern(
                Status.PROBLEM, "is unlogged: its changes never reach the WAL", "SET LOGGED"
            )
        case "t":
            yield _Concern(Status.PROBLEM, "is temporary: its changes never reach the WAL")
    identified = [
        operation
        for operation in (Operation.UPDATE, Operation.DELETE)
        if operation in route.operations
    ]
    if not identified:
        return
    if not table.identity:
        lost = " and ".join(f"{operation}s" for operation in identified)
        yield _Concern(
            Status.PROBLEM, f"{lost} are lost: there is no replica identity to send", _FULL
        )
        return
    if table.replica_identity != "f":
        yield from _partial_identity(table, route, masked)


def _partial_identity(table: Table, route: Route, masked: frozenset[str]) -> Iterator[_Concern]:
    """Look for columns that updates and deletes do not carry, and the route wants."""
    where = route.where
    carried = frozenset(table.identity)
    if where is not None and Operation.DELETE in route.operations:
        yield from _untestable(where, carried, "a delete carries")
    if Operation.UPDATE not in route.operations:
        return
    if where is not None and route.leaving:
        yield from _untestable(where, carried, "of the row before an update comes")
    long = {column.name for column in table.columns if column.toastable} - carried
    unsent = "an update that leaves a long value (2 kB and more) as it was does not carry it: "
    if where is not None and (read := long & columns(where)):
        text = f"{unsent}the filter on {_listed(read)} does not match then"
        yield _Concern(Status.WARNING, text, _FULL)
    if hidden := long & masked:
        text = f"{unsent}{_listed(hidden)} comes as unchanged then, not masked"
        yield _Concern(Status.WARNING, text, _FULL)


def _untestable(where: Filter, carried: frozenset[str], what: str) -> Iterator[_Concern]:
    absent = columns(where) - carried
    if not absent:
        return
    text = f"{what} only {_listed(carried)}, and the filter reads {_listed(absent)}: it "
    if _may_hold(where, carried):
        yield _Concern(Status.WARNING, f"{text}does not match where that decides", _FULL)
    else:
        yield _Concern(Status.PROBLEM, f"{text}never matches", _FULL)


def _may_hold(where: Filter, carried: frozenset[str], *, negated: bool = False) -> bool:
    """Whether a filter can be true, or when ``negated`` false, on the carried columns alone."""
    match where:
        case Comparison(column=column):
            return column in carried
        case Not(negated=inner):
            return _may_hold(inner, carried, negated=not negated)
        case And(parts):
            combine = any if negated else all
        case Or(parts):
            combine = all if negated else any
    return combine(_may_hold(part, carried, negated=negated) for part in parts)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _quoted(*names: str) -> str:
    return sql.Identifier(*names).as_string()


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


# ---- What the server is asked

_IDENTITY: Final = sql.SQL(
    "SELECT system_identifier::text, current_database() FROM pg_control_system()"
)

_KEPT_WAL: Final = sql.SQL("SELECT current_setting('max_slot_wal_keep_size')")

_SLOTS_IN_USE: Final = sql.SQL(
    """
    SELECT current_setting('max_replication_slots')::int,
           count(*),
           coalesce(bool_or(slot_name = %(name)s), false)
      FROM pg_replication_slots
    """
)

_WALSENDERS_IN_USE: Final = sql.SQL(
    """
    SELECT current_setting('max_wal_senders')::int,
           (SELECT count(*) FROM pg_stat_get_wal_senders() WHERE pid <> %(own)s),
           EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %(name)s AND active)
    """
)

_ROLE: Final = sql.SQL("SELECT rolsuper, rolreplication FROM pg_roles WHERE rolname = %(name)s")

_PLUGIN_LIBRARIES: Final = sql.SQL(
    "SELECT setting FROM pg_settings WHERE name = 'output_plugin_libraries'"
)

_PARTITIONS: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_partition_tree(format('%%I.%%I', %(schema)s::text, %(name)s::text)::regclass) AS t
      JOIN pg_class c ON c.oid = t.relid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE t.isleaf
     ORDER BY 1, 2
    """
)
