"""Tells systemd how the process is, by the protocol of sd_notify(3).

Nothing here can harm the process: without ``NOTIFY_SOCKET`` nothing is sent, and a socket that does
not take a message is logged once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

import structlog

from walstream.vitals import Phase, Vitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.systemd")

LOOK_SECONDS: Final = 1.0
"""How often it is looked whether there is something new to tell."""

LOOK_SECONDS_BEFORE_READY: Final = 0.2

START_SECONDS: Final = 30.0
"""How much more time is asked for, again and again, while the first stream has not begun."""


class Notifier:
    """The socket that the manager listens at, and what it has been told."""

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        """Take the socket's path, ``@name`` for an abstract one, or None: then nothing is sent."""
        self._address = address
        self._socket: socket.socket | None = None
        self._is_ready = False
        self._is_reloading = False
        self._untold = ""
        self._failed = False
        self.watchdog_seconds = watchdog_seconds
        """Without a sign of life for so long the manager kills the process; None for never."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``."""
        return cls(environment.get("NOTIFY_SOCKET") or None, _watchdog_seconds(environment))

    @property
    def is_listened_to(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    @property
    def is_ready(self) -> bool:
        """Whether the manager has been told that the start is over."""
        return self._is_ready

    def ready(self) -> None:
        """Tell that the start is over; only the first time."""
        if not self._is_ready:
            self._is_ready = True
            self._tell("READY=1")

    def starting(self, more_seconds: float) -> None:
        """Ask for more time than ``TimeoutStartSec``; to be repeated within it."""
        if not self._is_ready:
            self._send(f"EXTEND_TIMEOUT_USEC={_microseconds(more_seconds)}")

    def status(self, text: str) -> None:
        """Tell what ``systemctl status`` shows, in one line."""
        self._send(f"STATUS={' '.join(text.split())}")

    def reloading(self) -> None:
        """Tell that the configuration is read again; `reloaded` ends it.

        Before the start is over the manager does not expect it, and is not told.
        """
        if self._is_ready and not self._is_reloading:
            self._is_reloading = True
            # The manager compares it with the time of its own signal (Type=notify-reload).
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._tell(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def reloaded(self) -> None:
        """Tell that the configuration has been read, or refused: the process goes on."""
        if self._is_reloading:
            self._is_reloading = False
            self._tell("READY=1")

    def stopping(self, within_seconds: float | None = None) -> None:
        """Tell that it ends, and for how long that may take if ``TimeoutStopSec`` is shorter."""
        self._is_reloading = False  # whoever still reads a configuration has nothing more to tell
        more = ""
        if within_seconds is not None:
            more = f"\nEXTEND_TIMEOUT_USEC={_microseconds(within_seconds)}"
        self._tell(f"STOPPING=1{more}")

    def watchdog(self) -> None:
        """Give a sign of life."""
        if self.watchdog_seconds is not None:
            self._send("WATCHDOG=1")

    def retry(self) -> None:
        """Tell again what the manager waits for, if it could not take it."""
        if self._untold:
            self._send("")

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, state: str) -> None:
        """Tell what the manager waits for; if it cannot take it now, before anything else."""
        self._untold = state
        self._send("")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        try:
            if self._socket is None:
                self._socket = _connect(self._address)
            if self._untold:
                self._socket.send(self._untold.encode())
                self._untold = ""
            if text:
                self._socket.send(text.encode())
        except OSError as error:
            self.close()
            if not self._failed:
                self._failed = True
                log.warning("notify_failed", error=error.strerror or str(error))


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """Return how long the watchdog waits, when it waits for this very process."""
    usec = environment.get("WATCHDOG_USEC", "")
    pid = environment.get("WATCHDOG_PID") or str(os.getpid())
    if not (usec.isascii() and usec.isdigit() and int(usec)) or pid != str(os.getpid()):
        return None
    return int(usec) / 1e6


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _connect(address: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        connected.settimeout(0)
        connected.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError:
        connected.close()
        raise
    return connected


async def keep_telling(notifier: Notifier, vitals: Callable[[], Vitals]) -> None:
    """Tell how the process is until cancelled; returns at once when nobody listens.

    READY=1 when it streams for the first time, and requests for more time until then: a server that
    is down, or a slot that another process streams from, is no reason to kill who waits for it.
    WATCHDOG=1 at half of the time only while ``is_alive``. STATUS when it changes.
    """
    if not notifier.is_listened_to:
        return
    told = _Told(notifier)
    while True:
        told.look(vitals(), time.monotonic())
        await asyncio.sleep(told.pause_seconds)


class _Told:
    """What was told last, and when."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._status = ""
        self._watchdog_at = -float("inf")
        self._starting_at = -float("inf")

    @property
    def pause_seconds(self) -> float:
        """How long until the next look: often enough for the watchdog."""
        seconds = LOOK_SECONDS if self._notifier.is_ready else LOOK_SECONDS_BEFORE_READY
        return min(seconds, (self._notifier.watchdog_seconds or seconds * 4) / 4)

    def look(self, vitals: Vitals, now: float) -> None:
        """Tell what is new."""
        self._notifier.retry()
        status = describe(vitals)
        if status != self._status:
            self._status = status
            self._notifier.status(status)
        if vitals.phase is Phase.STREAMING:
            self._notifier.ready()
        elif not self._notifier.is_ready and now - self._starting_at >= START_SECONDS / 3:
            self._starting_at = now
            self._notifier.starting(START_SECONDS)
        if vitals.is_alive and self._watchdog_is_due(now):
            self._watchdog_at = now
            self._notifier.watchdog()

    def _watchdog_is_due(self, now: float) -> bool:
        # The looks come at quarters of the time: what is nearly due would else come late.
        seconds = self._notifier.watchdog_seconds
        return seconds is not None and now - self._watchdog_at >= seconds * 0.4


_PHASES: Final = {
    Phase.CONNECTING: "connecting, for {slot}",
    Phase.STANDING_BY: "standing by: another process streams from {slot}",
    Phase.STREAMING: "streaming from {slot}",
    Phase.WAITING: "waiting to connect again, for {slot}",
    Phase.STOPPING: "stopping, streaming from {slot}",
    Phase.STOPPED: "stopped, was streaming from {slot}",
}


def describe(vitals: Vitals) -> str:
    """Say in one line how the process is."""
    doing = _PHASES[vitals.phase].format(slot=vitals.slot_name)
    if vitals.phase is Phase.STREAMING:
        if vitals.stalled_because and not vitals.is_ready:
            doing += f", stalled for {vitals.stalled_seconds:.0f} s: {vitals.stalled_because}"
        doing += f", {vitals.lag_seconds:.1f} s and {_size(vitals.lag_bytes)} behind"
    elif vitals.reason:
        doing += f": {vitals.reason}"
    return f"{doing}, {vitals.changes_received:,} changes"


_UNITS: Final = ("bytes", "kB", "MB", "GB")
_STEP: Final = 1024


def _size(size_bytes: int) -> str:
    """Print a size as Postgres' pg_size_pretty does, more or less."""
    size = float(size_bytes)
    for unit in _UNITS:
        if size < 10 * _STEP:
            return f"{size:.0f} {unit}"
        size /= _STEP
    return f"{size:.0f} TB"
