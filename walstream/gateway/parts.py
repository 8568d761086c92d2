"""What the HTTP side is about."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from walstream.access.gate import Gate
from walstream.config.live import LiveConfig
from walstream.gateway.desk import Desk
from walstream.live.hub import Hub
from walstream.vitals import Vitals


class Parts(msgspec.Struct, frozen=True):
    """What the paths are about.

    ``hub`` has the changes, and is None while there is no live sink; ``gate`` says who may read
    them, ``live`` how much; ``desk`` is where dead letters are.
    """

    vitals: Callable[[], Vitals]
    hub: Callable[[], Hub | None]
    gate: Gate
    desk: Desk
    live: LiveConfig
