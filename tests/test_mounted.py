"""The HTTP side in a program of one's own, of what `run` reads in the same event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.streaming import Stream
from walstream import Walstream
from walstream.testing import Database

ANYBODY: Final = {
    "anonymous_role": "anybody",
    "roles": {"anybody": {"tables": [{"table": "public.orders"}]}},
}
PAGE: Final = "changes.jsonl?table=public.orders&until=now"

Waits: TypeAlias = Callable[..., Awaitable[None]]


@pytest.fixture
def stream(database: Database) -> Iterator[Stream]:
    """A slot and a configuration without ``http.listen``."""
    database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    routes = [{"table": "*.*", "to": "live"}]
    stream = Stream(database, sinks={"live": {"type": "live"}}, routes=routes, access=ANYBODY)
    yield stream
    stream.close()


@asynccontextmanager
async def running(app: Walstream, stream: Stream, wait_until: Waits) -> AsyncIterator[None]:
    task = asyncio.create_task(app.run(stream.config))
    await wait_until(lambda: app.is_ready)
    yield
    app.stop()
    await task


async def test_changes_are_read_below_the_path_that_it_is_mounted_at(
    stream: Stream, database: Database, async_wait_until: Waits
) -> None:
    """While it runs; before and after there are none."""
    app = Walstream()
    around = Starlette(routes=[Mount("/walstream", app.http_app(stream.config))])
    transport = httpx.ASGITransport(around)
    async with httpx.AsyncClient(transport=transport, base_url="http://own/walstream/") as client:

        async def rows() -> list[dict[str, int]]:
            lines = [json.loads(line) for line in (await client.get(PAGE)).text.splitlines()]
            return [line["row"] for line in lines if "row" in line]

        assert (await client.get(PAGE)).status_code == 503
        async with running(app, stream, async_wait_until):
            database.execute("INSERT INTO orders VALUES (1), (2)")
            await async_wait_until(lambda: _published(app) == 2)
            assert await rows() == [{"id": 1}, {"id": 2}]
            assert (await client.get("")).headers["content-type"].startswith("text/html")
            assert (await client.get("health/ready")).status_code == 200
            assert (await client.get("status.json")).status_code == 403
        assert (await client.get(PAGE)).status_code == 503
        assert (await client.get("health/ready")).status_code == 503


def _published(app: Walstream) -> int:
    live = app.vitals().live
    return 0 if live is None else live.published_changes
