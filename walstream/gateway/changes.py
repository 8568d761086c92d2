"""``/changes`` as Server-Sent Events, ``/changes.jsonl`` as lines: the same changes twice.

A request passes four gates before it gets anything: the token is whose (401), what is asked for can
be read (400), the role may read it (403), and there is room (429). From then on the stream is cut
when the token expires, when the client does not keep up, or when the process ends; each time it can
be taken up again at the last id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from walstream.access.gate import Gate
from walstream.access.readers import Reader
from walstream.access.refusals import UNAVAILABLE, ReaderRefused
from walstream.config.live import LiveConfig
from walstream.gateway.answers import NO_STORE, refused
from walstream.gateway.streams import Stream, open_stream
from walstream.gateway.tokens import token_of
from walstream.live.clients import Client, Cohort, End
from walstream.live.encodings import JSON_LINES, SERVER_SENT_EVENTS, Encoding
from walstream.live.expiry import Expiry
from walstream.live.hub import Hub
from walstream.live.streams import Beginning, begin_at, page, serve
from walstream.live.subscriptions import KEYS, Limits, RequestRefused, parse_subscriptions

_PARAMETERS: Final = (*KEYS, "since", "token")
_LINES_PARAMETERS: Final = (*_PARAMETERS, "until")
_EVENTS: Final = SERVER_SENT_EVENTS.media_type


def changes_routes(hub: Callable[[], Hub | None], gate: Gate, options: LiveConfig) -> list[Route]:
    """Make the two paths.

    Args:
        hub: with the changes; None while there is no live sink.
        gate: who may read what.
        options: limits.
    """
    return [
        Route("/changes", _Changes(hub, gate, options, SERVER_SENT_EVENTS)),
        Route("/changes.jsonl", _Changes(hub, gate, options, JSON_LINES)),
    ]


class _Wish(NamedTuple):
    """What a request asks for."""

    hub: Hub
    reader: Reader
    cohort: Cohort
    beginning: Beginning
    is_page: bool


class _Changes:
    """Answers with a stream, as an ASGI application."""

    def __init__(
        self,
        hub: Callable[[], Hub | None],
        gate: Gate,
        options: LiveConfig,
        encoding: Encoding,
    ) -> None:
        self._hub = hub
        self._gate = gate
        self._options = options
        self._encoding = encoding
        self._limits = Limits(options.max_subscriptions, options.max_filter_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            wish = await self._wish(scope)
        except RequestRefused as error:
            await self._refuse(error, scope)(scope, receive, send)
            return
        except ReaderRefused as error:
            answer = RequestRefused(error.status, error.reason, hint=error.hint)
            await self._refuse(answer, scope)(scope, receive, send)
            return
        await self._answer(wish, scope, receive, send)

    def _refuse(self, error: RequestRefused, scope: Scope) -> Response:
        accepted = Headers(scope=scope).get("accept", "")
        is_event_source = self._encoding is SERVER_SENT_EVENTS and _EVENTS in accepted
        if error.status != UNAVAILABLE or not is_event_source:
            return refused(error.status, error.message, error.hint)
        # An EventSource comes back to a stream that has ended, and never to another status than 200
        # (WHATWG HTML, 9.2.2).
        content = self._retry() + self._encoding.note("end", {"reason": "unavailable"}, None)
        return Response(content, media_type=self._encoding.media_type, headers=NO_STORE)

    def _retry(self) -> bytes:
        if self._encoding is not SERVER_SENT_EVENTS:
            return b""
        return b"retry: %d\n" % round(self._options.retry_seconds * 1000)

    async def _wish(self, scope: Scope) -> _Wish:
        if scope["method"] not in ("GET", "HEAD"):
            raise RequestRefused(405, "only GET is answered here")
        headers = Headers(scope=scope)
        reader = await self._gate.admit(token_of(scope))
        hub = self._hub()
        if hub is None:
            hint = 'route tables to a sink of type = "live"'
            raise RequestRefused(404, "no changes are published here", hint=hint)
        parameters = self._parameters(scope)
        subscriptions = parse_subscriptions(parameters, self._limits)
        if not hub.has_begun:
            raise RequestRefused(503, "the stream has not begun yet", hint="try again")
        await hub.requests.check(subscriptions, reader)
        values = dict(parameters)
        is_page = values.get("until") is not None
        since = headers.get("last-event-id") or values.get("since") or None
        beginning = await begin_at(hub, since)
        if is_page and since is None:
            beginning = Beginning(hub.history.begins)
        if beginning.reset and self._encoding is JSON_LINES:
            message = f"the history begins behind {hub.history.begins}"
            raise RequestRefused(410, message, hint="read the table anew, and go on without since")
        cohort = hub.cohort(subscriptions, reader, self._encoding)
        return _Wish(hub, reader, cohort, beginning, is_page)

    def _parameters(self, scope: Scope) -> list[tuple[str, str]]:
        try:
            query = scope["query_string"].decode("ascii")
            parameters = parse_qsl(query, keep_blank_values=True, errors="strict")
        except (UnicodeDecodeError, ValueError):
            raise RequestRefused(400, "the query cannot be read") from None
        allowed = _LINES_PARAMETERS if self._encoding is JSON_LINES else _PARAMETERS
        seen: set[str] = set()
        for name, value in parameters:
            if name not in allowed:
                raise RequestRefused(
                    400, f"there is no parameter {name!r}", hint=f"there are {', '.join(allowed)}"
                )
            if name not in KEYS and name in seen:
                raise RequestRefused(400, f"{name} is given twice")
            seen.add(name)
            if name == "until" and value != "now":
                raise RequestRefused(400, f"until: found {value!r}; allowed: now")
        return parameters

    async def _answer(self, wish: _Wish, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", self._encoding.media_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would hold events back
        ]
        farewell = self._encoding.note("end", {"reason": End.CLOSING}, None)
        async with open_stream(
            scope,
            receive,
            send,
            headers,
            farewell=farewell,
            compress=self._options.compress,
        ) as outflow:
            client = Client(wish.cohort, outflow, self._options.max_queue_bytes)
            leaving = asyncio.create_task(_until_left(outflow, client))
            expiry = Expiry()
            expiry.renew(wish.reader, partial(client.finish, End.EXPIRED))
            try:
                await self._serve(wish, client)
            finally:
                leaving.cancel()
                expiry.cancel()

    async def _serve(self, wish: _Wish, client: Client) -> None:
        hub, options = wish.hub, self._options
        if wish.is_page:
            await page(hub, client, wish.beginning.position)
            return
        client.outflow.write(self._retry())
        client.outflow.write(self._encoding.note("streaming", {}, wish.beginning.position))
        await serve(hub, client, wish.beginning, options.heartbeat_seconds)


async def _until_left(outflow: Stream, client: Client) -> None:
    """Wait for the client to leave, or for the server to cut it."""
    await outflow.ended()
    client.finish(End.LEFT)
