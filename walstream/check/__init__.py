"""``walstream check``: everything that could go wrong, each with what mends it.

Each check answers for itself: one that finds a problem, or cannot be asked because a connection is
missing, does not keep the others from being asked. Nothing is left behind on the server: all that
is ever made there, to see whether it has wal2json and allows it, is a temporary slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from walstream.check import plugin, server, slot
from walstream.check.findings import Finding, Report, Status
from walstream.check.routes import check_routes
from walstream.check.site import Site, asked
from walstream.config import Config, RouteSpec
from walstream.destinations import Handler

__all__ = ["Finding", "Report", "Status", "check"]

QUESTIONS: Final = (*server.QUESTIONS, *plugin.QUESTIONS, *slot.QUESTIONS)


async def check(
    config: Config,
    routes: Sequence[tuple[str, RouteSpec]],
    handlers: Mapping[str, Handler] | None = None,
) -> Report:
    """Look at the server, the slot and the routes.

    Args:
        config: what the daemon would run with.
        routes: all that would be routed, each with the name that it is reported by.
        handlers: by the names of their routes.

    Raises:
        ConfigError: a file that a secret is in cannot be read.
    """
    site = Site(config)
    try:
        findings = await asked(site, QUESTIONS)
        findings += await check_routes(site, routes, handlers or {})
    finally:
        await site.close()
    return Report(tuple(findings))
