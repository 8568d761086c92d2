"""The page, the figures and the dead letters by HTTP: for whom, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import pytest
from starlette.applications import Starlette

from tests import vitals
from tests.browser.fake import OPERATOR, VISITOR, FakeGate, FakeLetters, FakeReplay, letter
from tests.postgres import async_wait_until
from walstream.errors import DeadLetterStoreFailed
from walstream.gateway.dashboard import dashboard_route
from walstream.gateway.desk import Desk
from walstream.gateway.letters import MAX_BODY_BYTES, letters_routes
from walstream.gateway.status import status_route
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.vitals import JournalVitals, Vitals

BEARER: Final = {"Authorization": f"Bearer {OPERATOR}"}
JSON: Final = {**BEARER, "Content-Type": "application/json"}
REPLAY: Final = "/dead-letters/replay"


class Site:
    """What answers, and what is behind it."""

    def __init__(self) -> None:
        self.vitals: Vitals = vitals.full()
        self.gate = FakeGate()
        self.letters = FakeLetters()
        self.letters.stored = [letter(1), letter(2, route="index"), letter(3)]
        self.replay = FakeReplay(self.letters)
        self.desk = Desk(lambda: self.letters, lambda: self.replay)
        app = Starlette(
            routes=[
                dashboard_route(),
                status_route(lambda: self.vitals, lambda: None, self.gate),
                *letters_routes(self.desk, self.gate),
            ]
        )
        transport = httpx.ASGITransport(app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://walstream")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    async with site.client:
        yield site
    await site.desk.close(5)


# ---- The page


async def test_the_page_is_sent_once_and_then_only_when_it_changes(site: Site) -> None:
    first = await site.client.get("/")
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    again = await site.client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await site.client.head("/")).status_code == 200


# ---- Who may


@pytest.mark.parametrize("path", ["/status.json", "/dead-letters.json"])
@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({}, "", 401),
        ({"Authorization": "Bearer wrong"}, "", 401),
        ({"Authorization": "Bearer "}, "", 401),
        ({"Authorization": f"Basic {OPERATOR}"}, "", 401),
        ({"Authorization": f"Bearer {VISITOR}"}, "", 403),
        ({"Authorization": f"Bearer {VISITOR}"}, f"?token={OPERATOR}", 403),
        ({"Authorization": f"bearer {OPERATOR}"}, "", 200),
        ({}, f"?token={OPERATOR}", 200),
        ({}, "?token=", 401),
    ],
)
async def test_figures_and_letters_are_for_roles_that_may_see_them(
    site: Site, path: str, headers: dict[str, str], query: str, status: int
) -> None:
    answer = await site.client.get(path + query, headers=headers)
    assert answer.status_code == status
    assert answer.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in answer.headers) == (status == 401)
    if status != 200:
        assert set(answer.json()) == {"error", "hint"}
        assert OPERATOR not in answer.text


# ---- The figures


async def test_figures_are_those_of_the_vitals(site: Site) -> None:
    site.vitals = vitals.full(
        journal=JournalVitals(bytes=10, changes=2, begins=Position(Lsn(16), 1), durable=True)
    )
    told = (await site.client.get("/status.json", headers=BEARER)).json()
    assert told["positions"]["flush_lsn"] == "16/B374A000"
    assert told["slot"]["confirmed_flush_lsn"] == "16/B3740000"
    assert told["counters"]["changes"] == 1234
    assert told["journal"]["begins"] == "0/10:1"
    assert told["live"]["clients"] == 500
    assert told["routes"][0] == {"name": "orders", "matched": 900, "filtered": 90, "absent": 10}
    assert told["reader"]["role"] == "admin"


async def test_a_process_that_has_just_begun_has_figures_too(site: Site) -> None:
    site.vitals = vitals.young()
    told = (await site.client.get("/status.json", headers=BEARER)).json()
    assert (told["phase"], told["slot"], told["journal"]) == ("connecting", None, None)


# ---- Dead letters


async def test_letters_are_told_without_rows_and_keys(site: Site) -> None:
    site.letters.stored = [letter(1, payload=b"secret", keys=(("public.orders", b"[7]"),))]
    answer = await site.client.get("/dead-letters.json", headers=BEARER)
    told = answer.json()
    assert (told["count"], told["replay"]) == (1, None)
    assert told["letters"][0]["error"] == "TimeoutError at handlers.py:41"
    assert "secret" not in answer.text
    assert "keys" not in told["letters"][0]


@pytest.mark.parametrize(("limit", "status"), [("2", 200), ("0", 400), ("1001", 400), ("x", 400)])
async def test_so_many_letters_are_told_as_are_asked_for(
    site: Site, limit: str, status: int
) -> None:
    answer = await site.client.get(f"/dead-letters.json?limit={limit}", headers=BEARER)
    assert answer.status_code == status
    assert status == 400 or len(answer.json()["letters"]) == 2


async def test_a_store_that_cannot_be_read_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> Any:
        raise DeadLetterStoreFailed("the disk is gone", hint="look for it")

    monkeypatch.setattr(site.letters, "letters", fail)
    answer = await site.client.get("/dead-letters.json", headers=BEARER)
    assert answer.status_code == 503
    assert answer.json() == {"error": "the disk is gone", "hint": "look for it"}


async def test_a_replay_is_begun_once_and_told_until_its_end(site: Site) -> None:
    began = await site.client.post(REPLAY, headers=JSON, json={"route": "mailer"})
    assert (began.status_code, began.json()["replay"]["running"]) == (202, True)
    again = await site.client.post(REPLAY, headers=JSON, json={"ids": [2]})
    assert (again.status_code, again.json()["error"]) == (409, "a replay runs already")
    state = await ended_replay(site)
    assert state["reports"][0] == {
        "route": "mailer",
        "delivered": 2,
        "failed": 0,
        "left": 0,
        "added": 0,
        "reason": "",
    }
    assert [one.id for one in site.letters.stored] == [2]


async def test_a_replay_that_fails_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> Any:
        raise RuntimeError("a row's value")

    monkeypatch.setattr(site.replay, "run", fail)
    await site.client.post(REPLAY, headers=JSON, json={"ids": [1]})
    state = await ended_replay(site)
    assert state["error"].startswith("RuntimeError at test_dashboard_paths.py:")
    assert "value" not in json.dumps(state)


async def ended_replay(site: Site) -> dict[str, Any]:
    """Ask until the replay has ended."""

    async def ended() -> dict[str, Any]:
        answer = await site.client.get("/dead-letters.json", headers=BEARER)
        state: dict[str, Any] = answer.json()["replay"]
        return {} if state["running"] else state

    state: dict[str, Any] = await async_wait_until(ended)
    return state


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b'{"ids": [1]}', 401),
        ({"Authorization": f"Bearer {VISITOR}"}, b'{"ids": [1]}', 403),
        (BEARER, b'{"ids": [1]}', 415),
        ({**BEARER, "Content-Type": "text/plain"}, b'{"ids": [1]}', 415),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, b'{"ids": [1]}', 403),
        ({**JSON, "Sec-Fetch-Site": "same-site"}, b'{"ids": [1]}', 403),
        (JSON, b"", 400),
        (JSON, b"{}", 400),
        (JSON, b'{"ids": []}', 400),
        (JSON, b'{"ids": [1], "route": "mailer"}', 400),
        (JSON, b'{"ids": ["1"]}', 400),
        (JSON, b'{"all": true}', 400),
        (JSON, b"\xff", 400),
        (JSON, b'{"ids": [' + b"1," * MAX_BODY_BYTES + b"1]}", 413),
    ],
)
async def test_what_is_no_clear_wish_of_an_operator_replays_nothing(
    site: Site, headers: dict[str, str], body: bytes, status: int
) -> None:
    answer = await site.client.post(REPLAY, headers=headers, content=body)
    assert answer.status_code == status
    assert site.desk.state is None
    assert (await site.client.get(REPLAY, headers=JSON)).status_code == 405


async def test_a_replay_is_ended_with_the_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = asyncio.Event()

    async def run(*_: object) -> Any:
        await stopped.wait()
        return []

    monkeypatch.setattr(site.replay, "run", run)
    monkeypatch.setattr(site.replay, "stop", stopped.set)
    await site.client.post(REPLAY, headers=JSON, json={"ids": [1]})
    await site.desk.close(5)
    assert site.desk.state is not None
    assert (site.desk.state.running, site.desk.state.error) == (False, "")
