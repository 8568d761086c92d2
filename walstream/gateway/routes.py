"""All paths that a process answers beside health and metrics."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import BaseRoute

from walstream.access.gate import Gate
from walstream.config import Config
from walstream.gateway.changes import changes_routes
from walstream.live.hub import Hub


def make_routes(config: Config, gate: Gate, hub: Callable[[], Hub | None]) -> list[BaseRoute]:
    """Make the paths.

    Args:
        config: with the limits of clients.
        gate: who may read what.
        hub: with the changes; None while there is no live sink.
    """
    return [*changes_routes(hub, gate, config.live)]
