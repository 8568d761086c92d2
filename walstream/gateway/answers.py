"""What the paths that want a token have in common: who asks, and how a refusal is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from walstream.access import Reader
from walstream.access.refusals import FORBIDDEN, UNAUTHORIZED, UNAVAILABLE, ReaderRefused
from walstream.gateway.tokens import token_of

NO_STORE: Final = {"Cache-Control": "no-store"}

Answering: TypeAlias = Callable[[Request], Awaitable[Response]]


class Admits(Protocol):
    """Says who a token stands for (`walstream.access.Gate`)."""

    async def admit(self, token: str | None) -> Reader:
        """Return the reader.

        Raises:
            ReaderRefused: nobody, or nobody who is let in.
        """


async def reader_of(request: Request, gate: Admits) -> Reader:
    """Return who asks.

    Raises:
        ReaderRefused: that is not known.
    """
    return await gate.admit(token_of(request.scope))


def forbidden(reader: Reader, right: str, key: str) -> ReaderRefused:
    """Say that a role lacks a right, and where it is given."""
    reason = f"the role {reader.role!r} may not {right}"
    return ReaderRefused(FORBIDDEN, reason, hint=f"{key} = true under [access.roles.{reader.role}]")


def refusing(answering: Answering) -> Answering:
    """Make of what is raised an answer."""

    async def answer(request: Request) -> Response:
        try:
            return await answering(request)
        except ReaderRefused as error:
            return refused(error.status, error.reason, error.hint)

    return answer


def refused(status: int, error: str, hint: str = "") -> JSONResponse:
    """Say why not, and what to do."""
    headers = dict(NO_STORE)
    if status == UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status == UNAVAILABLE:
        headers["Retry-After"] = "1"
    return JSONResponse({"error": error, "hint": hint}, status, headers)
