"""What a server tells by itself: answers that no application makes, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from walstream.logs import type_and_place

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

ANSWER_FULL: Final = JSONResponse(
    {
        "error": "too many clients are connected",
        "hint": "try again later; http.max_connections of walstream's configuration is the bound",
    },
    HTTPStatus.SERVICE_UNAVAILABLE,
    {"Cache-Control": "no-store", "Connection": "close", "Retry-After": "5"},
)


def refusal(status: HTTPStatus, error: str, hint: str = "") -> bytes:
    """Write an answer, after which the connection ends."""
    headers = [
        (b"content-type", b"application/json"),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    return answer(status, headers, json.dumps({"error": error, "hint": hint}).encode())


def answer(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Write an answer with these headers, after which the connection ends."""
    given = [one for one in headers if one[0] not in (b"content-length", b"connection")]
    own = ((b"content-length", b"%d" % len(body)), (b"connection", b"close"))
    lines = [b"%b: %b\r\n" % one for one in (*given, *own)]
    phrase = HTTPStatus(status).phrase.encode()
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, phrase, b"".join(lines), body)


def tell_failed(error: BaseException) -> None:
    """Log that an application failed; not what it was about."""
    while isinstance(error, BaseExceptionGroup):  # of the tasks of a socket: the first one tells
        error = error.exceptions[0]
    if isinstance(error, ClientDisconnect | asyncio.CancelledError):
        log.debug("http_refused", reason="the client has gone")
    else:
        log.error("http_failed", error=type_and_place(error))


class _Notices(logging.Handler):
    """Makes events of what uvicorn's protocol logs: a request of no use, an answer that failed."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            log.debug("http_refused", reason=record.getMessage())
        else:
            tell_failed(error)


def _make_logger() -> logging.Logger:
    """Make a logger outside of the process's tree: uvicorn's own may be somebody else's."""
    logger = logging.Logger("walstream.gateway", logging.WARNING)  # noqa: LOG001 - outside of it
    logger.addHandler(_Notices())
    return logger


LOGGER: Final = _make_logger()
