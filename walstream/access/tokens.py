"""Tokens: JSON Web Tokens (RFC 7519), verified by PyJWT.

What a token says about itself counts only as far as it is expected: its algorithm has to be one
that the configuration allows and that its key is for, it has to end, and what is marked as critical
is refused. A refusal says nothing about the claims before the signature is verified.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from walstream.access.keys import Key, Keys, pyjwt, wrong_algorithm
from walstream.access.refusals import Cause, ReaderRefused, expired, unknown
from walstream.config.access import AccessConfig

LATEST: Final = 253_402_300_799
"""The end of the year 9999. What ends later ends then: timers and dates know no later time."""

_MALFORMED: Final = "this is no token"


class Verified(msgspec.Struct, frozen=True, eq=False):
    """What a token says, and when it ends, in seconds since 1970."""

    claims: Mapping[str, Any]
    expires_at: float

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return "Verified()"


class Verifier:
    """Verifies tokens."""

    def __init__(self, config: AccessConfig, keys: Keys) -> None:
        self._config = config
        self._keys = keys
        self._allowed = frozenset(config.allowed_algorithms)

    async def verify(self, token: str) -> Verified:
        """Return what a token says.

        Raises:
            ReaderRefused: 401, it is not to be believed; 503, its key cannot be had now.
        """
        if len(token) > self._config.max_token_bytes:
            raise unknown(f"the token is longer than {self._config.max_token_bytes} bytes")
        header = _header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or not isinstance(kid, str | None) or "crit" in header:
            raise unknown(_MALFORMED)
        if algorithm not in self._allowed:
            raise wrong_algorithm()
        key = await self._keys.key(algorithm, kid)
        claims = self._claims(token, key)
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise unknown(f"the token's {name} is no number of seconds")
        ends = float(min(claims["exp"], LATEST))
        return Verified(claims, ends + self._config.leeway_seconds)

    def _claims(self, token: str, key: Key) -> Mapping[str, Any]:
        """Verify the signature, then what the claims say about the token."""
        jwt = pyjwt()
        config = self._config
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.value,
                algorithms=sorted(key.algorithms & self._allowed),
                audience=config.audience,
                issuer=config.issuer,
                leeway=config.leeway_seconds,
                options={
                    "require": ["exp"],
                    "verify_aud": config.audience is not None,
                    "verify_sub": False,  # a number is as good, where it is compared with one
                    "verify_jti": False,
                    "enforce_minimum_key_length": True,
                },
            )
        except jwt.ExpiredSignatureError:
            raise expired(_seconds_since_end(token)) from None
        except jwt.PyJWTError as error:
            raise _refusal(error) from None
        return claims


def _seconds_since_end(token: str) -> int:
    """Return how long ago a token ended whose signature was found to be right."""
    claims = pyjwt().decode(token, options={"verify_signature": False})
    return max(0, int(time.time() - float(claims["exp"])))


def _refusal(error: Exception) -> ReaderRefused:
    """Say what is wrong with a token; the error's own text may hold a part of it."""
    reasons = {
        "ImmatureSignatureError": "the token is not valid yet",
        "InvalidAudienceError": "the token is for another audience",
        "InvalidIssuerError": "the token is from another issuer",
    }
    missing = getattr(error, "claim", None)  # of a MissingRequiredClaimError: exp, aud or iss
    if missing is not None:
        cause = Cause.INCOMPLETE if missing == "exp" else Cause.MALFORMED
        return unknown(f"the token has no {missing}", cause)
    name = type(error).__name__
    if name == "InvalidAlgorithmError":
        return wrong_algorithm()
    if name == "InvalidSignatureError":
        return unknown("the token's signature is wrong", Cause.SIGNATURE)
    return unknown(reasons.get(name, _MALFORMED))


def _header(token: str) -> Mapping[str, Any]:
    """Read the header; a name that comes twice is refused, for another reader may take the other.

    Raises:
        ReaderRefused: there is none.
    """
    segments = token.split(".")
    if not token.isascii() or len(segments) != 3:  # noqa: PLR2004 - header, claims, signature
        raise unknown(_MALFORMED)
    try:
        text = base64.b64decode(_padded(segments[0]), altchars=b"-_", validate=True)
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise unknown(_MALFORMED) from None
    if not isinstance(header, dict):
        raise unknown(_MALFORMED)
    return header


def _padded(segment: str) -> str:
    return segment + "=" * (-len(segment) % 4)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _is_time(value: object) -> bool:
    if isinstance(value, bool):  # which is an int, too
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
