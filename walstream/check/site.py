"""What checks look at, and how a question is asked so that its failure is only its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Literal, TypeAlias

import msgspec
import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from walstream.catalog import Catalog
from walstream.check.findings import Finding, Outcome, failed, skipped
from walstream.config import Config
from walstream.connection import ReplicationConnection
from walstream.errors import WalstreamError
from walstream.postgres import connect, server_error

Need: TypeAlias = Literal["catalog", "replication", "probe", "slot"]

_LACKING: Final[dict[Need, str]] = {
    "catalog": "there is no connection to the catalog",
    "replication": "there is no replication connection",
    "probe": "no slot could be made to ask with",
    "slot": "there is no slot",
}


END_SECONDS: Final = 5.0
"""How long the walsender is watched ending."""

_LOOK_SECONDS: Final = 0.01

_WALSENDER: Final = sql.SQL("SELECT FROM pg_stat_get_wal_senders() WHERE pid = %(pid)s")


class Walsender(msgspec.Struct, frozen=True):
    """The replication connection, and what is known of it from connecting."""

    connection: ReplicationConnection
    user: str
    pid: int
    major: int


class Site:
    """The configuration, and the connections as far as they came about.

    ``catalog_user`` is set once the catalog can be asked, ``probe_slot`` once there is a temporary
    slot to stream from, ``slot_exists`` once the configured one was seen.
    """

    def __init__(self, config: Config) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: a file that a secret is in cannot be read.
        """
        self.config = config
        self.slot_name = config.slot.name
        self.masking_key = config.masking.secret()
        self._application_name = f"{config.postgres.application_name} check"[:63]
        self.catalog = Catalog(
            config.postgres.catalog_dsn(), application_name=self._application_name
        )
        self.catalog_user = ""
        self.walsender: Walsender | None = None
        self.probe_slot = ""
        self.slot_exists = False

    async def connect(self, dsn: str, *, replication: bool = False) -> AsyncConnection[TupleRow]:
        """Connect as walstream does, under a name of its own."""
        return await connect(dsn, application_name=self._application_name, replication=replication)

    async def close(self) -> None:
        """Close the connections, and see that the server has dropped the temporary slot."""
        if self.walsender is not None:
            await self.walsender.connection.close()
            if self.catalog_user:
                await self._see_the_end_of(self.walsender)
        await self.catalog.close()

    async def _see_the_end_of(self, walsender: Walsender) -> None:
        """Wait until it has ended, a moment after its client is gone; its slot goes with it."""
        try:
            async with asyncio.timeout(END_SECONDS):
                while await self.catalog.rows(_WALSENDER, {"pid": walsender.pid}):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_SECONDS)
        except (TimeoutError, WalstreamError):
            pass  # it ends without a witness

    def lacks(self, *needs: Need) -> str:
        """Say what is needed and not there; nothing when all is."""
        present: dict[Need, bool] = {
            "catalog": bool(self.catalog_user),
            "replication": self.walsender is not None,
            "probe": bool(self.probe_slot),
            "slot": self.slot_exists,
        }
        return next((_LACKING[need] for need in needs if not present[need]), "")

    @property
    def replication(self) -> ReplicationConnection:
        """The replication connection, for questions that need it."""
        assert self.walsender is not None  # noqa: S101 - what they need is looked at before
        return self.walsender.connection


class Question(msgspec.Struct, frozen=True):
    """One check; it is skipped unless what it ``needs`` is there."""

    group: str
    name: str
    ask: Callable[[Site], Awaitable[Outcome]]
    needs: tuple[Need, ...] = ()


async def asked(site: Site, questions: Iterable[Question]) -> list[Finding]:
    """Ask one after another: a later one may build on what an earlier one has opened."""
    return [
        Finding.of(question.group, question.name, await _answer(site, question))
        for question in questions
    ]


async def _answer(site: Site, question: Question) -> Outcome:
    lacking = site.lacks(*question.needs)
    if lacking:
        return skipped(lacking)
    try:
        return await question.ask(site)
    except WalstreamError as error:
        return failed(error)
    except psycopg.Error as error:
        return failed(server_error(error))
