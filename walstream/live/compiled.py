"""What is compiled: the views of all cohorts, and for each layout the index of who has which.

A layout is compiled when its first change comes, for all who are there; who comes later is compiled
for all layouts before joining. Of very many layouts the oldest are forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from walstream.access.readers import Reader
from walstream.catalog import Catalog
from walstream.changes import Change, Layout
from walstream.errors import FilterError, SinkFailed, Unavailable
from walstream.live.clients import Cohort
from walstream.live.index import Group, LayoutIndex
from walstream.live.literals import Literals
from walstream.live.subscriptions import Subscription, named_columns
from walstream.live.turns import Turn
from walstream.live.views import View, literals_of

MAX_LAYOUTS: Final = 512

Index: TypeAlias = LayoutIndex[Cohort]

Prepared: TypeAlias = dict[Layout, list[View]]
"""A cohort's views, for each layout in the order of its subscriptions."""


class Compiled:
    """Views and indexes, for as long as types and layouts stay as they are."""

    def __init__(
        self, catalog: Catalog, literals: Literals, cohorts: Mapping[Hashable, Cohort]
    ) -> None:
        """Begin with nothing.

        Args:
            catalog: has the types.
            literals: what is known of the values of filters.
            cohorts: who is there, at each moment.
        """
        self._catalog = catalog
        self._literals = literals
        self._cohorts = cohorts
        self._indexes: dict[Layout, Index] = {}

    def index(self, layout: Layout) -> Index | None:
        """Return who has which view of a layout; None when it is not compiled."""
        return self._indexes.get(layout)

    async def compile(self, changes: Sequence[Change]) -> None:
        """Compile all clients' views for layouts that are new.

        Raises:
            SinkFailed: the catalog cannot be asked.
        """
        layouts = dict.fromkeys(change.layout for change in changes)
        new = [layout for layout in layouts if layout not in self._indexes]
        for layout in new[: MAX_LAYOUTS // 2]:
            index: Index = LayoutIndex(layout)
            views: dict[Cohort, list[View]] = {}
            turn = Turn()
            try:
                while missing := [one for one in self._cohorts.values() if one not in views]:
                    for cohort in missing:
                        views[cohort] = await self.views(cohort, layout)
                        await turn.give_way()
            except Unavailable as error:
                message = f"the catalog cannot be asked for {layout.relation}: {error.message}"
                raise SinkFailed(message, hint=error.hint) from None
            self._make_room()
            self._indexes[layout] = index
            for cohort in self._cohorts.values():
                _enter(cohort, index, views[cohort])

    async def prepare(self, cohort: Cohort) -> Prepared:
        """Compile the cohort's views for all layouts that are compiled."""
        prepared: Prepared = {}
        turn = Turn()
        for layout in list(self._indexes):
            prepared[layout] = await self.views(cohort, layout)
            await turn.give_way()
        return prepared

    def enter(self, cohort: Cohort, prepared: Prepared) -> bool:
        """Let a cohort be found by what it sees.

        Returns:
            Whether it is done; if not, there are layouts that were not prepared.
        """
        if any(layout not in prepared for layout in self._indexes):
            return False
        for layout, index in self._indexes.items():
            _enter(cohort, index, prepared[layout])
        return True

    def withdraw(self, cohort: Cohort) -> None:
        """Let a cohort be found no more."""
        for layout, views in cohort.entered.items():
            self._withdraw(cohort, layout, views)
        cohort.entered.clear()

    async def renew_types(self) -> None:
        """Compile everything anew: an enum has got a label.

        Raises:
            SinkFailed: the catalog cannot be asked.
        """
        try:
            await self._catalog.renew_types()
        except Unavailable as error:
            raise SinkFailed(f"types cannot be asked for: {error.message}") from None
        self._indexes.clear()
        self._literals.forget()
        for cohort in self._cohorts.values():
            cohort.entered.clear()
            cohort.views.clear()

    async def views(self, cohort: Cohort, layout: Layout) -> list[View]:
        """Return the cohort's views of a layout, in the order of its subscriptions.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        known = cohort.views.get(layout)
        if known is None:
            known = [
                view
                for rank, subscription in enumerate(cohort.subscriptions)
                if (view := await self._view(cohort.reader, subscription, layout, rank)) is not None
            ]
            if len(cohort.views) >= MAX_LAYOUTS:
                del cohort.views[next(iter(cohort.views))]
            cohort.views[layout] = known
        return known

    async def _view(
        self, reader: Reader, subscription: Subscription, layout: Layout, rank: int
    ) -> View | None:
        covered = (layout.relation, *layout.ancestors)
        if not any(subscription.pattern.covers(relation) for relation in covered):
            return None
        sight = reader.sight(layout)
        if sight is None:
            return None
        if not all(map(sight.reads, named_columns(subscription))):
            return None  # of a partition more may be hidden than of its table, which was checked
        try:
            normalised = await self._literals.normalise(
                literals_of(subscription, sight, layout), layout
            )
            return View(subscription, sight, layout, normalised, rank)
        except FilterError:
            return None  # the table's types have changed since: nothing of it passes

    def _make_room(self) -> None:
        while len(self._indexes) >= MAX_LAYOUTS:
            oldest = next(iter(self._indexes))
            del self._indexes[oldest]
            for cohort in self._cohorts.values():
                cohort.entered.pop(oldest, None)
                cohort.views.pop(oldest, None)

    def _withdraw(self, cohort: Cohort, layout: Layout, views: Iterable[View]) -> None:
        index = self._indexes.get(layout)
        if index is None:
            return
        for key, _ in _keyed(views, cohort):
            group = index.group(key)
            if group is not None:
                group.members.pop(cohort, None)
                if not group.members:
                    index.remove(key)


def _enter(cohort: Cohort, index: Index, views: list[View]) -> None:
    """Enter a cohort into the groups of a layout."""
    for key, view in _keyed(views, cohort):
        group = index.group(key)
        if group is None:
            group = Group(view, cohort.encoding.form)
            index.add(key, group)
        group.members[cohort] = view.rank
    cohort.entered[index.layout] = views


def _keyed(views: Iterable[View], cohort: Cohort) -> Iterator[tuple[Hashable, View]]:
    """Pair views with the keys of their groups.

    What a client asks for twice is in two groups: a client may tell its subscriptions apart.
    """
    form = cohort.encoding.form
    times: Counter[Hashable] = Counter()
    for view in views:
        alike = (view.subscription, view.sight)
        times[alike] += 1
        yield (*alike, form, times[alike]), view
