"""What one reader sees of a change: the rules of visibility, in one place.

A reader's sight may have a condition on rows, and a subscription has a filter. Both are tested on
what the change itself carries, and what it does not carry is not visible:

- INSERT: the new row must pass both.
- UPDATE whose new row is visible and passes the filter: it is sent. The old row is sent with it
  only when that was visible too; a reader that a row comes to sees nothing of its past.
- UPDATE whose old row was visible and passed the filter, and whose new row is not visible any more:
  it has left the reader's sight, and is sent as ``leaving`` by its key alone; to a subscription
  that is not told of departures only when it asks for what leaves.
- UPDATE whose new row is visible and does not pass the filter, and whose old row did: sent, marked
  as ``leaving``, when the subscription asks for that.
- DELETE: the old row must pass both. TRUNCATE has no row.

Where the server's row security decides, too, it is asked about new rows after that
(`walstream.live.sieves`). It knows no old ones, and so nothing of one is told, nor tested by a
client's filter, which would tell it as well: no past, nothing that leaves, no truncate, and of a
DELETE the key, to those who may know that, by a filter on the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

import msgspec

from walstream.access.readers import Sight
from walstream.changes import Change, Column, Layout, Operation, Row
from walstream.errors import DecodeError, FilterError
from walstream.filters import (
    And,
    Condition,
    Filter,
    Literal,
    compile_filter,
    equality_keys,
    literals,
)
from walstream.live.subscriptions import Subscription
from walstream.projection import Projection

_UPDATE: Final = Operation.UPDATE
_DELETE: Final = Operation.DELETE
_TRUNCATE: Final = Operation.TRUNCATE


class Look(IntEnum):
    """How a change is seen."""

    WHOLE = 0
    WITHOUT_PAST = 1
    LEAVING = 2
    LEAVING_BY_KEY = 3
    BY_KEY = 4
    """A DELETE of a row that the reader may not have seen."""


class View:
    """One subscription with one sight, compiled for one layout."""

    __slots__ = (
        "_condition",
        "_layout",
        "_narrow",
        "_sight_condition",
        "_tells_departure",
        "_wants",
        "equalities",
        "is_secured",
        "may_leave",
        "rank",
        "shape",
        "sight",
        "subscription",
    )

    def __init__(
        self,
        subscription: Subscription,
        sight: Sight,
        layout: Layout,
        normalised: Mapping[Literal, str],
        rank: int = 0,
    ) -> None:
        """Compile.

        Args:
            subscription: what is asked for.
            sight: what may be seen.
            layout: of the changes.
            normalised: what the server made of each of `literals_of`.
            rank: which of a client's subscriptions it is.

        Raises:
            FilterError: a filter does not fit the layout's types.
        """
        self.subscription = subscription
        self.sight = sight
        self.rank = rank
        self._layout = layout
        self._condition = _compiled(subscription.where, layout, normalised, is_linear=True)
        self._sight_condition = _compiled(sight.where, layout, normalised)
        self.is_secured = sight.persona is not None
        """Whether the server's row security is to be asked, too."""
        self._wants = _wanted(subscription, sight)
        columns = _columns_of(subscription, layout)
        self._narrow = None if columns is None else Projection(include=columns)
        self._tells_departure = subscription.tells_departure or subscription.leaving
        self.may_leave = (
            not self.is_secured
            and _UPDATE in self._wants
            and (
                (self._tells_departure and sight.where is not None)
                or (subscription.leaving and subscription.where is not None)
            )
        )
        self.shape = (sight.projection, columns)
        """Views of equal shapes show a change that they see in the same way alike."""
        self.equalities: Mapping[str, Any] = equalities_of(subscription, sight, layout, normalised)

    def wants(self, operation: Operation) -> bool:
        """Whether such changes are asked for."""
        return operation in self._wants

    def look(self, change: Change) -> Look | None:
        """Say how the change is seen; None when it is not.

        Values that cannot be compared are not visible: a client's filter never stops the stream.

        Raises:
            UnknownLabel: an enum has got a label since its type was fetched.
        """
        operation = change.operation
        if operation not in self._wants:
            return None
        if operation is _TRUNCATE:
            return Look.WHOLE
        try:
            if self.is_secured:
                return self._look_at_secured(change)
            if operation is _UPDATE:
                return self._look_at_update(change)
            row = change.identity if operation is _DELETE else change.row
            return Look.WHOLE if self._sees(row) and self._passes(row) else None
        except DecodeError:
            return None

    def show(self, change: Change, look: Look) -> Change:
        """Return the change as it is seen."""
        change = self.permit(change, look)
        if self._narrow is None or look in _BY_KEY:  # without its key it says nothing
            return change
        return self._narrow.project(change)

    def permit(self, change: Change, look: Look) -> Change:
        """Return all of the change that may be seen, also what is not asked for."""
        if look is Look.WITHOUT_PAST:
            change = _replaced(change, sent_identity=None)
        elif look is Look.BY_KEY:
            change = _replaced(change, sent_identity=_key_columns(change))
        elif look is Look.LEAVING:
            change = _replaced(change, leaving=True)
        elif look is Look.LEAVING_BY_KEY:
            change = _replaced(
                change,
                new_columns=None,
                sent_identity=_key_columns(change),
                unchanged=(),
                leaving=True,
            )
        projection = self.sight.projection
        return change if projection is None else projection.project(change)

    def _look_at_update(self, change: Change) -> Look | None:
        row = change.row
        if self._sees(row):
            was_seen = self._sight_condition is None or self._sees(change.identity)
            if self._passes(row):
                return Look.WHOLE if was_seen else Look.WITHOUT_PAST
            asked = self.subscription.leaving and was_seen
            return Look.LEAVING if asked and self._passes(change.identity) else None
        if not self._tells_departure:
            return None
        old = change.identity
        return Look.LEAVING_BY_KEY if self._sees(old) and self._passes(old) else None

    def _look_at_secured(self, change: Change) -> Look | None:
        """Look at what row security is to be asked about, and at a DELETE, which it is not."""
        if change.operation is _DELETE:
            key = Row(change.layout, list(_key_columns(change)))
            is_told = len(key) > 0 and self._sees(change.identity) and self._passes(key)
            return Look.BY_KEY if is_told else None
        if not (self._sees(change.row) and self._passes(change.row)):
            return None
        return Look.WITHOUT_PAST if change.operation is _UPDATE else Look.WHOLE

    def _sees(self, row: Row) -> bool:
        return self._sight_condition is None or self._sight_condition(row) is True

    def _passes(self, row: Row) -> bool:
        return self._condition is None or self._condition(row) is True


_BY_KEY: Final = frozenset({Look.LEAVING_BY_KEY, Look.BY_KEY})


def _wanted(subscription: Subscription, sight: Sight) -> frozenset[Operation]:
    wanted = frozenset(filter(subscription.wants, Operation))
    if sight.persona is None:
        return wanted
    return wanted - ({_TRUNCATE} if sight.tells_deletes else {_TRUNCATE, _DELETE})


def literals_of(subscription: Subscription, sight: Sight, layout: Layout) -> list[Literal]:
    """List the values in the filters that the server must read as the layout's types.

    Raises:
        FilterError: a filter does not fit them, or has a pattern that no client may have.
    """
    asked = (subscription.where, True), (sight.where, False)  # who runs walstream is trusted
    return [
        literal
        for where, is_linear in asked
        if where is not None
        for literal in literals(
            where, layout.columns, layout.types, layout.relation, is_linear=is_linear
        )
    ]


def equalities_of(
    subscription: Subscription, sight: Sight, layout: Layout, normalised: Mapping[Literal, str]
) -> Mapping[str, Any]:
    """Return by column the values without which no row is seen, the client's before the role's."""
    both = [where for where in (subscription.where, sight.where) if where is not None]
    if not both:
        return {}
    where = both[0] if len(both) == 1 else And(tuple(both))
    return equality_keys(where, layout.columns, layout.types, normalised)


def _columns_of(subscription: Subscription, layout: Layout) -> frozenset[str] | None:
    """Return the columns that are asked for; None for all."""
    columns = subscription.columns
    if columns is None or not subscription.with_key:
        return columns
    return columns.union(layout.key)


def _compiled(
    where: Filter | None,
    layout: Layout,
    normalised: Mapping[Literal, str],
    *,
    is_linear: bool = False,
) -> Condition | None:
    if where is None:
        return None
    try:
        return compile_filter(where, layout.columns, layout.types, normalised, is_linear=is_linear)
    except FilterError:
        if layout.in_catalog:
            raise
        return _never  # of a table that is gone not all columns are known


def _never(_row: Row) -> bool:
    return False


def _replaced(change: Change, **parts: Any) -> Change:
    return msgspec.structs.replace(change, _row=None, _identity=None, **parts)


def _key_columns(change: Change) -> Sequence[Column]:
    key = change.layout.key
    return [column for column in change.identity_columns or () if column.name in key]
