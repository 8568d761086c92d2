"""What the HTTP side is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import msgspec

from walstream.access.gate import Gate
from walstream.config import Config
from walstream.config.live import LiveConfig
from walstream.gateway.desk import Desk, Letters, Replaying
from walstream.live.hub import Hub
from walstream.realtime.rooms import Rooms
from walstream.realtime.services import Services
from walstream.realtime.topics import Topics
from walstream.vitals import RealtimeVitals, Vitals


class Parts(msgspec.Struct, frozen=True):
    """What the paths are about.

    ``hub`` has the changes, and is None while there is no live sink; ``gate`` says who may read
    them, ``live`` how much; ``desk`` is where dead letters are, and ``realtime`` what the clients
    of Supabase Realtime need.
    """

    vitals: Callable[[], Vitals]
    hub: Callable[[], Hub | None]
    gate: Gate
    desk: Desk
    live: LiveConfig
    realtime: Services

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        vitals: Callable[[], Vitals],
        hub: Callable[[], Hub | None],
        letters: Callable[[], Letters | None],
        make_replay: Callable[[], Replaying],
    ) -> Self:
        """Make them as a configuration says.

        Raises:
            ConfigError: keys of tokens cannot be read.
            SetupError: what tokens need is not installed.
        """
        gate = Gate(
            config.access, masking_key=config.masking.secret(), own_tables=config.own_tables()
        )
        realtime = Services(
            hub=hub,
            gate=gate,
            rooms=Rooms(config.realtime),
            topics=Topics(config.realtime),
            config=config.realtime,
            live=config.live,
        )
        return cls(vitals, hub, gate, Desk(letters, make_replay), config.live, realtime)

    @property
    def max_body_bytes(self) -> int | None:
        """What a request may bring, where that is more than elsewhere."""
        config = self.realtime.config
        return max(config.max_frame_bytes, 1 << 20) if config.enabled else None

    def realtime_vitals(self) -> RealtimeVitals | None:
        """Say how the clients of Supabase Realtime are; None where they are not answered."""
        return self.realtime.vitals() if self.realtime.config.enabled else None

    async def close(self, drain_seconds: float) -> None:
        """Ask for no more keys, and let a replay finish what it is delivering."""
        await self.desk.close(drain_seconds)
        await self.gate.close()
