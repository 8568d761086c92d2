"""What clients were refused, counted by why: an operator does not see what an application shows.

The reasons are known beforehand, and none comes from a client. All of them are there from the
beginning, with 0: so the first refusal of its kind is seen as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from walstream.access.refusals import Cause


class Reason(StrEnum):
    """Why something was refused, or ended, where neither a token nor a join has a word for it."""

    VERSION = "connection_version"
    """A connection, for a version of the protocol that there is not."""

    BINDING = "binding"
    """Changes of a table, for a channel that was joined nevertheless."""

    BROADCAST = "broadcast"
    PRESENCE = "presence"
    """To be seen; or the channel, which was closed for changing that too often."""

    EXPIRED = "expired"
    """A channel, closed at the end of its token."""

    MESSAGES = "messages"
    """A socket, closed for sending too much."""

    SLOW = "slow"
    """A socket, closed for not fetching what was sent."""

    HTTP = "http"
    """A request to broadcast by HTTP."""

    OTHER = "other"


JOIN_CODES: Final = (
    "ChannelRateLimitReached",
    "ClientJoinRateLimitReached",
    "InvalidJWTToken",
    "InvalidJoinPayload",
    "JwtSignatureError",
    "MalformedJWT",
    "PostgresChangesSubscribeTimeout",
    "PrivateOnly",
    "TopicNameRequired",
    "Unauthorized",
    "UnknownErrorOnChannel",
)
"""What the texts begin with by which a channel is refused, or closed for another token."""


def of_connection(cause: Cause) -> str:
    """Name the reason for which a connection is refused."""
    return f"connection_{cause}"


def of_join(text: str) -> str:
    """Name the reason for which a channel is refused, by the text that tells the client."""
    code = text.partition(":")[0]
    return code if code in JOIN_CODES else Reason.OTHER


REASONS: Final = (*map(of_connection, Cause), *JOIN_CODES, *map(str, Reason))
"""All there are."""


class Tally:
    """Counts refusals."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(REASONS, 0)

    def add(self, reason: str) -> None:
        """Count something that was refused."""
        self._counts[reason] += 1

    def take(self, reasons: list[str]) -> None:
        """Count these, and leave none of them."""
        for reason in reasons:
            self.add(reason)
        reasons.clear()

    @property
    def counts(self) -> Mapping[str, int]:
        """How often it was each reason."""
        return MappingProxyType(self._counts)
