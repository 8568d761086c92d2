"""Filters: which rows a route keeps.

A filter is read by `parse` (`walstream.grammar`), checked against a relation's columns by
`literals`, and compiled by `compile_filter`. Comparisons are those of PostgreSQL for the column's
type (`walstream.comparables`), with SQL's three truth values. Values are read by the server:
`literals` says which, `compile_filter` takes the answers.

What SQL and the grammar leave open: text is ordered as with ``COLLATE "C"``; ``like`` and ``ilike``
take ``*`` for ``%`` as PostgREST does; ``in.()`` is false for every row; only after ``is`` does
``null`` mean null.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, TypeAlias, assert_never
from typing import Literal as OneOf

import msgspec

from walstream import dialects, patterns
from walstream.changes import Relation, Row
from walstream.errors import DecodeError, FilterError
from walstream.grammar import (
    And,
    Comparison,
    Filter,
    Not,
    Operator,
    Or,
    comparisons,
    parse,
)
from walstream.nested import parse_composite
from walstream.patterns import Matcher, PatternError
from walstream.values import BOOL_OID, TEXT_OID, VARCHAR_OID, Kind, RawTo, Support, Types

__all__ = [
    "ABSENT",
    "And",
    "Comparison",
    "Condition",
    "Filter",
    "Literal",
    "Not",
    "Operator",
    "Or",
    "Outcome",
    "columns",
    "compile_filter",
    "equality_key",
    "equality_keys",
    "failing_part",
    "literals",
    "operators_of",
    "parse",
    "required_equalities",
]


class Literal(msgspec.Struct, frozen=True):
    """A text in a filter that the server has to read.

    ``typeoid`` and ``type_name`` are what to read it as: the type of ``column``, or what that is a
    domain over. A regular expression (``is_pattern``) is only checked: it stays as it is.
    """

    column: str
    typeoid: int
    type_name: str
    text: str
    is_pattern: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is read as text, which is what it is."""
        return self.typeoid in (TEXT_OID, VARCHAR_OID)

    @property
    def sql(self) -> str:
        """A query of the normalised text, with ``%s`` for the text; it fails for a bad one."""
        if self.is_pattern:
            return "SELECT t FROM (SELECT %s::text) AS pattern (t) WHERE ('' ~ t) IS NOT NULL"
        return f"SELECT CAST(%s AS {self.type_name.replace('%', '%%')})::text"


class Absent(Enum):
    """The type of `ABSENT`."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
"""The change does not carry a column that it depends on."""

Outcome: TypeAlias = bool | OneOf[Absent.ABSENT] | None
"""True, false, SQL's unknown (None), or `ABSENT`. Only true keeps a row."""

Condition: TypeAlias = Callable[[Row], Outcome]


def columns(where: Filter) -> frozenset[str]:
    """Return the columns that a filter looks at."""
    return frozenset(comparison.column for comparison in comparisons(where))


def required_equalities(where: Filter) -> dict[str, Comparison]:
    """Return the ``eq`` comparisons without which no row passes, one for a column."""
    required: dict[str, Comparison] = {}
    for part in where.parts if isinstance(where, And) else (where,):
        if isinstance(part, And):
            required = required_equalities(part) | required
        elif isinstance(part, Comparison) and part.operator is Operator.EQ:
            required.setdefault(part.column, part)
    return required


def operators_of(typeoid: int, types: Types) -> list[Operator]:
    """Return the operators that a type has."""
    return _allowed(typeoid, types)


def literals(
    where: Filter,
    columns: Mapping[str, int],
    types: Types,
    relation: Relation | None = None,
    *,
    is_linear: bool = False,
) -> list[Literal]:
    """Check a filter against a relation's columns; return what the server must read.

    ``columns`` are the relation's, with the OIDs of their types; ``is_linear`` says that its
    regular expressions may cost no more than RE2 needs (`dialects`).

    Raises:
        FilterError: a column is not there, its type does not have the operator, or a pattern cannot
            be translated.
    """
    compiler = _Compiler(columns, types, {}, relation, is_linear=is_linear)
    found: dict[Literal, None] = {}
    for comparison in comparisons(where):
        compiler.check(comparison)
        found.update(dict.fromkeys(compiler.literals(comparison)))
    return [literal for literal in found if literal.is_pattern or not literal.is_text]


def compile_filter(
    where: Filter,
    columns: Mapping[str, int],
    types: Types,
    normalised: Mapping[Literal, str],
    *,
    is_linear: bool = False,
) -> Condition:
    """Compile a filter for rows with these columns and types.

    ``normalised`` holds the server's answer to each of `literals`, ``is_linear`` is as there. The
    condition raises `UnknownLabel` when an enum has got a new label since, and `DecodeError` for a
    value that wal2json does not write, or that is too long for a pattern that is to be linear.

    Raises:
        FilterError: as `literals`.
    """
    condition = _Compiler(columns, types, normalised, is_linear=is_linear).compile(where)

    def guarded(row: Row) -> Outcome:
        try:
            return condition(row)
        except ValueError:
            raise DecodeError("a value in a filter is not what wal2json writes") from None

    return guarded


def failing_part(where: Filter, test: Callable[[Filter], Outcome]) -> Filter:
    """Return the smallest part of a filter by itself enough for its outcome, which is not true.

    An `Or` of which no part is true, and a `Not`, are answered as a whole.

    Args:
        where: the filter.
        test: gives the outcome of the filter and of its parts, for one row.
    """
    if not isinstance(where, And):
        return where
    outcome = test(where)
    return failing_part(next(part for part in where.parts if test(part) is outcome), test)


def equality_keys(
    where: Filter, columns: Mapping[str, int], types: Types, normalised: Mapping[Literal, str]
) -> dict[str, Any]:
    """Return by column what `equality_key` has to give, or no row passes the filter."""
    compiler = _Compiler(columns, types, normalised)
    return {
        name: compiler.keys(comparison)[0]
        for name, comparison in required_equalities(where).items()
    }


def equality_key(typeoid: int, types: Types) -> RawTo:
    """Return what reads a value as a key that is equal for equal values; None for null.

    It raises `ValueError` for a value that wal2json does not write.

    Raises:
        FilterError: the type has no equality.
    """
    if _kind(typeoid, types) is Kind.ENUM:
        return types.text_of(typeoid)  # labels are equal or not, also when one of them is new
    return types.key_of(typeoid)


_SUPPORT: Final = {
    Operator.EQ: Support.EQUALITY,
    Operator.NEQ: Support.EQUALITY,
    Operator.IN: Support.EQUALITY,
    Operator.ISDISTINCT: Support.EQUALITY,
    Operator.LT: Support.ORDER,
    Operator.LTE: Support.ORDER,
    Operator.GT: Support.ORDER,
    Operator.GTE: Support.ORDER,
}
_ORDER: Final[dict[Operator, Callable[[Any, Any], bool]]] = {
    Operator.LT: operator.lt,
    Operator.LTE: operator.le,
    Operator.GT: operator.gt,
    Operator.GTE: operator.ge,
}
_PATTERNS: Final = (Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH)
_REGULAR_EXPRESSIONS: Final = (Operator.MATCH, Operator.IMATCH)
_TRUTHS: Final = {"true": True, "false": False}
_TEXT_LIKE: Final = frozenset({"text", "varchar", "bpchar", "name", "citext"})


class _Compiler:
    """Compiles filters for one set of columns."""

    def __init__(
        self,
        columns: Mapping[str, int],
        types: Types,
        normalised: Mapping[Literal, str],
        relation: Relation | None = None,
        *,
        is_linear: bool = False,
    ) -> None:
        self.is_linear = is_linear
        self.columns = columns
        self.types = types
        self.normalised = normalised
        self.relation = relation

    def compile(self, where: Filter) -> Condition:
        match where:
            case Comparison():
                self.check(where)
                return self.comparison(where)
            case Not(negated):
                return _not(self.compile(negated))
            case And(parts):
                return _all([self.compile(part) for part in parts])
            case Or(parts):
                return _any([self.compile(part) for part in parts])
            case _:
                assert_never(where)

    def check(self, comparison: Comparison) -> None:
        """Refuse what the column's type cannot do."""
        typeoid = self.typeoid(comparison.column)
        allowed = _allowed(typeoid, self.types)
        if comparison.operator not in allowed:
            reason = f"{comparison.operator} is not an operator for it"
            raise self.refused(comparison, reason, f"its operators are {', '.join(allowed)}")
        if comparison.operator is Operator.IS and comparison.values[0] not in ("null", "not_null"):
            self.check_truth(comparison, typeoid)
        if comparison.operator in _PATTERNS:
            self.matcher(comparison)

    def check_truth(self, comparison: Comparison, typeoid: int) -> None:
        if self.types.resolve(typeoid) != BOOL_OID:
            reason = f"is.{comparison.values[0]} needs a boolean"
            raise self.refused(comparison, reason, "for any type there are is.null and is.not_null")

    def literals(self, comparison: Comparison) -> list[Literal]:
        """Name the values and the regular expression of a comparison."""
        typeoid = self.types.resolve(self.typeoid(comparison.column))
        column = comparison.column
        if comparison.operator in _REGULAR_EXPRESSIONS:
            name = self.types.name(TEXT_OID)
            return [Literal(column, TEXT_OID, name, comparison.values[0], is_pattern=True)]
        if comparison.operator not in _SUPPORT:
            return []
        name = self.types.name(typeoid)
        return [Literal(column, typeoid, name, value) for value in comparison.values]

    def keys(self, comparison: Comparison) -> list[Any]:
        """Return the keys of the values that a comparison compares with."""
        typeoid = self.typeoid(comparison.column)
        texts = [
            literal.text if literal.is_text else self.normalised[literal]
            for literal in self.literals(comparison)
        ]
        if self.compares_labels(comparison):
            return texts
        return list(map(self.types.comparable(typeoid), texts))

    def compares_labels(self, comparison: Comparison) -> bool:
        is_enum = _kind(self.typeoid(comparison.column), self.types) is Kind.ENUM
        return is_enum and comparison.operator not in _ORDER

    def comparison(self, comparison: Comparison) -> Condition:
        name, typeoid = comparison.column, self.typeoid(comparison.column)
        if comparison.operator is Operator.IS:
            return self.test(comparison)
        if comparison.operator in _PATTERNS:
            return _matching(name, self.types.text_of(typeoid), self.matcher(comparison))
        keys = self.keys(comparison)
        if comparison.operator in _ORDER:
            key_of = self.types.key_of(typeoid)
            return _ordered(name, key_of, _ORDER[comparison.operator], keys[0])
        return _EQUALITIES[comparison.operator](name, equality_key(typeoid, self.types), keys)

    def test(self, comparison: Comparison) -> Condition:
        name, value = comparison.column, comparison.values[0]
        if value in _TRUTHS:
            return _truth(name, self.types.key_of(self.typeoid(name)), expected=_TRUTHS[value])
        pg_type = self.types.get(self.types.resolve(self.typeoid(name)))
        negate = value == "not_null"
        if pg_type is not None and pg_type.kind is Kind.COMPOSITE:
            text_of = self.types.text_of(pg_type.oid)
            return _null_composite(name, text_of, negate=negate)
        return _not(_null(name)) if negate else _null(name)

    def matcher(self, comparison: Comparison) -> Matcher:
        try:
            type_name = _type_name(self.typeoid(comparison.column), self.types)
            return _matcher(comparison, type_name, is_linear=self.is_linear)
        except PatternError as error:
            raise self.refused(comparison, str(error)) from None

    def typeoid(self, column: str) -> int:
        if column not in self.columns:
            of = f" of {self.relation}" if self.relation else ""
            raise FilterError(
                f"there is no column {column!r}{of}",
                hint=f"the columns{of} are {', '.join(self.columns)}",
            )
        return self.columns[column]

    def refused(self, comparison: Comparison, reason: str, hint: str = "") -> FilterError:
        of = f" of {self.relation}" if self.relation else ""
        name = self.types.name(self.typeoid(comparison.column))
        return FilterError(f"column {comparison.column!r}{of} of type {name}: {reason}", hint=hint)


def _allowed(typeoid: int, types: Types) -> list[Operator]:
    supports = types.supports(typeoid)
    is_text = _type_name(typeoid, types) in _TEXT_LIKE
    return [
        one
        for one in Operator
        if one is Operator.IS
        or (one in _PATTERNS and is_text)
        or (one in _SUPPORT and _SUPPORT[one] in supports)
    ]


def _matcher(comparison: Comparison, type_name: str, *, is_linear: bool) -> Matcher:
    pattern = comparison.values[0]
    # citext's own operators make all four ignore case.
    fold_case = type_name == "citext" or comparison.operator in (Operator.ILIKE, Operator.IMATCH)
    if comparison.operator in _REGULAR_EXPRESSIONS:
        compile_ = patterns.linear_expression if is_linear else patterns.regular_expression
        return compile_(pattern, fold_case=fold_case)
    if not comparison.is_verbatim:
        pattern = pattern.replace("*", "%")
    matches = patterns.like(pattern, fold_case=fold_case)
    return dialects.bounded(matches) if is_linear else matches


def _type_name(typeoid: int, types: Types) -> str:
    pg_type = types.get(types.resolve(typeoid))
    return "" if pg_type is None else pg_type.name


def _kind(typeoid: int, types: Types) -> Kind | None:
    pg_type = types.get(types.resolve(typeoid))
    return None if pg_type is None else pg_type.kind


def _not(condition: Condition) -> Condition:
    def negation(row: Row) -> Outcome:
        outcome = condition(row)
        return outcome if outcome is None or outcome is ABSENT else not outcome

    return negation


def _all(conditions: Sequence[Condition]) -> Condition:
    """False wins; an absent column counts more than an unknown."""

    def conjunction(row: Row) -> Outcome:
        outcome: Outcome = True
        for condition in conditions:
            one = condition(row)
            if one is False:
                return False
            if one is not True and outcome is not ABSENT:
                outcome = one
        return outcome

    return conjunction


def _any(conditions: Sequence[Condition]) -> Condition:
    """True wins; an absent column counts more than an unknown."""

    def disjunction(row: Row) -> Outcome:
        outcome: Outcome = False
        for condition in conditions:
            one = condition(row)
            if one is True:
                return True
            if one is not False and outcome is not ABSENT:
                outcome = one
        return outcome

    return disjunction


def _equal(name: str, key_of: RawTo, keys: Sequence[Any]) -> Condition:
    (wanted,) = keys

    def equal(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        key = key_of(column.value)
        return None if key is None else key == wanted

    return equal


def _unequal(name: str, key_of: RawTo, keys: Sequence[Any]) -> Condition:
    return _not(_equal(name, key_of, keys))


def _among(name: str, key_of: RawTo, keys: Sequence[Any]) -> Condition:
    wanted = frozenset(keys)

    def among(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        key = key_of(column.value)
        # To be among nothing is false even for null.
        return None if key is None and wanted else key in wanted

    return among


def _distinct(name: str, key_of: RawTo, keys: Sequence[Any]) -> Condition:
    (wanted,) = keys

    def distinct(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        key = key_of(column.value)
        return key is None or key != wanted

    return distinct


_EQUALITIES: Final = {
    Operator.EQ: _equal,
    Operator.NEQ: _unequal,
    Operator.IN: _among,
    Operator.ISDISTINCT: _distinct,
}


def _ordered(
    name: str, key_of: RawTo, compare: Callable[[Any, Any], bool], wanted: Any
) -> Condition:
    def ordered(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        key = key_of(column.value)
        return None if key is None else compare(key, wanted)

    return ordered


def _matching(
    name: str, text_of: Callable[[msgspec.Raw], str | None], matches: Matcher
) -> Condition:
    def matching(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        text = text_of(column.value)
        return None if text is None else matches(text)

    return matching


def _truth(name: str, key_of: RawTo, *, expected: bool) -> Condition:
    def truth(row: Row) -> Outcome:
        column = row.column(name)
        return ABSENT if column is None else key_of(column.value) is expected

    return truth


def _null(name: str) -> Condition:
    def null(row: Row) -> Outcome:
        column = row.column(name)
        return ABSENT if column is None else bytes(column.value) == b"null"

    return null


def _null_composite(
    name: str, text_of: Callable[[msgspec.Raw], str | None], *, negate: bool
) -> Condition:
    """A composite is null when all of its attributes are, and not null when none of them is.

    (PostgreSQL documentation, 9.2 Comparison Functions and Operators.)
    """

    def null_composite(row: Row) -> Outcome:
        column = row.column(name)
        if column is None:
            return ABSENT
        text = text_of(column.value)
        if text is None:
            return not negate
        return all((field is not None) is negate for field in parse_composite(text))

    return null_composite
