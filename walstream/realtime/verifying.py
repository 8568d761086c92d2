"""Whether a binding can be had: what only the catalog knows of it.

The order is the original's: the table, the conditions as they stand in the filter, the columns. Of
a table that the reader may not see nothing is told, not even whether it is there.
"""

from __future__ import annotations

from typing import Final

from walstream.access.readers import Reader
from walstream.errors import FilterError
from walstream.filters import operators_of
from walstream.grammar import Comparison, Operator, comparisons
from walstream.live.requests import Requests, VisibleTable, is_sent
from walstream.live.subscriptions import Subscription
from walstream.patterns import PatternError, like, linear_expression
from walstream.realtime.bindings import Binding
from walstream.realtime.refusals import BAD_ESCAPE, RAISED, failed, not_enabled
from walstream.realtime.terms import type_shown
from walstream.values import BOOL_OID

MAX_FILTERED_TABLES: Final = 50
"""Tables that a wildcard with a filter may stand for: each of them has to fit."""

_LIKES: Final = (Operator.LIKE, Operator.ILIKE)
_EXPRESSIONS: Final = (Operator.MATCH, Operator.IMATCH)


class _Failed(Exception):
    """The server refuses a binding."""

    def __init__(self, message: str, sqlstate: str = RAISED) -> None:
        super().__init__(message)
        self.message = message
        self.sqlstate = sqlstate


async def verify(binding: Binding, requests: Requests, reader: Reader) -> str | None:
    """Return why a reader cannot have a binding, or None when it can.

    Args:
        binding: read by `read_bindings`.
        requests: of the hub that the changes come from.
        reader: who asks.

    Raises:
        WalstreamError: the catalog cannot be asked.
    """
    subscription = binding.subscription
    if subscription is None:
        return binding.error
    try:
        is_visible = await _verify(subscription, requests, reader)
    except _Failed as refused:
        return failed(binding.parameters, refused.sqlstate, refused.message)
    return None if is_visible else not_enabled(binding.parameters)


async def _verify(subscription: Subscription, requests: Requests, reader: Reader) -> bool:
    """Whether there is a table to be seen; each has to fit the filter."""
    count = 0
    async for table in requests.visible(subscription.pattern, reader):
        count += 1
        if subscription.where is None and subscription.columns is None:
            return True
        if count > MAX_FILTERED_TABLES:
            raise _Failed(f"a filter for more than {MAX_FILTERED_TABLES} tables")
        await _verify_table(subscription, requests, table)
    return count > 0


async def _verify_table(
    subscription: Subscription, requests: Requests, table: VisibleTable
) -> None:
    if subscription.where is not None:
        for comparison in comparisons(subscription.where):
            if not requests.may_compare(comparison.column, table):
                raise _Failed(f"invalid column for filter {comparison.column}")
            _verify_operator(comparison, table)
        await _verify_values(subscription, requests, table)
    for name in sorted(subscription.columns or ()):
        if not is_sent(name, table):
            raise _Failed(f"invalid column for select {name}")


def _verify_operator(comparison: Comparison, table: VisibleTable) -> None:
    types = table.layout.types
    operator, column = comparison.operator, comparison.column
    typeoid = table.layout.columns[column]
    type_name = type_shown(typeoid, types)
    if operator is Operator.IS:
        value = comparison.values[0]
        is_about_null = value in ("null", "not_null")
        if not is_about_null and types.resolve(typeoid) != BOOL_OID:
            raise _Failed(f"is {value} filter requires a boolean column, got {type_name}")
    elif operator in operators_of(typeoid, types):
        _verify_pattern(comparison)
    elif operator in (*_LIKES, *_EXPRESSIONS):
        message = f"operator {operator} requires a text-compatible column type, got {type_name}"
        raise _Failed(message)
    else:
        raise _Failed(
            f"operator {operator} is not supported on column {column} of type {type_name}"
        )


def _verify_pattern(comparison: Comparison) -> None:
    operator = comparison.operator
    try:
        if operator in _LIKES:
            like(comparison.values[0])
        elif operator in _EXPRESSIONS:
            linear_expression(comparison.values[0])
    except PatternError as error:
        if operator in _LIKES:
            raise _Failed("LIKE pattern must not end with escape character", BAD_ESCAPE) from None
        raise _Failed(f"invalid regular expression for {operator} filter: {error}") from None


async def _verify_values(
    subscription: Subscription, requests: Requests, table: VisibleTable
) -> None:
    assert subscription.where is not None  # noqa: S101 - the caller has seen to it
    try:
        await requests.read_values(subscription.where, table)
    except FilterError as error:
        raise _Failed(error.reason or error.message, error.sqlstate or RAISED) from None
