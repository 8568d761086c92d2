"""A small walstream for the browser: the real page and paths, over made-up vitals and changes.

It lives in a thread with an event loop of its own; a test publishes changes, cuts, and says who is
let in.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests import vitals
from walstream.access import Reader, ReaderRefused
from walstream.changes import Operation, Relation
from walstream.dead_letters import DeadLetter, LetterQuery, StoredLetter
from walstream.gateway.answers import refusing
from walstream.gateway.dashboard import dashboard_route
from walstream.gateway.desk import Desk
from walstream.gateway.letters import letters_routes
from walstream.gateway.status import status_route
from walstream.gateway.tokens import token_of
from walstream.vitals import ChangeCount, DestinationVitals, Outcome, Vitals

OPERATOR = "operator-token"
VISITOR = "visitor-token"


class FakeGate:
    """Two tokens, and a switch that lets both expire."""

    def __init__(self) -> None:
        self.expired = False

    async def admit(self, token: str | None) -> Reader:
        if token not in (OPERATOR, VISITOR):
            raise ReaderRefused(401, "a token is needed", hint="send Authorization: Bearer")
        if self.expired:
            raise ReaderRefused(401, "the token has expired", hint="get a new one")
        may = token == OPERATOR
        return Reader(
            "admin" if may else "visitor",
            expires_at=time.time() + 3000,
            can_see_status=may,
            can_operate=may,
        )


class FakeReport(msgspec.Struct):
    route: str
    delivered: int
    failed: int = 0
    left: int = 0
    added: int = 0
    reason: str = ""


class FakeLetters:
    """Letters that a replay removes, but the last one of each route."""

    def __init__(self) -> None:
        self.stored: list[StoredLetter] = []

    async def letters(self, query: LetterQuery) -> list[StoredLetter]:
        return self.stored[: query.limit]

    async def count(self) -> int:
        return len(self.stored)

    def make_replay(self) -> FakeReplay:
        return FakeReplay(self)


class FakeReplay:
    is_busy = False

    def __init__(self, letters: FakeLetters) -> None:
        self._letters = letters

    def stop(self) -> None:
        pass

    async def run(self, query: LetterQuery, confirm: Any) -> Sequence[FakeReport]:
        asked = [
            one
            for one in self._letters.stored
            if one.id in (query.ids or ()) or one.letter.route == query.route
        ]
        confirm(asked)
        await asyncio.sleep(0.7)
        self._letters.stored = [one for one in self._letters.stored if one not in asked]
        return [
            FakeReport(route, sum(one.letter.route == route for one in asked))
            for route in sorted({one.letter.route for one in asked})
        ]


def letter(number: int, route: str = "mailer", **differs: Any) -> StoredLetter:
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "route": route,
        "change_id": f"0/16274F8:{number}",
        "operation": Operation.INSERT,
        "relation": Relation("public", "orders"),
        "keys": (),
        "payload": b"",
        "stored_at": now,
        "attempts": 5,
        "error": "TimeoutError at handlers.py:41",
        "first_failed_at": now,
    }
    return StoredLetter(number, DeadLetter(**{**values, **differs}))


class FakeServer:
    """Answers on a free port of loopback while the block runs."""

    def __init__(self) -> None:
        self.gate = FakeGate()
        self.letters = FakeLetters()
        self.began = time.time()
        self.history: list[dict[str, Any]] = []
        self.asked: list[dict[str, str]] = []
        self._news = asyncio.Event()
        self._ending: str | None = None
        desk = Desk(lambda: self.letters, self.letters.make_replay)
        app = Starlette(
            routes=[
                dashboard_route(),
                status_route(self.vitals, lambda: None, self.gate),
                *letters_routes(desk, self.gate),
                Route("/changes", refusing(self._changes)),
            ]
        )
        config = uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    # What tests do

    def publish(self, *changes: dict[str, Any]) -> None:
        self.history.extend(changes)
        self._wake()

    def end(self, reason: str) -> None:
        """Let all streams end, also those that come, until the reason is none again."""
        self._ending = reason or None
        self._wake()

    def change(self, operation: str = "insert", **differs: Any) -> dict[str, Any]:
        number = len(self.history) + 1
        return {
            "id": f"0/{number:X}:1",
            "operation": operation,
            "schema": "public",
            "table": "messages_v2",
            "row": {"id": number, "conversation_id": "abc-123", "content": "Hello"},
            "identity": None,
            "unchanged": [],
            "xid": 700 + number,
            "commit_lsn": f"0/{number:X}",
            "end_lsn": f"0/{number:X}",
            "ordinal": 1,
            "commit_time": datetime.now(UTC).isoformat(),
            **differs,
        }

    # What is answered

    def vitals(self) -> Vitals:
        passed = time.time() - self.began
        received = int(400 * passed + 900 * math.sin(passed / 4)) + 4000
        return vitals.full(
            changes_received=received,
            lag_seconds=0.02 + abs(math.sin(passed / 3)) / 4,
            dead_letters=len(self.letters.stored),
            changes=(
                ChangeCount(
                    Relation("public", "messages_v2"), Operation.INSERT, Outcome.ROUTED, received
                ),
                ChangeCount(Relation("public", "orders"), Operation.UPDATE, Outcome.ROUTED, 1834),
                ChangeCount(Relation("public", "orders"), Operation.DELETE, Outcome.DROPPED, 34),
            ),
            destinations=(
                DestinationVitals("live", received - 3, 0, 0, 0, 0, 0, calls=vitals.CALLS),
                DestinationVitals("mailer", 900, 8, 0, 2, 3, 4, waiting=3, calls=vitals.CALLS),
                DestinationVitals("archive", 0, 0, 0, 0, 0, 0),
            ),
            lost=(),
        )

    async def _changes(self, request: Request) -> Response:
        await self.gate.admit(token_of(request.scope))
        last = request.headers.get("last-event-id")
        self.asked.append({**request.query_params, "last": last or ""})
        begin = len(self.history)
        if last is not None:
            ids = [one["id"] for one in self.history]
            begin = ids.index(last) + 1 if last in ids else 0
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(
            self._stream(begin), headers=headers, media_type="text/event-stream"
        )

    async def _stream(self, begin: int) -> AsyncIterator[str]:
        at = self.history[begin - 1]["id"] if begin else "0/0:0"
        yield f"retry: 200\nid: {at}\nevent: streaming\ndata: {{}}\n\n"
        while self._ending is None:
            for one in self.history[begin:]:
                begin += 1
                event = one.get("operation", "reset")
                yield f"id: {one.get('id', at)}\nevent: {event}\ndata: {json.dumps(one)}\n\n"
            self._news.clear()
            await self._news.wait()
        yield f'event: end\ndata: {{"reason": "{self._ending}"}}\n\n'

    def _wake(self) -> None:
        loop = self._server.servers[0].get_loop()
        loop.call_soon_threadsafe(self._news.set)
