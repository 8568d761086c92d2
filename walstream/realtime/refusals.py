"""What clients are told when they cannot have what they ask for, in the original's words.

Applications and their tests compare these texts: they are a part of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, assert_never

from walstream.access.refusals import Cause, ReaderRefused
from walstream.realtime.terms import term

# Tokens

_NOT_VALID: Final = "The token provided is not a valid JWT"
_NOT_SIGNED: Final = "Failed to validate JWT signature"
_NOT_COMPLETE: Final = "Fields `role` and `exp` are required in JWT"

_AT_CONNECT: Final = {
    Cause.MISSING: "API key is missing",
    Cause.EXPIRED: "Token has expired",
    Cause.INCOMPLETE: _NOT_COMPLETE,
    Cause.MALFORMED: _NOT_VALID,
    Cause.SIGNATURE: _NOT_SIGNED,
}


def connect_refusal(error: ReaderRefused) -> tuple[int, str]:
    """Return the status and the text with which a connection is refused."""
    if error.cause in _AT_CONNECT:
        return 401, _AT_CONNECT[error.cause]
    if error.cause is Cause.UNAVAILABLE:
        return error.status, "Error connecting to Realtime"
    return error.status, error.reason


def join_refusal(error: ReaderRefused) -> str:
    """Return the text, behind a code and a colon, with which a channel is refused."""
    match error.cause:
        case Cause.EXPIRED:
            return f"InvalidJWTToken: {expired(error.expired_seconds_ago or 0)}"
        case Cause.INCOMPLETE:
            return f"InvalidJWTToken: {_NOT_COMPLETE}"
        case Cause.MISSING | Cause.MALFORMED:
            return f"MalformedJWT: {_NOT_VALID}"
        case Cause.SIGNATURE:
            return f"JwtSignatureError: {_NOT_SIGNED}"
        case Cause.FORBIDDEN:
            return f"Unauthorized: {error.reason}"
        case Cause.UNAVAILABLE:
            return f"UnknownErrorOnChannel: {error.reason}"
        case _:
            assert_never(error.cause)


def expired(seconds_ago: int) -> str:
    """Tell that a token has come to its end."""
    return f"Token has expired {seconds_ago} seconds ago"


# Channels

PRIVATE_ONLY: Final = "PrivateOnly: This project only allows private channels"


def not_readable(name: str) -> str:
    """Tell that somebody may not be in a channel."""
    return f"Unauthorized: You do not have permissions to read from this Channel topic: {name}"


PAYLOAD_TOO_LARGE: Final = "payload_size_exceeded"


def not_writable(name: str) -> str:
    """Tell that somebody may say nothing in a channel, and not be present there."""
    return f"Unauthorized: You do not have permissions to write to this Channel topic: {name}"


def not_begun(seconds: float) -> str:
    """Tell that no changes have come for as long as a join waits for that."""
    return (
        f"PostgresChangesSubscribeTimeout: Timed out after {seconds * 1000:.0f}ms"
        " waiting for the postgres_changes subscription"
    )


NOT_NOW: Final = "UnknownErrorOnChannel: the database cannot be asked at this moment"
"""What is tried again by the clients: a channel without its changes would never get them."""


# Bindings

NOT_IN_SEVERAL: Final = (
    "Column selection is not supported for wildcard subscriptions."
    " Provide an explicit schema and table name."
)

RAISED: Final = "P0001"
"""The SQLSTATE of what the original's own functions refuse."""

BAD_ESCAPE: Final = "22025"

_SQLSTATES: Final = {
    RAISED: "raise_exception",
    "2201B": "invalid_regular_expression",
    "22003": "numeric_value_out_of_range",
    "22007": "invalid_datetime_format",
    "22008": "datetime_field_overflow",
    "22009": "invalid_time_zone_displacement_value",
    "22023": "invalid_parameter_value",
    BAD_ESCAPE: "invalid_escape_sequence",
    "22P02": "invalid_text_representation",
    "23502": "not_null_violation",
    "23514": "check_violation",
    "42883": "undefined_function",
}
"""PostgreSQL documentation, Appendix A. PostgreSQL Error Codes."""

_SECRETS: Final = ("user_token", "auth_token")


def unreadable(key: str, reason: str) -> str:
    """Tell that a key of a binding cannot be read."""
    return f"Error parsing `{key}` params: {reason}"


def not_given(raw: Mapping[str, Any]) -> str:
    """Tell that a binding names no table, or has a filter without schema and table."""
    shown = "<redacted>" if any(name in raw for name in _SECRETS) else term(raw)
    return (
        "No subscription params provided. Please provide at least a `schema` or `table` to"
        f" subscribe to: {shown}"
    )


def not_enabled(parameters: str) -> str:
    """Tell that a table is not there, or not for this reader: nothing says which."""
    return (
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled"
        f" for the given connect parameters: [{parameters}]"
    )


def failed(parameters: str, sqlstate: str, message: str) -> str:
    """Tell that the server refused a binding."""
    name = _SQLSTATES.get(sqlstate, "error")
    return (
        "Unable to subscribe to changes with given parameters. An exception happened so please"
        f" check your connect parameters: [{parameters}]."
        f" Exception: ERROR {sqlstate} ({name}) {message}"
    )
