"""``/dead-letters.json`` and ``/dead-letters/replay``, for roles that may operate.

The list says what could not be delivered, and where that failed; it holds no key and no value of a
row. Only a request whose body is declared as JSON begins a replay: a page of another origin cannot
send that without being asked about first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from walstream.access import Reader
from walstream.dead_letters import LetterQuery, StoredLetter
from walstream.errors import DeadLetterStoreFailed, ReplayRuns, WalstreamError
from walstream.gateway.answers import (
    NO_STORE,
    Admits,
    Answering,
    forbidden,
    reader_of,
    refused,
    refusing,
)
from walstream.gateway.desk import Desk, ReplayState

SHOWN_LETTERS: Final = 200
MAX_LETTERS: Final = 1000
MAX_BODY_BYTES: Final = 1 << 16

_BODY_HINT: Final = 'send {"ids": [1, 2]} or {"route": "orders"}'


def letters_routes(desk: Desk, gate: Admits) -> list[Route]:
    """Make the two paths.

    Args:
        desk: where the letters are.
        gate: who may look at them.
    """

    async def show(request: Request) -> Response:
        await _operator(request, gate)
        limit = _limit(request.query_params.get("limit"))
        if limit is None:
            return refused(400, f"limit: allowed: 1 to {MAX_LETTERS}")
        query = LetterQuery(route=request.query_params.get("route"), limit=limit)
        letters, count = await desk.show(query)
        return _answer(
            {
                "letters": [_letter(stored) for stored in letters],
                "count": count,
                "replay": _replay(desk.state),
            }
        )

    async def replay(request: Request) -> Response:
        await _operator(request, gate)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return refused(415, "the body must be declared as application/json", _BODY_HINT)
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return refused(403, "a page of another origin may not replay dead letters")
        body = await _body(request)
        if body is None:
            return refused(413, f"the body has more than {MAX_BODY_BYTES} bytes", _BODY_HINT)
        query = _query(body)
        if query is None:
            return refused(400, "the body does not say which letters", _BODY_HINT)
        state = desk.replay(query)
        return _answer({"replay": _replay(state)}, 202)

    return [
        Route("/dead-letters.json", refusing(_telling(show))),
        Route("/dead-letters/replay", refusing(_telling(replay)), methods=["POST"]),
    ]


async def _operator(request: Request, gate: Admits) -> Reader:
    reader = await reader_of(request, gate)
    if not reader.can_operate:
        raise forbidden(reader, "see or replay dead letters", "operate")
    return reader


def _telling(answering: Answering) -> Answering:
    """Make of our own errors answers: those who may operate may know."""

    async def answer(request: Request) -> Response:
        try:
            return await answering(request)
        except ReplayRuns as error:
            return refused(409, error.message, error.hint)
        except DeadLetterStoreFailed as error:
            return refused(503, error.message, error.hint)
        except WalstreamError as error:
            return refused(500, error.message, error.hint)

    return answer


# ---- What is asked for


def _limit(text: str | None) -> int | None:
    if text is None:
        return SHOWN_LETTERS
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LETTERS))
    return int(text) if is_number and 1 <= int(text) <= MAX_LETTERS else None


async def _body(request: Request) -> bytes | None:
    """Read the body; None when it is too long."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


class _Which(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[int] | None = None
    route: str | None = None


def _query(body: bytes) -> LetterQuery | None:
    """Read which letters are meant: these, or those of a route, and never all by mistake."""
    try:
        which = msgspec.json.decode(body, type=_Which)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if bool(which.ids) == bool(which.route):
        return None
    return LetterQuery(ids=which.ids or None, route=which.route or None)


# ---- What is told


def _answer(told: dict[str, Any], status: int = 200) -> Response:
    body = msgspec.json.encode(told)
    return Response(body, status, media_type="application/json", headers=NO_STORE)


def _letter(stored: StoredLetter) -> dict[str, Any]:
    letter = stored.letter
    return {
        "id": stored.id,
        "route": letter.route,
        "change_id": letter.change_id,
        "schema": None if letter.relation is None else letter.relation.schema,
        "table": None if letter.relation is None else letter.relation.name,
        "operation": letter.operation,
        "attempts": letter.attempts,
        "error": letter.error,
        "parked": letter.parked,
        "first_failed_at": letter.first_failed_at,
        "last_failed_at": stored.last_failed_at,
        "stored_at": letter.stored_at,
        "deliveries": stored.deliveries,
        "size_bytes": stored.size_bytes,
    }


def _replay(state: ReplayState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return {
        "running": state.running,
        "begun_at": state.begun_at,
        "ended_at": state.ended_at,
        "letters": state.letters,
        "error": state.error,
        "hint": state.hint,
        "reports": _reports(state),
    }


def _reports(state: ReplayState) -> Sequence[dict[str, Any]]:
    return [
        {
            "route": one.route,
            "delivered": one.delivered,
            "failed": one.failed,
            "left": one.left,
            "added": one.added,
            "reason": one.reason,
        }
        for one in state.reports
    ]
