"""Where a redirect may lead: what a receiver answers must not open other doors to it.

A request that is redirected comes from inside the operator's network. So it goes to no address that
is reachable from there only, unless that is allowed, and never from encrypted to plain.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Final, TypeAlias

import httpx
import msgspec

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

REDIRECTS: Final = (307, 308)
"""Those that keep the method and the body. The others make a GET of a POST."""

MAX_REDIRECTS: Final = 3

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
"""All that is given out of IPv6; nothing else of it is the Internet's, whatever it is called."""

_NOT_GLOBAL: Final = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("192.88.99.0/24"),  # relays of 6to4
    ipaddress.ip_network("2001::/23"),
    ipaddress.ip_network("3fff::/20"),
)
"""What IANA's registries say beyond what older versions of Python know."""


class RedirectRefused(Exception):
    """A redirect that is not followed; the text says why, and names no more than a host."""


class Target(msgspec.Struct, frozen=True):
    """What a request is sent to.

    ``address`` is where it goes, whatever the name means by the time it is sent; empty for what the
    name means. ``is_trusted``: it may have the headers that the operator has set.
    """

    url: httpx.URL
    address: str = ""
    is_trusted: bool = True

    def __repr__(self) -> str:
        """Print without what may be secret."""
        return f"Target({self.shown})"

    @property
    def shown(self) -> str:
        """Scheme, host and path: neither user nor query, which may be secrets."""
        path = self.url.raw_path.partition(b"?")[0].decode("ascii")
        return f"{origin(self.url)}{path}"


async def follow(target: Target, location: str, *, allow_private: bool) -> Target:
    """Return where a redirect leads.

    Args:
        target: what has answered.
        location: what it has answered.
        allow_private: whether any address will do.

    Raises:
        RedirectRefused: it does not lead to where it may.
    """
    url = _url(target.url, location)
    is_trusted = target.is_trusted and _is_same_place(target.url, url)
    address = "" if allow_private else await _public_address(url)
    return Target(url, address, is_trusted)


def origin(url: httpx.URL) -> str:
    """Return scheme, host and port."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def is_public(address: Address) -> bool:
    """Whether an address is one of the Internet's, also behind what translates it to IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    if any(address in network for network in _NOT_GLOBAL):
        return False
    return address.is_global and not address.is_multicast


def _url(base: httpx.URL, location: str) -> httpx.URL:
    if not location:
        raise RedirectRefused("a redirect without a location")
    try:
        url = base.join(location).copy_with(username=None, password=None, fragment=None)
    except (httpx.InvalidURL, ValueError):
        raise RedirectRefused("a redirect to what is no URL") from None
    if url.scheme not in _DEFAULT_PORTS or not url.host:
        raise RedirectRefused("a redirect to something else than HTTP")
    if base.scheme == "https" and url.scheme == "http":
        raise RedirectRefused(f"a redirect from https to {origin(url)}")
    return url


def _is_same_place(one: httpx.URL, other: httpx.URL) -> bool:
    """Whether it is the same host and port; from http to https on their usual ports is the same."""
    if one.host != other.host:
        return False
    ports = [url.port or _DEFAULT_PORTS[url.scheme] for url in (one, other)]
    return ports[0] == ports[1] or ports == [80, 443]


async def _public_address(url: httpx.URL) -> str:
    """Return an address of the host.

    Raises:
        RedirectRefused: not all of them are public, or there is none.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            url.host, url.port or _DEFAULT_PORTS[url.scheme], type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise RedirectRefused(f"a redirect to {origin(url)}, which has no address") from None
    addresses = [str(place[0]) for _, _, _, _, place in found]
    if not all(is_public(ipaddress.ip_address(one)) for one in addresses):
        raise RedirectRefused(f"a redirect to {origin(url)}, which has a private address")
    return addresses[0]
