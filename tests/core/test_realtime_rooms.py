"""What is said in a room, who hears it, and how little presence costs when many come together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from random import Random
from typing import Any, Final

import pytest

from tests.phoenix_presence import JavaScriptPresence, PythonPresence
from tests.postgres import async_wait_until
from walstream.config.realtime import RealtimeConfig
from walstream.realtime.frames import split
from walstream.realtime.messages import Version
from walstream.realtime.rooms import RoomKey, Rooms, TrackRefused

ROOM: Final[RoomKey] = ("realtime:room1", False)
PRIVATE: Final[RoomKey] = ("realtime:room1", True)


class Listener:
    """Keeps what it gets."""

    def __init__(
        self,
        version: Version = Version.V2,
        *,
        wants_self: bool = False,
        wants_presence: bool = True,
    ) -> None:
        self.version = version
        self.wants_self = wants_self
        self.wants_presence = wants_presence
        self.frames: list[bytes] = []

    def send(self, frames: bytes) -> None:
        self.frames.append(frames)

    def take(self) -> list[Any]:
        """Event and payload of what came as text, and what came in binary as it is."""
        found = [_read(self.version, *one) for frame in self.frames for one in split(frame)]
        self.frames.clear()
        return found


def _read(version: Version, is_text: bool, payload: bytes) -> Any:  # noqa: FBT001 - of split
    if not is_text:
        return payload
    message = json.loads(payload)
    if version is Version.V1:
        assert sorted(message) == ["event", "payload", "ref", "topic"]
        assert message["ref"] is None
        return message["event"], message["payload"]
    join_ref, ref, _topic, event, content = message
    assert (join_ref, ref) == (None, None)
    return event, content


class Watcher(Listener):
    """A client that knows who is present."""

    def __init__(self, version: Version, rooms: Rooms, key: RoomKey = ROOM) -> None:
        super().__init__(version)
        rooms.enter(key, self)
        self.state = rooms.state(key)

    def metas(self) -> dict[str, list[dict[str, Any]]]:
        """What its client makes of all that it got."""
        presence = JavaScriptPresence() if self.version is Version.V2 else PythonPresence()
        presence.on_state(json.loads(self.state))
        for event, payload in self.take():
            assert event == "presence_diff"
            presence.on_diff(payload)
        return presence.metas


def rooms_of(**settings: Any) -> Rooms:
    return Rooms(RealtimeConfig(**settings))


def inside(rooms: Rooms, *members: Listener, key: RoomKey = ROOM) -> None:
    for member in members:
        rooms.enter(key, member)


def said(event: str, payload: Any, **more: Any) -> tuple[str, Any]:
    return "broadcast", {"type": "broadcast", "event": event, "payload": payload, **more}


async def told() -> None:
    """Wait until what is to be told at once has been told."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


# ---- Broadcast


def test_all_but_the_sender_hear_what_is_said() -> None:
    rooms = rooms_of()
    sender, eager = Listener(), Listener(wants_self=True)
    old, elsewhere, gone = Listener(Version.V1), Listener(), Listener()
    inside(rooms, sender, eager, old, gone)
    inside(rooms, elsewhere, key=("realtime:room2", False))
    rooms.leave(ROOM, gone)
    rooms.broadcast(ROOM, "x", b'{"a":1}', is_json=True, sender=sender)
    rooms.broadcast(ROOM, "y", b"[2]", is_json=True, sender=eager)
    assert sender.take() == [said("y", [2])]
    assert eager.take() == old.take() == [said("x", {"a": 1}), said("y", [2])]
    assert elsewhere.take() == gone.take() == []
    assert (rooms.broadcasts, rooms.sent_broadcasts) == (2, 5)


def test_somebody_from_outside_is_heard_by_all() -> None:
    rooms, one, other = rooms_of(), Listener(), Listener(Version.V1)
    inside(rooms, one, other)
    rooms.broadcast(ROOM, "x", b"null", is_json=True, metadata={"id": "1", "persist": True})
    assert one.take() == other.take() == [said("x", None, meta={"id": "1"})]


def test_bytes_are_heard_by_clients_of_version_2_only() -> None:
    rooms, new, old = rooms_of(), Listener(), Listener(Version.V1)
    inside(rooms, new, old)
    rooms.broadcast(ROOM, "x", b"\x00\xff", is_json=False)
    assert new.take() == [b"\x04\x0e\x01\x00\x00realtime:room1x\x00\xff"]
    assert old.take() == []
    rooms.broadcast(ROOM, "x" * 256, b"\x00", is_json=False)  # its name has no place in the frame
    assert new.take() == []
    assert rooms.sent_broadcasts == 1


def test_a_private_room_is_another_one() -> None:
    rooms, public, private = rooms_of(), Listener(), Listener()
    inside(rooms, public)
    inside(rooms, private, key=PRIVATE)
    rooms.broadcast(PRIVATE, "x", b"1", is_json=True)
    assert (public.take(), private.take()) == ([], [said("x", 1)])


def test_one_frame_is_made_for_each_version() -> None:
    rooms = rooms_of()
    members = [Listener(version) for version in Version for _ in range(3)]
    inside(rooms, *members)
    rooms.broadcast(ROOM, "x", b"1", is_json=True)
    assert len({id(member.frames[0]) for member in members}) == 2


def test_a_member_may_leave_while_it_is_sent_to() -> None:
    rooms, others = rooms_of(), [Listener() for _ in range(2)]

    class Slow(Listener):
        def send(self, frames: bytes) -> None:
            super().send(frames)
            rooms.leave(ROOM, self)

    slow = Slow()
    inside(rooms, others[0], slow, others[1])
    for _ in range(2):
        rooms.broadcast(ROOM, "x", b"1", is_json=True)
    assert [len(one.frames) for one in (*others, slow)] == [2, 2, 1]


def test_an_empty_room_is_forgotten() -> None:
    rooms, member = rooms_of(), Listener()
    inside(rooms, member)
    assert len(rooms) == 1
    rooms.leave(ROOM, member)
    rooms.leave(ROOM, member)
    assert len(rooms) == 0
    rooms.broadcast(ROOM, "x", b"1", is_json=True)
    assert rooms.state(ROOM) == b"{}"
    rooms.track(ROOM, member, "k", {})
    rooms.untrack(ROOM, member)
    assert (len(rooms), rooms.presences, member.take()) == (0, 0, [])


# ---- Presence


def diff(joins: Mapping[str, Any], leaves: Mapping[str, Any]) -> tuple[str, Any]:
    return "presence_diff", {"joins": joins, "leaves": leaves}


def keys_of(message: tuple[str, Any]) -> tuple[list[str], list[str]]:
    event, payload = message
    assert event == "presence_diff"
    return list(payload["joins"]), list(payload["leaves"])


async def test_presence_is_told_to_everybody_who_wants_to_know() -> None:
    rooms = rooms_of()
    one, old = Listener(), Listener(Version.V1)
    deaf = Listener(wants_presence=False)
    inside(rooms, one, old, deaf)
    rooms.track(ROOM, one, "k1", {"u": 1})
    assert rooms.presences == 1
    await told()
    [message] = one.take()
    [meta] = message[1]["joins"]["k1"]["metas"]
    assert message == diff({"k1": {"metas": [{"phx_ref": meta["phx_ref"], "u": 1}]}}, {})
    assert old.take() == [message]
    assert json.loads(rooms.state(ROOM)) == message[1]["joins"]
    rooms.track(ROOM, one, "k1", {"u": 1})
    await told()
    assert one.take() == deaf.take() == []


async def test_whoever_leaves_is_not_present() -> None:
    rooms, one, other = rooms_of(), Listener(), Listener()
    inside(rooms, one, other)
    rooms.track(ROOM, one, "k1", {})
    await told()
    rooms.leave(ROOM, one)
    await async_wait_until(lambda: len(other.frames) == 2)
    assert [keys_of(message) for message in other.take()] == [(["k1"], []), ([], ["k1"])]
    assert len(one.take()) == 1


async def test_untracked_is_not_present_and_still_there() -> None:
    rooms, one = rooms_of(), Listener()
    inside(rooms, one)
    rooms.track(ROOM, one, "k1", {})
    await told()
    rooms.untrack(ROOM, one)
    rooms.untrack(ROOM, one)
    await async_wait_until(lambda: len(one.frames) == 2)
    assert [keys_of(message) for message in one.take()] == [(["k1"], []), ([], ["k1"])]
    assert rooms.state(ROOM) == b"{}"
    assert rooms.presences == 0


async def test_all_who_come_in_one_turn_are_one_diff() -> None:
    rooms, members = rooms_of(), [Listener() for _ in range(50)]
    inside(rooms, *members)
    for number, member in enumerate(members):
        rooms.track(ROOM, member, f"k{number}", {})
    await told()
    assert {len(member.frames) for member in members} == {1}
    assert len(keys_of(members[0].take()[0])[0]) == 50


async def test_refs_are_not_those_of_another_process() -> None:
    refs = set()
    for rooms in (rooms_of(), rooms_of()):
        member = Listener()
        inside(rooms, member)
        rooms.track(ROOM, member, "k", {})
        await told()
        refs.add(member.take()[0][1]["joins"]["k"]["metas"][0]["phx_ref"])
    assert len(refs) == 2


async def test_presences_are_bounded() -> None:
    rooms = rooms_of(max_presence_bytes=100, max_frame_bytes=250)
    members = [Listener() for _ in range(4)]
    inside(rooms, *members)
    for key, payload in (("k" * 1_000_000, {}), ("k", {"u": "x" * 5_000_000})):
        with pytest.raises(TrackRefused, match="Track message size exceeded: found"):
            rooms.track(ROOM, members[0], key, payload)
    with pytest.raises(TrackRefused, match="cannot be written"):
        rooms.track(ROOM, members[0], "k", {"u": "\ud800"})
    for member in members[:3]:
        rooms.track(ROOM, member, "k", {"u": "x" * 70})
    with pytest.raises(TrackRefused, match="Too many presences in this channel"):
        rooms.track(ROOM, members[3], "k", {"u": "x" * 70})
    rooms.track(ROOM, members[2], "k", {"u": "y" * 70})  # instead of its own
    await told()
    assert b"y" * 70 in members[0].frames[0]
    assert all(len(member.frames) == 1 for member in members)


async def test_who_tracks_again_and_again_makes_few_diffs() -> None:
    rooms, members = rooms_of(), [Listener() for _ in range(100)]
    inside(rooms, *members)
    began = time.monotonic()
    for number in range(300):
        rooms.track(ROOM, members[0], "k", {"n": number})
        await asyncio.sleep(0)
    await async_wait_until(lambda: b'"n":299' in members[1].frames[-1])
    seconds = time.monotonic() - began
    assert len(members[1].frames) <= 2 + seconds / 0.01
    for member in members:
        presence = JavaScriptPresence()
        presence.on_state({})
        for _, payload in member.take():
            presence.on_diff(payload)
        assert [meta["n"] for meta in presence.metas["k"]] == [299]


@pytest.mark.parametrize(
    ("steps", "read"),
    [(6_000, 40), pytest.param(60_000, 1_000, marks=pytest.mark.soak)],
)
async def test_a_thousand_members_at_random_come_to_the_same_on_every_client(
    steps: int, read: int
) -> None:
    """Members are clients too; each is in for a while, present or not, and may come back."""
    random, rooms = Random(7), rooms_of()  # noqa: S311 - not for secrets
    members: list[Watcher | None] = [None] * 1_000
    frames = 0
    for step in range(steps):
        number = random.randrange(1_000)
        member = members[number]
        if member is None:
            member = members[number] = Watcher(random.choice(list(Version)), rooms)
        chance = random.random()
        if chance < 0.6:
            rooms.track(ROOM, member, f"k{number % 700}", {"n": random.randrange(3)})
        elif chance < 0.8:
            rooms.untrack(ROOM, member)
        else:
            rooms.leave(ROOM, member)
            frames += len(member.frames)
            members[number] = None
        if step % 3 == 0:
            await asyncio.sleep(0)
    there = [member for member in members if member is not None]
    last = Watcher(Version.V2, rooms)
    rooms.track(ROOM, last, "last", {})
    await async_wait_until(lambda: any(b'"last"' in one for one in last.frames))
    frames += sum(len(member.frames) for member in there)
    # All that happened, told by itself to each, would be some hundred times the steps.
    assert frames < steps * 40
    state = {key: some["metas"] for key, some in json.loads(rooms.state(ROOM)).items()}
    assert len(there) > 500
    assert rooms.presences == sum(map(len, state.values())) > 400
    for member in [last, *random.sample(there, min(read, len(there)))]:
        assert member.metas() == state


async def test_ten_thousand_members_hold_nobody_up() -> None:
    rooms, members = rooms_of(), [Listener(wants_presence=n % 2 == 0) for n in range(10_000)]
    inside(rooms, *members)
    began = time.process_time()
    rooms.broadcast(ROOM, "x", b'{"a":1}', is_json=True, sender=members[0])
    assert time.process_time() - began < 0.2  # it is some 2 ms
    for number, member in enumerate(members):
        rooms.track(ROOM, member, f"k{number}", {"n": number})
    await told()
    assert len(members[2].frames) == 2
    assert len(members[1].frames) == 1
    assert rooms.state(ROOM) is rooms.state(ROOM)  # it is written once
    for member in members[:-1]:
        rooms.leave(ROOM, member)
    await asyncio.sleep(0)
    assert len(members[-2].frames) == 2  # it has left, and is told nothing of the others
    assert rooms.presences == 1
