"""When somebody's token comes to its end."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from walstream.access import Reader
from walstream.access.tokens import LATEST
from walstream.live import expiry
from walstream.live.expiry import Expiry


async def test_the_end_comes_when_the_token_ends() -> None:
    ended = asyncio.Event()
    Expiry().renew(Reader("viewer", expires_at=time.time() + 0.05), ended.set)
    assert not ended.is_set()
    await ended.wait()


async def test_a_token_that_is_renewed_ends_once_and_later() -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    waiting = Expiry()
    waiting.renew(Reader("viewer", expires_at=time.time() + 0.02), lambda: ended.put_nowait("old"))
    waiting.renew(Reader("viewer", expires_at=time.time() + 0.05), lambda: ended.put_nowait("new"))
    assert await ended.get() == "new"
    assert ended.empty()


async def test_the_clock_counts_and_not_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([*range(10), 60])
    ended = asyncio.Event()

    def clock() -> float:
        assert not ended.is_set()
        return next(seconds, 60)

    monkeypatch.setattr(expiry, "LOOK_AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(expiry, "time", SimpleNamespace(time=clock))
    Expiry().renew(Reader("viewer", expires_at=60), ended.set)
    await ended.wait()
    assert next(seconds, None) is None


async def test_there_may_be_no_end_or_one_that_nobody_lives_to_see() -> None:
    waiting = Expiry()
    for expires_at in (None, float(LATEST)):
        waiting.renew(Reader("viewer", expires_at=expires_at), pytest.fail)
        await asyncio.sleep(0)
        waiting.cancel()
