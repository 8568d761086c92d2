"""Which columns of a change a route passes on, and which of them masked.

The rules hold for the new row, the identity, the key, and the names of unchanged columns alike.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Final, Self, assert_never

import msgspec

from walstream.changes import Change, Column, Relation
from walstream.errors import RelationMissing
from walstream.values import TEXT_OID, Types

REDACTED: Final = "[redacted]"

_MASK: Final = re.compile(r"(null|redact|hash)|keep-last-([1-9]\d{0,3})")
_NULL: Final = msgspec.Raw(b"null")


class MaskKind(StrEnum):
    """What a mask puts in the place of a value; null stays null under every mask."""

    NULL = "null"
    REDACT = "redact"
    KEEP_LAST = "keep-last"
    HASH = "hash"


class Mask(msgspec.Struct, frozen=True):
    """How a column is masked; ``keep`` counts the characters that `KEEP_LAST` leaves readable."""

    kind: MaskKind
    keep: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``null``, ``redact``, ``hash`` or ``keep-last-N``, N from 1 to 9999.

        Raises:
            ValueError: it is none of these.
        """
        matched = _MASK.fullmatch(text)
        if matched is None:
            raise ValueError(
                f"{text!r} is not a mask; masks are null, redact, hash and keep-last-N,"
                " such as keep-last-4"
            )
        if matched[1]:
            return cls(MaskKind(matched[1]))
        return cls(MaskKind.KEEP_LAST, int(matched[2]))

    def __str__(self) -> str:
        """Print so that `parse` reads it again."""
        return f"{self.kind}-{self.keep}" if self.keep else str(self.kind)


class Projection:
    """The columns that a route passes on: include, then exclude, then mask."""

    def __init__(
        self,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        mask: Mapping[str, Mask] | None = None,
        key: bytes | None = None,
    ) -> None:
        """Make the rules; ``include=None`` is every column, ``key`` is the secret of hashes.

        Raises:
            ValueError: a column is masked by `HASH` and there is no key.
        """
        self._include = None if include is None else frozenset(include)
        self._exclude = frozenset(exclude)
        self._mask = dict(mask or {})
        self._conceal = {name: _conceal(one, name, key) for name, one in self._mask.items()}

    def check(self, columns: Iterable[str], relation: Relation) -> None:
        """Refuse rules for columns that the relation does not have.

        Raises:
            RelationMissing: with the columns in question, and those that there are.
        """
        known = list(columns)
        named = {*(self._include or ()), *self._exclude, *self._mask}
        unknown = sorted(named.difference(known))
        if unknown:
            raise RelationMissing(
                f"{relation} has no column {', '.join(map(repr, unknown))}",
                hint=f"its columns are {', '.join(known)}",
            )

    def passes(self, name: str) -> bool:
        """Whether a column is passed on, masked or not."""
        included = self._include is None or name in self._include
        return included and name not in self._exclude

    def shows(self, name: str) -> bool:
        """Whether a column is passed on as it is."""
        return self.passes(name) and name not in self._mask

    @property
    def rules(self) -> tuple[list[str] | None, list[str], dict[str, str]]:
        """Include, exclude and masks, in a form that is the same for the same rules."""
        return (
            None if self._include is None else sorted(self._include),
            sorted(self._exclude),
            {name: str(mask) for name, mask in sorted(self._mask.items())},
        )

    @property
    def masks(self) -> Mapping[str, Mask]:
        """The masks by column, also of columns that are not passed on."""
        return self._mask

    def project(self, change: Change) -> Change:
        """Return the change with the rules applied, or the change itself when none applies."""
        if not self._applies(change):
            return change
        types = change.layout.types
        return msgspec.structs.replace(
            change,
            new_columns=self._columns(change.new_columns, types),
            sent_identity=self._columns(change.identity_columns, types),
            unchanged=tuple(filter(self.passes, change.unchanged)),
            _row=None,
            _identity=None,
        )

    def _applies(self, change: Change) -> bool:
        names = [column.name for column in change.new_columns or ()]
        names += [column.name for column in change.identity_columns or ()]
        names += change.unchanged
        return any(name in self._conceal or not self.passes(name) for name in names)

    def _columns(self, columns: list[Column] | None, types: Types) -> list[Column] | None:
        if columns is None:
            return None
        conceal = self._conceal
        return [
            conceal[column.name](column, types) if column.name in conceal else column
            for column in columns
            if self.passes(column.name)
        ]


_Conceal = Callable[[Column, Types], Column]


def _conceal(mask: Mask, name: str, key: bytes | None) -> _Conceal:
    """Return what makes a masked column out of a column."""
    match mask.kind:
        case MaskKind.NULL:
            return lambda column, _: Column(column.name, _NULL, column.typeoid)
        case MaskKind.REDACT:
            return _by_text(lambda _: REDACTED)
        case MaskKind.KEEP_LAST:
            return _by_text(lambda text: _keep_last(text, mask.keep))
        case MaskKind.HASH:
            if not key:
                raise ValueError(f"the mask hash of column {name!r} needs a key to hash with")
            return _by_text(lambda text: hmac.digest(key, text.encode(), "sha256").hex())
        case _:
            assert_never(mask.kind)


def _by_text(conceal: Callable[[str], str]) -> _Conceal:
    """Make a text of the value's output text; null stays null."""

    def masked(column: Column, types: Types) -> Column:
        text = types.text(column.typeoid, column.value)
        if text is None:
            return column
        return Column(column.name, msgspec.Raw(msgspec.json.encode(conceal(text))), TEXT_OID)

    return masked


def _keep_last(text: str, keep: int) -> str:
    """A text that is no longer than what may be seen is not seen at all."""
    return "*" * len(text) if len(text) <= keep else "*" * (len(text) - keep) + text[-keep:]
