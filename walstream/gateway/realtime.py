"""``/realtime/v1/websocket``, for the clients of Supabase Realtime.

Before a socket is accepted it is known who comes: by an API key in the header ``x-api-key`` or the
query, as those clients send it. What is said by the socket after that is `walstream.realtime`'s.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import HTTPConnection
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send

from walstream.access.readers import Reader
from walstream.access.refusals import ReaderRefused
from walstream.gateway.sockets import open_socket, refuse
from walstream.gateway.tokens import api_key_of
from walstream.realtime.messages import Version
from walstream.realtime.protocol import Protocol, ProtocolLimits
from walstream.realtime.refusals import connect_refusal
from walstream.realtime.services import Services
from walstream.realtime.tally import Reason, of_connection
from walstream.realtime.visits import Visit

PATHS: Final = ("/realtime/v1/websocket", "/socket/websocket")

LARGEST_FRAMES: Final = 4
"""So many of the largest frames may come from one socket within ten seconds."""

_BAD_REQUEST: Final = 400


def realtime_routes(services: Services) -> list[WebSocketRoute]:
    """Make the paths; there are none unless the configuration wants them."""
    if not services.config.enabled:
        return []
    return [WebSocketRoute(path, _Realtime(services)) for path in PATHS]


class _Realtime:
    """Lets clients in by WebSocket, as an ASGI application."""

    def __init__(self, services: Services) -> None:
        self._services = services
        config = services.config
        self._limits = ProtocolLimits(
            max_channels=config.max_channels,
            max_bytes=LARGEST_FRAMES * config.max_frame_bytes,
            messages_per_second=config.messages_per_second,
            joins_per_second=config.joins_per_second,
            presence_calls=config.presence_calls,
            presence_seconds=config.presence_seconds,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        vsn = connection.query_params.get("vsn") or Version.V1
        if vsn not in tuple(Version):
            allowed = ", ".join(Version)
            error = f"vsn: found {vsn[:20]!r}; allowed: {allowed}"
            self._services.refusals.add(Reason.VERSION)
            await refuse(scope, receive, send, _BAD_REQUEST, {"error": error})
            return
        token = api_key_of(connection)
        try:
            reader = await self._services.gate.admit(token)
        except ReaderRefused as refusal:
            self._services.refusals.add(of_connection(refusal.cause))
            await asyncio.sleep(self._services.config.refusal_seconds)  # they come back at once
            status, text = connect_refusal(refusal)
            await refuse(scope, receive, send, status, {"error": text})
            return
        await self._serve(Version(vsn), reader, token, (scope, receive, send))

    async def _serve(
        self, version: Version, reader: Reader, token: str | None, asgi: tuple[Scope, Receive, Send]
    ) -> None:
        config = self._services.config
        async with open_socket(*asgi, max_bytes=config.max_frame_bytes) as socket:
            protocol = Protocol(version, self._limits)
            visit = Visit(self._services, protocol, socket, reader=reader, token=token)
            await visit.run()
