"""``/health/live`` and ``/health/ready``: 200 for yes, 503 for no, and why.

Live says that a restart would not help, ready that changes get through. The bodies hold no values
of rows and no passwords; while it does not stream, ``reason`` may name the server's address.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from walstream.vitals import Vitals


def health_routes(vitals: Callable[[], Vitals]) -> list[Route]:
    """Make the two paths; both answer GET and HEAD."""

    async def live(_request: Request) -> JSONResponse:
        now = vitals()
        return _answer("alive", now, yes=now.is_alive)

    async def ready(_request: Request) -> JSONResponse:
        now = vitals()
        return _answer("ready", now, yes=now.is_ready)

    return [Route("/health/live", live), Route("/health/ready", ready)]


def _answer(word: str, vitals: Vitals, *, yes: bool) -> JSONResponse:
    body = {
        word: yes,
        "phase": vitals.phase,
        "reason": vitals.reason,
        "stalled_because": vitals.stalled_because,
        "stalled_seconds": round(vitals.stalled_seconds, 1),
    }
    return JSONResponse(body, 200 if yes else 503, {"Cache-Control": "no-store"})
