"""One streaming session: the path of a change, from the socket to the status update.

    connection --bytes--> protocol --> decoder --change--> router --> delivery --> handlers, sinks
        ^                                                                | taken
        +---------- status update <-- flush_lsn <-- acknowledger <-------+

A batch is what one read of the socket brought. It is decoded, routed and handed to the
destinations, which work by themselves. While too much is in flight nothing is read: the socket
fills, and the server waits. That is what bounds memory.

Status updates have a clock of their own, so that a slow handler does not cost the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import structlog

from walstream.acknowledger import Acknowledger, Ticket
from walstream.binding import Binding
from walstream.catalog import Catalog
from walstream.changes import Begin, Change, Commit, Message, Relation
from walstream.connection import ReplicationConnection
from walstream.delivery import Delivery
from walstream.errors import (
    ConnectionLost,
    DecodeError,
    HandlerStuck,
    ServerShutdown,
    Unavailable,
    WalstreamError,
)
from walstream.flow import Handed
from walstream.lsn import ZERO, Lsn
from walstream.outlets import Held
from walstream.protocol import PrimaryKeepalive, XLogData, parse, record_of, status_update
from walstream.router import Route, TablePattern
from walstream.vitals import Standstill

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.stream")

STATUS_INTERVAL_SECONDS: Final = 10.0
"""The longest time between two status updates, as with pg_recvlogical.

When the position has advanced, one is sent every `WATCH_SECONDS`.
"""

ASK_SECONDS: Final = 3.0
"""After so much silence the server is asked for a sign of life."""

WATCH_SECONDS: Final = 1.0
"""How often the position and the delivery are looked at."""

PATIENCE: Final = 10
"""So many times ``receive_timeout_seconds`` a walsender may be silent that nobody can look at."""

ANSWER_SECONDS: Final = 5.0
"""How long the catalog gets to say what a silent walsender does."""

MOST_NOTICES: Final = 1000
"""How many different notices of the server are told; their texts are remembered."""

RECHECK_SECONDS: Final = 10.0
"""How often it is asked whether a routed table has become a partitioned one."""

FINISH_SECONDS: Final = 5.0
"""How long the server gets to read the last status update."""


Exchange: TypeAlias = Callable[[], Awaitable[tuple[Binding, Delivery]]]
"""Makes ready what a session goes on with."""


class Counts(msgspec.Struct):
    """What has been received: whole transactions, changes and messages inside and outside them."""

    transactions: int = 0
    changes: int = 0
    messages: int = 0


class LostChanges:
    """Changes that the server announces and cannot send.

    These are updates and deletes of tables without a replica identity.
    """

    _NOTICE: Final = re.compile(r"no tuple identifier for (UPDATE|DELETE) in table (.+)")

    def __init__(self, is_wanted: Callable[[Relation], bool]) -> None:
        """Count those of the tables that are wanted."""
        self._is_wanted = is_wanted
        self._told: set[str] = set()
        self.counts: Counter[tuple[str, str]] = Counter()
        """By operation (``update`` or ``delete``) and table."""

    def notice(self, sqlstate: str, text: str) -> None:
        """Take a notice of the server; log the first one of each table."""
        matched = self._NOTICE.search(text)
        if matched is None:
            if text not in self._told and len(self._told) < MOST_NOTICES:
                self._told.add(text)  # some come every few seconds
                log.info("server_notice", sqlstate=sqlstate, text=text)
            return
        operation, table = matched[1].lower(), matched[2]
        relation = TablePattern.parse(table).relation
        if relation is None or not self._is_wanted(relation):
            return
        name = str(relation)
        self.counts[operation, name] += 1
        if sum(count for (_, one), count in self.counts.items() if one == name) == 1:
            log.error(
                "changes_lost",
                table=name,
                operation=operation,
                hint="Postgres does not send updates and deletes of a table without a replica"
                f" identity: ALTER TABLE {table} REPLICA IDENTITY FULL, or give it a primary key",
            )


class Session:
    """Streams from one started connection until it is stopped, or something stops it."""

    def __init__(  # noqa: PLR0913 - the composition root hands over each part of the path once
        self,
        connection: ReplicationConnection,
        catalog: Catalog,
        binding: Binding,
        delivery: Delivery,
        acknowledger: Acknowledger,
        counts: Counts,
        *,
        check_routes: Callable[[], Awaitable[None]],
        record: Callable[[Lsn], Awaitable[None]],
        on_message: Callable[[Message], None] | None = None,
        drain_seconds: float,
        release_after_seconds: float,
        receive_timeout_seconds: float,
        status_interval_seconds: float = STATUS_INTERVAL_SECONDS,
        until: Lsn | None = None,
    ) -> None:
        self._connection = connection
        self._catalog = catalog
        self._binding = binding
        self._delivery = delivery
        self._acknowledger = acknowledger
        self._drain_seconds = drain_seconds
        self._release_after_seconds = release_after_seconds
        self._receive_timeout_seconds = receive_timeout_seconds
        self._status_interval_seconds = status_interval_seconds
        self._check_routes = check_routes
        self._on_message = on_message
        self._record = record
        self._recording: asyncio.Task[None] | None = None
        self._recorded_lsn = acknowledger.flush_lsn
        self._until = until
        self._reached_until = False
        self._received_lsn = self._server_lsn = acknowledger.flush_lsn
        self._listening_since: float | None = None
        self._asking_since: float | None = None
        self._standstill = Standstill()
        self._exchange: Exchange | None = None
        self._group: asyncio.TaskGroup | None = None
        self._delivering: asyncio.Task[None] | None = None
        self._aborted = False
        self._is_cut = False
        self._stopping = False
        self._stopped_because: WalstreamError | None = None
        self._deadline: asyncio.Timeout | None = None
        self._ticket: Ticket | None = None
        self._counts = counts

    def stop(self, because: WalstreamError | None = None) -> None:
        """Finish the transactions that are being delivered, confirm what is taken, and end.

        After ``drain_seconds`` the session ends in any case; what was not taken comes again.

        Args:
            because: raised by `run` at the end, when it is not a stop that was wished for.
        """
        if self._stopping:
            return
        self._stopping = True
        self._stopped_because = because
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._drain_seconds)
        self._delivery.begin_no_more()
        self._connection.wake()

    def exchange(self, exchange: Exchange) -> None:
        """Deliver another way from the end of the transaction that is coming in.

        Args:
            exchange: called when all that was handed over is taken; returns what to go on with.
        """
        self._exchange = exchange
        self._connection.wake()

    @property
    def received_lsn(self) -> Lsn:
        """Up to where all has come."""
        return self._received_lsn

    @property
    def server_lsn(self) -> Lsn:
        """How far the server's WAL goes, as it last said."""
        return max(self._server_lsn, self._received_lsn)

    @property
    def acknowledger(self) -> Acknowledger:
        """Of this session."""
        return self._acknowledger

    @property
    def silent_seconds(self) -> float:
        """How long the server has been listened to and has said nothing."""
        since = self._listening_since
        return 0.0 if since is None else time.monotonic() - since

    def standstill_seconds(self, now: float) -> float:
        """How long the watermark has stood before changes that are not taken.

        Args:
            now: monotonic seconds.
        """
        acknowledger, delivery = self._acknowledger, self._delivery
        return self._standstill.seconds(
            now,
            # What is taken is told for several calls at once; slow ones move nevertheless.
            (acknowledger.progress, delivery.calls_ended),
            has_work=acknowledger.is_waiting and not delivery.waits_for_batch,
        )

    @property
    def asking_seconds(self) -> float:
        """How long the catalog has been asked about a table without an answer."""
        since = self._asking_since
        return 0.0 if since is None else time.monotonic() - since

    def abort(self) -> None:
        """From now on confirm nothing: whoever cancels `run` then ends it as a crash would."""
        self._aborted = True

    async def run(self) -> None:
        """Stream; return after `stop`, or when ``until`` is acknowledged.

        Raises:
            WalstreamError: what else ended the session. What was taken before is confirmed as far
                as the connection still allows.
        """
        try:
            async with asyncio.TaskGroup() as group:
                beside = (self._report(), self._watch(), self._refuse_silence())
                others = [group.create_task(one) for one in beside]
                await self._drained(group)
                for task in others:
                    task.cancel()
        except ExceptionGroup as failures:
            await self._confirm()
            first = first_failure(failures)
            raise first from first.__cause__
        except asyncio.CancelledError:
            with contextlib.suppress(WalstreamError):
                self._send_status()  # nobody waits for more
            raise
        is_confirmed = await self._confirm()
        if self._stopped_because is not None:
            raise self._stopped_because
        if self._until is not None and not self._stopping and not is_confirmed:
            message = "the connection was cut before the server confirmed the last position"
            raise ConnectionLost(message)

    async def _drained(self, group: asyncio.TaskGroup) -> None:
        """Read until there is a reason to end, and let the destinations finish."""
        self._group = group
        self._deliver()
        try:
            # A stop may have come before there was anything to end.
            seconds = self._drain_seconds if self._stopping else None
            async with asyncio.timeout(seconds) as self._deadline:
                try:
                    await self._pump()
                except Unavailable:
                    # What would be taken now cannot be confirmed any more.
                    self._is_cut = True
                    await self._finish_calls()
                    raise
                except WalstreamError:
                    await self._finish()  # what came before the fault need not come again
                    raise
                await self._finish()
        except TimeoutError:
            if self._deadline is None or not self._deadline.expired():
                raise
            if self._delivering is not None:
                self._delivering.cancel()
            log.warning(
                "drain_incomplete",
                drain_seconds=self._drain_seconds,
                in_flight=self._acknowledger.in_flight,
                flush_lsn=str(self._acknowledger.flush_lsn),
            )
        finally:
            self._deadline = None

    def _deliver(self) -> None:
        assert self._group is not None  # noqa: S101 - set by _drained
        self._delivering = self._group.create_task(self._delivery.run())

    async def _finish(self) -> None:
        self._delivery.finish()
        assert self._delivering is not None  # noqa: S101 - it delivers from the beginning
        await asyncio.wait([self._delivering])

    async def _finish_calls(self) -> None:
        """Let calls that have begun return, for some time."""
        self._delivery.finish(calls_only=True)
        assert self._delivering is not None  # noqa: S101 - it delivers from the beginning
        await asyncio.wait([self._delivering], timeout=self._drain_seconds)

    async def _change_over(self, exchange: Exchange) -> None:
        """Go on with another delivery, once this one has nothing left."""
        self._exchange = None
        await self._finish()
        if not self._stopping:
            self._binding, self._delivery = await exchange()
            self._deliver()

    async def _pump(self) -> None:
        while not self._is_done():
            if self._exchange is not None and self._ticket is None:
                await self._change_over(self._exchange)
                continue
            if self._delivery.is_full:
                await self._delivery.wait_for_change()
                continue
            batch = await self._listen()
            handed: list[Handed] = []
            try:
                reply_requested = await self._receive(batch, handed)
            finally:  # what came before a fault, too
                self._delivery.hand(handed)
            if reply_requested:
                self._send_status()

    async def _listen(self) -> list[bytes]:
        self._listening_since = time.monotonic()
        try:
            return await self._connection.read()
        finally:
            self._listening_since = None

    def _is_done(self) -> bool:
        if self._reached_until:
            return True
        if self._until is not None and self._received_lsn >= self._until:
            return True
        # In the middle of a transaction whose delivery has begun, the rest is waited for.
        is_inside = self._ticket is not None and self._ticket.begun
        return self._stopping and not (is_inside and self._delivery.wants_more)

    async def _receive(self, batch: list[bytes], handed: list[Handed]) -> bool:
        """Decode and route the messages of a batch; return whether the server wants a reply."""
        reply_requested = False
        self._binding.begin_batch()
        for data in batch:
            record = record_of(data)
            if record is None:
                reply_requested |= self._keepalive(parse(data))
                continue
            try:
                decoded = self._binding.decode(record)
                if decoded is None:
                    decoded = await self._ask(self._binding.learn(record))
                if type(decoded) is Change:
                    self._counts.changes += 1
                    routed = self._binding.route(decoded)
                    if routed is None:
                        routed = await self._ask(self._binding.route_anew(decoded))
                    self._hand(routed, handed, len(data))
                elif not self._bracket(decoded, handed):
                    break
            except DecodeError as error:
                text = f"{_position(data)}: {error.message}"
                raise DecodeError(text, hint=error.hint) from None
        return reply_requested

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Wait for what the catalog says; `asking_seconds` tells how long."""
        self._asking_since = time.monotonic()
        try:
            return await question
        finally:
            self._asking_since = None

    def _keepalive(self, message: XLogData | PrimaryKeepalive) -> bool:
        """Take a sign of life; return whether the server wants one of ours."""
        assert isinstance(message, PrimaryKeepalive)  # noqa: S101 - the other kind has a record
        self._server_lsn = max(self._server_lsn, Lsn(message.wal_end))
        self._acknowledger.keepalive(Lsn(message.wal_end))
        if self._ticket is None:
            self._received_lsn = max(self._received_lsn, Lsn(message.wal_end))
        return message.reply_requested

    def _hand(
        self, routed: list[tuple[Route, Change]], handed: list[Handed], size_bytes: int
    ) -> None:
        ticket = self._ticket
        assert ticket is not None  # noqa: S101 - the decoder refuses changes outside of transactions
        if routed:
            self._acknowledger.hand(ticket, len(routed))
            handed += [(route, projected, ticket, size_bytes) for route, projected in routed]

    def _bracket(self, decoded: Begin | Change | Commit | Message, handed: list[Handed]) -> bool:
        """Open and close transactions, route messages; return False when ``until`` is reached."""
        match decoded:
            case Begin(transaction):
                if self._until is not None and transaction.commit_lsn >= self._until:
                    self._reached_until = True
                    return False
                self._ticket = self._acknowledger.open(transaction.end_lsn)
                self._ticket.transaction = transaction
            case Commit():
                assert self._ticket is not None  # noqa: S101 - the decoder refuses such a commit
                self._acknowledger.close(self._ticket)
                self._received_lsn = max(self._received_lsn, self._ticket.end_lsn)
                self._ticket = None
                self._counts.transactions += 1
            case Message():
                self._counts.messages += 1
                if self._on_message is not None:
                    self._on_message(decoded)
                self._hand_message(decoded, handed)
        return True

    def _hand_message(self, message: Message, handed: list[Handed]) -> None:
        routed = self._binding.route_message(message)
        if not routed:
            return
        # One outside of a transaction is one of its own: it comes again until its end is confirmed.
        ticket = self._ticket
        if message.transaction is None or ticket is None:
            ticket = self._acknowledger.open(message.lsn)
        self._acknowledger.hand(ticket, len(routed))
        size_bytes = len(message.content)
        handed += [(route, its_message, ticket, size_bytes) for route, its_message in routed]
        if ticket is not self._ticket:
            self._acknowledger.close(ticket)

    async def _report(self) -> None:
        """Send status updates on a clock of their own; give the slot up for a stuck handler."""
        pause = min(WATCH_SECONDS, self._status_interval_seconds)
        ask_seconds = min(ASK_SECONDS, self._receive_timeout_seconds / 3)
        sent_at, asked_at, sent_lsn = 0.0, 0.0, ZERO
        while True:
            await self._record_taken(pause)
            now = time.monotonic()
            asks = self.silent_seconds >= ask_seconds and now - asked_at >= ask_seconds
            is_news = self._recorded_lsn != sent_lsn
            # News is told at every look: what is not confirmed comes again after a crash.
            if asks or is_news or now - sent_at >= self._status_interval_seconds:
                self._send_status(reply_requested=asks)
                sent_at, sent_lsn = now, self._recorded_lsn
                asked_at = now if asks else asked_at
            self.standstill_seconds(now)
            self._delivery.watch(now)
            refuse_stuck(self._delivery.held, now, self._release_after_seconds)
            await asyncio.sleep(pause)

    async def _record_taken(self, within_seconds: float) -> None:
        """Record what is taken: only what is recorded is confirmed.

        A disk that does not answer holds up what is confirmed, and no sign of life.
        """
        flush_lsn = self._acknowledger.flush_lsn
        if self._recording is None:
            if flush_lsn == self._recorded_lsn:
                return
            self._recording = asyncio.create_task(self._record_up_to(flush_lsn))
        await asyncio.wait([self._recording], timeout=within_seconds)
        if self._recording.done():
            done, self._recording = self._recording, None
            done.result()

    async def _record_up_to(self, flush_lsn: Lsn) -> None:
        await self._record(flush_lsn)
        self._recorded_lsn = flush_lsn

    async def _watch(self) -> None:
        """Look at what the stream cannot tell: a server that shuts down, tables that change kind.

        A task of its own, because a catalog that does not answer must not hold up status updates.
        """
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._acknowledger.in_flight or self._delivery.held is not None:
                await self._notice_shutdown()
            if time.monotonic() - checked_at >= RECHECK_SECONDS:
                await self._check_routes()
                checked_at = time.monotonic()

    async def _refuse_silence(self) -> None:
        """Give up a connection on which the server does not even answer.

        A walsender that decodes what it will not send, such as millions of rows of other tables,
        is silent too. The catalog tells the difference.
        """
        while True:
            await asyncio.sleep(min(WATCH_SECONDS, self._receive_timeout_seconds / 4))
            if self.silent_seconds < self._receive_timeout_seconds:
                continue
            is_decoding = await self._is_decoding()
            silent_seconds = self.silent_seconds
            if is_decoding is None:  # nobody can tell: it may well be
                is_decoding = silent_seconds < PATIENCE * self._receive_timeout_seconds
            if not is_decoding and silent_seconds >= self._receive_timeout_seconds:
                self._is_cut = True  # nobody reads what would be confirmed
                message = f"the server has not answered for {silent_seconds:.0f} seconds"
                raise ConnectionLost(message)

    async def _is_decoding(self) -> bool | None:
        """Ask the catalog; where that does not answer either, nothing is."""
        asking = asyncio.create_task(self._catalog.is_decoding(self._connection.backend_pid))
        done, _ = await asyncio.wait([asking], timeout=ANSWER_SECONDS)
        if not done:
            self._catalog.abandon()
            asking.cancel()
            return False
        return False if asking.exception() is not None else asking.result()

    async def _notice_shutdown(self) -> None:
        """Stop when the server wants to shut down.

        While changes are in flight the stream does not say so: the server's request for
        confirmation stands behind all that has not been read yet.
        """
        try:
            await self._catalog.probe()
        except ServerShutdown as shutdown:
            if not self._stopping:
                log.warning("server_shutting_down", drain_seconds=self._drain_seconds)
            self.stop(shutdown)
        except WalstreamError as error:
            log.debug("probe_failed", error=error.message)  # the stream itself shows how it is

    def _send_status(self, *, reply_requested: bool = False) -> None:
        if self._aborted or self._is_cut:
            return
        self._connection.send(
            status_update(self._recorded_lsn, now=time.time(), reply_requested=reply_requested)
        )

    async def _confirm(self) -> bool:
        """Report the last position and let the server read it, if the connection still can."""
        if self._aborted or self._is_cut:
            return False
        try:
            async with asyncio.timeout(FINISH_SECONDS):
                await self._record_taken(FINISH_SECONDS)
                if self._recorded_lsn != self._acknowledger.flush_lsn:
                    await self._record_taken(FINISH_SECONDS)
                self._send_status()
                await self._connection.finish()
        except (TimeoutError, WalstreamError) as error:
            log.warning("confirm_failed", error=type(error).__name__)
            return False
        return True


def refuse_stuck(held: Held | None, now: float, release_after_seconds: float) -> None:
    """Give the slot up for another process when a call lasts too long.

    Raises:
        HandlerStuck: it does.
    """
    if held is not None and now - held.since > release_after_seconds:
        raise HandlerStuck(
            f"{held.destination} has held change {held.change_id} for"
            f" {now - held.since:.0f} seconds",
            hint="the slot is freed; release_after_seconds is the limit",
        )


def first_failure(failures: ExceptionGroup[Exception]) -> Exception:
    """Return the first of the errors in a group, however deep."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, ExceptionGroup) else first


def _position(data: bytes) -> str:
    """Say where a record lies that cannot be used."""
    message = parse(data)
    return f"at {Lsn(message.data_start)}" if isinstance(message, XLogData) else "in a keepalive"
