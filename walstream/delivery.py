"""All destinations together: handing out, bounds, what is stuck, and the end.

The reader hands over what it has routed and reads on; each destination has an outlet that works by
itself (`walstream.outlets`). When too much is in flight the reader waits. A change that is taken is
told to the acknowledger, which alone decides what may be confirmed.
"""

from __future__ import annotations

import sysconfig
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from walstream.acknowledger import Acknowledger
from walstream.calls import CallClock, Target, caller_of
from walstream.destinations import Destination
from walstream.errors import WalstreamError
from walstream.flow import Flow, Halt, Handed
from walstream.outlets import (
    Held,
    Outlet,
    OutletCounts,
    Services,
    TransactionOutlet,
    outlet_of,
    run_together,
)
from walstream.parking import Parking
from walstream.vitals import DestinationVitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")


class Limits(msgspec.Struct, frozen=True):
    """How much may be in flight, and how long things may take."""

    max_in_flight_changes: int = 10_000
    max_in_flight_bytes: int = 64 << 20
    stuck_after_seconds: float = 60.0
    drain_seconds: float = 10.0


async def _already_visible(_: int) -> None:
    """Where nobody can be asked, as in tests without a server."""


class Delivery:
    """Delivers to all destinations of a process, one session after another."""

    def __init__(  # noqa: PLR0913 - what all destinations share
        self,
        destinations: Iterable[Destination],
        limits: Limits,
        *,
        parking: Parking | None = None,
        targets: Mapping[Destination, Target] | None = None,
        wait_until_visible: Callable[[int], Awaitable[None]] = _already_visible,
        show_error_messages: bool = False,
        trace: Callable[[Destination], Destination] | None = None,
    ) -> None:
        """Make the outlets.

        Args:
            destinations: each once.
            limits: for all together.
            parking: where dead letters go; None when no route has them.
            targets: the databases of transactional handlers.
            wait_until_visible: for handlers that want their changes to be visible.
            show_error_messages: whether the text of handlers' exceptions may be logged and stored.
            trace: puts spans around a destination's calls; None for none.
        """
        self._limits = limits
        self._flow = Flow(limits.max_in_flight_changes, limits.max_in_flight_bytes)
        self._show_error_messages = show_error_messages
        services = Services(
            self._flow, parking, wait_until_visible, self.describe, limits.drain_seconds
        )
        self._targets = dict(targets or {})
        self._outlets: dict[Destination, Outlet] = {}
        for destination in destinations:
            called = destination if trace is None else trace(destination)
            caller = caller_of(called, self._targets.get(destination))
            self._outlets[destination] = outlet_of(called, caller, services)
        self._collecting = [
            outlet for outlet in self._outlets.values() if isinstance(outlet, TransactionOutlet)
        ]
        self._only = next(iter(self._outlets.values())) if len(self._outlets) == 1 else None
        self._told_stuck: dict[Outlet, float] = {}

    @property
    def counts(self) -> dict[str, OutletCounts]:
        """What became of the changes, by destination; those of one name together."""
        found: dict[str, OutletCounts] = {}
        for outlet in self._outlets.values():
            before = found.get(outlet.name)
            found[outlet.name] = outlet.counts if before is None else before + outlet.counts
        return found

    @property
    def delivered(self) -> int:
        """How many changes all destinations have taken."""
        return sum(outlet.counts.delivered for outlet in self._outlets.values())

    @property
    def retries(self) -> int:
        """How many calls were made after the first."""
        return sum(outlet.counts.retries for outlet in self._outlets.values())

    @property
    def in_flight(self) -> int:
        """How many changes are handed over and not taken."""
        return self._flow.changes

    @property
    def in_flight_bytes(self) -> int:
        """How large the records of the changes in flight are."""
        return self._flow.size_bytes

    def adopt(self, other: Delivery) -> None:
        """Count on for the destinations of a delivery whose place this one takes."""
        for destination, outlet in self._outlets.items():
            before = other._outlets.get(destination)
            if before is not None:
                outlet.adopt(before)

    @property
    def held(self) -> Held | None:
        """The call that lasts longest, if there is one."""
        held = [outlet.held for outlet in self._outlets.values()]
        return min((one for one in held if one is not None), key=_since, default=None)

    def stalled(self, now: float) -> tuple[float, str]:
        """Say how long a destination has been at the change that it has held longest, and why.

        Retries and their pauses count from the first attempt on; see `Outlet.stalled`.

        Args:
            now: monotonic seconds.

        Returns:
            Seconds, and a sentence without a row's value; 0 and nothing when none is at anything.
        """
        return max((outlet.stalled(now) for outlet in self._outlets.values()), default=(0.0, ""))

    @property
    def calls_ended(self) -> int:
        """How many calls have ended, of all destinations."""
        return sum(outlet.calls_ended for outlet in self._outlets.values())

    @property
    def waits_for_batch(self) -> bool:
        """Whether changes wait for a batch to be full, as their handler wishes."""
        return any(outlet.waits_for_batch for outlet in self._outlets.values())

    def destinations(self) -> tuple[DestinationVitals, ...]:
        """Say how each destination is; those of one name together."""
        by_name: dict[str, list[Outlet]] = {}
        for outlet in self._outlets.values():
            by_name.setdefault(outlet.name, []).append(outlet)
        now, counts = time.monotonic(), self.counts
        return tuple(_vitals(name, ways, counts[name], now) for name, ways in by_name.items())

    @property
    def is_stuck(self) -> bool:
        """Whether a call lasts longer than ``stuck_after_seconds``."""
        return bool(self._told_stuck)

    @property
    def is_busy(self) -> bool:
        """Whether a ``def`` handler still runs."""
        return any(outlet.is_busy for outlet in self._outlets.values())

    def attach(self, acknowledger: Acknowledger) -> None:
        """Begin a session: take changes from its acknowledger from now on.

        One delivery serves all sessions of a process: a ``def`` handler that the last session gave
        up waiting for must return before it is called again. What else the last session left is
        forgotten; it comes again.
        """
        self._flow.attach(acknowledger)
        for outlet in self._outlets.values():
            outlet.attach()

    def hand(self, handed: Sequence[Handed]) -> None:
        """Let changes wait for their destinations, in commit order; after each batch, also empty.

        Transactions are complete when their tickets are closed.
        """
        if self._only is not None:
            if handed or self._collecting:
                self._only.add(handed)
            return
        by_outlet: dict[Outlet, list[Handed]] = {outlet: [] for outlet in self._collecting}
        for entry in handed:
            outlet = self._outlets[entry[0].destination]
            by_outlet.setdefault(outlet, []).append(entry)
        for outlet, its_own in by_outlet.items():
            outlet.add(its_own)

    @property
    def is_full(self) -> bool:
        """Whether so much is in flight that nothing more should be handed over."""
        return self._flow.is_full

    def wait_for_change(self) -> Coroutine[Any, Any, object]:
        """Wait until less is in flight than at this call, or nothing more is begun."""
        self._wake()  # a batch that lingers waits for what will not come
        return self._flow.wait_for_change()

    def begin_no_more(self) -> None:
        """Begin no transaction any more; those that are begun are finished."""
        self._flow.begin_no_more(Halt.FINISH_BEGUN)
        self._wake()

    @property
    def wants_more(self) -> bool:
        """Whether any destination would still begin something."""
        return any(outlet.wants_more for outlet in self._outlets.values())

    def finish(self, *, calls_only: bool = False) -> None:
        """Nothing more will be handed over: let `run` return when all is done.

        Args:
            calls_only: only calls in hand are finished; all else comes again.
        """
        if calls_only:
            self._flow.begin_no_more(Halt.FINISH_CALLS)
        self._flow.is_closed = True
        self._wake()

    async def run(self) -> None:
        """Deliver one session's changes, until `finish` was called and all is delivered.

        When one destination fails for good, the others finish what they have begun.

        Raises:
            DeliveryError: a change was not taken, and its route's policy is to stop.
        """
        await run_together(
            [outlet.run() for outlet in self._outlets.values()],
            on_failure=self._finish_begun,
            drain_seconds=self._limits.drain_seconds,
        )

    def watch(self, now: float) -> None:
        """Log calls that last too long, once each, and when they are over.

        Args:
            now: monotonic seconds.
        """
        for outlet in self._outlets.values():
            held = outlet.held
            if held is not None and now - held.since > self._limits.stuck_after_seconds:
                if self._told_stuck.get(outlet) != held.since:
                    self._told_stuck[outlet] = held.since
                    self._tell_stuck(held, now)
            elif self._told_stuck.pop(outlet, None) is not None:
                log.info("handler_moves_again", destination=outlet.name)

    def _tell_stuck(self, held: Held, now: float) -> None:
        log.error(
            "handler_stuck",
            destination=held.destination,
            change=held.change_id,
            key=held.key,
            seconds=round(now - held.since, 1),
            frames=held.slot.frames(),
        )

    def close(self) -> None:
        """Let threads end after the functions that run in them; begin no further one.

        This call does not wait for those functions. The interpreter does, before it exits.
        """
        for outlet in self._outlets.values():
            outlet.caller.close()

    def describe(self, error: BaseException) -> str:
        """Name an error without its text, which may hold a row's values, unless asked for.

        Errors of walstream's own never hold any.
        """
        if isinstance(error, WalstreamError):
            return f"{type(error).__name__}: {error.message}"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
        place = "".join(f" at {one.filename}:{one.lineno}" for one in (own or frames)[-1:])
        text = f": {error}" if self._show_error_messages else ""
        return f"{type(error).__name__}{place}{text}"

    def _finish_begun(self) -> None:
        self.begin_no_more()
        self.finish()

    def _wake(self) -> None:
        for outlet in self._outlets.values():
            outlet.wake()


_LIBRARIES: Final = tuple(
    {str(Path(__file__).parent), "<frozen "}
    | {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
)
"""Where errors are raised that a handler's own line leads to: that line is told."""


def _vitals(
    name: str, ways: Sequence[Outlet], counts: OutletCounts, now: float
) -> DestinationVitals:
    return DestinationVitals(
        name,
        **msgspec.structs.asdict(counts),
        waiting=sum(outlet.waiting for outlet in ways),
        held_seconds=max(outlet.stalled(now)[0] for outlet in ways),
        calls=CallClock.together(outlet.clock for outlet in ways),
    )


def _since(held: Held) -> float:
    return held.since
