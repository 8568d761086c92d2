"""Whether a server is the continuation of the one that was streamed from before.

After a failover, a restore from a backup, or a slot made anew, the slot of the configured name may
stand anywhere, or nowhere. To go on from there would leave out changes, or follow a history that
parts from what was delivered. `verify` compares what was confirmed last with what the server says,
and refuses unless the one follows from the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from walstream.errors import HistoryForked, SlotLost, Unavailable
from walstream.lsn import Lsn


class Lineage(msgspec.Struct, frozen=True):
    """A cluster, a timeline of it, and up to where its changes are confirmed."""

    systemid: str
    timeline: int
    flush_lsn: Lsn


class Standing(msgspec.Struct, frozen=True):
    """What a server says now.

    ``flush_lsn`` is how far its WAL goes, ``slot_lsn`` what the slot has confirmed, None when there
    is no slot. ``history`` lists the timelines that the current one goes on from, and where each
    was left; it is needed only when the timeline has changed. ``others_stream`` says that other
    processes of the same service move the slot, too.
    """

    systemid: str
    timeline: int
    flush_lsn: Lsn
    slot_lsn: Lsn | None
    in_recovery: bool = False
    others_stream: bool = False
    history: Sequence[tuple[int, Lsn]] = ()


def verify(last: Lineage, now: Standing, slot: str) -> None:
    """Refuse a server on which going on would leave a gap, or follow another history.

    A slot that stands behind what was confirmed is no reason: after a restart of the server changes
    may come again. One that stands ahead of it was moved by somebody else, or made anew.

    Args:
        last: what was confirmed last.
        now: what the server says.
        slot: the slot's name, for messages.

    Raises:
        SlotLost: changes are missing, or nobody can tell.
        HistoryForked: the server has never seen what was confirmed.
        Unavailable: a standby has not replayed yet what was confirmed.
    """
    if now.systemid != last.systemid:
        raise SlotLost(
            f"the server is the cluster {now.systemid}, and was {last.systemid} before: its slot"
            " knows nothing of what was confirmed",
            hint=f"check the dsn; if it is the right one, {_ACCEPT}",
        )
    if now.timeline != last.timeline:
        _verify_timeline(last, now)
    if now.slot_lsn is None:
        raise SlotLost(
            f"the slot {slot} was there and is gone: changes since {last.flush_lsn} are missing",
            hint="somebody dropped it, or this is another server after a failover; bring over what"
            f" is missing by other means, make it again with walstream slot create; {_ACCEPT}",
        )
    if now.slot_lsn > last.flush_lsn and not now.others_stream:
        raise SlotLost(
            f"the slot {slot} stands at {now.slot_lsn}, and {last.flush_lsn} was confirmed last:"
            " what was committed in between did not come through here",
            hint="it was made anew, advanced, or another process has streamed from it (shared ="
            f" true under [slot] says that others may); bring over what is missing; {_ACCEPT}",
        )
    if now.flush_lsn < last.flush_lsn:
        if now.in_recovery:
            raise Unavailable(
                f"the standby has replayed up to {now.flush_lsn}, and {last.flush_lsn} is confirmed"
            )
        raise HistoryForked(
            f"the server stands at {now.flush_lsn}, and {last.flush_lsn} was confirmed: it was"
            " restored from an older copy",
            hint=f"what was delivered after that position is not in this database; {_ACCEPT}",
        )


def _verify_timeline(last: Lineage, now: Standing) -> None:
    """Refuse a timeline that does not go on from what was confirmed."""
    left_at = dict(now.history).get(last.timeline)
    if now.timeline < last.timeline or left_at is None:
        raise HistoryForked(
            f"the server is on timeline {now.timeline}, which does not go on from timeline"
            f" {last.timeline}, on which {last.flush_lsn} was confirmed",
            hint=f"it was restored from a backup, or is an old primary; {_ACCEPT}",
        )
    if last.flush_lsn > left_at:
        raise HistoryForked(
            f"the server went on from timeline {last.timeline} at {left_at}, and {last.flush_lsn}"
            " was confirmed: the last changes that were delivered are not in this database",
            hint=f"the promoted standby had not received them; {_ACCEPT}",
        )


_ACCEPT = "to go on from the slot's position, start again with --accept-gap"
