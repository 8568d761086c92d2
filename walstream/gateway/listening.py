"""From ``[http] listen`` to sockets that listen, and room for the connections they bring."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import resource
import socket
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from walstream.errors import ConfigError, SetupError

BACKLOG: Final = 4096
"""So many clients may connect at once and wait; the system's somaxconn may be less."""

OTHER_FILES: Final = 256
"""Descriptors that are left for all else: connections to Postgres, sinks, stores, handlers."""

_LAST_PORT: Final = 65535
_UNSENT_BYTES: Final = 1 << 17
_MUTE_SECONDS: Final = 60

_CONNECTION_OPTIONS: Final = (
    # Events are small and must not wait for more.
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    # Clients that have vanished are noticed, also by a stream on which nothing happens ...
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    # ... and so are those that do not take what was sent, whether they are there or not.
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _MUTE_SECONDS * 1000),
    # What a slow client has not fetched waits here, where it is counted, and not in the system,
    # which would take megabytes for each.
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", _UNSENT_BYTES),
)
"""Set where we listen: connections inherit them."""

_HINTS: Final = {
    errno.EADDRINUSE: "give each process a port of its own; `ss -ltnp` shows who listens there",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one",
    errno.EADDRNOTAVAIL: "the host must be an address of this machine: 127.0.0.1 for this machine"
    " only, 0.0.0.0 for all its addresses",
}


class Address(NamedTuple):
    """Where to listen; the host is a name or an address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Print as it is written in URLs."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect; the host must be an address."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback


def parse_listen(listen: str) -> Address:
    """Read ``host:port`` or ``[address]:port``.

    Raises:
        ConfigError: it is neither, or there is no such port.
    """
    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= _LAST_PORT):
        raise ConfigError(
            [f"http.listen: found {listen!r}; allowed: an address and a port up to {_LAST_PORT}"],
            hint='write listen = "127.0.0.1:8432"',
        )
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


async def listen_at(address: Address) -> list[socket.socket]:
    """Listen at all addresses that the host has; port 0 becomes the same free port for all.

    Raises:
        ConfigError: the host has no address.
        SetupError: one of them cannot be had.
    """
    sockets: list[socket.socket] = []
    try:
        for family, host in await _resolve(address):
            port = address_of(sockets[0]).port if sockets else address.port
            sockets.append(_listen(family, Address(host, port)))
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def allow_connections(wanted: int) -> int:
    """Raise the process's soft limit of open files as far as needed, and return what can be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):  # a system may have a lower one of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return max(1, min(wanted, soft - OTHER_FILES))


def address_of(listening: socket.socket) -> Address:
    """Return where a socket listens."""
    host, port, *_ = listening.getsockname()
    return Address(host, port)


async def _resolve(address: Address) -> Sequence[tuple[int, str]]:
    loop = asyncio.get_running_loop()
    try:
        found: list[Any] = await loop.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise ConfigError(
            [f"http.listen: the host {address.host} cannot be resolved"],
            hint="write an address: 127.0.0.1 for this machine only, 0.0.0.0 for all its addresses",
        ) from None
    return list(dict.fromkeys((family, where[0]) for family, _, _, _, where in found))


def _listen(family: int, address: Address) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # What an earlier process has left in TIME_WAIT is no reason to refuse.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `localhost` has two addresses, each gets its socket; [::] alone stands for all.
            only = address.host != "::"
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        for level, name, value in _CONNECTION_OPTIONS:
            if hasattr(socket, name):  # not every system has all
                listening.setsockopt(level, getattr(socket, name), value)
        listening.settimeout(0)
        listening.bind((address.host, address.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"http.listen: cannot listen at {address}: {reason}"
        raise SetupError(message, hint=_HINTS.get(error.errno or 0, "")) from None
    return listening
