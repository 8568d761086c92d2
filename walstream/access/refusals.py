"""How somebody who asks for changes is refused."""

from __future__ import annotations

from typing import Final

UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
UNAVAILABLE: Final = 503


class ReaderRefused(Exception):
    """Somebody is not let in, or not to that.

    ``status`` is the one of HTTP: 401 when it is not known who asks, 403 when it is and they may
    not, 503 when the keys that would tell cannot be had now. ``reason`` and ``hint`` are for who
    asks: they name claims, and hold no value of one, nothing of a token and nothing of a key.
    """

    def __init__(self, status: int, reason: str, *, hint: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.hint = hint


def unknown(reason: str, *, hint: str = "") -> ReaderRefused:
    """It is not known who asks."""
    return ReaderRefused(UNAUTHORIZED, reason, hint=hint)


def forbidden(reason: str, *, hint: str = "") -> ReaderRefused:
    """It is known who asks, and they may not."""
    return ReaderRefused(FORBIDDEN, reason, hint=hint)
