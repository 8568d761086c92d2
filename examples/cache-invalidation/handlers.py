"""Purges the pages of a product from a web cache when the product changes."""

import os

import httpx

from walstream import Change, Walstream

stream = Walstream()
cache = httpx.AsyncClient(
    base_url=os.environ.get("CACHE_URL", "http://127.0.0.1:6081"),
    timeout=5,
)


@stream.on("public.products", concurrency=8, visible=True)
async def purge(change: Change) -> None:
    if change.operation == "truncate":
        await purge_page("/products/*")
        return
    # The old one too: an update may give a product another id.
    for number in {row["id"] for row in (change.row, change.identity) if "id" in row}:
        await purge_page(f"/products/{number}")


async def purge_page(path: str) -> None:
    answer = await cache.request("PURGE", path)
    if answer.status_code != httpx.codes.NOT_FOUND:  # it had not kept the page
        answer.raise_for_status()
