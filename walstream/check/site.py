"""What checks look at, and how a question is asked so that its failure is only its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec
import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from walstream.assembly import Attached, make_router
from walstream.catalog import Catalog, Query
from walstream.check.findings import Finding, Outcome, failed, problem, skipped, unreachable
from walstream.config import Config
from walstream.connection import ReplicationConnection
from walstream.errors import ConfigError, ConnectionLost, UsageError, WalstreamError
from walstream.postgres import connect, cut, server_error
from walstream.router import Router

Need: TypeAlias = Literal["catalog", "replication", "probe", "slot"]

_NO_SLOT: Final = "there is no slot"
"""Said already where the slot itself is asked for."""

_LACKING: Final[dict[Need, str]] = {
    "catalog": "there is no connection to the catalog",
    "replication": "there is no replication connection",
    "probe": "no slot could be made to ask with",
    "slot": _NO_SLOT,
}

QUERY_SECONDS: Final = 3.0
"""How long the server may take for an answer from its catalog, which may be locked."""

QUESTION_SECONDS: Final = 15.0
"""How long a question may take with all of its queries; then its connections are cut."""

CONNECT_SECONDS: Final = 5
"""How long connecting may take, unless the connection string says otherwise."""

_GRACE_SECONDS: Final = 1.0
"""How soon who waits for an answer has noticed that the connection is cut."""

END_SECONDS: Final = 5.0
"""How long the walsender is watched ending."""

_LOOK_SECONDS: Final = 0.01

_WALSENDER: Final = sql.SQL("SELECT FROM pg_stat_get_wal_senders() WHERE pid = %(pid)s")


class Link(msgspec.Struct, frozen=True):
    """What is known of a connection from opening it.

    ``announced_pid`` is what it was greeted with, ``backend_pid`` who answers: a pooler greets with
    a number of its own. ``address`` is empty for a socket. ``ahead_seconds`` is how far the
    server's clock is ahead of ours, by at most ``error_seconds`` more or less.
    """

    user: str
    host: str
    address: str
    database: str
    is_encrypted: bool
    sslmode: str
    announced_pid: int
    backend_pid: int
    started_at: str
    in_recovery: bool
    ahead_seconds: float
    error_seconds: float

    @property
    def is_pooled(self) -> bool:
        """Whether somebody stands between us and the server."""
        return self.announced_pid != self.backend_pid


class Walsender(msgspec.Struct, frozen=True):
    """The replication connection; ``session`` is the same one, for queries before it streams."""

    connection: ReplicationConnection
    session: AsyncConnection[TupleRow]
    user: str
    pid: int
    major: int


class _QuickCatalog(Catalog):
    """The catalog, which is not waited for long."""

    async def rows(
        self,
        query: Query,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        seconds: float = QUERY_SECONDS,
    ) -> list[TupleRow]:
        return await super().rows(query, parameters, seconds=min(seconds, QUERY_SECONDS))


class Site:
    """The configuration, and the connections as far as they came about.

    ``links`` has those that were opened. ``catalog_user`` is set once the catalog can be asked,
    ``probe_slot`` once there is a temporary slot to stream from, ``slot_exists`` once the
    configured one was seen.
    """

    def __init__(
        self, config: Config, handlers: Sequence[Attached] = (), arguments: str = ""
    ) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: a file that a secret is in cannot be read.
        """
        self.config = config
        self.handlers = handlers
        self.slot_name = config.slot.name
        self._arguments = arguments
        self.masking_key = config.masking.secret()
        self.application_name = f"{config.postgres.application_name} check"[:63]
        self.catalog: Catalog = _QuickCatalog(
            _impatient(config.postgres.catalog_dsn()), application_name=self.application_name
        )
        self.links: dict[Literal["catalog", "replication"], Link] = {}
        self.catalog_user = ""
        self.walsender: Walsender | None = None
        self.probe_slot = ""
        self.slot_exists = False
        self._is_stuck = False
        self._others: list[AsyncConnection[TupleRow]] = []

    def command(self, name: str, options: str = "") -> str:
        """Write a command of walstream's as a step."""
        return " ".join(filter(None, ("$ walstream", name, self._arguments, options)))

    def router(self) -> Router | None:
        """Return the routes that a run would have; None when they cannot be made."""
        try:
            return make_router(self.config, self.handlers)
        except (ConfigError, UsageError):
            return None

    async def connect(self, dsn: str, *, replication: bool = False) -> AsyncConnection[TupleRow]:
        """Connect as walstream does, under a name of its own; closed at the end at the latest."""
        connection = await connect(
            _impatient(dsn), application_name=self.application_name, replication=replication
        )
        self._others.append(connection)
        return connection

    async def close(self) -> None:
        """Close the connections, and see that the server has dropped the temporary slot."""
        for connection in self._others:
            await connection.close()
        if self.walsender is not None and self.catalog_user and not self._is_stuck:
            await self._see_the_end_of(self.walsender)
        await self.catalog.close()

    async def _see_the_end_of(self, walsender: Walsender) -> None:
        """Wait until it has ended, a moment after its client is gone; its slot goes with it."""
        deadline = asyncio.get_running_loop().time() + END_SECONDS
        try:
            while await self.catalog.rows(_WALSENDER, {"pid": walsender.pid}):
                if asyncio.get_running_loop().time() > deadline:
                    return
                await asyncio.sleep(_LOOK_SECONDS)
        except WalstreamError:
            pass  # it ends without a witness

    def give_up(self) -> None:
        """Cut all connections: who waits for an answer gets an error at once."""
        self._is_stuck = True
        self.catalog.abandon()
        for connection in self._others:
            cut(connection)

    @property
    def is_stuck(self) -> bool:
        """Whether the server has once not answered in time."""
        return self._is_stuck

    def lacks(self, *needs: Need) -> str:
        """Say what is needed and not there; nothing when all is."""
        if needs and self._is_stuck:
            return "the server does not answer in time"
        present: dict[Need, bool] = {
            "catalog": bool(self.catalog_user),
            "replication": self.walsender is not None,
            "probe": bool(self.probe_slot),
            "slot": self.slot_exists,
        }
        return next((_LACKING[need] for need in needs if not present[need]), "")

    @property
    def streaming_role(self) -> str:
        """Whom replication connects as, or would if it were let in."""
        if self.walsender is not None:
            return self.walsender.user
        named = conninfo_to_dict(self.config.postgres.streaming_dsn()).get("user")
        return str(named or self.catalog_user)

    @property
    def replication(self) -> ReplicationConnection:
        """The replication connection, for questions that need it."""
        assert self.walsender is not None  # noqa: S101 - what they need is looked at before
        return self.walsender.connection


def _impatient(dsn: str) -> str:
    if "connect_timeout" in conninfo_to_dict(dsn):
        return dsn
    return make_conninfo(dsn, connect_timeout=CONNECT_SECONDS)


class Question(msgspec.Struct, frozen=True):
    """One check; it is skipped unless what it ``needs`` is there, and left out if it gives None."""

    group: str
    name: str
    ask: Callable[[Site], Awaitable[Outcome | None]]
    needs: tuple[Need, ...] = ()


async def asked(site: Site, questions: Iterable[Question]) -> list[Finding]:
    """Ask one after another: a later one may build on what an earlier one has opened."""
    return [
        Finding.of(question.group, question.name, outcome)
        for question in questions
        if (outcome := await _answer(site, question)) is not None
    ]


async def _answer(site: Site, question: Question) -> Outcome | None:
    lacking = site.lacks(*question.needs)
    if lacking:
        return None if lacking == _NO_SLOT else skipped(lacking)
    return await answered(site, question.ask(site))


async def answered(site: Site, answer: Awaitable[Outcome | None]) -> Outcome | None:
    """Wait for an answer, but not for ever; an error is an answer too."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    timer = loop.call_later(QUESTION_SECONDS, site.give_up)
    try:
        # What waits for an answer is cut loose; what is only connecting is cancelled.
        async with asyncio.timeout(QUESTION_SECONDS + _GRACE_SECONDS):
            return await answer
    except TimeoutError:
        failure: WalstreamError = ConnectionLost("there was no answer")
    except WalstreamError as error:
        failure = error
    except psycopg.Error as error:
        failure = server_error(error)
    except OSError as error:  # this machine's, not the server's
        where = f"{error.filename}: " if error.filename else ""
        return problem(
            f"{where}{error.strerror or type(error).__name__}",
            "-- see that the user whom walstream runs as may look there",
        )
    finally:
        timer.cancel()
    # Cut by ourselves: that it is cut says nothing about the server.
    if site.is_stuck or (failure.__cause__ is not None and _is_late(loop.time() - began, failure)):
        site.give_up()
        return unreachable("the server does not answer in time", _LOOK_AT_LOCKS)
    return failed(failure)


def _is_late(elapsed_seconds: float, failure: WalstreamError) -> bool:
    return elapsed_seconds >= QUERY_SECONDS and isinstance(
        failure.__cause__, psycopg.OperationalError
    )


_LOOK_AT_LOCKS: Final = (
    "-- see whether the server is overloaded, or somebody holds a lock on its catalog:"
    " SELECT * FROM pg_locks WHERE NOT granted"
)
