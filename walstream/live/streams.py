"""A client's stream from its first word to its last: what it missed, what comes, why it ends."""

from __future__ import annotations

from typing import NamedTuple

import structlog

from walstream.errors import SinkFailed, Unavailable, WalstreamError
from walstream.journal import JournalTrimmed
from walstream.live.clients import Client, End
from walstream.live.hub import Hub
from walstream.live.missed import Missed, resolve
from walstream.live.subscriptions import RequestRefused
from walstream.positions import Position

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.live")

CATCH_UP_SECONDS = 0.2
"""How often it is looked whether the stream has come to where a client was before a restart."""


class Beginning(NamedTuple):
    """Behind what a stream begins; ``reset`` says why that is not what was asked for."""

    position: Position
    reset: str = ""


async def begin_at(hub: Hub, since: str | None) -> Beginning:
    """Return where a stream begins: behind ``since``, or now when that is not kept any more.

    Raises:
        RequestRefused: ``since`` cannot be read, or cannot be judged at this moment.
    """
    if since is None:
        return Beginning(hub.position)
    try:
        position = await resolve(since, hub)
        is_foreign = position is not None and await hub.is_foreign(position)
    except (Unavailable, SinkFailed):
        raise RequestRefused(503, "what was missed cannot be told at this moment") from None
    if position is None:
        return Beginning(hub.position, "trimmed")
    return Beginning(hub.position, "foreign") if is_foreign else Beginning(position)


async def serve(
    hub: Hub, client: Client, beginning: Beginning, heartbeat_seconds: float
) -> Position:
    """Give a client all that it missed, and then what comes, until it ends.

    Returns up to where it has read what it missed.

    Args:
        hub: with the changes.
        client: new.
        beginning: from `begin_at`.
        heartbeat_seconds: after so long it gets a sign of life.
    """
    encoding, outflow = client.cohort.encoding, client.outflow
    hub.enter(client)
    if not hub.has_begun:  # its sink was closed, by a reload perhaps: nothing comes here any more
        client.finish(End.CLOSING)
    try:
        begin = beginning.position
        if beginning.reset:
            outflow.write(hub.reset_note(encoding, beginning.reset))
            begin = hub.position  # as the note says: more may have come meanwhile
        while begin > hub.position and not client.has_ended():  # what it has got comes again
            await client.wait(CATCH_UP_SECONDS)
        reached = await _replay(hub, client, begin)
        await _live(hub, client, heartbeat_seconds)
        if client.end is not End.LEFT:
            # Who has got all up to here goes on from here.
            is_complete = client in client.cohort.clients and not client.has_missed
            position = hub.reached(client) if is_complete else None
            outflow.write(encoding.note("end", {"reason": client.end}, position))
        return reached
    finally:
        hub.leave(client)


async def _replay(hub: Hub, client: Client, begin: Position) -> Position:
    while not client.has_ended():
        missed = Missed(hub, client, begin)
        try:
            async for piece in missed:
                await client.outflow.room()  # others may write to it, too
                if client.has_ended():  # it may have other rights by now
                    return begin
                client.outflow.write(piece)
                begin = missed.position
                await client.outflow.room()
                if client.has_ended():
                    return begin
        except JournalTrimmed:  # it was slower than the history is long
            client.outflow.write(hub.reset_note(client.cohort.encoding, "trimmed"))
            begin = hub.position
        except WalstreamError as failure:  # it comes back, and asks again
            begin = missed.position
            if client.has_ended():
                break
            log.error("history_not_read", error=failure.message, hint=failure.hint)  # noqa: TRY400
            client.finish(End.CLOSING)
        else:
            return missed.position
    return begin


async def _live(hub: Hub, client: Client, heartbeat_seconds: float) -> None:
    encoding = client.cohort.encoding
    told = hub.position
    while not client.has_ended():
        await client.wait(heartbeat_seconds)
        if client.has_ended() or client.outflow.waiting_bytes:
            continue
        # It has all up to here; a filter that keeps little must not fall off the history.
        reached = hub.reached(client)
        is_news, told = reached != told, reached
        client.push(encoding.note("position", {}, told) if is_news else encoding.heartbeat)


async def page(hub: Hub, client: Client, begin: Position) -> None:
    """Give a client what there is at this moment, and where to go on from."""
    upto = max(begin, hub.position)
    try:
        async for piece in Missed(hub, client, begin).read(upto):
            client.outflow.write(piece)
            await client.outflow.room()
            if client.end is not None:  # or it would be taken for all there is
                encoding = client.cohort.encoding
                client.outflow.write(encoding.note("end", {"reason": client.end}, None))
                return
    except JournalTrimmed:
        client.outflow.write(hub.reset_note(client.cohort.encoding, "trimmed"))
    else:
        client.outflow.write(client.cohort.encoding.note("position", {}, upto))
