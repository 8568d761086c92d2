"""The way to one destination: what waits for it, who calls it, and what is done when it fails.

Every destination has its own outlet, so that one that is slow or fails holds up no other until too
much is in flight. The contract: a change is taken only after the handler has returned, or the sink
has made it durable, or the dead-letter store has it, or its route says that it may be skipped.

An `Outlet` lets changes wait, and says what is given to its destination at once. Before a call its
`Admission` says what may be called for; its `Attempts` make the call, and further ones; its
`Failures` do what the policy says with what no attempt delivered. What is taken is told to its
`Share` of what is in flight, and `InHand` knows what it is at.
"""

from __future__ import annotations

from walstream.calls import Caller
from walstream.destinations import Destination, Handler
from walstream.outlets.in_hand import Held
from walstream.outlets.lists import TransactionOutlet, UnitOutlet
from walstream.outlets.outlet import Outlet
from walstream.outlets.parallel import LaneOutlet
from walstream.outlets.services import Services
from walstream.outlets.share import OutletCounts
from walstream.outlets.single import PlainOutlet, ThreadOutlet
from walstream.outlets.together import run_together

__all__ = [
    "Held",
    "LaneOutlet",
    "Outlet",
    "OutletCounts",
    "PlainOutlet",
    "Services",
    "ThreadOutlet",
    "TransactionOutlet",
    "UnitOutlet",
    "outlet_of",
    "run_together",
]


def outlet_of(  # noqa: PLR0911 - one for each kind
    destination: Destination, caller: Caller, services: Services
) -> Outlet:
    """Return the way to a destination."""
    if not isinstance(destination, Handler):
        return UnitOutlet(destination, caller, services)
    options = destination.options
    if options.transactions:
        return TransactionOutlet(destination, caller, services)
    if options.concurrency > 1:
        return LaneOutlet(destination, caller, services)
    if options.batch:
        return UnitOutlet(destination, caller, services)
    if not destination.is_async:
        return ThreadOutlet(destination, caller, services)
    if options.transactional is not None:
        return UnitOutlet(destination, caller, services)
    return PlainOutlet(destination, caller, services)
