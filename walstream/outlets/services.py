"""What all outlets share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from walstream.flow import Flow
from walstream.parking import Parking


class Services(msgspec.Struct, frozen=True):
    """What outlets need of others.

    ``wait_until_visible`` takes an xid and returns when other sessions see that transaction.
    ``describe`` names an error without what may be a row's values. ``drain_seconds`` is how long
    calls may go on when another one of their destination has failed for good.
    """

    flow: Flow
    parking: Parking | None
    wait_until_visible: Callable[[int], Awaitable[None]]
    describe: Callable[[BaseException], str]
    drain_seconds: float = 10.0
