"""The ASGI application, served by the daemon or mounted in a program of one's own.

::

    Starlette(routes=[Mount("/walstream", make_app(vitals))])
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette

from walstream.gateway.health import health_routes
from walstream.gateway.metrics import metrics_route
from walstream.vitals import Vitals


def make_app(vitals: Callable[[], Vitals]) -> Starlette:
    """Make an application that tells how the process is.

    Args:
        vitals: asked once for each request, in the event loop.
    """
    return Starlette(routes=[*health_routes(vitals), metrics_route(vitals)])
