"""The changes that one channel is subscribed to.

Bindings that begin at the same position are one client of the hub; so a channel is one, unless some
of its bindings carry ``since``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from walstream.access.readers import Reader
from walstream.access.refusals import UNAVAILABLE
from walstream.errors import Unavailable
from walstream.live.clients import Client, End, Outflow
from walstream.live.hub import Hub
from walstream.live.streams import Beginning, begin_at, serve
from walstream.live.subscriptions import RequestRefused
from walstream.positions import Position
from walstream.realtime.bindings import Binding
from walstream.realtime.encodings import ChannelEncoding
from walstream.realtime.messages import Version

HEARTBEAT_SECONDS: Final = 3600.0
"""The clients of this protocol send signs of life by themselves."""


class Following:
    """Follows the changes for one channel, until it is left."""

    def __init__(
        self,
        hub: Hub,
        outflow: Outflow,
        *,
        version: Version,
        topic: str,
        max_queue_bytes: int,
        on_end: Callable[[End], None],
    ) -> None:
        """Follow nothing yet.

        Args:
            hub: with the changes.
            outflow: of the socket.
            version: of the protocol.
            topic: of the channel.
            max_queue_bytes: so much may wait for the client.
            on_end: called when it ends by itself, with the reason.
        """
        self._hub = hub
        self._outflow = outflow
        self._version = version
        self._topic = topic
        self._max_queue_bytes = max_queue_bytes
        self._on_end = on_end
        self._begun: dict[Hashable, tuple[list[Binding], Beginning]] = {}
        self._streams: list[_Stream] = []

    def has(self, binding: Binding) -> bool:
        """Whether a binding is followed already."""
        return any(binding is one for stream in self._streams for one in stream.bindings)

    async def add(self, binding: Binding) -> str | None:
        """Note where a binding begins; what is committed from now on is not missed.

        Returns why it cannot begin there.

        Raises:
            Unavailable: it cannot be told at this moment.
        """
        key = (binding.since, binding.with_position)
        if key not in self._begun:
            try:
                self._begun[key] = ([], await begin_at(self._hub, binding.since))
            except RequestRefused as refusal:
                if refusal.status == UNAVAILABLE:
                    raise Unavailable(refusal.message) from None
                return f"{refusal.message}; {refusal.hint}" if refusal.hint else refusal.message
        self._begun[key][0].append(binding)
        return None

    def start(self, reader: Reader, tasks: asyncio.TaskGroup) -> None:
        """Let the changes come."""
        for bindings, beginning in self._begun.values():
            self._streams.append(self._follow(bindings, beginning, reader, tasks))
        self._begun.clear()

    async def renew(self, reader: Reader, tasks: asyncio.TaskGroup) -> None:
        """Go on as another reader: from where each stream has come to."""
        for stream in self._streams:
            stream.stop(self._hub)
        for place, stream in enumerate(self._streams):
            position = await stream.stopped()
            self._streams[place] = self._follow(stream.bindings, Beginning(position), reader, tasks)

    def leave(self) -> None:
        """Let no more come."""
        for stream in self._streams:
            stream.client.finish(End.LEFT)
            stream.task.cancel()
        self._streams.clear()

    def _follow(
        self,
        bindings: Sequence[Binding],
        beginning: Beginning,
        reader: Reader,
        tasks: asyncio.TaskGroup,
    ) -> _Stream:
        encoding = ChannelEncoding(
            version=self._version,
            topic=self._topic,
            ids=tuple(binding.id for binding in bindings),
            with_position=bindings[0].with_position,
        )
        subscriptions = [one.subscription for one in bindings if one.subscription is not None]
        cohort = self._hub.cohort(subscriptions, reader, encoding)
        client = Client(cohort, self._outflow, self._max_queue_bytes)
        task = tasks.create_task(self._serve(client, beginning))
        return _Stream(bindings, client, task)

    async def _serve(self, client: Client, beginning: Beginning) -> Position:
        position = await serve(self._hub, client, beginning, HEARTBEAT_SECONDS)
        if client.end is not None and client.end is not End.LEFT:
            self._on_end(client.end)
        return position


class _Stream:
    """Some bindings of a channel, as one client of the hub."""

    __slots__ = ("_live_until", "bindings", "client", "task")

    def __init__(
        self, bindings: Sequence[Binding], client: Client, task: asyncio.Task[Position]
    ) -> None:
        self.bindings = bindings
        self.client = client
        self.task = task
        self._live_until: Position | None = None

    def stop(self, hub: Hub) -> None:
        """Let no more come, from this moment on."""
        if self.client in self.client.cohort.clients:
            self._live_until = hub.reached(self.client)
        self.client.finish(End.LEFT)

    async def stopped(self) -> Position:
        """Wait until it has stopped, and return up to where all has come."""
        reached = await self.task
        return reached if self._live_until is None else self._live_until
