"""Which hosts a request may ask for: the guard against names that are made to point here.

A page anywhere can have its name resolved to an address of this machine and then read what is
answered there, as if it were of its own origin (DNS rebinding). Its requests ask for its own name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from walstream.gateway.listening import parse_listen

_HOST: Final = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(:\d{1,5})?", re.ASCII)


class Hosts:
    """The hosts of one server."""

    def __init__(self, listen: str | None, hosts: Sequence[str]) -> None:
        """Take what is configured.

        Args:
            listen: address:port; all addresses of the machine allow any host, unless there are
                ``hosts``. None allows any likewise.
            hosts: further names, without port; ``*`` allows any.
        """
        own = "" if listen is None else _plain(parse_listen(listen).host)
        address = _address(own)
        is_everywhere = not own or (address is not None and address.is_unspecified)
        self._is_loopback = own == "localhost" or (address is not None and address.is_loopback)
        self._is_name = address is None and not self._is_loopback
        self._names: Final = {_plain(one) for one in hosts} | ({own} - {""})
        self.allows_any: Final = "*" in hosts or (is_everywhere and not hosts)

    def allows(self, header: str) -> bool:
        """Whether a request with this header ``Host`` is for this server."""
        matched = _HOST.fullmatch(header.strip().lower())
        if matched is None:
            return False
        name = _plain(matched["name"])
        return self.allows_any or name in self._names or self._is_own_address(name)

    def _is_own_address(self, name: str) -> bool:
        address = _address(name)
        if self._is_loopback:
            return name == "localhost" or (address is not None and address.is_loopback)
        # Which addresses our name has is not asked; an address is no name that could be rebound.
        return self._is_name and address is not None


def _plain(name: str) -> str:
    return name.lower().strip("[]").rstrip(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
