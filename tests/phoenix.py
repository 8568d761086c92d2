"""A client of Phoenix channels that does what it is told, and remembers all that it got."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from websockets.sync.client import connect
from websockets.sync.connection import Connection

SECONDS = 10.0


class Heard(NamedTuple):
    """A message of the server, in version 2.0.0."""

    join_ref: str | None
    ref: str | None
    topic: str
    event: str
    payload: Any


class Phoenix:
    """One socket."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.received: list[str | bytes] = []
        """All messages, as they came."""
        self._refs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.connection.close()

    def send(self, topic: str, event: str, payload: object, *, join_ref: str | None = None) -> str:
        """Send a message; return its ref."""
        self._refs += 1
        ref = str(self._refs)
        join_ref = ref if event == "phx_join" else join_ref
        self.connection.send(json.dumps([join_ref, ref, topic, event, payload]))
        return ref

    def hear(self, seconds: float = SECONDS) -> Heard:
        """Wait for the next message."""
        message = self.connection.recv(seconds)
        self.received.append(message)
        return Heard(*json.loads(message))

    def wait_for(self, is_wanted: Callable[[Heard], object], seconds: float = SECONDS) -> Heard:
        """Pass by messages until one is wanted."""
        while True:
            heard = self.hear(seconds)
            if is_wanted(heard):
                return heard

    def join(
        self,
        name: str,
        bindings: Sequence[Mapping[str, Any]] = (),
        *,
        token: str | None = None,
        **config: Any,
    ) -> Heard:
        """Join a channel; return the reply."""
        payload: dict[str, Any] = {"config": {"postgres_changes": list(bindings), **config}}
        if token is not None:
            payload["access_token"] = token
        ref = self.send(f"realtime:{name}", "phx_join", payload)
        return self.wait_for(lambda heard: heard.ref == ref)

    def changes(self, count: int, seconds: float = SECONDS) -> list[Any]:
        """Wait for so many changes, and return their data."""
        found: list[Any] = []
        while len(found) < count:
            heard = self.wait_for(lambda one: one.event == "postgres_changes", seconds)
            found.append(heard.payload["data"])
        return found

    def is_quiet(self, seconds: float = 0.2) -> bool:
        """Whether nothing comes for so long."""
        try:
            self.hear(seconds)
        except TimeoutError:
            return True
        return False


@contextmanager
def phoenix(url: str, token: str, *, reads_ahead: bool = True) -> Iterator[Phoenix]:
    """Connect to a running walstream at an address of HTTP.

    Args:
        url: of the server.
        token: of who connects.
        reads_ahead: whether messages are fetched before anybody asks for them.
    """
    address = f"{url.replace('http://', 'ws://')}/realtime/v1/websocket?apikey={token}&vsn=2.0.0"
    max_queue = None if reads_ahead else 1
    with (
        connect(address, max_size=None, max_queue=max_queue, close_timeout=1) as connection,
        Phoenix(connection) as client,
    ):
        yield client
