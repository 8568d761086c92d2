"""Who sees a change: found by relation, operation and the value of a column.

A `Group` is one view with all who have it: its filter is tested once. Groups that need a column to
equal a value are found by that value, so a change costs what sees it, and not how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from walstream.changes import Change, Layout, Operation, Row
from walstream.errors import DecodeError
from walstream.filters import equality_key
from walstream.live.encodings import Form
from walstream.live.views import View

_UPDATE: Final = Operation.UPDATE
_DELETE: Final = Operation.DELETE
_TRUNCATE: Final = Operation.TRUNCATE


class Member(Protocol):
    """Who has views."""

    def __hash__(self) -> int:
        """Hash by identity."""


MemberT = TypeVar("MemberT", bound=Member)


class Group(Generic[MemberT]):
    """A view, the form it is wanted in, and who has it.

    ``members`` have it with the rank that it has among their views.
    """

    __slots__ = ("form", "members", "view")

    def __init__(self, view: View, form: Form) -> None:
        self.view = view
        self.form = form
        self.members: dict[MemberT, int] = {}


class _ByValue(msgspec.Struct, Generic[MemberT], eq=False):
    """Groups that need one column to equal a value, by the value."""

    column: str
    key_of: Callable[[msgspec.Raw], Any]
    groups: dict[Any, dict[Group[MemberT], None]]


class _Found(msgspec.Struct, Generic[MemberT], eq=False):
    """The groups for one operation: those tried each time, and those found by a value."""

    scanned: dict[Group[MemberT], None]
    by_column: dict[str, _ByValue[MemberT]]


class LayoutIndex(Generic[MemberT]):
    """All groups for the changes of one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._groups: dict[Hashable, Group[MemberT]] = {}
        self._found: dict[Operation, _Found[MemberT]] = {
            operation: _Found({}, {}) for operation in Operation
        }
        # Updates are also looked up by their old row, by groups that want to know what leaves.
        self._leaving: _Found[MemberT] = _Found({}, {})

    def group(self, key: Hashable) -> Group[MemberT] | None:
        """Return the group of a key, if there is one."""
        return self._groups.get(key)

    def add(self, key: Hashable, group: Group[MemberT]) -> None:
        """Take in a group."""
        self._groups[key] = group
        for operation in Operation:
            if group.view.wants(operation):
                self._place(self._found[operation], operation, group)
        if group.view.may_leave:
            self._place(self._leaving, _UPDATE, group)

    def remove(self, key: Hashable) -> None:
        """Let go of a group."""
        group = self._groups.pop(key)
        for found in (*self._found.values(), self._leaving):
            _take_out(found, group, self.layout)

    def candidates(self, change: Change) -> Iterator[Group[MemberT]]:
        """Go through the groups that may see the change; `View.look` says whether they do."""
        operation = change.operation
        found = self._found[operation]
        yield from found.scanned
        if operation is _TRUNCATE:
            return
        if operation is not _UPDATE:
            yield from _by_value(found, change.identity if operation is _DELETE else change.row)
            return
        row = change.row
        if not self._leaving.by_column:
            yield from _by_value(found, row)
            return
        # A group that is found by the new row must not come again by the old one.
        first = dict.fromkeys(_by_value(found, row))
        yield from first
        for group in _by_value(self._leaving, change.identity):
            if group not in first:
                yield group

    def _place(self, found: _Found[MemberT], operation: Operation, group: Group[MemberT]) -> None:
        equalities = group.view.equalities
        if operation is _TRUNCATE or not equalities:
            if found is not self._leaving:  # it is tried for each update as it is
                found.scanned[group] = None
            return
        column = _chosen(group, self.layout)
        key = equalities[column]
        by_value = found.by_column.get(column)
        if by_value is None:
            key_of = equality_key(self.layout.columns[column], self.layout.types)
            by_value = found.by_column[column] = _ByValue(column, key_of, {})
        by_value.groups.setdefault(key, {})[group] = None


def _by_value(found: _Found[MemberT], row: Row) -> Iterator[Group[MemberT]]:
    for by_value in found.by_column.values():
        column = row.column(by_value.column)
        if column is None:
            continue
        try:
            key = by_value.key_of(column.value)
        except (ValueError, DecodeError):  # a filter of clients never stops the stream
            continue
        if key is not None:
            yield from by_value.groups.get(key, ())


def _chosen(group: Group[MemberT], layout: Layout) -> str:
    """Return the column that a group is found by: one of the key has few rows for a value."""
    equalities = group.view.equalities
    return next((name for name in layout.key if name in equalities), next(iter(equalities)))


def _take_out(found: _Found[MemberT], group: Group[MemberT], layout: Layout) -> None:
    found.scanned.pop(group, None)
    if not group.view.equalities:
        return
    column = _chosen(group, layout)
    key = group.view.equalities[column]
    by_value = found.by_column.get(column)
    if by_value is None:
        return
    groups = by_value.groups.get(key)
    if groups is not None:
        groups.pop(group, None)
        if not groups:
            del by_value.groups[key]
    if not by_value.groups:
        del found.by_column[column]
