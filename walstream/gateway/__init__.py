"""Health and metrics by HTTP: what `Vitals` says, for probes and for Prometheus.

It reads the `Vitals` that it is given and nothing else, so it can be mounted elsewhere
(`walstream.gateway.app.make_app`). Starlette, uvicorn and prometheus-client are not imported before
they are asked for: they come with the extra ``http``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from walstream.errors import SetupError
from walstream.vitals import Vitals

if TYPE_CHECKING:
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
    async def open(cls, listen: str, vitals: Callable[[], Vitals]) -> AsyncIterator[Self]:
        """Answer requests at ``listen``: host:port, where port 0 is any free one.

        Raises:
            ConfigError: ``listen`` is no address that can be resolved.
            SetupError: nothing can listen there, or the extra is not installed.
        """
        try:
            from walstream.gateway.server import Server  # noqa: PLC0415 - needs the extra
        except ImportError as error:
            message = f"http.listen is set, and the module {error.name} is not installed"
            raise SetupError(message, hint='pip install "walstream[http]"') from None
        server = await Server.open(listen, vitals)
        try:
            yield cls(server)
        finally:
            await server.close()
