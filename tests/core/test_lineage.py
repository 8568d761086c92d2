"""Which servers are the continuation of the one that was streamed from before."""

from __future__ import annotations

import msgspec
import pytest

from walstream.errors import HistoryForked, SlotLost, Unavailable
from walstream.lineage import Lineage, Standing, verify
from walstream.lsn import Lsn

LAST = Lineage("7", 2, Lsn(0x500))
SAME = Standing("7", 2, flush_lsn=Lsn(0x900), slot_lsn=Lsn(0x500))
PROMOTED = msgspec.structs.replace(SAME, timeline=3, history=((1, Lsn(0x100)), (2, Lsn(0x700))))


def now(standing: Standing, **changes: object) -> Standing:
    return msgspec.structs.replace(standing, **changes)


@pytest.mark.parametrize(
    "standing",
    [
        SAME,
        now(SAME, slot_lsn=Lsn(0x400)),  # after a crash of the server
        now(SAME, slot_lsn=Lsn(0x800), others_stream=True),
        now(PROMOTED, slot_lsn=Lsn(0x800), others_stream=True),
        PROMOTED,
        now(PROMOTED, slot_lsn=Lsn(0x450)),  # a synchronised slot is a little behind
        now(PROMOTED, history=((2, Lsn(0x500)),)),  # left exactly there
        now(PROMOTED, timeline=5, history=((2, Lsn(0x600)), (3, Lsn(0x700)), (4, Lsn(0x710)))),
    ],
    ids=repr,
)
def test_a_continuation_is_taken(standing: Standing) -> None:
    verify(LAST, standing, "orders")


@pytest.mark.parametrize(
    ("standing", "kind", "says"),
    [
        (now(SAME, systemid="8"), SlotLost, "the cluster 8, and was 7"),
        (now(SAME, slot_lsn=None), SlotLost, "orders was there and is gone"),
        (now(PROMOTED, slot_lsn=None), SlotLost, "changes since 0/500 are missing"),
        (now(SAME, slot_lsn=Lsn(0x720)), SlotLost, "stands at 0/720, and 0/500 was confirmed last"),
        (now(PROMOTED, slot_lsn=Lsn(0x720)), SlotLost, "in between did not come through here"),
        (now(PROMOTED, history=((2, Lsn(0x4FF)),)), HistoryForked, "at 0/4FF, and 0/500 was"),
        (now(PROMOTED, history=()), HistoryForked, "does not go on from timeline 2"),
        (now(PROMOTED, timeline=1), HistoryForked, "on timeline 1, which does not go on"),
        (now(SAME, flush_lsn=Lsn(0x4FF)), HistoryForked, "restored from an older copy"),
        (now(SAME, flush_lsn=Lsn(0x4FF), in_recovery=True), Unavailable, "has replayed up to"),
    ],
    ids=repr,
)
def test_what_would_leave_a_gap_or_follows_another_history_is_refused(
    standing: Standing, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        verify(LAST, standing, "orders")
