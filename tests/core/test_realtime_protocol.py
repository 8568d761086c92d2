"""What a client of Realtime says, and what it is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walstream.realtime.channels import Channel
from walstream.realtime.events import (
    Answer,
    Broadcasting,
    Event,
    Joining,
    Left,
    Overrun,
    TokenGiven,
    Tracking,
    Untracking,
)
from walstream.realtime.frames import split
from walstream.realtime.messages import Version
from walstream.realtime.protocol import (
    MAX_HELD_BYTES,
    MAX_JOIN_BYTES,
    Protocol,
    ProtocolLimits,
)

V1, V2 = Version.V1, Version.V2
ROOM = "realtime:room1"


class Driver:
    """Does at once what a driver does when it can."""

    def __init__(self, version: Version, limits: ProtocolLimits | None = None) -> None:
        self.protocol = Protocol(version, limits)
        self.events: list[Event] = []
        self.said: list[str] = []
        self.now = 100.0

    def hear(self, data: str | bytes) -> list[Event]:
        if isinstance(data, str):
            events = self.protocol.receive_text(data, self.now)
        else:
            events = self.protocol.receive_bytes(data, self.now)
        for event in events:
            self._handle(event)
        return events

    def _handle(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Answer(frames):
                self.say(frames)
            case Joining(channel):
                self.join(channel)
            case Broadcasting(wants_ack=True) | Tracking() | Untracking():
                self.say(self.protocol.reply(event.channel, event.ref, {}))
            case _:
                pass

    def join(self, channel: Channel) -> None:
        self.say(self.protocol.joined(channel, {"postgres_changes": []}))

    def say(self, frames: bytes) -> None:
        for is_text, payload in split(frames):
            assert is_text
            self.said.append(payload.decode())


def dialogues() -> dict[str, list[str]]:
    """Read them: each begins with its rule, and ends with an empty line."""
    text = Path(__file__).with_name("realtime_dialogues.txt").read_text()
    blocks = [block.strip().split("\n") for block in text.split("\n# ")[1:]]
    return {rule: lines for rule, *lines in blocks}


@pytest.mark.parametrize("dialogue", dialogues().values(), ids=dialogues())
def test_dialogue(dialogue: list[str]) -> None:
    is_v1 = any(line.startswith('S {"topic"') for line in dialogue)
    driver = Driver(V1 if is_v1 else V2)
    lines: list[str] = []
    for line in dialogue:
        if line.startswith("C "):
            lines.append(line)
            driver.hear(line[2:])
            lines += [f"S {said}" for said in driver.said]
            driver.said.clear()
    assert lines == dialogue


@pytest.mark.parametrize(
    "payload",
    [
        '{"n":1' + "0" * 5_000 + "}",
        "[" * 500 + "]" * 500,
        "[" * 1_000_000,
        '{"event":' * 100_000,
        '"\\ud800"',
        '"\ud800"',
        "\x00",
    ],
    ids=lambda payload: payload[:5].encode("unicode_escape").decode(),
)
def test_what_is_hostile_is_dropped(payload: str) -> None:
    driver, channel = joined()
    for event in ("phx_join", "presence", "access_token"):
        assert driver.hear(f'["6","8","{ROOM}","{event}",{payload}]') == []
    wrapped = f'{{"event":"track","payload":{{"n":{payload}}}}}'
    assert driver.hear(f'["6","8","{ROOM}","presence",{wrapped}]') == []
    assert driver.protocol.channels[ROOM] is channel


def test_version_1_takes_json_in_binary_frames_too() -> None:
    driver = Driver(V1)
    driver.hear(b'{"topic":"phoenix","event":"heartbeat","payload":{},"ref":"1"}')
    assert len(driver.said) == 1


def joined(
    version: Version = V2, limits: ProtocolLimits | None = None, config: object = None
) -> tuple[Driver, Channel]:
    """Return a driver in a room."""
    driver = Driver(version, limits)
    driver.hear(frame(version, ROOM, "phx_join", {"config": config}, ref="6", join_ref="6"))
    driver.said.clear()
    driver.events.clear()
    return driver, driver.protocol.channels[ROOM]


def frame(
    version: Version, topic: str, event: str, payload: object, *, ref: str, join_ref: str | None
) -> str:
    if version is V1:
        names = {"topic": topic, "event": event, "payload": payload}
        return json.dumps({**names, "ref": ref, "join_ref": join_ref})
    return json.dumps([join_ref, ref, topic, event, payload])


def push(event: str, payload: object, ref: str = "7") -> str:
    return frame(V2, ROOM, event, payload, ref=ref, join_ref="6")


def test_a_channel_is_what_its_join_asked_for() -> None:
    driver = Driver(V2)
    binding = {"event": "*", "table": "todos", "since": None}
    config = {"postgres_changes": [binding, None], "private": "true", "presence": {"key": "k"}}
    [event] = driver.hear(push("phx_join", {"config": config, "access_token": "a.b.c"}))
    assert isinstance(event, Joining)
    channel = event.channel
    assert (channel.topic, channel.name, channel.join_ref) == (ROOM, "room1", "6")
    assert channel.join.bindings == (binding,)
    assert channel.join.is_private
    assert channel.join.presence_key == "k"
    assert channel.join.token == "a.b.c"  # noqa: S105  # a test's
    assert dict(driver.protocol.channels) == {ROOM: channel}


def test_a_binding_is_echoed_as_it_came() -> None:
    class Echoing(Driver):
        def join(self, channel: Channel) -> None:
            echo = [{**one, "id": 7} for one in channel.join.bindings]
            self.say(self.protocol.joined(channel, {"postgres_changes": echo}))

    driver = Echoing(V2)
    bindings = '[{"event":"*","n":1e30,"x":[null,"\\u00e9"]}]'
    driver.hear(f'["1","1","{ROOM}","phx_join",{{"config":{{"postgres_changes":{bindings}}}}}]')
    assert json.loads(driver.said[0])[4]["response"] == {
        "postgres_changes": [{**json.loads(bindings)[0], "id": 7}]
    }


def test_a_second_join_is_another_channel() -> None:
    driver, first = joined()
    left, answer, joining = driver.hear(push("phx_join", {}))
    assert left == Left(first)
    assert isinstance(answer, Answer)
    assert isinstance(joining, Joining)
    assert joining.channel is not first
    assert driver.protocol.channels[ROOM] is joining.channel


def test_a_channel_that_is_left_is_told_before_it_is_answered() -> None:
    driver, channel = joined()
    left, answer = driver.hear(push("phx_leave", {}))
    assert left == Left(channel)
    assert isinstance(answer, Answer)
    assert not driver.protocol.channels


@pytest.mark.parametrize("ack", [True, False])
def test_a_broadcast_is_to_be_passed_on(ack: bool) -> None:  # noqa: FBT001
    driver, channel = joined(config={"broadcast": {"ack": ack}})
    text = f'["6","7","{ROOM}","broadcast",{{"event":"x","payload":{{"n": 1.10}},"ids":[1]}}]'
    binary = b'\x03\x01\x01\x0e\x01\x00\x0167realtime:room1x{"n": 1.10}'
    expected = Broadcasting(
        channel=channel,
        ref="7",
        event="x",
        payload=b'{"n": 1.10}',
        is_json=True,
        metadata={},
        wants_ack=ack,
    )
    assert driver.hear(text) == driver.hear(binary) == [expected]
    acknowledgement = f'["6","7","{ROOM}","phx_reply",{{"status":"ok","response":{{}}}}]'
    assert driver.said == [acknowledgement] * 2 * ack


def test_a_broadcast_of_bytes_is_to_be_passed_on() -> None:
    driver, channel = joined()
    data = b'\x03\x00\x00\x0e\x01\x10\x00realtime:room1x{"persist":true}\xff\x00'
    assert driver.hear(data) == [
        Broadcasting(
            channel=channel,
            ref=None,
            event="x",
            payload=b"\xff\x00",
            is_json=False,
            metadata={"persist": True},
            wants_ack=False,
        )
    ]


def test_presence_is_for_the_driver() -> None:
    driver, channel = joined()
    assert driver.hear(push("presence", {"event": "Track", "payload": {"a": [1]}})) == [
        Tracking(channel, "7", {"a": [1]})
    ]
    assert driver.hear(push("presence", {"event": "track"})) == [Tracking(channel, "7", {})]
    assert driver.hear(push("presence", {"event": "untrack"})) == [Untracking(channel, "7")]


def test_nobody_is_present_by_a_key_that_breaks_the_clients_of_others() -> None:
    """The JavaScript client takes everything with a key ``ids`` for a change."""
    driver, _ = joined(config={"presence": {"key": "ids"}})
    [answer] = driver.hear(push("presence", {"event": "track", "payload": {}}))
    assert isinstance(answer, Answer)
    assert json.loads(driver.said[0])[4] == {
        "status": "error",
        "response": {"reason": "Presence key must not be ids"},
    }


@pytest.mark.parametrize(
    ("payload", "token"),
    [
        ({"access_token": "a.b.c"}, "a.b.c"),
        ({"access_token": "a%2Eb.c\n"}, "a.b.c"),
        ({"access_token": None}, None),
        ({"access_token": "sb_secret_1"}, None),
        ({"access_token": ["a.b.c"]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_new_token_is_for_the_driver(payload: object, token: str | None) -> None:
    driver, channel = joined()
    events = driver.hear(push("access_token", payload))
    assert events == ([] if token is None else [TokenGiven(channel, token)])
    assert not driver.said


def said(frames: bytes) -> list[Any]:
    return [json.loads(payload) for _, payload in split(frames)]


@pytest.mark.parametrize("version", Version)
def test_what_the_driver_says(version: Version) -> None:
    driver, channel = joined(version)
    core = driver.protocol
    system = core.system(channel, "postgres_changes", "ok", "Subscribed to PostgreSQL")
    state = core.push(channel, "presence_state", b"{}")
    failure = core.reply(channel, "8", {"reason": "no"}, ok=False)
    closed = core.close(channel)
    told = {
        "channel": "room1",
        "extension": "postgres_changes",
        "message": "Subscribed to PostgreSQL",
        "status": "ok",
    }
    refusal = {"status": "error", "response": {"reason": "no"}}
    expected: list[tuple[str | None, str, object]] = [
        (None, "system", told),
        (None, "presence_state", {}),
        ("8", "phx_reply", refusal),
        ("6", "phx_close", {}),
    ]
    if version is V1:
        assert said(system + state + failure + closed) == [
            {"topic": ROOM, "event": event, "payload": payload, "ref": ref}
            for ref, event, payload in expected
        ]
    else:
        assert said(system + state + failure + closed) == [
            ["6", ref, ROOM, event, payload] for ref, event, payload in expected
        ]
    assert not core.channels


def test_a_join_is_refused() -> None:
    core = Protocol(V2)
    [event] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(event, Joining)
    assert not event.channel.is_joined
    reason = "Unauthorized: You do not have permissions to read from this Channel topic: room1"
    assert said(core.refuse_join(event.channel, reason)) == [
        ["6", "7", ROOM, "phx_reply", {"status": "error", "response": {"reason": reason}}]
    ]
    assert not core.channels


def test_nothing_is_said_by_a_channel_that_is_gone() -> None:
    core = Protocol(V2)
    [event] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(event, Joining)
    core.receive_text(push("phx_join", {}), 0.0)
    assert core.joined(event.channel, {}) == b""
    assert core.refuse_join(event.channel, "no") == b""
    assert core.close(event.channel) == b""
    assert len(core.channels) == 1


# Before the join is answered


def test_what_comes_before_the_join_is_answered_is_taken_after_it() -> None:
    core = Protocol(V2)
    [joining] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(joining, Joining)
    assert core.receive_text(push("presence", {"event": "track"}, "8"), 0.0) == []
    assert core.receive_text(push("broadcast", {"event": "x"}, "9"), 0.0) == []
    assert core.receive_text('[null,"10","phoenix","heartbeat",{}]', 0.0) != []
    assert core.resume(0.0) == []
    core.joined(joining.channel, {})
    assert [type(event) for event in core.resume(0.0)] == [Tracking, Broadcasting]
    assert core.resume(0.0) == []


def test_a_driver_that_does_not_resume_has_it_with_the_next_message() -> None:
    core = Protocol(V2)
    [joining] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(joining, Joining)
    core.receive_text(push("presence", {"event": "track"}), 0.0)
    core.joined(joining.channel, {})
    events = core.receive_text(push("broadcast", {"event": "x"}), 0.0)
    assert [type(event) for event in events] == [Tracking, Broadcasting]


def test_what_came_before_a_join_was_refused_has_no_topic() -> None:
    core = Protocol(V2)
    [joining] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(joining, Joining)
    core.receive_text(push("presence", {"event": "track"}, "8"), 0.0)
    _, unmatched = said(core.refuse_join(joining.channel, "no"))
    assert unmatched == [
        *(None, "8", ROOM, "phx_reply"),
        {"status": "error", "response": {"reason": "unmatched topic"}},
    ]
    assert core.resume(0.0) == []


def test_a_channel_is_left_at_once_also_before_its_join_is_answered() -> None:
    core = Protocol(V2)
    [joining] = core.receive_text(push("phx_join", {}), 0.0)
    assert isinstance(joining, Joining)
    core.receive_text(push("presence", {"event": "track"}, "8"), 0.0)
    left, answer = core.receive_text(push("phx_leave", {}, "9"), 0.0)
    assert left == Left(joining.channel)
    assert isinstance(answer, Answer)
    assert [one[1] for one in said(answer.frames)] == ["9", "6", "8"]
    assert core.joined(joining.channel, {}) == b""


def test_no_more_is_held_than_is_allowed_and_it_is_given_back() -> None:
    core = Protocol(V2, ProtocolLimits(messages_per_second=10_000))
    for _ in range(3):
        events = core.receive_text(push("phx_join", {}), 0.0)
        held = 0
        while not (answers := core.receive_text(push("broadcast", {"event": "x"}), 0.0)):
            held += 1
        assert MAX_HELD_BYTES // 1_100 <= held <= MAX_HELD_BYTES // 1_000
        [unmatched] = answers
        assert isinstance(unmatched, Answer)
        joining = events[-1]
        assert isinstance(joining, Joining)
        core.joined(joining.channel, {})
        assert len(core.resume(0.0)) == held


# Limits


def reasons(driver: Driver) -> list[str]:
    """Return why something was refused, of all that was said."""
    return [json.loads(one)[4]["response"]["reason"] for one in driver.said if "reason" in one]


def join(number: int) -> str:
    return frame(V2, f"realtime:{number}", "phx_join", {}, ref="1", join_ref="1")


def test_a_socket_has_so_many_channels() -> None:
    driver = Driver(V2, ProtocolLimits(max_channels=3, joins_per_second=10_000))
    for number in range(1_000):
        driver.hear(join(number))
    assert reasons(driver) == ["ChannelRateLimitReached: Too many channels"] * 997
    assert len(driver.protocol.channels) == 3
    driver.hear(join(2))
    driver.hear(frame(V2, "realtime:0", "phx_leave", {}, ref="2", join_ref="1"))
    driver.hear(join(3))
    assert len(reasons(driver)) == 997


def test_a_socket_may_join_so_often() -> None:
    driver = Driver(V2, ProtocolLimits(max_channels=100, joins_per_second=10))
    for number in range(12):
        driver.hear(join(number))
    assert reasons(driver) == ["ClientJoinRateLimitReached: Too many joins per second"] * 2
    driver.now += 1.0
    driver.hear(join(12))
    assert len(driver.protocol.channels) == 11


def test_a_join_has_a_size() -> None:
    driver = Driver(V2)
    driver.hear(push("phx_join", {"a": "x" * MAX_JOIN_BYTES}))
    assert reasons(driver) == [f"InvalidJoinPayload: A join has at most {MAX_JOIN_BYTES} bytes"]
    assert not driver.protocol.channels


def test_a_socket_that_sends_too_many_bytes_is_over_whatever_they_say() -> None:
    """To read them costs, also what is dropped."""
    driver, _ = joined(limits=ProtocolLimits(max_bytes=10_000))
    for _ in range(9):
        assert driver.hear("[" * 1_000) == []
    assert driver.hear("[" * 1_000) == [Overrun("Too many messages per second")]


def test_a_socket_that_says_too_much_is_over() -> None:
    """Ten seconds' worth may come at once; heartbeats and leaving do not count."""
    driver, _ = joined(limits=ProtocolLimits(messages_per_second=10))
    for _ in range(100):
        assert driver.hear(push("anything", {})) == []
        driver.hear('[null,"9","phoenix","heartbeat",{}]')
    driver.now += 0.15
    assert driver.hear(push("anything", {})) == []
    assert driver.hear(push("anything", {})) == [Overrun("Too many messages per second")]
    assert driver.hear(push("anything", {})) == []
    assert driver.hear('[null,"9","phoenix","heartbeat",{}]') == []


def test_a_client_is_present_so_often() -> None:
    driver, channel = joined()
    other = frame(V2, "realtime:b", "phx_join", {}, ref="1", join_ref="1")
    driver.hear(other)
    driver.said.clear()
    for _ in range(5):
        driver.hear(push("presence", {"event": "track", "payload": {}}))
    driver.said.clear()
    left, answer = driver.hear(push("presence", {"event": "untrack"}))
    assert left == Left(channel)
    assert isinstance(answer, Answer)
    told = '{"channel":"room1","extension":"system",'
    told += '"message":"Client presence rate limit exceeded","status":"error"}'
    assert driver.said == [
        f'["6",null,"{ROOM}","system",{told}]',
        f'["6","6","{ROOM}","phx_close",{{}}]',
    ]
    assert list(driver.protocol.channels) == ["realtime:b"]


# Anything at all

NAMES = st.sampled_from(["realtime:mine", "realtime:", "phoenix", "mine"]) | st.text(max_size=5)
EVENTS = st.sampled_from(
    ["phx_join", "phx_leave", "phx_close", "broadcast", "presence", "access_token", "heartbeat"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: (
        st.lists(values)
        | st.dictionaries(
            st.sampled_from(["event", "payload", "config", "presence", "key", "access_token"])
            | st.text(max_size=3),
            values | st.sampled_from(["track", "untrack", "x", "ids"]),
        )
    ),
    max_leaves=10,
)
REFS = st.none() | st.sampled_from(["1", "2"]) | st.integers() | st.text(max_size=3)


@st.composite
def text_frames(draw: st.DrawFn, version: Version) -> str:
    names = (draw(REFS), draw(REFS), draw(NAMES), draw(EVENTS | st.text(max_size=5)), draw(VALUES))
    if version is V2:
        text = json.dumps(names)
    else:
        keys = ("join_ref", "ref", "topic", "event", "payload")
        text = json.dumps(dict(zip(keys, names, strict=True)))
    cut = draw(st.none() | st.integers(0, len(text)))
    return text if cut is None else text[:cut] + draw(st.text(max_size=3)) + text[cut:]


@st.composite
def binary_frames(draw: st.DrawFn) -> bytes:
    parts = [
        draw(st.text(max_size=5) | st.sampled_from(["realtime:mine", "1"])).encode(
            "utf-8", "surrogatepass"
        )
        for _ in range(4)
    ]
    metadata = draw(st.sampled_from([b"", b"{}", b'{"persist":true}', b"[", b"\xff"]))
    parts.append(metadata)
    is_json = draw(st.integers(0, 2))
    payload = json.dumps(draw(VALUES)).encode() if draw(st.booleans()) else draw(st.binary())
    return bytes([draw(st.integers(2, 4)), *map(len, parts), is_json]) + b"".join(parts) + payload


def frames_of(version: Version) -> st.SearchStrategy[str | bytes]:
    return text_frames(version) | binary_frames() | st.text() | st.binary()


@pytest.mark.parametrize("version", Version)
@given(data=st.data())
@settings(max_examples=60)
def test_any_frames_raise_nothing_and_touch_no_other_channel(
    version: Version, data: st.DataObject
) -> None:
    driver = Driver(version)
    driver.hear(frame(version, "realtime:other", "phx_join", {}, ref="1", join_ref="1"))
    other = driver.protocol.channels["realtime:other"]
    driver.said.clear()
    driver.events.clear()
    for one in data.draw(st.lists(frames_of(version), max_size=10)):
        if "other" not in str(one):
            driver.hear(one)
    assert driver.protocol.channels["realtime:other"] is other
    assert other.is_joined
    for event in driver.events:
        assert not isinstance(event, Overrun)
        assert isinstance(event, Answer) or event.channel is not other
    for text in driver.said:
        answer = json.loads(text)
        assert (answer["topic"] if version is V1 else answer[2]) != "realtime:other"


@pytest.mark.parametrize("version", Version)
@given(data=st.data())
@settings(max_examples=60)
def test_a_channel_begins_once_and_ends_once_and_nothing_comes_after(
    version: Version, data: st.DataObject
) -> None:
    """Also when joins are answered late, or refused."""
    core = Protocol(version, ProtocolLimits(max_channels=3))
    begun: set[Channel] = set()
    waiting: list[Channel] = []
    for one in data.draw(st.lists(frames_of(version) | st.booleans(), max_size=15)):
        if isinstance(one, bool):
            events = _answer_a_join(core, waiting, begun, accept=one)
        elif isinstance(one, str):
            events = core.receive_text(one, 0.0)
        else:
            events = core.receive_bytes(one, 0.0)
        for event in events:
            match event:
                case Joining(channel):
                    assert channel not in begun
                    assert not channel.is_joined
                    begun.add(channel)
                    waiting.append(channel)
                case Left(channel):
                    begun.remove(channel)
                case Answer(frames):
                    assert frames
                case Overrun():
                    raise AssertionError
                case _:
                    assert event.channel in begun
                    assert event.channel.is_joined
        assert set(core.channels.values()) == begun
        assert core._held_bytes >= sum(map(len, (one.held for one in begun)))
    assert len(begun) <= 3


def _answer_a_join(
    core: Protocol, waiting: list[Channel], begun: set[Channel], *, accept: bool
) -> list[Event]:
    if not waiting:
        return []
    channel = waiting.pop(0)
    if accept:
        assert bool(core.joined(channel, {})) == (channel in begun)
        return core.resume(0.0)
    assert bool(core.refuse_join(channel, "no")) == (channel in begun)
    begun.discard(channel)
    return []
