"""Who is present in a room, as the clients of Phoenix keep it.

A client has a state, which is told once, and diffs, which it applies to it in order: of each diff
all joins, and then all leaves. So what was told counts here, and not only what is true by now:
`state` is what all diffs so far have come to, and `take_diff` is all that has happened since. A
client that is told the state, and every diff that is taken after that, has what everybody has.

Whoever joins and leaves between two diffs is in none of them. The metas of one key are in the order
in which they were tracked, here and on every client; one that is tracked anew goes to the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import msgspec

_OURS: Final = ("phx_ref", "phx_ref_prev")

Member: TypeAlias = object
"""Whoever is present, by one meta."""


class Meta(msgspec.Struct, frozen=True, eq=False):
    """One presence: ``json`` is the text that clients get of it, ``content`` what was tracked."""

    key: str
    ref: str
    previous_ref: str | None
    content: bytes

    @property
    def json(self) -> bytes:
        """The JSON text."""
        head = b'{"phx_ref":"%b"' % self.ref.encode()
        if self.previous_ref is not None:
            head += b',"phx_ref_prev":"%b"' % self.previous_ref.encode()
        return head + (b"}" if self.content == b"{}" else b"," + self.content[1:])


class Unwritable(ValueError):
    """A payload that cannot be written as a JSON object again."""


def content_of(payload: Mapping[str, Any]) -> bytes:
    """Write what somebody tracks; the names that are Phoenix's own are left out.

    Raises:
        Unwritable: it is nested too deeply, or has text that no UTF-8 is made of.
    """
    try:
        return msgspec.json.encode({k: v for k, v in payload.items() if k not in _OURS})
    except (RecursionError, UnicodeEncodeError, TypeError, msgspec.ValidationError) as error:
        raise Unwritable(str(error)) from None


class Presences:
    """Everybody who is present in one room."""

    def __init__(self, refs: Iterator[str]) -> None:
        """Begin with nobody.

        Args:
            refs: texts for JSON that nobody else is given, also by a process before this one: by
                them clients tell what they know already.
        """
        self._refs = refs
        self._present: dict[Member, Meta] = {}
        self._told: dict[str, dict[str, Meta]] = {}
        self._joins: dict[str, Meta] = {}
        self._leaves: dict[str, Meta] = {}
        self._state: bytes | None = None
        self.bytes = 0
        """What is present, by the size of keys and contents."""

    def __len__(self) -> int:
        return len(self._present)

    def track(self, member: Member, key: str, content: bytes) -> bool:
        """Let somebody be present, with this instead of what they were before.

        Args:
            member: who.
            key: under which others see them, together with all who have the same.
            content: of `content_of`.

        Returns:
            whether anything is new by that.
        """
        before = self._present.get(member)
        if before is not None and before.key == key and before.content == content:
            return False
        previous = None if before is None or before.key != key else self._known_ref(before)
        self.untrack(member)
        meta = Meta(key, next(self._refs), previous, content)
        self._present[member] = self._joins[meta.ref] = meta
        self.bytes += size_of(key, content)
        return True

    def untrack(self, member: Member) -> bool:
        """Let somebody be absent; return whether they were present."""
        meta = self._present.pop(member, None)
        if meta is None:
            return False
        self.bytes -= size_of(meta.key, meta.content)
        if self._joins.pop(meta.ref, None) is None:
            self._leaves[meta.ref] = meta
        return True

    def size(self, member: Member) -> int:
        """Return how much of `bytes` is somebody's."""
        meta = self._present.get(member)
        return 0 if meta is None else size_of(meta.key, meta.content)

    @property
    def has_news(self) -> bool:
        """Whether there is something for a diff."""
        return bool(self._joins or self._leaves)

    def take_diff(self) -> bytes:
        """Return, as JSON, what is to be told now; from now on it belongs to the state."""
        joins, leaves = list(self._joins.values()), list(self._leaves.values())
        self._joins.clear()
        self._leaves.clear()
        self._tell(joins, leaves)
        return b'{"joins":%b,"leaves":%b}' % (_json(_grouped(joins)), _json(_grouped(leaves)))

    def state(self) -> bytes:
        """Return, as JSON, what was told."""
        if self._state is None:
            self._state = _json({key: metas.values() for key, metas in self._told.items()})
        return self._state

    def _known_ref(self, meta: Meta) -> str | None:
        """Return the last ref of a presence that was told."""
        return meta.previous_ref if meta.ref in self._joins else meta.ref

    def _tell(self, joins: Iterable[Meta], leaves: Iterable[Meta]) -> None:
        self._state = None
        for meta in joins:
            self._told.setdefault(meta.key, {})[meta.ref] = meta
        for meta in leaves:
            metas = self._told[meta.key]
            del metas[meta.ref]
            if not metas:
                del self._told[meta.key]


def size_of(key: str, content: bytes) -> int:
    """Return what a presence counts."""
    return len(key) + len(content)


def _grouped(metas: Iterable[Meta]) -> dict[str, list[Meta]]:
    groups: dict[str, list[Meta]] = {}
    for meta in metas:
        groups.setdefault(meta.key, []).append(meta)
    return groups


def _json(groups: Mapping[str, Iterable[Meta]]) -> bytes:
    written = (
        b'%b:{"metas":[%b]}' % (msgspec.json.encode(key), b",".join([one.json for one in metas]))
        for key, metas in groups.items()
    )
    return b"{%b}" % b",".join(written)
