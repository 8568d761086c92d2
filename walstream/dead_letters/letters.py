"""Dead letters: what of a change is kept when its destination would not take it.

A letter holds the change as its route saw it, after projection and masks: what is masked is stored
masked. The payload is JSON; values stay the JSON that wal2json sent, with the OIDs of their types.
The types themselves are not in it: at the replay the catalog tells them (`typeoids_of`). An OID is
good for one database cluster, and for what pg_upgrade makes of it, and so is a payload.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, TypeAlias

import msgspec

from walstream.changes import Change, Column, Layout, Message, Operation, Relation, Transaction
from walstream.errors import DeadLetterStoreFailed
from walstream.keys import Key
from walstream.lsn import Lsn
from walstream.values import Types

PAYLOAD_VERSION: Final = 1

TEXT_BYTES: Final = 16 << 10
"""What is kept of an error or a traceback."""

_CUT: Final = b"\n[...]\n"

Position: TypeAlias = tuple[Lsn, int]
"""Where in the stream a change stands: these compare in the order in which changes come."""

Identity: TypeAlias = tuple[str, str]
"""Route and id of a change: a store has no two letters of one."""

_BEHIND_ALL: Final = 1 << 62
"""The ordinal of what stands alone at its LSN: a transaction that ends there came before it."""


class DeadLetter(msgspec.Struct, frozen=True):
    """A change or message that a route could not deliver, or that waits behind one.

    Attributes:
        route: the route's name.
        change_id: ``Change.id`` or ``Message.id``.
        operation: None for a message.
        relation: the table that the change came from, a partition perhaps; None for a message.
        keys: what the change is about, as the route keys it (`walstream.keys`).
        payload: what `payload_of` made.
        attempts: how many there were; 0 when it is parked.
        error: type and place of the last attempt's exception; empty when it is parked.
        traceback: its frames.
        parked: it was never tried, for an earlier one of its keys is here.
        first_failed_at: None when it is parked.
        stored_at: when it was put here.
    """

    route: str
    change_id: str
    operation: Operation | None
    relation: Relation | None
    keys: tuple[Key, ...]
    payload: bytes
    stored_at: datetime
    attempts: int = 0
    error: str = ""
    traceback: str = ""
    parked: bool = False
    first_failed_at: datetime | None = None

    @property
    def identity(self) -> Identity:
        """What tells it from all others."""
        return self.route, self.change_id

    @property
    def position(self) -> Position:
        """Where in the stream it stands."""
        return position_of(self.change_id)

    @property
    def size_bytes(self) -> int:
        """What counts against the bound on a store's size: about what it takes there."""
        return (
            len(self.payload)
            + len(storable(self.error).encode())
            + len(storable(self.traceback).encode())
            + sum(len(values) for _, values in self.keys)
        )

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"DeadLetter({self.route} {self.change_id})"


def storable(text: str) -> str:
    """Return what is kept of an error or a traceback, in its place what a database cannot hold.

    That is NUL, and what is no Unicode text. A long one is cut in its middle to `TEXT_BYTES`.
    """
    kept = text.encode("utf-8", "replace").replace(b"\0", "\N{REPLACEMENT CHARACTER}".encode())
    if len(kept) > TEXT_BYTES:
        half = (TEXT_BYTES - len(_CUT)) // 2
        kept = kept[:half] + _CUT + kept[-half:]
    return kept.decode(errors="ignore")


def position_of(change_id: str) -> Position:
    """Return where in the stream the change or message of an id stands.

    Raises:
        ValueError: it is no such id.
    """
    lsn, _, ordinal = change_id.partition(":")
    # A message outside of a transaction has the LSN at which its record starts. That may be where
    # the commit record before it ends.
    return Lsn.parse(lsn), int(ordinal) if ordinal else _BEHIND_ALL


def parked(letter: DeadLetter) -> DeadLetter:
    """Return a letter as one that was never tried."""
    return msgspec.structs.replace(
        letter, parked=True, attempts=0, error="", traceback="", first_failed_at=None
    )


def payload_of(item: Change | Message) -> bytes:
    """Return all that `item_of` needs, as one JSON object.

    Raises:
        DecodeError: the old values in the record are not what wal2json writes.
    """
    match item:
        case Message():
            return _ENCODER.encode(_MessagePayload.of(item))
        case change:
            return _ENCODER.encode(_ChangePayload.of(change))


def item_of(payload: bytes, types: Types) -> Change | Message:
    """Return the change or message that a payload was made of.

    Args:
        payload: what `payload_of` made.
        types: should know `typeoids_of` the payload; values of other types stay text.

    Raises:
        DeadLetterStoreFailed: it cannot be read, or is of another version.
    """
    match _decoded(payload):
        case _MessagePayload() as message:
            return message.message()
        case change:
            return change.change(types)


def typeoids_of(payload: bytes) -> frozenset[int]:
    """Return the OIDs of the types of a payload's values and columns.

    Raises:
        DeadLetterStoreFailed: it cannot be read, or is of another version.
    """
    match _decoded(payload):
        case _MessagePayload():
            return frozenset()
        case change:
            sent = [*(change.columns or ()), *(change.identity or ())]
            layout = change.layout
            return frozenset(
                [*layout.typeoids, *layout.columns.values(), *(column.typeoid for column in sent)]
            )


class _TransactionPayload(msgspec.Struct, frozen=True):
    xid: int
    commit_lsn: str
    end_lsn: str
    commit_timestamp: str

    @classmethod
    def of(cls, transaction: Transaction) -> _TransactionPayload:
        return cls(
            transaction.xid,
            str(transaction.commit_lsn),
            str(transaction.end_lsn),
            transaction.commit_timestamp,
        )

    def transaction(self) -> Transaction:
        return Transaction(
            self.xid,
            Lsn.parse(self.commit_lsn),
            Lsn.parse(self.end_lsn),
            self.commit_timestamp,
        )


class _LayoutPayload(msgspec.Struct, frozen=True):
    relation: Relation
    names: list[str]
    typeoids: list[int]
    key: list[str]
    ancestors: tuple[Relation, ...]
    columns: dict[str, int]
    missing: tuple[str, ...]
    toastable: tuple[str, ...]
    is_full: bool
    in_catalog: bool

    @classmethod
    def of(cls, layout: Layout) -> _LayoutPayload:
        return cls(
            layout.relation,
            layout.names,
            layout.typeoids,
            layout.key,
            layout.ancestors,
            dict(layout.columns),
            layout.missing,
            layout.toastable,
            layout.is_full,
            layout.in_catalog,
        )

    def layout(self, types: Types) -> Layout:
        return Layout(types=types, **msgspec.structs.asdict(self))


class _ChangePayload(msgspec.Struct, frozen=True, tag_field="kind", tag="change"):
    operation: Operation
    layout: _LayoutPayload
    transaction: _TransactionPayload
    ordinal: int
    columns: list[Column] | None
    identity: list[Column] | None
    unchanged: tuple[str, ...]
    leaving: bool
    version: int = PAYLOAD_VERSION

    @classmethod
    def of(cls, change: Change) -> _ChangePayload:
        return cls(
            operation=change.operation,
            layout=_LayoutPayload.of(change.layout),
            transaction=_TransactionPayload.of(change.transaction),
            ordinal=change.ordinal,
            columns=change.new_columns,
            identity=change.identity_columns,
            unchanged=change.unchanged,
            leaving=change.leaving,
        )

    def change(self, types: Types) -> Change:
        return Change(
            operation=self.operation,
            layout=self.layout.layout(types),
            transaction=self.transaction.transaction(),
            ordinal=self.ordinal,
            new_columns=self.columns,
            sent_identity=self.identity,
            unchanged=self.unchanged,
            leaving=self.leaving,
        )


class _MessagePayload(msgspec.Struct, frozen=True, tag_field="kind", tag="message"):
    prefix: str
    content: str
    lsn: str
    transaction: _TransactionPayload | None
    ordinal: int
    version: int = PAYLOAD_VERSION

    @classmethod
    def of(cls, message: Message) -> _MessagePayload:
        transaction = message.transaction
        return cls(
            prefix=message.prefix,
            content=message.content,
            lsn=str(message.lsn),
            transaction=None if transaction is None else _TransactionPayload.of(transaction),
            ordinal=message.ordinal,
        )

    def message(self) -> Message:
        transaction = None if self.transaction is None else self.transaction.transaction()
        return Message(self.prefix, self.content, Lsn.parse(self.lsn), transaction, self.ordinal)


class _Versioned(msgspec.Struct):
    version: int


_ENCODER: Final = msgspec.json.Encoder()
_VERSION: Final = msgspec.json.Decoder(_Versioned)
_PAYLOAD: Final[msgspec.json.Decoder[_ChangePayload | _MessagePayload]] = msgspec.json.Decoder(
    _ChangePayload | _MessagePayload
)


def _decoded(payload: bytes) -> _ChangePayload | _MessagePayload:
    try:
        version = _VERSION.decode(payload).version
        if version == PAYLOAD_VERSION:
            return _PAYLOAD.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Not from it: its text may hold a value.
        message = f"a dead letter's payload of {len(payload)} bytes cannot be read"
        hint = "it was damaged, or changed by hand: drop it, and bring its row over by other means"
        raise DeadLetterStoreFailed(message, hint=hint) from None
    message = (
        f"a dead letter's payload has version {version}, this walstream knows {PAYLOAD_VERSION}"
    )
    hint = "it was stored by another version of walstream: use that one"
    raise DeadLetterStoreFailed(message, hint=hint)
