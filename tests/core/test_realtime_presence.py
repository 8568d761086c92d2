"""Presence comes to the same on every client, whenever it came and whatever it has missed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.phoenix_presence import JavaScriptPresence, PythonPresence
from walstream.realtime.presence import Presences, Unwritable, content_of

Metas = dict[str, list[dict[str, Any]]]


def refs() -> Iterator[str]:
    return (f"r{number}" for number in itertools.count(1))


def diff_of(presences: Presences) -> Any:
    return json.loads(presences.take_diff())


def state_of(presences: Presences) -> Any:
    return json.loads(presences.state())


def track(presences: Presences, member: object, key: str, **payload: Any) -> bool:
    return presences.track(member, key, content_of(payload))


def test_who_is_tracked_joins_with_a_ref() -> None:
    presences = Presences(refs())
    assert track(presences, "a", "k1", u=1)
    assert presences.has_news
    assert diff_of(presences) == {
        "joins": {"k1": {"metas": [{"phx_ref": "r1", "u": 1}]}},
        "leaves": {},
    }
    assert state_of(presences) == {"k1": {"metas": [{"phx_ref": "r1", "u": 1}]}}
    assert not presences.has_news


def test_who_is_tracked_anew_joins_with_the_ref_before_and_leaves_by_it() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1", u=1)
    diff_of(presences)
    track(presences, "a", "k1", u=2)
    assert diff_of(presences) == {
        "joins": {"k1": {"metas": [{"phx_ref": "r2", "phx_ref_prev": "r1", "u": 2}]}},
        "leaves": {"k1": {"metas": [{"phx_ref": "r1", "u": 1}]}},
    }


def test_the_same_payload_again_is_no_news() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1", u=1)
    diff_of(presences)
    assert not track(presences, "a", "k1", u=1)
    assert not presences.has_news
    assert track(presences, "a", "k1", u=True)


def test_sockets_with_one_key_are_metas_of_it_in_their_order() -> None:
    presences = Presences(refs())
    for member in "abc":
        track(presences, member, "k1", by=member)
    assert [meta["by"] for meta in diff_of(presences)["joins"]["k1"]["metas"]] == ["a", "b", "c"]
    presences.untrack("b")
    track(presences, "a", "k1", by="a again")
    diff_of(presences)
    assert [meta["by"] for meta in state_of(presences)["k1"]["metas"]] == ["c", "a again"]
    assert len(presences) == 2


def test_whoever_comes_and_goes_between_two_diffs_is_in_none() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1")
    assert presences.untrack("a")
    assert not presences.untrack("a")
    assert not presences.has_news
    assert diff_of(presences) == {"joins": {}, "leaves": {}}


def test_the_ref_before_is_one_that_was_told() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1", u=1)
    diff_of(presences)
    track(presences, "a", "k1", u=2)
    track(presences, "a", "k1", u=3)
    diff = diff_of(presences)
    assert diff["joins"]["k1"]["metas"] == [{"phx_ref": "r3", "phx_ref_prev": "r1", "u": 3}]
    assert diff["leaves"]["k1"]["metas"] == [{"phx_ref": "r1", "u": 1}]


def test_another_key_is_another_presence() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1", u=1)
    diff_of(presences)
    track(presences, "a", "k2", u=1)
    diff = diff_of(presences)
    assert list(diff["leaves"]) == ["k1"]
    assert diff["joins"] == {"k2": {"metas": [{"phx_ref": "r2", "u": 1}]}}


def test_the_state_is_what_was_told_and_not_what_is_news() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1")
    assert state_of(presences) == {}
    diff_of(presences)
    presences.untrack("a")
    assert "k1" in state_of(presences)
    diff_of(presences)
    assert state_of(presences) == {}


def test_phoenix_own_names_cannot_be_forged() -> None:
    presences = Presences(refs())
    presences.track("a", "k1", content_of({"phx_ref": "x", "phx_ref_prev": "y", "u": 1}))
    diff_of(presences)
    assert state_of(presences) == {"k1": {"metas": [{"phx_ref": "r1", "u": 1}]}}


@pytest.mark.parametrize("key", ["", '"', "\\", "__proto__", "\x00\n", "ключ 😀", "k" * 1_000_000])
def test_any_text_is_a_key(key: str) -> None:
    presences = Presences(refs())
    track(presences, "a", key, u="</script>")
    diff_of(presences)
    assert list(state_of(presences)) == [key]


def test_what_is_no_json_is_told() -> None:
    nested: Any = {}
    for _ in range(100_000):
        nested = {"a": nested}
    for payload in ({"a": "\ud800"}, {"a": {1, object()}}, nested):
        with pytest.raises(Unwritable):
            content_of(payload)


def test_bytes_are_those_of_who_is_present() -> None:
    presences = Presences(refs())
    track(presences, "a", "k1", u=1)
    assert presences.bytes == presences.size("a") == len('k1{"u":1}')
    track(presences, "a", "k1", u=100)
    assert presences.bytes == len('k1{"u":100}')
    presences.untrack("a")
    assert presences.bytes == presences.size("a") == 0


# ---- Clients


class Client:
    """A client of each kind by one channel; it may come back with what it knew."""

    def __init__(self) -> None:
        self.javascript = JavaScriptPresence()
        self.python = PythonPresence()
        self.is_in = False

    def enter(self, state: Any) -> None:
        """Join; walstream sends the state before all diffs."""
        self.is_in = True
        self.javascript.rejoin()
        self.javascript.on_state(state)
        self.python.on_state(state)

    def leave(self) -> None:
        self.is_in = False

    def get(self, diff: Any) -> None:
        if self.is_in:
            self.javascript.on_diff(diff)
            self.python.on_diff(diff)

    @property
    def known(self) -> Metas:
        """What it shows, in which both kinds agree."""
        assert self.javascript.metas == self.python.metas
        return self.python.metas


class Truth:
    """Who is present, told by itself: members in the order in which they were tracked."""

    def __init__(self) -> None:
        self.present: dict[int, tuple[str, Any]] = {}

    def track(self, member: int, key: str, payload: Any) -> None:
        if self.present.get(member) != (key, payload):
            self.present.pop(member, None)
            self.present[member] = (key, payload)

    def untrack(self, member: int) -> None:
        self.present.pop(member, None)

    def metas(self) -> Metas:
        found: Metas = {}
        for key, payload in self.present.values():
            found.setdefault(key, []).append(payload)
        return found


def payloads(metas: Metas) -> Metas:
    ours = ("phx_ref", "phx_ref_prev")
    return {
        key: [{name: value for name, value in one.items() if name not in ours} for one in some]
        for key, some in metas.items()
    }


MEMBERS = st.integers(0, 7)
KEYS = st.sampled_from(["k1", "k2", "k3"])


class Room(RuleBasedStateMachine):
    """Members come and go at random, and so do clients."""

    def __init__(self) -> None:
        super().__init__()
        self.presences = Presences(refs())
        self.truth = Truth()
        self.clients = [Client() for _ in range(4)]
        self.refs: set[str] = set()

    @rule(member=MEMBERS, key=KEYS, number=st.integers(0, 2))
    def track(self, member: int, key: str, number: int) -> None:
        payload = {"n": number}
        self.presences.track(member, key, content_of(payload))
        self.truth.track(member, key, payload)

    @rule(member=MEMBERS)
    def untrack(self, member: int) -> None:
        self.presences.untrack(member)
        self.truth.untrack(member)

    @rule()
    def tell(self) -> None:
        if not self.presences.has_news:
            return
        diff = diff_of(self.presences)
        metas = [meta for some in diff["joins"].values() for meta in some["metas"]]
        for meta in metas:
            assert meta["phx_ref"] not in self.refs
            assert meta.get("phx_ref_prev", meta["phx_ref"]) in {*self.refs, meta["phx_ref"]}
        self.refs |= {meta["phx_ref"] for meta in metas}
        for client in self.clients:
            client.get(diff)

    @rule(number=st.integers(0, 3))
    def enter(self, number: int) -> None:
        self.clients[number].enter(state_of(self.presences))

    @rule(number=st.integers(0, 3))
    def leave(self, number: int) -> None:
        self.clients[number].leave()

    @invariant()
    def every_client_knows_what_was_told(self) -> None:
        told = {key: some["metas"] for key, some in state_of(self.presences).items()}
        for client in self.clients:
            assert not client.is_in or client.known == told
        if not self.presences.has_news:
            assert payloads(told) == self.truth.metas()

    def teardown(self) -> None:
        self.tell()
        self.every_client_knows_what_was_told()
        assert len(self.presences) == len(self.truth.present)


TestRoom = pytest.mark.timeout(120)(Room.TestCase)
TestRoom.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_client_of_javascript_may_get_diffs_before_the_state() -> None:
    presences, client = Presences(refs()), JavaScriptPresence()
    for members in ("ab", "cd"):
        for member in members:
            track(presences, member, "k1", by=member)
        presences.untrack("b")
        client.on_diff(diff_of(presences))
    client.on_state(state_of(presences))
    assert client.state == state_of(presences)


def test_a_thousand_members_at_random_come_to_the_same_on_every_client() -> None:
    random = Random(1_000)  # noqa: S311 - not for secrets
    presences, truth = Presences(refs()), Truth()
    clients = [Client() for _ in range(6)]
    for step in range(4_000):
        member = random.randrange(1_000)
        if random.random() < 0.6:
            key, payload = f"k{random.randrange(400)}", {"n": random.randrange(3)}
            presences.track(member, key, content_of(payload))
            truth.track(member, key, payload)
        else:
            presences.untrack(member)
            truth.untrack(member)
        if step % 100 == 0:
            random.choice(clients).enter(state_of(presences))
        if step % 80 == 0:
            tell(presences, clients)
    for client in clients:
        client.enter(state_of(presences))
    tell(presences, clients)
    assert len(presences) > 400
    for client in clients:
        assert payloads(client.known) == truth.metas()
        assert client.known == clients[0].known


def tell(presences: Presences, clients: list[Client]) -> None:
    diff = diff_of(presences)
    for client in clients:
        client.get(diff)
