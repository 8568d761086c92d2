"""One socket of a client, from its first message to its last: what the protocol decides is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final, assert_never
from typing import Protocol as Interface

import structlog

from walstream.access.readers import Reader
from walstream.live.clients import Outflow
from walstream.live.turns import Turn
from walstream.realtime.attendances import Attendance
from walstream.realtime.channels import Channel
from walstream.realtime.events import (
    Answer,
    Broadcasting,
    Event,
    Joining,
    Left,
    Overrun,
    TokenGiven,
    Tracking,
    Untracking,
)
from walstream.realtime.frames import CloseCode
from walstream.realtime.protocol import Protocol
from walstream.realtime.services import Services
from walstream.realtime.tally import Reason

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.realtime")

BEHIND_FACTOR: Final = 8
"""So much more may wait for a client that is not slow, while much is said at once."""


class Socket(Outflow, Interface):
    """The way to one client and back; `walstream.gateway.sockets.Socket` is one."""

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when there is none to come."""

    async def close(self, code: int, reason: str) -> None:
        """End the connection."""


class Visit:
    """A client that has come by a socket, and all the channels that it has joined there."""

    def __init__(
        self,
        services: Services,
        protocol: Protocol,
        socket: Socket,
        *,
        reader: Reader,
        token: str | None,
    ) -> None:
        """Begin with nothing joined.

        Args:
            services: of the process.
            protocol: of this socket.
            socket: accepted.
            reader: who it is by the token of the connection.
            token: that one; a join without a token of its own has this one.
        """
        self._services = services
        self._protocol = protocol
        self._socket = socket
        self._reader = reader
        self._token = token
        self._attendances: dict[Channel, Attendance] = {}
        self._tasks = asyncio.TaskGroup()
        self._is_over = False
        self._longest_bytes = 0

    def __len__(self) -> int:
        """Count the channels."""
        return len(self._attendances)

    @property
    def outflow(self) -> Outflow:
        """The way to the client."""
        return self._socket

    async def run(self) -> None:
        """Serve the client until it goes, or is cut off."""
        async with self._tasks:
            self._services.visits.add(self)
            try:
                turn = Turn()
                while not self._is_over and (data := await self._socket.receive()) is not None:
                    self._receive(data)
                    await turn.give_way()
            finally:
                self._is_over = True
                self._services.visits.discard(self)
                for attendance in self._attendances.values():
                    attendance.leave()
                self._attendances.clear()

    def send(self, frames: bytes) -> None:
        """Send something; a client that does not keep up is cut off rather than waited for."""
        if self._is_over:
            return
        if self._is_slow():
            self.end(CloseCode.TRY_AGAIN_LATER, "slow")
        else:
            self._socket.write(frames)
            self._longest_bytes = max(self._longest_bytes, len(frames))

    def _is_slow(self) -> bool:
        waiting = self._socket.waiting_bytes
        if not waiting:
            self._longest_bytes = 0
        most = self._services.live.max_queue_bytes
        if self._socket.is_behind:  # it is our sending: what is said in a room waits for nobody
            most *= BEHIND_FACTOR
        # The longest that waits does not count: the state of a large room is no slowness.
        return waiting - self._longest_bytes > most

    def end(self, code: int, reason: str) -> None:
        """End the connection: the client comes back, and joins anew."""
        if not self._is_over:
            self._is_over = True
            log.debug("socket_ended", reason=reason)
            if code == CloseCode.TRY_AGAIN_LATER:
                self._services.refusals.add(Reason.SLOW)
                self._socket.drop()
            self._tasks.create_task(self._socket.close(code, reason))

    def _receive(self, data: str | bytes) -> None:
        now = time.monotonic()
        if isinstance(data, str):
            events = self._protocol.receive_text(data, now)
        else:
            events = self._protocol.receive_bytes(data, now)
        self._handle_all(events)

    def resume(self) -> None:
        """Go on with what the client has sent while it waited for a join to be answered."""
        self._handle_all(self._protocol.resume(time.monotonic()))

    def _handle_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._handle(event)
        self._services.refusals.take(self._protocol.refusals)

    def _handle(self, event: Event) -> None:
        match event:
            case Answer(frames):
                self.send(frames)
            case Joining(channel):
                self._join(channel)
            case Left(channel):
                attendance = self._attendances.pop(channel, None)
                if attendance is not None:
                    attendance.leave()
            case TokenGiven(channel, token):
                self._attendances[channel].renew(token)
            case Broadcasting():
                self._attendances[event.channel].voice.broadcast(event)
            case Tracking(channel, ref, payload):
                self._attendances[channel].voice.track(ref, payload)
            case Untracking(channel, ref):
                self._attendances[channel].voice.untrack(ref)
            case Overrun(reason):
                self._overrun(reason)
            case _:
                assert_never(event)

    def _join(self, channel: Channel) -> None:
        attendance = Attendance(
            self._services, self._protocol, channel, self, reader=self._reader, token=self._token
        )
        self._attendances[channel] = attendance
        attendance.begin(self._tasks)

    def forget(self, channel: Channel) -> None:
        """Know nothing more of a channel that has ended by itself."""
        self._attendances.pop(channel, None)

    def _overrun(self, reason: str) -> None:
        for channel in list(self._protocol.channels.values()):
            self.send(self._protocol.system(channel, "system", "error", reason))
            self.send(self._protocol.close(channel))
        self.end(CloseCode.POLICY_VIOLATION, reason)
