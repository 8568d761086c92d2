"""The HTTP side: health and metrics of what `Vitals` says, and the routes that it is given.

The application can be mounted elsewhere (`walstream.gateway.app.make_app`). Starlette, uvicorn,
httptools and prometheus-client are not imported before they are asked for: they come with the extra
``http``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from walstream.config.live import HttpConfig
from walstream.errors import SetupError
from walstream.vitals import Vitals

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from walstream.gateway.server import Server


class Gateway:
    """Answers requests while the block of `open` runs."""

    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def address(self) -> str:
        """Where it listens, with the port that it has got."""
        return self.server.address

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        http: HttpConfig,
        vitals: Callable[[], Vitals],
        routes: Callable[[], Sequence[BaseRoute]] = tuple,
        *,
        max_body_bytes: int | None = None,
    ) -> AsyncIterator[Self]:
        """Answer requests at ``http.listen``: host:port, where port 0 is any free one.

        Args:
            http: where to listen, and to whom to answer.
            vitals: asked once for each request for health or metrics.
            routes: makes further routes, and may import for that what comes with the extra.
            max_body_bytes: of a request, where one of the routes takes more than others.

        Raises:
            ConfigError: ``http.listen`` is no address that can be resolved.
            SetupError: nothing can listen there, or the extra is not installed.
        """
        try:
            from walstream.gateway.server import Server  # noqa: PLC0415 - needs the extra
            from walstream.gateway.shared import BODY_BYTES  # noqa: PLC0415 - the same

            further = routes()
        except ImportError as error:
            message = f"http.listen is set, and the module {error.name} is not installed"
            raise SetupError(message, hint='pip install "walstream[http]"') from None
        server = await Server.open(http, vitals, further, max_body_bytes or BODY_BYTES)
        try:
            yield cls(server)
        finally:
            await server.close()
