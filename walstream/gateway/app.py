"""The ASGI application, served by the daemon or mounted in a program of one's own.

::

    Starlette(routes=[Mount("/walstream", make_app(vitals))])

Health and metrics are for probes, which ask by address and read by themselves. All other routes are
for browsers too: they are guarded by `Hosts` and `Cors`, and no answer may be stored, sniffed,
framed, or named to others by its address, which may hold a token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from walstream.config.live import HttpConfig
from walstream.gateway.compression import CompressAnswers
from walstream.gateway.cors import Cors, not_admitted
from walstream.gateway.health import health_routes
from walstream.gateway.hosts import Hosts
from walstream.gateway.metrics import metrics_route
from walstream.gateway.sockets import DENIAL, refuse
from walstream.vitals import Vitals

_DEFAULTS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What every answer has that does not say otherwise; a page brings its own policy."""

_NO_SOCKET: Final = {"error": "Not Found", "hint": "there is no WebSocket at this path"}
_HEADS: Final = ("http.response.start", f"{DENIAL}.start")


def make_app(
    vitals: Callable[[], Vitals],
    routes: Sequence[BaseRoute] = (),
    http: HttpConfig | None = None,
) -> Starlette:
    """Make an application that tells how the process is, and answers at further routes.

    Args:
        vitals: asked once for each request, in the event loop.
        routes: Starlette's, of which the daemon gives those of changes and of the dashboard.
        http: whose hosts and origins count. Without it they are left to the application around.
    """
    app = Starlette(
        routes=[*health_routes(vitals), metrics_route(vitals)],
        middleware=[Middleware(_Defaults)],
        exception_handlers={HTTPException: _tell, Exception: _fail},
    )
    # Redirects would send the client to an address with the token in it.
    app.router.redirect_slashes = False
    router = Router(routes, redirect_slashes=False, default=_nowhere)
    further: ASGIApp = CompressAnswers(router)
    app.router.default = further if http is None else _Guard(further, http)
    return app


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await refuse(scope, receive, send, HTTPStatus.NOT_FOUND, _NO_SOCKET)
        return
    raise HTTPException(HTTPStatus.NOT_FOUND)


async def _tell(_request: Request, error: Exception) -> Response:
    """Answer as JSON what Starlette would answer as text."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these
    hint = ""
    if error.status_code == HTTPStatus.NOT_FOUND:
        hint = "nothing is answered at this path"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        hint = "use " + ", ".join(sorted(allowed.split(", ")))
    body = {"error": error.detail, "hint": hint}
    return JSONResponse(body, error.status_code, error.headers)


async def _fail(_request: Request, _error: Exception) -> Response:
    """Answer for a bug of ours; the server logs where it is."""
    body = {"error": "the answer could not be made", "hint": "the event http_failed says where"}
    # Nothing is around this answer that would add them.
    return JSONResponse(body, HTTPStatus.INTERNAL_SERVER_ERROR, _DEFAULTS)


# What follows hands on what its application returns, without awaiting it: thousands of streams live
# within these calls, and each frame less is less for the garbage collector to look at.


class _Defaults:
    """Adds the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        async def send_with_defaults(message: Message) -> None:
            if message["type"] in _HEADS:
                headers = MutableHeaders(scope=message)
                for name, value in _DEFAULTS.items():
                    headers.setdefault(name, value)
            await send(message)

        return self._app(scope, receive, send_with_defaults)


class _Guard:
    """Refuses requests for other hosts, and says which origins may read the answer."""

    def __init__(self, app: ASGIApp, http: HttpConfig) -> None:
        self._app = app
        self._hosts = Hosts(http.listen, http.hosts)
        self._cors = Cors(http.cors_origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] not in ("http", "websocket"):
            return self._app(scope, receive, send)
        headers = Headers(raw=scope["headers"])
        answer = _refuse_host(self._hosts, headers.getlist("host"))
        if answer is None:
            answer = self._check_origin(scope, headers)
        if answer is not None:
            return answer(scope, receive, send)
        if scope["type"] == "websocket":
            return self._app(scope, receive, send)
        allowed = self._cors.headers(headers.get("origin"))

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                of_answer = MutableHeaders(scope=message)
                for name, value in allowed.items():
                    if name == "Vary":
                        of_answer.add_vary_header(value)
                    else:
                        of_answer[name] = value
            await send(message)

        return self._app(scope, receive, send_with_origin)

    def _check_origin(self, scope: Scope, headers: Headers) -> Response | None:
        """Answer for the application what pages of other origins ask, where that is to be done."""
        if scope["type"] == "websocket":
            # A browser lets any page open one, and read it: there is no CORS for these.
            is_allowed = self._cors.admits(headers.get("origin"), headers["host"])
            return None if is_allowed else not_admitted()
        return self._cors.preflight(headers) if scope["method"] == "OPTIONS" else None


def _refuse_host(hosts: Hosts, asked: Sequence[str]) -> Response | None:
    if len(asked) != 1:
        body = {"error": f"found {len(asked)} headers Host", "hint": "send exactly one"}
        return JSONResponse(body, HTTPStatus.BAD_REQUEST)
    if hosts.allows(asked[0]):
        return None
    body = {
        "error": f"the request is for the host {asked[0][:100]!r}, which is none of this server's",
        "hint": "ask for the address in http.listen, or add the name to http.hosts",
    }
    return JSONResponse(body, HTTPStatus.MISDIRECTED_REQUEST)
