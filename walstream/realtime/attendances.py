"""One channel of one socket, from the join to the end: who may, what is heard, what is said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol

from walstream.access.readers import Reader
from walstream.access.refusals import Cause, ReaderRefused
from walstream.access.refusals import expired as token_expired
from walstream.errors import WalstreamError
from walstream.live.clients import End, Outflow
from walstream.live.expiry import Expiry
from walstream.live.hub import Hub
from walstream.live.subscriptions import Limits
from walstream.realtime.bindings import Binding, TooMany, read_bindings
from walstream.realtime.channels import Channel
from walstream.realtime.followings import Following
from walstream.realtime.frames import CloseCode
from walstream.realtime.protocol import Protocol as Core
from walstream.realtime.refusals import (
    NOT_NOW,
    PRIVATE_ONLY,
    expired,
    join_refusal,
    not_begun,
    not_enabled,
    not_readable,
)
from walstream.realtime.services import Services
from walstream.realtime.tally import Reason, of_join
from walstream.realtime.verifying import verify
from walstream.realtime.voices import Voice

SUBSCRIBED: Final = "Subscribed to PostgreSQL"
JOIN_SECONDS: Final = 8.0
"""So long a join waits for the stream to begin: clients give up after ten seconds."""

_LOOK_AGAIN_SECONDS: Final = 0.1


class Caller(Protocol):
    """The socket that a channel is joined on; `walstream.realtime.visits.Visit` is one."""

    @property
    def outflow(self) -> Outflow:
        """The way to the client."""

    def send(self, frames: bytes) -> None:
        """Send something, or cut the client off when it does not keep up."""

    def end(self, code: int, reason: str) -> None:
        """End the connection."""

    def resume(self) -> None:
        """Go on with what the client has sent while it waited for a join to be answered."""

    def forget(self, channel: Channel) -> None:
        """Know nothing more of a channel that has ended by itself."""


class JoinRefused(Exception):
    """A channel cannot be joined; the text is for the client."""


class Attendance:
    """A channel that somebody joins, is in, and leaves."""

    def __init__(
        self,
        services: Services,
        core: Core,
        channel: Channel,
        caller: Caller,
        *,
        reader: Reader,
        token: str | None,
    ) -> None:
        """Take what a join asks for.

        Args:
            services: of the process.
            core: the protocol of the socket.
            channel: asked for.
            caller: the socket.
            reader: who it is by the token of the connection.
            token: that one.
        """
        self.voice: Final = Voice(services, core, channel, caller.send, reader)
        """What it says to the others."""
        self._services = services
        self._core = core
        self._channel = channel
        self._caller = caller
        self._reader = reader
        self._token = token
        self._wanted: Sequence[Binding] = ()
        self._following: Following | None = None
        self._tasks: asyncio.TaskGroup
        self._running: set[asyncio.Task[None]] = set()
        self._in_turn = asyncio.Lock()
        self._expiry = Expiry()
        self._problems: Sequence[str] = ()

    # Called by the socket

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Join, in a task of the group."""
        self._tasks = tasks
        self._run(self._join)

    def renew(self, token: str) -> None:
        """Go on by another token, once it is verified."""
        self._run(partial(self._renew, token))

    def leave(self) -> None:
        """Be gone, at once."""
        for task in self._running:
            task.cancel()
        self._expiry.cancel()
        if self._following is not None:
            self._following.leave()
        self.voice.leave()

    # The join

    async def _join(self) -> None:
        try:
            await self._admit(self._channel.join.token or self._token)
            bindings = read_bindings(self._channel.join.bindings, self._limits())
            self._wanted = [binding for binding in bindings if not binding.error]
            problems = await self._subscribe()
            _verify_not_ended(self._reader)
        except ReaderRefused as refusal:
            self._refuse(join_refusal(refusal))
        except (JoinRefused, TooMany) as refusal:
            self._refuse(str(refusal))
        except WalstreamError:
            self._refuse(NOT_NOW)
        else:
            self._enter(bindings, problems)

    async def _admit(self, token: str | None) -> None:
        """Say who it is, and whether they may enter.

        Raises:
            ReaderRefused: the token is not to be believed.
            JoinRefused: they may not.
        """
        self._reader = self.voice.reader = await self._services.gate.admit(token)
        self._token = token
        self._verify_topic()

    def _verify_topic(self) -> None:
        if not self._channel.join.is_private:
            if not self._services.config.public_channels:
                raise JoinRefused(PRIVATE_ONLY)
        elif not self._services.topics.may_read(self._reader, self._channel.name):
            raise JoinRefused(not_readable(self._channel.name))

    async def _subscribe(self) -> list[str]:
        """Find out where each binding begins, as who reads now; return what is wrong with others.

        What is followed already goes on as who reads now, before anything else is asked.
        """
        if not self._wanted:
            return []
        if self._following is not None:
            await self._following.renew(self._reader, self._tasks)
        hub = await self._hub()
        if hub is None:
            return [not_enabled(binding.parameters) for binding in self._wanted]
        if self._following is None:
            self._following = self._make_following(hub)
        found = [await self._begin(binding, hub, self._following) for binding in self._wanted]
        return [problem for problem in found if problem]

    async def _begin(self, binding: Binding, hub: Hub, following: Following) -> str | None:
        problem = await verify(binding, hub.requests, self._reader)
        if problem or following.has(binding):
            return problem
        return await following.add(binding)

    def _make_following(self, hub: Hub) -> Following:
        return Following(
            hub,
            self._caller.outflow,
            version=self._core.version,
            topic=self._channel.topic,
            max_queue_bytes=self._services.live.max_queue_bytes,
            on_end=self._end_connection,
        )

    def _limits(self) -> Limits:
        services = self._services
        return Limits(services.config.max_bindings, services.live.max_filter_bytes)

    async def _hub(self) -> Hub | None:
        """Return where changes come from, once they come."""
        join = self._channel.join
        seconds = join.wait_seconds if join.wait else JOIN_SECONDS
        deadline = time.monotonic() + seconds
        while (hub := self._services.hub()) is not None and not hub.has_begun:
            if time.monotonic() > deadline:
                raise JoinRefused(not_begun(seconds))
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return hub

    def _enter(self, bindings: Sequence[Binding], problems: Sequence[str]) -> None:
        """Be in the channel from now on: the reply comes before everything else."""
        core, channel, send = self._core, self._channel, self._caller.send
        send(core.joined(channel, {"postgres_changes": [binding.echo for binding in bindings]}))
        self.voice.enter()
        if channel.join.wants_replication_ready:
            send(core.system(channel, "system", "ok", "Replication connection established"))
        for binding in bindings:
            if binding.error:
                self._tell_of_problem(binding.error)
        self._follow(problems)
        self._expiry.renew(self._reader, self._expire)
        self._caller.resume()

    def _follow(self, problems: Sequence[str]) -> None:
        """Tell how it is with the bindings, and let the changes come."""
        self._problems = problems
        for problem in problems:
            self._tell_of_problem(problem)
        if self._following is not None and len(problems) < len(self._wanted):
            self._tell_of_changes("ok", SUBSCRIBED)
            self._following.start(self._reader, self._tasks)

    def _tell_of_problem(self, problem: str) -> None:
        self._services.refusals.add(Reason.BINDING)
        self._tell_of_changes("error", problem)

    def _tell_of_changes(self, status: str, message: str) -> None:
        told = self._core.system(self._channel, "postgres_changes", status, message)
        self._caller.send(told)

    def _refuse(self, reason: str) -> None:
        self._count(reason)
        self._caller.forget(self._channel)
        self._caller.send(self._core.refuse_join(self._channel, reason))

    def _count(self, refusal: str) -> None:
        self._services.refusals.add(of_join(refusal))

    # What comes later

    async def _renew(self, token: str) -> None:
        if token == self._token:
            return
        before = self._reader.grants
        try:
            await self._admit(token)
            self._expiry.renew(self._reader, self._expire)
            is_same = self._reader.grants == before
            problems = self._problems if is_same else await self._subscribe()
        except ReaderRefused as refusal:
            self._count(join_refusal(refusal))
            if refusal.cause is Cause.UNAVAILABLE:
                self._end_connection(End.CLOSING)
            else:
                self._close(join_refusal(refusal).partition(": ")[2])
            return
        except JoinRefused as refusal:
            self._count(str(refusal))
            self._close(str(refusal))
            return
        except WalstreamError:
            self._count(NOT_NOW)
            self._end_connection(End.CLOSING)
            return
        self._follow(problems)

    def _expire(self) -> None:
        self._services.refusals.add(Reason.EXPIRED)
        self._close(expired(0))

    def _close(self, message: str) -> None:
        """End by ourselves, and say why; nothing comes after that."""
        self.leave()
        self._caller.forget(self._channel)
        self._caller.send(self._core.system(self._channel, "system", "error", message))
        self._caller.send(self._core.close(self._channel))

    def _end_connection(self, end: End) -> None:
        """Let the client connect anew: a channel alone cannot be told to come back."""
        code = CloseCode.TRY_AGAIN_LATER if end is End.SLOW else CloseCode.SERVICE_RESTART
        self._caller.end(code, end)

    def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        task = self._tasks.create_task(self._one_at_a_time(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _one_at_a_time(self, work: Callable[[], Awaitable[None]]) -> None:
        async with self._in_turn:
            await work()


def _verify_not_ended(reader: Reader) -> None:
    """Refuse a token that has ended while the join was waiting.

    Raises:
        ReaderRefused: it has.
    """
    late_seconds = 0.0 if reader.expires_at is None else time.time() - reader.expires_at
    if late_seconds > 0:
        raise token_expired(int(late_seconds))
