"""Who may use which private channels, and how often something may be done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.access import Reader
from walstream.config.realtime import RealtimeConfig
from walstream.realtime.rates import MOST_KNOWN, Rate, Rates
from walstream.realtime.topics import Topics
from walstream.topic_patterns import TopicPattern

CLAIMS = {
    "sub": "ada",
    "n": 7,
    "star": "*",
    "none": None,
    "empty": "",
    "yes": True,
    "teams": ["red", "blue", "", 9, None],
    "app": {"team": "x.y"},
    "with.dot": "d",
}


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("room1", ["room1"], ["room", "room11", "Room1", "", "xroom1"]),
        ("*", ["", "a", "a:b/c", "*", "\n"], []),
        ("room:*", ["room:", "room:1", "room:1:2"], ["room", "xroom:1"]),
        ("*:chat", [":chat", "a:chat", "chat:chat"], ["chat", "a:chat1"]),
        ("a*b*a", ["aba", "abba", "axbya", "abaa"], ["aa", "aba1", "ab"]),
        ("a**", ["a", "ab"], ["b"]),
        ("user:{claims.sub}", ["user:ada"], ["user:", "user:bob", "user:ada2", "user:*"]),
        ("{claims.n}", ["7"], ["07", "7.0"]),
        ("{claims.star}", ["*"], ["", "a", "**"]),
        ("x{claims.none}", [], ["x", "xnull", "xNone"]),
        ("x{claims.empty}", [], ["x"]),
        ("x{claims.yes}", [], ["xtrue", "xTrue", "x1"]),
        ("x{claims.app}", [], ["x", "x{}"]),
        ("x{claims.no.such}", [], ["x"]),
        ("{claims.app.team}", ["x.y"], ["x", "xzy"]),
        ('{claims."with.dot"}', ["d"], []),
        ("{claims.teams}:*", ["red:1", "blue:", "9:"], [":1", "green:1", "redblue:"]),
        ("{claims.teams}-{claims.teams}", ["red-blue", "blue-blue"], ["red-green", "red-"]),
        ("*{claims.sub}*", ["ada", "xada", "adax", "adada"], ["ad"]),
        ("[ab]?.+", ["[ab]?.+"], ["a", "b."]),
    ],
)
def test_patterns_fit_names(pattern: str, fitting: list[str], others: list[str]) -> None:
    parsed = TopicPattern.parse(pattern)
    assert [name for name in (*fitting, *others) if parsed.fits(name, CLAIMS)] == fitting


@pytest.mark.parametrize(
    "text", ["{", "}", "a{b}", "{sub}", "{claims.}", "{claims.sub", "{claims..a}", "{{claims.sub}}"]
)
def test_what_is_no_placeholder_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        TopicPattern.parse(text)


@given(st.lists(st.sampled_from("ab*"), max_size=8), st.text("ab", max_size=10))
def test_patterns_fit_as_globs_do(parts: list[str], name: str) -> None:
    def fits(pattern: str, rest: str) -> bool:
        if not pattern:
            return not rest
        if pattern[0] == "*":
            return any(fits(pattern[1:], rest[start:]) for start in range(len(rest) + 1))
        return rest[:1] == pattern[0] and fits(pattern[1:], rest[1:])

    pattern = "".join(parts)
    assert TopicPattern.parse(pattern).fits(name, {}) == fits(pattern, name)


@pytest.mark.timeout(10)
def test_no_pattern_takes_long() -> None:
    pattern = TopicPattern.parse("*a" * 200 + "{claims.teams}" * 50 + "b")
    assert not pattern.fits("a" * 1024, {"teams": ["a" * n for n in range(1, 100)]})


TOPICS = Topics(
    RealtimeConfig.model_validate(
        {
            "private": [
                {"topic": "room:*", "read": ["member", "guest"], "write": ["member"]},
                {"topic": "user:{claims.sub}", "read": ["member"], "write": ["service"]},
                {"topic": "user:*", "read": ["service"]},
            ]
        }
    )
)


@pytest.mark.parametrize(
    ("role", "name", "may"),
    [
        ("member", "room:1", "rw"),
        ("guest", "room:1", "r"),
        ("service", "room:1", ""),
        ("member", "user:ada", "r"),
        ("member", "user:bob", ""),
        ("service", "user:bob", "r"),
        ("service", "user:ada", "rw"),
        ("member", "hall", ""),
        ("", "room:1", ""),
    ],
)
def test_rules_add_up_and_nobody_else_is_let_in(role: str, name: str, may: str) -> None:
    reader = Reader(role, {"sub": "ada"})
    found = "r" * TOPICS.may_read(reader, name) + "w" * TOPICS.may_write(reader, name)
    assert found == may


def test_without_rules_nobody_is_let_in() -> None:
    topics = Topics(RealtimeConfig())
    assert not topics.may_read(Reader("service"), "a")
    assert not topics.may_write(Reader("service"), "a")


def test_a_rate_lets_so_many_through_and_then_one_after_another() -> None:
    rate = Rate(5, 30.0)
    assert [rate.take(100.0) for _ in range(6)] == [True] * 5 + [False]
    assert not rate.take(105.9)
    assert rate.take(106.0)
    assert not rate.take(106.0)
    assert [rate.take(1000.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_rate_counts_several_at_once() -> None:
    rate = Rate(10, 1.0)
    assert not rate.take(0.0, 11)
    assert rate.take(0.0, 10)
    assert not rate.take(0.4, 5)
    assert rate.take(0.5, 5)


@given(st.lists(st.floats(0, 5), max_size=200))
def test_nobody_has_more_than_twice_the_rate(moments: list[float]) -> None:
    rate = Rate(10, 1.0)
    taken = [moment for moment in sorted(moments) if rate.take(moment)]
    for moment in taken:
        assert sum(moment <= one < moment + 1 for one in taken) <= 20


def test_each_sender_has_a_rate_and_few_are_remembered() -> None:
    rates = Rates(1, 1.0)
    assert [rates.take(who, 0.0) for who in "aab"] == [True, False, True]
    for number in range(MOST_KNOWN):
        assert rates.take(number, 0.0)
    assert rates.take("a", 0.0)  # forgotten meanwhile
