"""What a client asks for when it joins a channel.

Nothing in it is an error: what cannot be read has its default, as with the original, which clients
of every age and language rely on.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import unquote

import msgspec

DEFAULT_WAIT_SECONDS: Final = 15.0
MAX_WAIT_SECONDS: Final = 20.0

_OF_BINDINGS: Final = ("since", "leaving")
"""What a join may ask for all its bindings: not every client passes on keys of a binding that it
does not know, but each does so with those of a join."""

_OPAQUE: Final = "sb_"
_MAX_TOKEN_CHARACTERS: Final = 16 << 10
_SPACE: Final = re.compile(r"\s+")


class Join(msgspec.Struct, frozen=True):
    """One join, as far as it can be read.

    ``bindings`` are the client's own words, to be echoed as they are, but for what the join asks
    for all of them. ``presence_key`` is empty where the server has to choose one. ``token`` None
    stands for the token of the connection. ``wait`` asks for the reply not before the bindings are
    live, or `wait_seconds` have passed.
    """

    bindings: tuple[dict[str, Any], ...] = ()
    broadcast_self: bool = False
    broadcast_ack: bool = False
    presence_key: str = ""
    presence_enabled: bool = True
    is_private: bool = False
    token: str | None = None
    wait: bool = False
    wait_seconds: float = DEFAULT_WAIT_SECONDS
    wants_replication_ready: bool = False


def read_join(payload: Any) -> Join:
    """Read the payload of a ``phx_join``."""
    asked = _mapping(payload)
    config = _mapping(asked.get("config"))
    broadcast = _mapping(config.get("broadcast"))
    presence = _mapping(config.get("presence"))
    options = _mapping(config.get("postgres_changes_options"))
    return Join(
        bindings=_bindings(config.get("postgres_changes"), asked),
        broadcast_self=truth(broadcast.get("self")),
        broadcast_ack=truth(broadcast.get("ack")),
        presence_key=_key(presence.get("key")),
        # Clients from before this key never see anybody unless they get the state.
        presence_enabled=truth(presence.get("enabled"), default=True),
        is_private=truth(config.get("private")),
        token=_token(asked),
        wait=truth(options.get("wait")),
        wait_seconds=_wait_seconds(options.get("timeout")),
        wants_replication_ready=truth(broadcast.get("replication_ready")),
    )


def read_token(value: Any) -> str | None:
    """Clean the token of a join or a refresh; None where the one at hand stays in use.

    Keys that begin with ``sb_`` are of the connection: libraries send them where a user's token is
    expected.
    """
    if not isinstance(value, str) or value.startswith(_OPAQUE):
        return None
    if len(value) > _MAX_TOKEN_CHARACTERS:
        return value  # whatever it is, no token
    return _SPACE.sub("", unquote(value)) or None


def truth(value: Any, *, default: bool = False) -> bool:
    """Read a flag, which may be text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return default


def _token(asked: dict[str, Any]) -> str | None:
    first = asked.get("access_token") or asked.get("user_token")
    if isinstance(first, str) and first.startswith(_OPAQUE):
        return None
    legacy = asked.get("user_token")
    return read_token(legacy if isinstance(legacy, str) else asked.get("access_token"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _bindings(value: Any, asked: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the bindings; what is asked of the join itself holds for those that do not say it."""
    if not isinstance(value, list):
        return ()
    common = {name: asked[name] for name in _OF_BINDINGS if name in asked}
    return tuple({**common, **one} for one in value if isinstance(one, dict))


def _key(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):  # a boolean too
        return msgspec.json.encode(value).decode()
    return ""


def _wait_seconds(milliseconds: Any) -> float:
    if isinstance(milliseconds, str) and milliseconds.isdecimal() and milliseconds.isascii():
        milliseconds = int(milliseconds[:9])
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int) or milliseconds <= 0:
        return DEFAULT_WAIT_SECONDS
    return min(milliseconds, MAX_WAIT_SECONDS * 1000) / 1000
