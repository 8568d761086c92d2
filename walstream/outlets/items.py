"""What an outlet asks about a change on its way."""

from __future__ import annotations

from collections.abc import Sequence

from walstream.changes import Message
from walstream.destinations import Item
from walstream.flow import Handed
from walstream.keys import Key, keys_of
from walstream.parking import Part
from walstream.policy import FailurePolicy


def keys_of_item(item: Item, columns: Sequence[str] | None) -> tuple[Key, ...]:
    """Return what an item is about; messages are in order per prefix."""
    if isinstance(item, Message):
        return ((f"message {item.prefix}", b"*"),)
    return keys_of(item, columns)


def parts_of(unit: Sequence[Handed], columns: Sequence[str] | None) -> list[Part]:
    """Return changes as the dead-letter store wants them."""
    return [(route.name, item, keys_of_item(item, columns)) for route, item, _, _ in unit]


def policy_of(entry: Handed) -> FailurePolicy:
    """Return what its route says about failures."""
    policy: FailurePolicy = entry[0].policy
    return policy


def named(item: Item) -> str:
    """Name an item without its values."""
    return f"{'message' if isinstance(item, Message) else 'change'} {item.id}"
