"""The bindings of channels: each rule of their text, and what clients are told of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.access.refusals import Cause, ReaderRefused, expired, forbidden, unknown
from walstream.changes import Operation
from walstream.grammar import And, Comparison, Filter, Not, Operator
from walstream.live.subscriptions import Limits
from walstream.realtime.bindings import Binding, read_bindings
from walstream.realtime.filters import (
    Unreadable,
    ValueRefused,
    condition_on_rows,
    read_conditions,
)
from walstream.realtime.joins import Join, read_join
from walstream.realtime.messages import MAX_DEPTH, Malformed, Version, decode
from walstream.realtime.refusals import connect_refusal, join_refusal
from walstream.realtime.terms import term
from walstream.router import TablePattern

TODOS: Final = {"event": "*", "schema": "public", "table": "todos"}


def read(text: str) -> list[tuple[str, ...]]:
    """What is read of a filter: column, operator, value, and ``not`` where it is negated."""
    return [
        (one.column, str(one.operator), one.value, *(["not"] if one.is_negated else []))
        for one in read_conditions(text)
    ]


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("", []),
        ("  \t", []),
        ("subject=eq.hey", [("subject", "eq", "hey")]),
        *((f"a={one}.x", [("a", one, "x")]) for one in sorted({*Operator} - {"in"})),
        *((f"a=not.{one}.x", [("a", one, "x", "not")]) for one in sorted({*Operator} - {"in"})),
        ("id=gt.0,id=lt.100", [("id", "gt", "0"), ("id", "lt", "100")]),
        (" id=gt.0 , id=lt.100 ", [("id", "gt", "0"), ("id", "lt", "100")]),
        # The first = ends the column, the first dot the operator.
        ("a=eq.b=c", [("a", "eq", "b=c")]),
        ("a=eq.1.5", [("a", "eq", "1.5")]),
        ("a.b=eq.1", [("a.b", "eq", "1")]),
        ('"a"=eq.1', [('"a"', "eq", "1")]),
        ("a =eq.1", [("a ", "eq", "1")]),
        ("=eq.1", [("", "eq", "1")]),
        ("a=eq.", [("a", "eq", "")]),
        ("a=eq.not.x", [("a", "eq", "not.x")]),
        # Commas in parentheses or in quotes do not split.
        ("a=in.(1,2),b=eq.3", [("a", "in", "{1,2}"), ("b", "eq", "3")]),
        ("a=eq.f(x,y),b=eq.1", [("a", "eq", "f(x,y)"), ("b", "eq", "1")]),
        ("a=eq.((x),y)", [("a", "eq", "((x),y)")]),
        ("a=eq.x),b=eq.1", [("a", "eq", "x)"), ("b", "eq", "1")]),
        ("a=eq.(x,b=eq.1", [("a", "eq", "(x,b=eq.1")]),
        ('a=eq."x,y",b=eq.1', [("a", "eq", "x,y"), ("b", "eq", "1")]),
        ('a=eq."x,b=eq.1', [("a", "eq", '"x,b=eq.1')]),
        ('a=in.("x,)",b)', [("a", "in", '{"x,)",b}')]),
        ('a=in.(x,"y,z")', [("a", "in", '{x,"y,z"}')]),
        # A quote opens behind a dot, a parenthesis or a comma alone; a backslash escapes in quotes.
        ('a=eq.x"y,b=eq.1', [("a", "eq", 'x"y'), ("b", "eq", "1")]),
        ('a=eq."x\\",y",b=eq.1', [("a", "eq", 'x",y'), ("b", "eq", "1")]),
        ('a=eq."x\\\\",b=eq.1', [("a", "eq", "x\\"), ("b", "eq", "1")]),
        ("a=eq.x\\,b=eq.1", [("a", "eq", "x\\"), ("b", "eq", "1")]),
        ('a=eq."x\\', [("a", "eq", '"x\\')]),
        # Values wholly in quotes lose them; others stay as they are.
        ('a=eq."x"', [("a", "eq", "x")]),
        ('a=eq.""', [("a", "eq", "")]),
        ('a=eq." x "', [("a", "eq", " x ")]),
        ('a=eq."x', [("a", "eq", '"x')]),
        ('a=eq."x"y', [("a", "eq", '"x"y')]),
        ('a=eq."x"y"', [("a", "eq", '"x"y"')]),
        ('a=eq."', [("a", "eq", '"')]),
        ('a=eq."a\\nb"', [("a", "eq", "anb")]),
        ('a=not.like."%,%"', [("a", "like", "%,%", "not")]),
        # What is in parentheses becomes an array's text.
        ("subject=in.(hidee,ho)", [("subject", "in", "{hidee,ho}")]),
        ("a=not.in.(1)", [("a", "in", "{1}", "not")]),
        ("a=in.()", [("a", "in", "{}")]),
        ("a=in.((1))", [("a", "in", "{(1)}")]),
    ],
)
def test_a_filter_is_read(text: str, conditions: list[tuple[str, ...]]) -> None:
    assert read(text) == conditions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("subject=foo.hey", '["foo", "hey"]'),
        ("a=not.foo.x", '["foo", "x"]'),
        ("a=EQ.1", '["EQ", "1"]'),
        ("a=not.not.eq.1", '["not", "eq.1"]'),
        ("a=or.(b.eq.1)", '["or", "(b.eq.1)"]'),
        ("or=(a.eq.1,b.eq.2)", '["(a", "eq.1,b.eq.2)"]'),
        ("undefined", '["undefined"]'),
        ("id", '["id"]'),
        ("a=eq", '["eq"]'),
        ("a=", '[""]'),
        ('say "x"', '["say \\"x\\""]'),
        ("a=eq.1,", "filter must not contain empty segments (check for extra commas)"),
        (",a=eq.1", "filter must not contain empty segments (check for extra commas)"),
        ("a=eq.1,,b=eq.2", "filter must not contain empty segments (check for extra commas)"),
        ("a=eq.1, ,b=eq.2", "filter must not contain empty segments (check for extra commas)"),
        ("a=in.1,2", "`in` filter value must be wrapped by parentheses"),
        ("a=in.(1", "`in` filter value must be wrapped by parentheses"),
        ("a=in.1)", "`in` filter value must be wrapped by parentheses"),
        ("a=in.(", "`in` filter value must be wrapped by parentheses"),
        ("a=in.", "`in` filter value must be wrapped by parentheses"),
    ],
)
def test_what_is_no_filter_is_refused_in_the_words_that_clients_know(
    text: str, reason: str
) -> None:
    with pytest.raises(Unreadable) as refused:
        read_conditions(text)
    assert str(refused.value) == reason


def where(text: str) -> Filter | None:
    return condition_on_rows(read_conditions(text))


def among(*values: str) -> Comparison:
    return Comparison("a", Operator.IN, values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("a=eq.1", Comparison("a", Operator.EQ, ("1",))),
        ("a=not.eq.1", Not(Comparison("a", Operator.EQ, ("1",)))),
        (
            "a=eq.1,b=not.gt.2",
            And(
                (
                    Comparison("a", Operator.EQ, ("1",)),
                    Not(Comparison("b", Operator.GT, ("2",))),
                )
            ),
        ),
        ("a=like.x*", Comparison("a", Operator.LIKE, ("x*",), is_verbatim=True)),
        ("a=not.ilike.x%", Not(Comparison("a", Operator.ILIKE, ("x%",), is_verbatim=True))),
        ("a=match.^x", Comparison("a", Operator.MATCH, ("^x",))),
        *(
            (f"a=is.{one}", Comparison("a", Operator.IS, (one,)))
            for one in ("null", "true", "false", "unknown")
        ),
        ("a=not.is.null", Comparison("a", Operator.IS, ("not_null",))),
        ("a=not.is.true", Not(Comparison("a", Operator.IS, ("true",)))),
        # The values of in are written as in an array of PostgreSQL.
        ("a=in.()", among()),
        ("a=in.( \t)", among()),
        ("a=in.(x,y)", among("x", "y")),
        ("a=in.( x , y )", among("x", "y")),
        ("a=in.(x y)", among("x y")),
        ('a=in.("x,y"," z ")', among("x,y", " z ")),
        ('a=in.( "x" , y)', among("x", "y")),
        ('a=in.("","a\\"b\\\\c\\d")', among("", 'a"b\\cd')),
        ("a=in.(x\\ ,y\\,z)", among("x ", "y,z")),
        ('a=in.("null",\\NULL)', among("null", "NULL")),
        # A null among the values: nothing equals it, and nothing is known to be none of them.
        ("a=in.(x,NULL,null)", among("x")),
        ("a=in.(nullx,x)", among("nullx", "x")),
        ("a=not.in.(x)", Not(among("x"))),
        ("a=not.in.(x,NULL)", among()),
    ],
)
def test_a_filter_becomes_a_condition_on_rows(text: str, expected: Filter | None) -> None:
    assert where(text) == expected


@pytest.mark.parametrize(
    ("text", "sqlstate", "message"),
    [
        ("a=in.(x,)", "22P02", 'malformed array literal: "{x,}"'),
        ("a=in.(,)", "22P02", 'malformed array literal: "{,}"'),
        ("a=in.(x, ,y)", "22P02", 'malformed array literal: "{x, ,y}"'),
        ('a=in.("x)', "22P02", 'malformed array literal: "{"x}"'),
        ('a=in.(x"y")', "22P02", 'malformed array literal: "{x"y"}"'),
        ('a=in.("x"y)', "22P02", 'malformed array literal: "{"x"y}"'),
        ("a=in.(x\\)", "22P02", 'malformed array literal: "{x\\}"'),
        ("a=in.({1,2})", "22P02", 'malformed array literal: "{{1,2}}"'),
        ("a=in.(1})", "22P02", 'malformed array literal: "{1}}"'),
        (
            f"a=in.({','.join(map(str, range(101)))})",
            "P0001",
            "too many values for `in` filter. Maximum 100",
        ),
        *(
            (
                f"a=is.{one}",
                "P0001",
                "invalid value for is filter: must be null, true, false, or unknown",
            )
            for one in ("NULL", "not_null", "", "maybe")
        ),
    ],
)
def test_a_value_that_no_column_takes_is_refused(text: str, sqlstate: str, message: str) -> None:
    with pytest.raises(ValueRefused) as refused:
        where(text)
    assert (refused.value.sqlstate, refused.value.message) == (sqlstate, message)


def test_in_takes_a_hundred_values() -> None:
    assert where(f"a=in.({','.join(map(str, range(100)))})") == among(*map(str, range(100)))


# What the builder of the stock client writes

values = st.text(alphabet='ab,()"\\. =%', max_size=6)


def built(value: str) -> str:
    """Write a value as the client does."""
    if not set(value) & set(',()"\\') and value == value.strip():
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(st.tuples(st.sampled_from(["eq", "like", "not.match"]), values), min_size=1))
def test_what_a_client_builds_is_read_as_it_was_meant(some: list[tuple[str, str]]) -> None:
    text = ",".join(f"a={operator}.{built(value)}" for operator, value in some)
    assert [one.value for one in read_conditions(text)] == [value for _, value in some]


@given(st.lists(values.filter(bool), min_size=1, max_size=4))
def test_a_list_that_a_client_builds_is_read_as_it_was_meant(some: list[str]) -> None:
    assert where(f"a=in.({','.join(map(built, some))})") == among(*some)


@given(st.text(alphabet='ab=.,()"\\ {}notinequl', max_size=30) | st.text())
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        where(text)
    except (Unreadable, ValueRefused):
        return


# Bindings


def bind(**raw: Any) -> Binding:
    [binding] = read_bindings([raw], Limits())
    return binding


def asked(**raw: Any) -> Any:
    binding = bind(**raw)
    assert binding.error == ""
    assert binding.subscription is not None
    return binding.subscription


@pytest.mark.parametrize(
    ("given", "schema", "name"),
    [
        ({"schema": "public", "table": "todos"}, "public", "todos"),
        ({"table": "todos"}, "public", "todos"),
        ({"schema": "app"}, "app", None),
        ({"schema": "*"}, None, None),
        ({"schema": "app", "table": "*"}, "app", None),
        ({"schema": "*", "table": "todos"}, None, "todos"),
        ({"table": "*"}, "public", None),
        ({"schema": "My App", "table": 'my.t"able'}, "My App", 'my.t"able'),
        ({"schema": None, "table": "todos", "filter": None}, "public", "todos"),
        ({"schema": "app", "table": None}, "app", None),
        # The original takes % and _ for wildcards of LIKE; here they are what they are.
        ({"schema": "public", "table": "user_interactions"}, "public", "user_interactions"),
        ({"schema": "public", "table": "to%"}, "public", "to%"),
    ],
)
def test_a_binding_names_tables(
    given: dict[str, Any], schema: str | None, name: str | None
) -> None:
    assert asked(event="*", **given).pattern == TablePattern(schema, name)


ALL: Final = frozenset({Operation.INSERT, Operation.UPDATE, Operation.DELETE})


@pytest.mark.parametrize(
    ("event", "operations"),
    [
        ("INSERT", {Operation.INSERT}),
        ("update", {Operation.UPDATE}),
        ("Delete", {Operation.DELETE}),
        ("*", ALL),
        ("TRUNCATE", ALL),
        ("anything", ALL),
        ("", ALL),
        (None, ALL),
        (3, ALL),
    ],
)
def test_a_binding_names_an_event_or_means_all(event: Any, operations: set[Operation]) -> None:
    subscription = asked(event=event, schema="public", table="todos")
    assert subscription.operations == operations
    assert not subscription.wants(Operation.TRUNCATE)
    assert subscription.wants(Operation.READ) == (Operation.INSERT in operations)


@pytest.mark.parametrize(
    ("select", "columns"),
    [
        (["id", "n"], {"id", "n"}),
        (["id", 3, None, {}], {"id"}),
        ([], None),
        ([3], None),
        (None, None),
        (3, None),
        ({"a": 1}, None),
    ],
)
def test_a_binding_selects_columns(select: Any, columns: set[str] | None) -> None:
    subscription = asked(**TODOS, select=select)
    assert subscription.columns == columns
    assert subscription.with_key
    assert not subscription.tells_departure


@pytest.mark.parametrize(
    ("leaving", "asks"),
    [(True, True), ("true", True), ("True", True), (False, False), ("false", False), (None, False)],
)
def test_a_binding_asks_for_what_leaves(leaving: Any, asks: bool) -> None:  # noqa: FBT001
    assert asked(**TODOS, leaving=leaving).leaving is asks
    assert not asked(**TODOS).leaving


@pytest.mark.parametrize(
    ("given", "since", "with_position"),
    [
        ({}, None, False),
        ({"since": None}, None, True),
        ({"since": "0/16B3748:1"}, "0/16B3748:1", True),
        ({"since": "beginning"}, "beginning", True),
    ],
)
def test_a_binding_says_since_when(
    given: dict[str, Any],
    since: str | None,
    with_position: bool,  # noqa: FBT001
) -> None:
    binding = bind(**TODOS, **given)
    assert (binding.since, binding.with_position) == (since, with_position)
    assert binding.error == ""


_NOT_GIVEN: Final = (
    "No subscription params provided. Please provide at least a `schema` or `table`"
    " to subscribe to: "
)
_FAILED: Final = (
    "Unable to subscribe to changes with given parameters. An exception happened so please check"
    " your connect parameters: [event: *, schema: public, table: test,"
)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ({"filter": "a=foo.hey"}, 'Error parsing `filter` params: ["foo", "hey"]'),
        ({"filter": "undefined"}, 'Error parsing `filter` params: ["undefined"]'),
        (
            {"filter": "a=eq.1,"},
            (
                "Error parsing `filter` params: filter must not contain empty segments"
                " (check for extra commas)"
            ),
        ),
        (
            {"filter": "a=in.1"},
            "Error parsing `filter` params: `in` filter value must be wrapped by parentheses",
        ),
        (
            {"select": "id,n"},
            (
                "Error parsing `select` params: expected a list of column name strings,"
                ' e.g. select: ["col1", "col2"]'
            ),
        ),
        (
            {"table": "*", "select": ["id"]},
            (
                "Column selection is not supported for wildcard subscriptions."
                " Provide an explicit schema and table name."
            ),
        ),
        ({"schema": None, "table": None}, f'{_NOT_GIVEN}%{{"schema" => nil, "table" => nil}}'),
        (
            {"schema": None, "filter": "a=eq.1"},
            f'{_NOT_GIVEN}%{{"filter" => "a=eq.1", "schema" => nil, "table" => "test"}}',
        ),
        ({"schema": 3}, f'{_NOT_GIVEN}%{{"schema" => 3, "table" => "test"}}'),
        ({"filter": 3}, f'{_NOT_GIVEN}%{{"filter" => 3, "schema" => "public", "table" => "test"}}'),
        ({"schema": 3, "user_token": "secret"}, f"{_NOT_GIVEN}<redacted>"),
        (
            {"filter": "subject=is.hey"},
            (
                f'{_FAILED} filters: [{{"subject", "is", "hey", false}}], select: nil]. Exception:'
                " ERROR P0001 (raise_exception)"
                " invalid value for is filter: must be null, true, false, or unknown"
            ),
        ),
        (
            {"filter": "a=not.in.(1,)", "select": ["id", "n"]},
            (
                f'{_FAILED} filters: [{{"a", "in", "{{1,}}", true}}], select: ["id", "n"]].'
                " Exception: ERROR 22P02 (invalid_text_representation)"
                ' malformed array literal: "{1,}"'
            ),
        ),
        (
            {"since": 12},
            (
                "Error parsing `since` params: expected the id of a change, an LSN, a time,"
                ' "beginning" or null'
            ),
        ),
        (
            {"filter": f"a=eq.{'x' * 5000}"},
            "Error parsing `filter` params: a filter of 5005 bytes; allowed: 4096",
        ),
        (
            {"filter": f"a=match.{'x' * 201}"},
            "Error parsing `filter` params: a pattern has at most 200 characters",
        ),
        (
            {"filter": ",".join(["a=match.x"] * 11)},
            "Error parsing `filter` params: 11 patterns in one request; allowed: 10",
        ),
    ],
)
def test_what_is_wrong_is_told_in_the_words_that_clients_know(
    raw: dict[str, Any], error: str
) -> None:
    raw = {"schema": "public", "table": "test", **raw}
    binding = bind(**raw)
    assert binding.error == error
    assert binding.subscription is None
    assert binding.echo == {**raw, "id": binding.id}


def test_a_binding_without_anything_is_refused() -> None:
    assert bind().error == f"{_NOT_GIVEN}%{{}}"


def test_a_binding_is_shown_as_the_original_shows_it() -> None:
    binding = bind(schema="public", table="test", filter='a=eq."x\ny",b=not.in.(1)', event="insert")
    assert binding.parameters == (
        'event: INSERT, schema: public, table: test, filters: [{"a", "eq", "x\\ny", false},'
        ' {"b", "in", "{1}", true}], select: nil'
    )
    assert bind(schema="app").parameters == (
        "event: *, schema: app, table: *, filters: [], select: nil"
    )


def test_bindings_are_echoed_in_their_order_with_nothing_but_an_id() -> None:
    raw: list[dict[str, Any]] = [
        {"table": "a", "extra": {"x": [1]}},
        {"event": "nonsense"},
        {"table": "a", "event": "*"},
    ]
    bindings = read_bindings(raw, Limits())
    assert [{**one.echo, "id": 0} for one in bindings] == [{**one, "id": 0} for one in raw]


def test_bindings_beyond_the_limit_are_refused_and_echoed_all_the_same() -> None:
    bindings = read_bindings([{"table": f"t{place}"} for place in range(4)], Limits(3))
    assert [one.error for one in bindings[:3]] == ["", "", ""]
    assert "4 in one channel; allowed: 3" in bindings[3].error
    assert bindings[3].echo["table"] == "t3"


@pytest.mark.parametrize("key", ["table", "filter", "select", "since", "x"])
@pytest.mark.parametrize("around", [lambda one: [one], lambda one: {"a": one}])
def test_a_binding_as_deep_as_a_message_may_be_is_echoed(
    around: Callable[[Any], Any], key: str
) -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH - 5):  # in message, payload, config, list and binding
        deep = around(deep)
    [asked] = joined_for({**TODOS, key: deep}).bindings
    [binding] = read_bindings([asked], Limits())
    assert binding.echo == {**TODOS, key: deep, "id": binding.id}
    assert msgspec.json.decode(msgspec.json.encode(binding.echo)) == binding.echo
    with pytest.raises(Malformed, match="deep"):
        joined_for({**TODOS, key: around(deep)})


def joined_for(raw: dict[str, Any]) -> Join:
    config = {"config": {"postgres_changes": [raw]}}
    text = msgspec.json.encode(["1", "1", "realtime:a", "phx_join", config])
    return read_join(decode(Version.V2, text).payload)


def test_patterns_of_all_bindings_together_are_bounded() -> None:
    raw = [{**TODOS, "filter": f"a=match.{place}"} for place in range(12)]
    errors = [one.error for one in read_bindings(raw, Limits())]
    assert errors[:10] == [""] * 10
    assert all("11 patterns in one request; allowed: 10" in one for one in errors[10:])


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["event", "schema", "table", "filter", "select", "since", "x"]),
            st.none() | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2),
        ),
        max_size=8,
    )
)
def test_equal_bindings_have_equal_ids_and_others_have_others(raw: list[dict[str, Any]]) -> None:
    bindings = read_bindings(raw, Limits())
    again = read_bindings(json.loads(json.dumps(raw)), Limits())
    assert [one.id for one in bindings] == [one.id for one in again]
    assert all(0 < one.id < 1 << 31 for one in bindings)
    contents = {json.dumps({**one, "since": "since" in one}, sort_keys=True) for one in raw}
    assert len({one.id for one in bindings}) == len(contents)


def test_ids_are_the_same_in_every_channel_and_whatever_they_begin_with() -> None:
    first = bind(**TODOS, since="0/1:1").id
    assert first == bind(**TODOS, since="0/2:1").id == bind(**TODOS, since=None).id
    assert first != bind(**TODOS).id  # whose records have no position
    _, second = read_bindings([{"table": "other"}, {**TODOS, "since": None}], Limits())
    assert second.id == first


# Values in messages


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nil"),
        (True, "true"),
        (1.5, "1.5"),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("é\n\x1b\x01#{x}", '"é\\n\\e\\x{1}\\#{x}"'),
        ([1, ["a"]], '[1, ["a"]]'),
        ({"b": 1, "a": {}}, '%{"a" => %{}, "b" => 1}'),
    ],
)
def test_values_are_written_as_the_original_writes_them(value: Any, shown: str) -> None:
    assert term(value) == shown


def test_what_is_long_or_deep_is_cut() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert term(deep) == "[[[[[]]]]]"
    assert len(term(["x" * 10_000] * 10_000)) < 250_000


# Tokens


@pytest.mark.parametrize(
    ("refused", "at_connect", "at_join"),
    [
        (
            unknown("there is no token", Cause.MISSING),
            (401, "API key is missing"),
            "MalformedJWT: The token provided is not a valid JWT",
        ),
        (
            expired(7),
            (401, "Token has expired"),
            "InvalidJWTToken: Token has expired 7 seconds ago",
        ),
        (
            unknown("the token has no exp", Cause.INCOMPLETE),
            (401, "Fields `role` and `exp` are required in JWT"),
            "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
        ),
        (
            unknown("this is no token"),
            (401, "The token provided is not a valid JWT"),
            "MalformedJWT: The token provided is not a valid JWT",
        ),
        (
            unknown("the token's signature is wrong", Cause.SIGNATURE),
            (401, "Failed to validate JWT signature"),
            "JwtSignatureError: Failed to validate JWT signature",
        ),
        (
            forbidden("the role may not read"),
            (403, "the role may not read"),
            "Unauthorized: the role may not read",
        ),
        (
            ReaderRefused(503, "the keys cannot be had"),
            (503, "Error connecting to Realtime"),
            "UnknownErrorOnChannel: the keys cannot be had",
        ),
    ],
)
def test_who_is_not_let_in_is_told_why(
    refused: ReaderRefused, at_connect: tuple[int, str], at_join: str
) -> None:
    assert connect_refusal(refused) == at_connect
    assert join_refusal(refused) == at_join
