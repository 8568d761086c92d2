"""How somebody who asks for changes is refused."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
UNAVAILABLE: Final = 503


class Cause(StrEnum):
    """Which kind of refusal it is, for protocols that have words of their own for it."""

    MISSING = "missing"
    """There is no token, and one is needed."""

    MALFORMED = "malformed"
    """It is no token, or none that is for here, or not yet."""

    SIGNATURE = "signature"
    """It is not signed as it has to be, or not by a key that is known here."""

    EXPIRED = "expired"
    INCOMPLETE = "incomplete"
    """It lacks its end, or its role."""

    FORBIDDEN = "forbidden"
    """It is known who asks, and they may not."""

    UNAVAILABLE = "unavailable"
    """It cannot be told now."""


class ReaderRefused(Exception):
    """Somebody is not let in, or not to that.

    ``status`` is the one of HTTP: 401 when it is not known who asks, 403 when it is and they may
    not, 503 when the keys that would tell cannot be had now. ``reason`` and ``hint`` are for who
    asks: they name claims, and hold no value of one, nothing of a token and nothing of a key.
    ``expired_seconds_ago`` is there when the cause is that, of a token whose signature is right.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        hint: str = "",
        cause: Cause | None = None,
        expired_seconds_ago: int | None = None,
    ) -> None:
        """Refuse; without a cause it is the one that the status tells."""
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.hint = hint
        self.cause = _CAUSES.get(status, Cause.FORBIDDEN) if cause is None else cause
        self.expired_seconds_ago = expired_seconds_ago


_CAUSES: Final = {
    UNAUTHORIZED: Cause.MALFORMED,
    FORBIDDEN: Cause.FORBIDDEN,
    UNAVAILABLE: Cause.UNAVAILABLE,
}


def unknown(reason: str, cause: Cause = Cause.MALFORMED, *, hint: str = "") -> ReaderRefused:
    """It is not known who asks."""
    return ReaderRefused(UNAUTHORIZED, reason, hint=hint, cause=cause)


def forbidden(reason: str, cause: Cause = Cause.FORBIDDEN, *, hint: str = "") -> ReaderRefused:
    """It is known who asks, and they may not."""
    return ReaderRefused(FORBIDDEN, reason, hint=hint, cause=cause)


def expired(seconds_ago: int) -> ReaderRefused:
    """The token has come to its end."""
    return ReaderRefused(
        UNAUTHORIZED,
        "the token has expired",
        cause=Cause.EXPIRED,
        expired_seconds_ago=seconds_ago,
    )
