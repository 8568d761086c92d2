"""``walstream check``: everything that could go wrong, each with what mends it.

Each check answers for itself: one that finds a problem, or cannot be asked because a connection is
missing, does not keep the others from being asked. A server that does not answer is given up after
some seconds. Nothing is left behind on the server: all that is ever made there, to see whether it
has wal2json and allows it, is a temporary slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from walstream.assembly import Attached
from walstream.check import (
    access,
    connections,
    place,
    plugin,
    realtime,
    role,
    server,
    slot,
    standby,
    stores,
    transactions,
)
from walstream.check.findings import Finding, Report, Status
from walstream.check.routes import check_routes
from walstream.check.site import Site, asked
from walstream.config import Config

__all__ = ["QUESTIONS", "Finding", "Report", "Status", "check"]

# What asks the replication connection comes before the plugin, which it is used up by.
_OF_THE_SERVER: Final = (
    *connections.QUESTIONS,
    *server.QUESTIONS,
    *transactions.QUESTIONS,
    *standby.QUESTIONS,
    *role.QUESTIONS,
)
_OF_THE_SLOT: Final = (*plugin.QUESTIONS, *slot.QUESTIONS)

QUESTIONS: Final = (
    *_OF_THE_SERVER,
    *_OF_THE_SLOT,
    *stores.QUESTIONS,
    *access.QUESTIONS,
    *realtime.QUESTIONS,
    *place.QUESTIONS,
)
"""All that is asked once, whatever the configuration."""


async def check(
    config: Config, handlers: Sequence[Attached] = (), *, arguments: str = ""
) -> Report:
    """Look at the server, the slot, the routes, and the place where walstream runs.

    Args:
        config: what the daemon would run with.
        handlers: what was attached to the application.
        arguments: by which commands find the same configuration and handlers, for mends.

    Raises:
        ConfigError: a file that a secret is in cannot be read.
    """
    site = Site(config, handlers, arguments)
    try:
        findings = await asked(site, _OF_THE_SERVER)
        of_the_place = await asked(site, place.QUESTIONS)
        findings += await asked(site, _OF_THE_SLOT)
        findings += await check_routes(site)
        findings += await place.check_sinks(site)
        findings += await stores.check_targets(site)
        findings += await asked(site, stores.QUESTIONS)
        findings += await asked(site, access.QUESTIONS)
        findings += await access.check_roles(site)
        findings += await asked(site, realtime.QUESTIONS)
    finally:
        await site.close()
    return Report((*findings, *of_the_place))
