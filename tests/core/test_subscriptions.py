"""What one request may ask for, as far as the text alone tells."""

from __future__ import annotations

import pytest

from walstream.live.subscriptions import Limits, RequestRefused, Subscription, parse_subscriptions

LIMITS = Limits(max_subscriptions=20, max_filter_bytes=4096)


def ask(*wheres: str) -> list[Subscription]:
    parameters = [one for where in wheres for one in (("table", "public.notes"), ("where", where))]
    return parse_subscriptions(parameters, LIMITS)


@pytest.mark.parametrize("operator", ["like", "ilike", "match", "imatch", "not.match"])
def test_patterns_are_bounded_in_length(operator: str) -> None:
    assert ask(f"body={operator}.{'x' * 200}")
    with pytest.raises(RequestRefused, match="a pattern has at most 200 characters"):
        ask(f"body={operator}.{'x' * 201}")


def test_patterns_of_all_subscriptions_together_are_bounded_in_number() -> None:
    assert ask(*["body=match.x,body=like.x"] * 5)
    with pytest.raises(RequestRefused, match="12 patterns in one request; allowed: 10"):
        ask(*["body=match.x,body=like.x"] * 6)


def test_comparisons_of_all_subscriptions_together_are_bounded_in_number() -> None:
    assert ask(*[",".join(["id=eq.1"] * 20)] * 10)
    with pytest.raises(RequestRefused, match="220 comparisons in one request; allowed: 200"):
        ask(*[",".join(["id=eq.1"] * 20)] * 11)


def test_who_asks_by_http_is_told_of_departures_and_gets_the_columns_that_are_named() -> None:
    [subscription] = parse_subscriptions([("table", "public.notes"), ("columns", "body")], LIMITS)
    assert subscription.tells_departure
    assert not subscription.with_key
    assert subscription.columns == frozenset({"body"})
