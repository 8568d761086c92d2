"""All paths that a process answers beside health and metrics."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import BaseRoute

from walstream.access.gate import Gate
from walstream.config import Config
from walstream.gateway.changes import changes_routes
from walstream.gateway.dashboard import dashboard_route
from walstream.gateway.desk import Desk
from walstream.gateway.letters import letters_routes
from walstream.gateway.status import status_route
from walstream.live.hub import Hub
from walstream.vitals import Vitals


def make_routes(
    config: Config,
    gate: Gate,
    hub: Callable[[], Hub | None],
    vitals: Callable[[], Vitals],
    desk: Desk,
) -> list[BaseRoute]:
    """Make the paths.

    Args:
        config: with the limits of clients.
        gate: who may read what.
        hub: with the changes; None while there is no live sink.
        vitals: of the process.
        desk: with the dead letters.
    """
    return [
        *changes_routes(hub, gate, config.live),
        dashboard_route(),
        status_route(vitals, hub, gate),
        *letters_routes(desk, gate),
    ]
