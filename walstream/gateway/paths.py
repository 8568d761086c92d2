"""All paths that a process answers beside health and metrics."""

from __future__ import annotations

from starlette.routing import BaseRoute

from walstream.gateway.broadcasts import broadcast_routes
from walstream.gateway.changes import changes_routes
from walstream.gateway.dashboard import dashboard_route
from walstream.gateway.letters import letters_routes
from walstream.gateway.parts import Parts
from walstream.gateway.realtime import realtime_routes
from walstream.gateway.status import status_route


def make_paths(parts: Parts) -> list[BaseRoute]:
    """Make the paths."""
    return [
        dashboard_route(),
        *changes_routes(parts.hub, parts.gate, parts.live),
        status_route(parts.vitals, parts.hub, parts.gate),
        *letters_routes(parts.desk, parts.gate),
        *realtime_routes(parts.realtime),
        *broadcast_routes(parts.realtime),
    ]
