"""Values of filters, as the server prints them: asked for once, and remembered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from walstream.catalog import Catalog
from walstream.changes import Layout
from walstream.errors import FilterError
from walstream.filters import Literal
from walstream.offline import read_offline

MAX_LITERALS: Final = 20_000

MAX_TEXT: Final = 1 << 14
"""Characters of a value: of ``1e131071`` the server makes a hundred thousand."""


class Literals:
    """What is known of values that filters compare with."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[Literal, str] = {}

    async def normalise(self, literals: Iterable[Literal], layout: Layout) -> dict[Literal, str]:
        """Return what the server makes of each.

        Raises:
            FilterError: it cannot read one as the column's type, or that is too long.
            Unavailable: the catalog cannot be asked.
        """
        answers: dict[Literal, str] = {}
        for literal in literals:
            text = self._known.get(literal)
            if text is None:
                text = read_offline(literal, layout.types)
            if text is None:
                text = (await self._catalog.normalise([literal], remember=False))[literal]
            if len(text) > MAX_TEXT:
                message = f"column {literal.column}: a value of {len(text)} characters"
                raise FilterError(message, hint=f"at most {MAX_TEXT} are compared with")
            if len(self._known) >= MAX_LITERALS:
                self._known.clear()
            answers[literal] = self._known[literal] = text
        return answers

    def forget(self) -> None:
        """Ask again: types have changed."""
        self._known.clear()
