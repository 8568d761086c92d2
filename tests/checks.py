"""What ``walstream check`` finds with a configuration, and what it proposes, done."""

from __future__ import annotations

from typing import Any, Final

from tests.postgres import Database
from walstream import config as configuration
from walstream.check import Finding, check
from walstream.config import Config

SLOT: Final[dict[str, Any]] = {"create": True, "name": "walstream_checked"}
"""On a server that is shared, one of the usual name may be somebody's."""


def settings(dsn: str, *, replication_dsn: str | None = None, **slot: Any) -> Config:
    """A configuration; the slot is made at the first start unless said otherwise."""
    postgres = {"dsn": dsn} | ({"replication_dsn": replication_dsn} if replication_dsn else {})
    return configuration.parse({"postgres": postgres, "slot": {**SLOT, **slot}})


async def findings(config: Config, group: str, name: str = "") -> list[Finding]:
    report = await check(config)
    return [one for one in report.findings if one.group == group and one.name.startswith(name)]


async def finding(config: Config, group: str, name: str) -> Finding:
    [found] = await findings(config, group, name)
    return found


def routed(dsn: str, **route: Any) -> Config:
    """A configuration with one route, to the standard output."""
    return configuration.parse(
        {
            "postgres": {"dsn": dsn},
            "slot": SLOT,
            "routes": [{"to": "out", "name": "mine", **route}],
            "sinks": {"out": {"type": "stdout"}},
        }
    )


async def route_findings(database: Database, **route: Any) -> list[Finding]:
    return await findings(routed(database.dsn, **route), "routes")


def mend(database: Database, found: Finding) -> None:
    assert found.mend
    for statement in found.mend.splitlines():
        if not statement.startswith("-- "):
            database.execute(statement)
