"""The text form of filters: what is read, what is refused, and printing it back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.errors import FilterError
from walstream.grammar import (
    IS_VALUES,
    And,
    Comparison,
    Filter,
    Not,
    Operator,
    Or,
    comparisons,
    parse,
)


def compare(column: str, operator: str, *values: str) -> Comparison:
    return Comparison(column, Operator(operator), values)


A1 = compare("a", "eq", "1")
B2 = compare("b", "gt", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=eq.1", A1),
        ("  a =eq.1  ", A1),
        ("a=eq.1,b=gt.2", And((A1, B2))),
        ("a=eq.1 , b=gt.2", And((A1, B2))),
        ("a=not.eq.1", Not(A1)),
        ("or(a.eq.1,b.gt.2)", Or((A1, B2))),
        ("or(a=eq.1, b=gt.2 )", Or((A1, B2))),
        ("or=(a.eq.1,b.gt.2)", Or((A1, B2))),
        ("and(a.eq.1,b.gt.2)", And((A1, B2))),
        ("not.or(a.eq.1,b.not.gt.2)", Not(Or((A1, Not(B2))))),
        ("not.and=(a.eq.1,or(b.gt.2,a.eq.1))", Not(And((A1, Or((B2, A1)))))),
        ("and(a.eq.1,b.gt.2),a=eq.1", And((And((A1, B2)), A1))),
        ("or(a.eq.1)", A1),
        ("not.and(a.not.eq.1)", A1),
        ("not.or(a.eq.1)", Not(A1)),
        ("or=eq.1", compare("or", "eq", "1")),
        ("or(or.eq.1,not.eq.2)", Or((compare("or", "eq", "1"), compare("not", "eq", "2")))),
        ('"a.b,=(\\"\\\\"=eq.1', compare('a.b,=("\\', "eq", "1")),
        ('or("a.b".eq.1,"c" =eq.2)', Or((compare("a.b", "eq", "1"), compare("c", "eq", "2")))),
        ("a.b=eq.1", compare("a.b", "eq", "1")),
        ("größe=eq.10 €", compare("größe", "eq", "10 €")),
        ("a=eq.", compare("a", "eq", "")),
        ('a=eq.""', compare("a", "eq", "")),
        ("a=eq. x", compare("a", "eq", " x")),
        ('a=eq." x "', compare("a", "eq", " x ")),
        ("a=eq.1.5=2", compare("a", "eq", "1.5=2")),
        ('a=eq."x,y)\\"\\\\z"', compare("a", "eq", 'x,y)"\\z')),
        ('a=eq."x', compare("a", "eq", '"x')),
        ('a=eq."x"y', compare("a", "eq", '"x"y')),
        ('a=eq."x,y"z', compare("a", "eq", '"x,y"z')),
        ('a=eq.v."x,y"', compare("a", "eq", 'v."x,y"')),
        ("a=eq.x\\", compare("a", "eq", "x\\")),
        ("a=eq.f(1,g(2)),b=gt.2", And((compare("a", "eq", "f(1,g(2))"), B2))),
        ('a=eq.f(")")', compare("a", "eq", 'f(")")')),
        ("or(a.eq.f(1,2),b.gt.2)", Or((compare("a", "eq", "f(1,2)"), B2))),
        ("a=in.(1,2)", compare("a", "in", "1", "2")),
        ('a=in.( 1 , "b, c" ,"" )', compare("a", "in", "1", "b, c", "")),
        ("a=in.()", compare("a", "in")),
        ("a=in.( )", compare("a", "in")),
        ("a=not.in.(f(1,2),b)", Not(compare("a", "in", "f(1,2)", "b"))),
        ('a=in.("x"y)', compare("a", "in", '"x"y')),
        ("or(a.in.(1,2),b.gt.2)", Or((compare("a", "in", "1", "2"), B2))),
        ("a=is.null", compare("a", "is", "null")),
        ("a=is.NOT_NULL", compare("a", "is", "not_null")),
        ("a=like.%x*", compare("a", "like", "%x*")),
        ("", And(())),
        (" \n", And(())),
    ],
)
def test_a_filter_is_read(text: str, expected: Filter) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "position", "found", "expected"),
    [
        ("undefined", 10, "the filter ends", "'='"),
        ("a.eq.1", 7, "the filter ends", "'='"),
        ("=eq.1", 1, "'=eq.1'", "a column"),
        ("a=eq.1,", 8, "the filter ends", "a column"),
        ("a=eq.1,,b=eq.2", 8, "',b=eq.2'", "a column"),
        ("a", 2, "the filter ends", "'='"),
        ("a=", 3, "the filter ends", "an operator (eq, neq, lt, lte, gt, gte, in, like"),
        ("a=foo.1", 3, "'foo.1'", "an operator"),
        ("a= eq.1", 3, "' eq.1'", "an operator"),
        ("a=EQ.1", 3, "'EQ.1'", "an operator"),
        ("a=not.not.eq.1", 7, "'not.eq.1'", "an operator"),
        ("a=eq", 5, "the filter ends", "'.' and a value"),
        ("a=eq,b", 5, "',b'", "'.' and a value"),
        ("a=is.maybe", 6, "'maybe'", "one of null, not_null, true, false, unknown"),
        ("a=in.1", 6, "'1'", "a list in parentheses"),
        ("a=in.(1", 8, "the filter ends", "a comma or a closing parenthesis"),
        ("a=in.(1,", 9, "the filter ends", "a value"),
        ("a=in.(,1)", 7, "',1)'", "a value"),
        ("a=in.(1)x", 9, "'x'", "a comma or the end"),
        ('a=in.("x,y)', 7, "'\"x,y)'", "a closing quote"),
        ('a=eq."x,b=eq.1', 6, "'\"x,b=eq.1'", "a closing quote"),
        ("a=eq.:)", 7, "')'", "balanced parentheses"),
        ("a=eq.:(,b=eq.1", 7, "'(,b=eq.1'", "balanced parentheses"),
        ("or(a.eq.1", 10, "the filter ends", "a comma or a closing parenthesis"),
        ("or(a.eq.1))", 11, "')'", "a comma or the end"),
        ("or()", 4, "')'", "a column"),
        ("or(a,b)", 5, "',b)'", "'=' or '.'"),
        ('"a"eq.1', 4, "'eq.1'", "'='"),
        ("a=foo." + "x" * 100, 3, "'foo.xxxxxxxxxxxxxxxx…'", "an operator"),
        ("or(" * 60 + "a.eq.1" + ")" * 60, 154, "'or(or(", "at most 50 groups"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    text: str, position: int, found: str, expected: str
) -> None:
    with pytest.raises(FilterError) as refused:
        parse(text)
    assert refused.value.message.startswith(f"filter, position {position}: ")
    assert found in refused.value.message
    assert f"expected {expected}" in refused.value.message


def test_comparisons_come_in_the_order_of_the_filter() -> None:
    where = parse("a=eq.1,not.or(b.eq.2,and(c.eq.3,d.not.eq.4)),e=eq.5")
    assert [one.column for one in comparisons(where)] == ["a", "b", "c", "d", "e"]


@given(st.text(alphabet='ab.,()"\\=* eqnotrid1') | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        where = parse(text)
    except FilterError:
        return
    assert parse(str(where)) == where


def _comparisons() -> st.SearchStrategy[Comparison]:
    names = st.text() | st.sampled_from(["a", "or", "and", "not", "a.b", '"', " a "])
    values = st.text() | st.text(alphabet='ab.,()"\\ ')
    plain = st.sampled_from([one for one in Operator if one not in (Operator.IN, Operator.IS)])
    return st.one_of(
        st.builds(Comparison, names, plain, st.tuples(values)),
        st.builds(Comparison, names, st.just(Operator.IN), st.lists(values).map(tuple)),
        st.builds(Comparison, names, st.just(Operator.IS), st.tuples(st.sampled_from(IS_VALUES))),
    )


def _groups(parts: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    several = st.lists(parts, min_size=2, max_size=4).map(tuple)
    group = st.builds(And, several) | st.builds(Or, several)
    return group | st.builds(Not, group | _comparisons())


@given(st.recursive(_comparisons(), _groups, max_leaves=8))
def test_what_is_printed_is_read_again(where: Filter) -> None:
    assert parse(str(where)) == where
