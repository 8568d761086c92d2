"""Changes on their way to destinations, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from walstream.acknowledger import Acknowledger, Ticket
from walstream.backoff import Backoff
from walstream.changes import Change, Column, Layout, Message, Operation, Relation, Transaction
from walstream.delivery import Delivery, Limits
from walstream.destinations import Destination, Handler, HandlerFunction, HandlerOptions, Item
from walstream.flow import Handed
from walstream.lsn import Lsn
from walstream.outlets import OutletCounts
from walstream.policy import FailurePolicy
from walstream.router import MessageRoute, Route, TablePattern
from walstream.values import Types

TEXT: Final = 25
LAYOUT: Final = Layout(
    Relation("public", "orders"),
    ["id", "status"],
    [TEXT, TEXT],
    ["id"],
    Types(lambda _: lambda text: text.decode()),
    columns={"id": TEXT, "status": TEXT},
)
QUICK: Final = FailurePolicy(attempts=3, backoff=Backoff(0.001, 0.001))
SIZE_BYTES: Final = 100


def handler(function: HandlerFunction, name: str = "handler", **options: Any) -> Handler:
    return Handler(function, name=name, options=HandlerOptions(**options))


def called(item: Item) -> str:
    """What a change is called in a test: as in `Line.send`."""
    if isinstance(item, Message):
        return item.content
    if item.operation is Operation.TRUNCATE:
        return "*"
    new = str(item.sent_row["id"])
    old = item.identity.get("id", new)
    return new if old == new else f"{old}>{new}"


def _columns(text: str) -> list[Column]:
    return [Column("id", msgspec.Raw(msgspec.json.encode(text)), TEXT)]


def _change(name: str, transaction: Transaction, ordinal: int) -> Change:
    if name == "*":
        return Change(Operation.TRUNCATE, LAYOUT, transaction, ordinal)
    old, _, new = name.rpartition(">")
    operation, identity = (Operation.UPDATE, _columns(old)) if old else (Operation.INSERT, None)
    return Change(operation, LAYOUT, transaction, ordinal, _columns(new), identity)


class Line:
    """Transactions end at 100, 200, ... by `commit`; ``policies`` are by destination."""

    def __init__(
        self,
        *destinations: Destination,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        policy: FailurePolicy = QUICK,
        policies: Mapping[Destination, FailurePolicy] | None = None,
        **options: Any,
    ) -> None:
        self.acknowledger = Acknowledger(Lsn(0))
        self.delivery = Delivery(destinations, limits, **options)
        self.routes = {
            destination: Route(
                destination.name,
                TablePattern(None, None),
                destination,
                policy=(policies or {}).get(destination, policy),
            )
            for destination in destinations
        }
        self.first = destinations[0]
        self.handed: list[Handed] = []
        self.end = 0
        self.ordinal = 0
        self._ticket: Ticket | None = None

    @property
    def ticket(self) -> Ticket:
        """Of the transaction that changes are sent in."""
        if self._ticket is None:
            self.end += 100
            self.ordinal = 0
            self._ticket = self.acknowledger.open(Lsn(self.end))
        return self._ticket

    @property
    def transaction(self) -> Transaction:
        return Transaction(self.end, Lsn(self.end - 9), Lsn(self.end), "2026-01-01 00:00:00+00")

    def send(self, names: str, *, to: Destination | None = None, by: Route | None = None) -> None:
        """Let changes come: ``a`` inserts row a, ``a>b`` makes it b, ``*`` truncates."""
        ticket = self.ticket
        for name in names.split():
            self.ordinal += 1
            change = _change(name, self.transaction, self.ordinal)
            self._hand(by or self.routes[to or self.first], change, ticket)

    def message(self, content: str, *, prefix: str = "jobs") -> None:
        """Let a message come to the first destination, outside of a transaction."""
        assert self._ticket is None
        route = self.routes[self.first]
        ticket = self.ticket
        self._ticket = None
        by = MessageRoute("messages", "jobs", self.first, route.policy)
        self._hand(by, Message(prefix, content, Lsn(self.end)), ticket)
        self.acknowledger.close(ticket)

    def _hand(self, route: Route | MessageRoute, item: Item, ticket: Ticket) -> None:
        self.acknowledger.hand(ticket)
        self.handed.append((route, item, ticket, SIZE_BYTES))

    def close(self) -> None:
        """Let the COMMIT come."""
        self.acknowledger.close(self.ticket)
        self._ticket = None

    def commit(self, *names: str, to: Destination | None = None) -> None:
        """Let whole transactions come, one for each text."""
        for one in names:
            self.send(one, to=to)
            self.close()

    def hand(self) -> None:
        """Hand over what has come since the last time."""
        handed, self.handed = self.handed, []
        self.delivery.hand(handed)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncio.Task[None]]:
        """Deliver while the block runs, and until all is delivered."""
        self.delivery.attach(self.acknowledger)
        running = asyncio.create_task(self.delivery.run())
        try:
            self.hand()
            yield running
            self.hand()
            self.delivery.finish()
            if not running.cancelled():
                await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def deliver(self) -> None:
        """Deliver what has come, in a session of its own."""
        self.delivery.attach(self.acknowledger)
        self.hand()
        self.delivery.finish()
        await self.delivery.run()

    @property
    def taken(self) -> int:
        """Up to where all is taken."""
        return int(self.acknowledger.flush_lsn)

    @property
    def counts(self) -> OutletCounts:
        """Of the first destination."""
        return self.delivery.counts[self.first.name]


class Recorder:
    """A handler's function that notes what it is called with, and fails as it is told.

    ``errors`` are raised when a change of that name comes, the first one first.
    """

    def __init__(self, **errors: list[BaseException]) -> None:
        self.calls: list[str] = []
        self.errors = errors

    def note(self, item: Item | list[Item]) -> None:
        items = item if isinstance(item, list) else [item]
        self.calls.append(" ".join(map(called, items)))
        for one in items:
            if errors := self.errors.get(called(one)):
                raise errors.pop(0)

    async def in_loop(self, item: Any) -> None:
        self.note(item)

    def in_thread(self, item: Any) -> None:
        self.note(item)
