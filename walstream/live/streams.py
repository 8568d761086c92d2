"""A client's stream from its first word to its last: what it missed, what comes, why it ends."""

from __future__ import annotations

import structlog

from walstream.errors import SinkFailed, Unavailable
from walstream.journal import JournalTrimmed
from walstream.live.clients import Client, End
from walstream.live.hub import Hub
from walstream.live.replays import Replay, resolve
from walstream.live.subscriptions import RequestRefused
from walstream.positions import Position

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.live")

CATCH_UP_SECONDS = 0.2
"""How often it is looked whether the stream has come to where a client was before a restart."""


async def begin_at(hub: Hub, since: str | None) -> Position | None:
    """Return where a stream begins: now, or behind ``since``; None when that is not kept any more.

    Raises:
        RequestRefused: ``since`` cannot be read, or cannot be judged at this moment.
    """
    if since is None:
        return hub.position
    try:
        position = await resolve(since, hub)
        is_foreign = position is not None and await hub.is_foreign(position)
    except (Unavailable, SinkFailed):
        raise RequestRefused(503, "what was missed cannot be told at this moment") from None
    return None if is_foreign else position


async def serve(hub: Hub, client: Client, begin: Position | None, heartbeat_seconds: float) -> None:
    """Give a client all that it missed, and then what comes, until it ends.

    Args:
        hub: with the changes.
        client: new.
        begin: from `begin_at`.
        heartbeat_seconds: after so long it gets a sign of life.
    """
    encoding, outflow = client.cohort.encoding, client.outflow
    hub.enter(client)
    try:
        if begin is None:
            outflow.write(hub.reset_note(encoding, "trimmed"))
            begin = hub.position
        while begin > hub.position and not client.has_ended():  # what it has got comes again
            await client.wait(CATCH_UP_SECONDS)
        await _replay(hub, client, begin)
        await _live(hub, client, heartbeat_seconds)
        if client.end is not End.LEFT:
            # Who was not cut off for its slowness has got all up to here, and goes on from here.
            is_complete = client in client.cohort.clients and client.end is not End.SLOW
            position = hub.position if is_complete else None
            outflow.write(encoding.note("end", {"reason": client.end}, position))
    finally:
        hub.leave(client)


async def _replay(hub: Hub, client: Client, begin: Position) -> None:
    while not client.has_ended():
        try:
            async for piece in Replay(hub, client, begin):
                client.outflow.write(piece)
                await client.outflow.room()
                if client.has_ended():
                    return
        except JournalTrimmed:  # it was slower than the history is long
            client.outflow.write(hub.reset_note(client.cohort.encoding, "trimmed"))
            begin = hub.position
        except SinkFailed as failure:  # it comes back, and asks again
            log.error("history_not_read", error=failure.message, hint=failure.hint)  # noqa: TRY400
            client.finish(End.CLOSING)
        else:
            return


async def _live(hub: Hub, client: Client, heartbeat_seconds: float) -> None:
    encoding = client.cohort.encoding
    told = hub.position
    while not client.has_ended():
        await client.wait(heartbeat_seconds)
        if client.has_ended() or client.outflow.waiting_bytes:
            continue
        # It has all up to here; a filter that keeps little must not fall off the history.
        is_news, told = hub.position != told, hub.position
        client.push(encoding.note("position", {}, told) if is_news else encoding.heartbeat)


async def page(hub: Hub, client: Client, begin: Position) -> None:
    """Give a client what there is at this moment."""
    try:
        async for piece in Replay(hub, client, begin).read(hub.position):
            client.outflow.write(piece)
            await client.outflow.room()
            if client.end is not None:  # or it would be taken for all there is
                encoding = client.cohort.encoding
                client.outflow.write(encoding.note("end", {"reason": client.end}, None))
                return
    except JournalTrimmed:
        client.outflow.write(hub.reset_note(client.cohort.encoding, "trimmed"))
