"""What the channels of a process are about, and who is there."""

from __future__ import annotations

from collections.abc import Callable, Sized

import msgspec

from walstream.access.gate import Gate
from walstream.config.live import LiveConfig
from walstream.config.realtime import RealtimeConfig
from walstream.live.hub import Hub
from walstream.realtime.rooms import Rooms
from walstream.realtime.tally import Tally
from walstream.realtime.topics import Topics
from walstream.vitals import RealtimeVitals


class Services(msgspec.Struct, frozen=True):
    """What a socket's channels need.

    ``hub`` has the changes, and is None while there is no live sink; ``gate`` says who somebody
    is, ``topics`` which private channels they may enter; in ``rooms`` are all who are in a channel.
    ``visits`` are the sockets that are open; one is as long as it has channels. ``refusals`` counts
    what clients did not get.
    """

    hub: Callable[[], Hub | None]
    gate: Gate
    rooms: Rooms
    topics: Topics
    config: RealtimeConfig
    live: LiveConfig
    visits: set[Sized] = msgspec.field(default_factory=set)
    refusals: Tally = msgspec.field(default_factory=Tally)

    def vitals(self) -> RealtimeVitals:
        """Say how many there are, and what was said."""
        rooms = self.rooms
        return RealtimeVitals(
            sockets=len(self.visits),
            channels=sum(map(len, self.visits)),
            rooms=len(rooms),
            presences=rooms.presences,
            broadcasts=rooms.broadcasts,
            sent_broadcasts=rooms.sent_broadcasts,
            refusals=dict(self.refusals.counts),
        )
