"""Which pages of other origins may read the answers (CORS).

An origin that is not listed gets no header of CORS, so the browser keeps the answer from its page.
A page on the internet that asks a server in a private network is let in only when its origin is
listed by name: ``*`` does not open a private network.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

ANY: Final = "*"

METHODS: Final = "GET, HEAD, POST"
REQUEST_HEADERS: Final = (
    "Authorization, Cache-Control, Content-Type, Last-Event-ID"
    ", apikey, X-Api-Key, X-Client-Info"  # of the clients of Supabase
)
ANSWER_HEADERS: Final = "Retry-After, WWW-Authenticate"
PREFLIGHT_SECONDS: Final = 600


class Cors:
    """The rules of one server."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Take the origins as browsers write them; ``*`` is any, and never with credentials."""
        self._listed: Final = {one.lower() for one in origins} - {ANY}
        self._is_any: Final = ANY in origins

    def headers(self, origin: str | None) -> dict[str, str]:
        """Return what an answer needs, so that a page of this origin can read it."""
        if origin is not None and origin.lower() in self._listed:
            return {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Credentials": "true",
                "Access-Control-Expose-Headers": ANSWER_HEADERS,
                "Vary": "Origin",
            }
        if self._is_any and origin is not None:
            allowed = {
                "Access-Control-Allow-Origin": ANY,
                "Access-Control-Expose-Headers": ANSWER_HEADERS,
            }
            return allowed | self._vary()
        return self._vary()

    def _vary(self) -> dict[str, str]:
        """Say that another origin may get other headers, where that is so."""
        return {"Vary": "Origin"} if self._listed else {}

    def admits(self, origin: str | None, host: str) -> bool:
        """Whether a page of this origin may open a WebSocket.

        A page of the server itself may, and who is no page: other clients name no origin, or that
        of the server that they ask.
        """
        if origin is None or self._is_any or origin.lower() in self._listed:
            return True
        return origin.lower().partition("://")[2] == host.lower()

    def preflight(self, request: Headers) -> Response | None:
        """Answer what a browser asks before a request; None when this is something else."""
        if "origin" not in request or "access-control-request-method" not in request:
            return None
        origin = request["origin"]
        headers = self.headers(origin)
        is_private = request.get("access-control-request-private-network") == "true"
        is_listed = origin.lower() in self._listed
        if not (is_listed or (self._is_any and not is_private)):
            return _refused(self._vary(), is_private=is_private)
        headers |= {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": REQUEST_HEADERS,
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }
        if is_private:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=headers)


def not_admitted() -> Response:
    """Refuse a WebSocket of a page."""
    return _refused({}, is_private=False)


def _refused(headers: dict[str, str], *, is_private: bool) -> Response:
    body = {
        "error": "pages of this origin may not ask this server",
        "hint": "list the origin in http.cors_origins"
        + (" by name: it asks for a server in a private network" if is_private else ""),
    }
    return JSONResponse(body, HTTPStatus.FORBIDDEN, headers)
