"""Publishes changes to clients, and lets clients come and go without missing one.

``position`` is the last change that was published. A client is joined in one step of the event
loop, when what it has read from the history ends exactly there: so nothing lies between replay and
live, and nothing comes twice.

Publishing waits for no client: one that does not keep up is given up (`Client.push`). It gives way
to the rest of the process every few milliseconds, and waits while it is our own sending that is
behind.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final, TypeAlias

import structlog

from walstream.access.readers import Reader
from walstream.catalog import Catalog
from walstream.changes import Change, memory_bytes
from walstream.live.clients import Client, Cohort, End, Joined
from walstream.live.compiled import Compiled, Prepared
from walstream.live.encodings import Encoding, Sighting
from walstream.live.history import History
from walstream.live.index import Group
from walstream.live.literals import Literals
from walstream.live.requests import Requests
from walstream.live.sieves import Backlog, Doubt, Held, Judge, RowSecurity, Sieve
from walstream.live.subscriptions import Subscription
from walstream.live.turns import SLICE_SECONDS, Turns
from walstream.live.views import Look, View
from walstream.lsn import Lsn
from walstream.positions import BEGINNING, Position
from walstream.values import UnknownLabel
from walstream.vitals import LiveVitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.live")

SLICE_BYTES: Final = 1 << 16
"""So much is given to a client at once, and a change more."""

_Shown: TypeAlias = dict[Hashable, bytes]
_Frames: TypeAlias = dict[Cohort, list[bytes]]
_Seen: TypeAlias = dict[Cohort, tuple[Sighting, ...]]
_Doubted: TypeAlias = dict[Cohort, list[Doubt]]


class Hub:
    """Who is there, and what they see."""

    def __init__(
        self, catalog: Catalog, history: History, row_security: RowSecurity | None = None
    ) -> None:
        """Begin with nobody; without `row_security` nothing is seen that it would decide about."""
        self.history = history
        self.row_security = row_security
        self.position = BEGINNING
        self.beginnings = 0
        """How often what is kept began anew."""
        self.has_begun = False
        self._rules = ""
        self.ended: Counter[End] = Counter()
        self.sent_changes = 0
        self.published_changes = 0
        self.turns = Turns()
        """Of those who read what they missed."""
        self._catalog = catalog
        self._clients: dict[Client, None] = {}
        self._cohorts: dict[Hashable, Cohort] = {}
        literals = Literals(catalog)
        self.requests = Requests(catalog, literals)
        """What may be asked for."""
        self.compiled = Compiled(catalog, literals, self._cohorts)
        self.judge = Judge(row_security, self.requests.masked)
        """What of it is seen that the server decides about."""
        self._backlog = Backlog()
        self._sieves: dict[Cohort, Sieve] = {}

    # Who is there

    @property
    def clients(self) -> list[Client]:
        """All who are served, those among them who still read what they missed."""
        return list(self._clients)

    @property
    def client_count(self) -> int:
        """How many they are, without those that are cut off and have not noticed it."""
        return sum(not client.has_ended() for client in self._clients)

    def enter(self, client: Client) -> None:
        """A client begins to be served; `leave` ends that."""
        self._clients[client] = None

    def vitals(self) -> LiveVitals:
        """Say how many there are, and what they got."""
        return LiveVitals(
            clients=self.client_count,
            cohorts=len(self._cohorts),
            published_changes=self.published_changes,
            sent_changes=self.sent_changes + self._backlog.sent_changes,
            ended={str(end): count for end, count in self.ended.items()},
            row_security=None if self.row_security is None else self.row_security.vitals(),
        )

    def cohort(
        self, subscriptions: Sequence[Subscription], reader: Reader, encoding: Encoding
    ) -> Cohort:
        """Return the cohort of a client to be: an old one, or one that is not joined yet."""
        new = Cohort(subscriptions, reader, encoding)
        return self._cohorts.get(new.key, new)

    def join(self, client: Client, prepared: Prepared) -> bool:
        """Let a client have what is published from now on.

        Args:
            client: new.
            prepared: by `Compiled.prepare`.

        Returns:
            Whether it is done; if not, there are layouts that were not prepared.
        """
        cohort = self._cohorts.get(client.cohort.key)
        if cohort is None:
            cohort = client.cohort
            if not self.compiled.enter(cohort, prepared):
                return False
            self._cohorts[cohort.key] = cohort
            if any(grant.sight.persona is not None for grant in cohort.reader.grants):
                self._sieves[cohort] = Sieve(cohort, self.judge, self._backlog)
        client.cohort = cohort
        sieve = self._sieves.get(cohort)
        client.joined = Joined(self.position, 0 if sieve is None else sieve.added)
        cohort.clients[client] = None
        return True

    def reached(self, client: Client) -> Position:
        """Return up to where a client that has joined has got all that it sees."""
        sieve = self._sieves.get(client.cohort)
        reached = None if sieve is None else sieve.reached(client)
        return self.position if reached is None else reached

    def leave(self, client: Client) -> None:
        """Let a client go; it need not have joined."""
        self._clients.pop(client, None)
        if client.end is not None:
            self.ended[client.end] += 1
        cohort = client.cohort
        if client not in cohort.clients:
            return
        del cohort.clients[client]
        if not cohort.clients:
            del self._cohorts[cohort.key]
            if cohort in self._sieves:
                self._sieves.pop(cohort).close()
            self.compiled.withdraw(cohort)

    def finish(self, end: End) -> None:
        """Let all streams end."""
        for client in self.clients:
            client.finish(end)

    # What is published

    async def begin(self, at: Lsn, history: str, *, accept_gap: bool = False) -> None:
        """A session begins: the server sends what stands behind a position.

        Args:
            at: the position of the slot.
            history: tells apart the rules under which changes are kept: slot, cluster, routes.
            accept_gap: forget what is kept of another slot or cluster.

        Raises:
            SetupError: the journal cannot be used.
        """
        is_changed = self.has_begun and history != self._rules
        self._rules = history
        await self.history.open(history, accept_gap=accept_gap)
        if at > self.history.covered:
            # Others have taken what lies between, or nothing is known yet.
            await self.history.interrupt(at)
            self.position = Position.after(at)
            self.beginnings += 1
            log.info("history_begun", position=str(self.position), clients=self.client_count)
            self._tell_reset("changed" if is_changed else "interrupted")
        elif not self.has_begun:
            # Later on there are clients: what is kept and was not published comes again.
            self.position = max(
                self.position, self.history.position, Position.after(self.history.covered)
            )
        self.has_begun = True

    async def cover(self, lsn: Lsn) -> None:
        """Note, before it is confirmed, that all up to a position has been published."""
        if lsn > self.history.covered:
            await self.history.cover(lsn)
            self.position = max(self.position, Position.after(lsn))

    async def publish(self, changes: Sequence[Change]) -> None:
        """Let everybody who may see them have these changes, which stand behind ``position``.

        Raises:
            SinkFailed: the catalog cannot be asked; what was published is behind ``position``.
        """
        done, unknown = 0, -1
        while done < len(changes):
            await self.compiled.compile(changes[done:])
            done, is_known, pushed = self._publish_slice(changes, done, lenient=unknown)
            if not is_known:
                unknown = done
                await self.compiled.renew_types()
            elif done < len(changes):
                await asyncio.sleep(0)
            for client in pushed:
                # Nobody is cut off because we publish faster than we send.
                while client.outflow.is_behind and not client.has_ended():
                    await client.outflow.moved()

    def _publish_slice(
        self, changes: Sequence[Change], begin: int, *, lenient: int
    ) -> tuple[int, bool, list[Client]]:
        """Publish for a few milliseconds, or what one write can take.

        Returns how far it came, whether labels are known, and who got something.

        Whoever cannot compare a label of the change at ``lenient`` does not see it.
        """
        frames: _Frames = {}
        deadline = time.perf_counter() + SLICE_SECONDS
        done, is_known, size = begin, True, 0
        try:
            while done < len(changes) and size < SLICE_BYTES:
                if self.compiled.index(changes[done].layout) is None:
                    break  # the bound on layouts was reached
                size += self._publish_one(changes[done], frames, strict=done != lenient)
                done += 1
                if time.perf_counter() > deadline:
                    break
        except UnknownLabel:
            is_known = False
        finally:  # what is behind `position` is not published again, whatever a later one raises
            pushed = self._push(frames)
        return done, is_known, pushed

    def _push(self, frames: _Frames) -> list[Client]:
        pushed: list[Client] = []
        for cohort, pieces in frames.items():
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self.sent_changes += len(pieces) * len(cohort.clients)
            pushed += cohort.clients
            for client in cohort.clients:
                client.push(data)
        return pushed

    def _publish_one(self, change: Change, frames: _Frames, *, strict: bool) -> int:
        """Return the bytes of the longest form of the change that somebody gets."""
        longest = 0
        doubted: _Doubted = {}
        seen = self._seen_by(change, doubted, strict=strict)
        if self._sieves:
            self._hold(change, seen, doubted)
        for cohort, sightings in seen.items():
            frame = cohort.encoding.address(sightings)
            longest = max(longest, len(frame))
            pieces = frames.get(cohort)
            if pieces is None:
                frames[cohort] = [frame]
            else:
                pieces.append(frame)
        self.position = Position.of(change)
        self.published_changes += 1
        return longest

    def _seen_by(self, change: Change, doubted: _Doubted, *, strict: bool) -> _Seen:
        """Return who sees a change, and how; note who may, if row security shows it to them."""
        index = self.compiled.index(change.layout)
        seen: _Seen = {}
        if index is None:
            return seen
        shown: _Shown = {}
        for group in index.candidates(change):
            look = look_at(group.view, change, strict=strict)
            if look is None:
                continue
            body = _body(group, change, look, shown)
            if group.view.is_secured and look is not Look.BY_KEY:
                for cohort, rank in group.members.items():
                    doubted.setdefault(cohort, []).append((group.view.sight, (rank, body)))
                continue
            for cohort, rank in group.members.items():
                if cohort in seen:
                    seen[cohort] = (*seen[cohort], (rank, body))
                else:
                    seen[cohort] = ((rank, body),)
        return seen

    def _hold(self, change: Change, seen: _Seen, doubted: _Doubted) -> None:
        """Hold for cohorts with a sieve what they see, and what they may see."""
        size_bytes = memory_bytes(change)
        for cohort in [one for one in {**seen, **doubted} if one in self._sieves]:
            held = Held(change, seen.pop(cohort, ()), doubted.get(cohort, ()), size_bytes)
            self._sieves[cohort].add(held, self.position)

    def _tell_reset(self, reason: str) -> None:
        for cohort in self._cohorts.values():
            note = self.reset_note(cohort.encoding, reason)
            if cohort in self._sieves:
                self._sieves[cohort].clear()
            for client in cohort.clients:
                client.joined = client.joined._replace(position=self.position)
                client.push(note)

    def reset_note(self, encoding: Encoding, reason: str) -> bytes:
        """Write that something may be missing, and where the stream goes on."""
        content = {
            "reason": reason,
            "begins": str(self.history.begins),
            "position": str(self.position),
        }
        return encoding.note("reset", content, self.position)

    async def is_foreign(self, position: Position) -> bool:
        """Whether a position lies beyond all that the server has written: it is of another one."""
        return (
            position > self.position and position.end_lsn > (await self._catalog.server()).flush_lsn
        )


def look_at(view: View, change: Change, *, strict: bool) -> Look | None:
    """Say how a change is seen; with a label that is not known not at all, unless ``strict``.

    Raises:
        UnknownLabel: types must be asked for again.
    """
    try:
        return view.look(change)
    except UnknownLabel:
        if strict:
            raise
        return None


def _body(group: Group[Cohort], change: Change, look: Look, shown: _Shown) -> bytes:
    """Write the change as it is seen, once for all that see it alike."""
    key = (group.view.shape, look, group.form)
    body = shown.get(key)
    if body is None:
        body = shown[key] = group.form.write(group.view, change, look)
    return body
