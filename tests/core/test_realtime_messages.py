"""The frames, the messages and the joins of Phoenix channels."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.realtime.frames import binary_frame, split, text_frame
from walstream.realtime.joins import Join, read_join, read_token
from walstream.realtime.messages import (
    MAX_DEPTH,
    BinaryBroadcast,
    Malformed,
    Version,
    broadcast_json,
    decode,
    decode_binary,
    decode_text_broadcast,
    encode,
    encode_broadcast,
    verify_json,
)

V1, V2 = Version.V1, Version.V2


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (0, b"\x81\x00"),
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
    ],
)
def test_a_frame_is_final_and_unmasked_and_has_the_shortest_length(
    length: int, header: bytes
) -> None:
    payload = b"a" * length
    assert text_frame(payload) == header + payload
    assert binary_frame(payload) == b"\x82" + header[1:] + payload


@given(
    messages=st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), max_size=5),
    has_long=st.booleans(),
)
def test_frames_in_one_piece_are_taken_apart_again(
    messages: list[tuple[bool, bytes]], *, has_long: bool
) -> None:
    messages = [*messages, (True, b"a" * 70_000)] if has_long else messages
    frames = [(text_frame if is_text else binary_frame)(payload) for is_text, payload in messages]
    assert list(split(b"".join(frames))) == messages


@pytest.mark.parametrize(
    ("version", "text", "expected"),
    [
        (
            V1,
            '{"topic":"realtime:room1","event":"phx_join","payload":{"a":1},"ref":"6","join_ref":"6"}',
            ("realtime:room1", "phx_join", {"a": 1}, "6", "6"),
        ),
        # realtime-py's heartbeat.
        (
            V1,
            '{"event":"heartbeat","topic":"phoenix","payload":{},"ref":null,"join_ref":null}',
            ("phoenix", "heartbeat", {}, None, None),
        ),
        (V1, '{"topic":"a","event":"b","ref":"1"}', ("a", "b", {}, "1", None)),
        (V1, '{"topic":"a","event":"b","payload":null,"else":1}', ("a", "b", None, None, None)),
        (V2, '[null,"9","phoenix","heartbeat",{}]', ("phoenix", "heartbeat", {}, "9", None)),
        (V2, '["6","7","a","b",[1.50]]', ("a", "b", [1.5], "7", "6")),
        (V2, ' [ "6" , 7 , "a" , "b" , "c" , "more" ] ', ("a", "b", "c", "7", "6")),
        (V2, '[null,null,"\\u00e9\\ud83d\\ude00","\u00e9",{}]', ("é😀", "é", {}, None, None)),
        (V2, '[null,null,"a","b",{"a":1,"a":2}]', ("a", "b", {"a": 2}, None, None)),
    ],
)
def test_a_text_frame_is_read(
    version: Version, text: str, expected: tuple[str, str, Any, str | None, str | None]
) -> None:
    for data in (text, text.encode()):
        message = decode(version, data)
        topic, event = message.topic, message.event
        assert (topic, event, message.payload, message.ref, message.join_ref) == expected


NOT_MESSAGES = [
    "",
    "null",
    "1",
    "{}",
    "[]",
    '{"topic":"a"}',
    '{"topic":"a","event":1,"payload":{},"ref":null}',
    '{"topic":null,"event":"b","payload":{},"ref":null}',
    '["1","2","a","b"]',
    "[1,2,3,4,5]",
    '[null,null,"a","b",{}',
    '[null,null,"a","b",{}]]',
    '[null,null,"a","b",NaN]',
    '[null,null,"a","b",Infinity]',
    '[null,null,"a","b",01]',
    '[null,true,"a","b",{}]',
    '[null,1.5,"a","b",{}]',
    '[null,{},"a","b",{}]',
    '[null,null,"\\ud800","b",{}]',
    '[null,null,"a","b",{"x":"\\ud800"}]',
    '[null,null,"a","b","\n"]',
    '[null,null,"\ud800","b",{}]',
    '["' + "6" * 256 + '",null,"a","b",{}]',
    '[null,"' + "6" * 256 + '","a","b",{}]',
    '[null,null,"' + "a" * 1_000_000 + '","b",{}]',
    '[null,null,"a","' + "b" * 1_000_000 + '",{}]',
    '[null,null,"a","b",' + "[" * 200 + "]" * 200 + "]",
    '[null,null,"a","b",' + '{"a":' * 200 + "1" + "}" * 200 + "]",
    "[" * 1_000_000,
    "[" * 1_000_000 + "]" * 1_000_000,
    '{"a":' * 200_000,
    '"' * 1_000_001,
    "1" * 1_000_000,
    "\ufeff[]",
]


@pytest.mark.parametrize("version", Version)
@pytest.mark.parametrize("text", NOT_MESSAGES, ids=lambda text: text[:20])
def test_what_is_no_message_is_malformed_and_nothing_else(version: Version, text: str) -> None:
    with pytest.raises(Malformed):
        decode(version, text)


def test_bytes_that_are_no_utf8_are_malformed() -> None:
    with pytest.raises(Malformed, match="UTF-8"):
        decode(V2, b'[null,null,"a","b","\xff"]')


def test_a_number_that_python_does_not_read_is_malformed_when_it_is_asked_for() -> None:
    message = decode(V2, '[null,null,"a","b",{"n":1' + "0" * 5000 + "}]")
    with pytest.raises(Malformed):
        _ = message.payload


def test_numbers_beyond_64_bits_are_kept() -> None:
    message = decode(V2, f'[null,{10**30},"a","b",{{"n":{10**30}}}]')
    assert (message.ref, message.payload) == (str(10**30), {"n": 10**30})


def test_brackets_are_counted_outside_of_text_only() -> None:
    brackets = '"' + "[{" * 1000 + r"\"\\" + '"'
    message = decode(V2, f'[null,null,"a","b",{{"x":{brackets},"y":{[[]] * 500}}}]')
    assert message.payload["y"] == [[]] * 500


BRACKETS = st.text('[]{}"\\\\a', max_size=8)
BRACKETED = st.recursive(
    BRACKETS, lambda inner: st.lists(inner) | st.dictionaries(BRACKETS, inner), max_leaves=10
)


@given(BRACKETED, st.integers(-3, 3))
def test_brackets_quotes_and_escapes_in_texts_are_not_counted(value: Any, more: int) -> None:
    for _ in range(MAX_DEPTH + more - _depth(value) - 1):
        value = {"[": value}
    payload = json.dumps([value, [[0]] * MAX_DEPTH]).encode()
    if more <= 0:
        verify_json(payload)
    else:
        with pytest.raises(Malformed, match="deep"):
            verify_json(payload)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


@pytest.mark.parametrize("depth", [1, MAX_DEPTH, MAX_DEPTH + 1, 500])
def test_json_that_is_passed_on_is_nested_so_deep_at_most(depth: int) -> None:
    payload = b"[" * (depth - 1) + b"{}" + b"]" * (depth - 1)
    if depth <= MAX_DEPTH:
        verify_json(payload)
    else:
        with pytest.raises(Malformed, match="deep"):
            verify_json(payload)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=20,
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=100)
REFS = st.none() | TEXTS


@given(TEXTS, TEXTS, VALUES, REFS, REFS)
def test_what_is_encoded_is_decoded(
    topic: str, event: str, payload: Any, ref: str | None, join_ref: str | None
) -> None:
    """By the decoders of clients: the JSON of either version has the places that they know."""
    content = json.dumps(payload).encode("utf-8", "replace")
    expected = json.loads(content)
    [(is_text, text)] = split(encode(V2, topic, event, content, ref=ref, join_ref=join_ref))
    assert is_text
    assert json.loads(text) == [join_ref, ref, topic, event, expected]
    [(is_text, text)] = split(encode(V1, topic, event, content, ref=ref, join_ref=join_ref))
    assert is_text
    assert json.loads(text) == {"topic": topic, "event": event, "payload": expected, "ref": ref}


def test_version_1_has_exactly_four_keys_and_a_ref_that_is_null() -> None:
    assert encode(V1, "realtime:a", "system", b'{"a":1}', join_ref="1") == text_frame(
        b'{"topic":"realtime:a","event":"system","payload":{"a":1},"ref":null}'
    )


def test_version_2_has_five_places() -> None:
    assert encode(V2, "realtime:a", "phx_close", b"{}", ref="6", join_ref="6") == text_frame(
        b'["6","6","realtime:a","phx_close",{}]'
    )


# What realtime-js sent: kind, lengths, is_json, join_ref "6", ref "7", the topic, the event "x".
STOCK = b'\x03\x01\x01\x0e\x01\x00\x0167realtime:room1x{"a":1}'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (STOCK, ("6", "7", "realtime:room1", "x", {}, True, b'{"a":1}')),
        (
            b"\x03\x00\x00\x01\x00\x00\x00a\xff\x00",
            (None, None, "a", "", {}, False, b"\xff\x00"),
        ),
        (
            b'\x03\x00\x00\x01\x01\x10\x01ax{"persist":true}"\xc3\xa9"',
            (None, None, "a", "x", {"persist": True}, True, '"é"'.encode()),
        ),
        (b"\x03\x00\x00\x00\x00\x00\x00", (None, None, "", "", {}, False, b"")),
        (b"\x03\x00\x00\x00\x00\x00\x021", (None, None, "", "", {}, True, b"1")),
    ],
)
def test_a_broadcast_in_binary_is_read(data: bytes, expected: tuple[object, ...]) -> None:
    assert decode_binary(data) == BinaryBroadcast(*expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x03",
        b"\x03\x00\x00\x00\x00\x00",
        STOCK[:22],
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x04" + STOCK[1:],
        STOCK.replace(b"room", b"\xff\xfe\xfd\xfc"),
        STOCK.replace(b'{"a":1}', b'{"a":1'),
        STOCK.replace(b'{"a":1}', b""),
        STOCK.replace(b'{"a":1}', b"NaN"),
        STOCK.replace(b'{"a":1}', b'"\xff"'),
        STOCK.replace(b'{"a":1}', b'"\xed\xa0\x80"'),
        STOCK.replace(b'{"a":1}', b'"\\ud800"'),
        STOCK.replace(b'{"a":1}', b'{"\xff":1}'),
        STOCK.replace(b'{"a":1}', b"[" * 100_000 + b"]" * 100_000),
        b"\x03\x00\x00\x01\x01\x02\x01ax[]1",
        b"\x03\x00\x00\x01\x01\x01\x01ax{1",
    ],
)
def test_a_binary_frame_that_is_no_broadcast_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode_binary(data)


@given(names=st.lists(TEXTS, min_size=4, max_size=4), is_json=st.booleans(), value=VALUES)
def test_every_field_of_a_binary_broadcast_is_where_its_length_says(
    names: list[str], *, is_json: bool, value: Any
) -> None:
    names = [one.encode()[:255].decode(errors="ignore") for one in names]
    payload = json.dumps(value).encode("utf-8", "replace")
    if is_json and b"\\ud" in payload:
        return  # a text of Hypothesis with half a character
    header = bytes([3, *(len(one.encode()) for one in names), 0, is_json])
    found = decode_binary(header + "".join(names).encode() + payload)
    assert [found.join_ref or "", found.ref or "", found.topic, found.event] == names
    assert (found.is_json, found.payload) == (is_json, payload)


@given(st.binary(max_size=600))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for read in (decode_binary, lambda data: decode(V1, data), lambda data: decode(V2, data)):
        try:
            read(data)
        except Malformed as error:
            assert str(error)  # noqa: PT017  # nothing else is raised


def test_a_broadcast_to_clients_is_of_kind_4() -> None:
    assert encode_broadcast("realtime:a", "é", b"\x00\xff", b'{"id":"1"}') == (
        binary_frame(b'\x04\x0a\x02\x0a\x00realtime:a\xc3\xa9{"id":"1"}\x00\xff')
    )


def test_a_broadcast_with_a_name_too_long_for_kind_4_is_nothing() -> None:
    assert encode_broadcast("t" * 255, "x", b"\xff")
    assert encode_broadcast("t" * 256, "x", b"\xff") == b""


def test_a_broadcast_as_text_has_its_type() -> None:
    assert broadcast_json('"', b"[1.10]") == (
        b'{"type":"broadcast","event":"\\"","payload":[1.10]}'
    )
    assert broadcast_json("x", b"{}", b'{"id":"1"}') == (
        b'{"type":"broadcast","event":"x","payload":{},"meta":{"id":"1"}}'
    )


@pytest.mark.parametrize(
    ("payload", "event", "content"),
    [
        ('{"event":"x","payload":{"n":1.10, "n":1}}', "x", b'{"n":1.10, "n":1}'),
        ('{"event":"x","payload":null,"ids":[1]}', "x", b"null"),
        ('{"event":"x"}', "x", b"{}"),
        ('{"event":"x","payload":9007199254740993}', "x", b"9007199254740993"),
    ],
)
def test_the_payload_of_a_broadcast_is_passed_on_as_it_was_written(
    payload: str, event: str, content: bytes
) -> None:
    found = decode_text_broadcast(decode(V2, f'["6","7","a","broadcast",{payload}]'))
    assert (found.event, bytes(found.payload)) == (event, content)


@pytest.mark.parametrize("payload", ["null", "[]", "1", "{}", '{"event":1}', '{"payload":{}}'])
def test_a_broadcast_without_the_name_of_an_event_is_malformed(payload: str) -> None:
    with pytest.raises(Malformed):
        decode_text_broadcast(decode(V2, f'["6","7","a","broadcast",{payload}]'))


STOCK_JOIN = {
    "config": {
        "broadcast": {"self": True, "ack": True},
        "presence": {"key": "k1", "enabled": True},
        "postgres_changes": [
            {"event": "*", "schema": "public", "table": "todos", "filter": "id=eq.1"},
            {"event": "DELETE", "table": "todos", "since": "beginning", "unknown": [None]},
        ],
        "private": False,
    },
    "access_token": "a.b.c",
}


def test_the_join_of_the_stock_client_is_read() -> None:
    assert read_join(STOCK_JOIN) == Join(
        bindings=(
            {"event": "*", "schema": "public", "table": "todos", "filter": "id=eq.1"},
            {"event": "DELETE", "table": "todos", "since": "beginning", "unknown": [None]},
        ),
        broadcast_self=True,
        broadcast_ack=True,
        presence_key="k1",
        presence_enabled=True,
        token="a.b.c",  # noqa: S106  # a test's
    )


@pytest.mark.parametrize(
    "payload",
    [
        None,
        1,
        "x",
        [],
        {},
        {"config": None},
        {"config": [1]},
        {"config": {}},
        {"config": {"broadcast": [], "presence": 1, "postgres_changes": {}, "private": "yes"}},
        {"config": {"broadcast": {"self": 1, "ack": "on"}, "presence": {"key": []}}},
        {"config": {"postgres_changes": [None, 1, "x", []], "postgres_changes_options": []}},
        {"access_token": 1},
        {"access_token": "", "user_token": None},
        {"access_token": " \n"},
    ],
)
def test_what_cannot_be_read_of_a_join_has_its_default(payload: object) -> None:
    assert read_join(payload) == Join()


@pytest.mark.parametrize(
    ("value", "truth"),
    [(True, True), ("true", True), ("True", True), ("TRUE", True), (1, False), ("yes", False)],
)
def test_a_boolean_may_come_as_text(value: object, *, truth: bool) -> None:
    config = {
        "private": value,
        "broadcast": {"self": value, "ack": value, "replication_ready": value},
        "postgres_changes_options": {"wait": value},
    }
    join = read_join({"config": config})
    assert join.is_private is truth
    assert join.broadcast_self is truth
    assert join.broadcast_ack is truth
    assert join.wants_replication_ready is truth
    assert join.wait is truth


@pytest.mark.parametrize(
    ("presence", "enabled", "key"),
    [
        ({}, True, ""),
        ({"key": "k"}, True, "k"),
        ({"enabled": False, "key": ""}, False, ""),
        ({"enabled": "false", "key": 1}, False, "1"),
        ({"enabled": "True", "key": 1.5}, True, "1.5"),
        ({"key": True}, True, "true"),
    ],
)
def test_presence_is_on_unless_it_is_said_to_be_off(
    presence: object, *, enabled: bool, key: str
) -> None:
    join = read_join({"config": {"presence": presence}})
    assert (join.presence_enabled, join.presence_key) == (enabled, key)


def test_nulls_among_the_bindings_are_dropped() -> None:
    bindings = [None, {"event": "*", "filter": None}, None]
    assert read_join({"config": {"postgres_changes": bindings}}).bindings == (
        {"event": "*", "filter": None},
    )


def test_a_join_may_say_for_all_its_bindings_where_they_begin() -> None:
    bindings = [{"event": "*"}, {"event": "*", "since": "0/1:1", "leaving": False}]
    payload = {"config": {"postgres_changes": bindings}, "since": None, "leaving": True}
    assert read_join(payload).bindings == (
        {"event": "*", "since": None, "leaving": True},
        {"event": "*", "since": "0/1:1", "leaving": False},
    )


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (15_000, 15.0),
        (1, 0.001),
        (20_001, 20.0),
        (10**30, 20.0),
        ("5000", 5.0),
        ("9" * 1_000, 20.0),
        (0, 15.0),
        (-1, 15.0),
        (1.5, 15.0),
        (True, 15.0),
        ("soon", 15.0),
        (None, 15.0),
    ],
)
def test_the_wait_for_bindings_is_20_seconds_at_most(timeout: object, seconds: float) -> None:
    options = {"wait": True, "timeout": timeout}
    join = read_join({"config": {"postgres_changes_options": options}})
    assert (join.wait, join.wait_seconds) == (True, seconds)


@pytest.mark.parametrize(
    ("payload", "token"),
    [
        ({"access_token": "a.b.c"}, "a.b.c"),
        ({"access_token": " a.b.c\n"}, "a.b.c"),
        ({"access_token": "a%2Eb%2Ec%20"}, "a.b.c"),
        ({"access_token": "a+b"}, "a+b"),
        ({"access_token": "a.b.c", "user_token": "d.e.f"}, "d.e.f"),
        ({"access_token": None, "user_token": "d.e.f"}, "d.e.f"),
        ({"access_token": "sb_publishable_1"}, None),
        ({"access_token": "sb_publishable_1", "user_token": "d.e.f"}, None),
        ({"access_token": "a.b.c", "user_token": "sb_secret_1"}, None),
        ({}, None),
    ],
)
def test_the_token_of_a_join(payload: object, token: str | None) -> None:
    assert read_join(payload).token == token


@pytest.mark.parametrize("value", [None, 1, "", "sb_secret_1", ["a.b.c"]])
def test_what_is_no_token_leaves_the_one_at_hand(value: object) -> None:
    assert read_token(value) is None


@given(VALUES)
def test_any_payload_is_a_join(payload: Any) -> None:
    for one in (payload, {"config": payload, "access_token": payload}):
        assert isinstance(read_join(one), Join)
    for key in ("broadcast", "presence", "postgres_changes", "postgres_changes_options", "private"):
        assert isinstance(read_join({"config": {key: payload}}), Join)
