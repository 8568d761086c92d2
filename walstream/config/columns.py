"""The columns that a route passes on, or a role may read: include, exclude, mask."""

from __future__ import annotations

from pydantic import field_validator

from walstream.config.section import Section
from walstream.projection import Mask, Projection


class ColumnsConfig(Section):
    """Which columns a route passes on, or a role may read, and which of them masked."""

    include: list[str] | None = None
    exclude: list[str] = []
    mask: dict[str, str] = {}

    @field_validator("mask")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for mask in value.values():
            Mask.parse(mask)
        return value

    def projection(self, masking_key: bytes | None) -> Projection | None:
        """Return what applies these rules; None when there are none.

        Raises:
            ValueError: a ``hash`` mask without a key.
        """
        if self == ColumnsConfig():
            return None
        return Projection(
            include=self.include,
            exclude=self.exclude,
            mask={column: Mask.parse(mask) for column, mask in self.mask.items()},
            key=masking_key,
        )
