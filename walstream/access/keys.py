"""The keys that tokens are verified with.

A key knows the algorithms that it may be used with, and is used with no other: a public key never
becomes the secret of an HMAC, whatever a token says about itself. Keys that a token brings along
are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec

from walstream.access.refusals import Cause, ReaderRefused, unknown
from walstream.config.access import SECRET_BYTES
from walstream.errors import SetupError

SMALLEST_RSA_BITS: Final = 2048
"""RFC 7518, 3.3."""

_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_EDDSA: Final = frozenset({"EdDSA"})


class Key(msgspec.Struct, frozen=True, eq=False):
    """A key, by its name in a set of keys if it has one, and what it may be used with."""

    value: Any
    algorithms: frozenset[str]
    kid: str | None = None

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"Key({', '.join(sorted(self.algorithms))})"

    def __rich_repr__(self) -> Iterator[str]:  # type: ignore[override]  # of a Struct it tells all
        """Print no more than `repr`."""
        yield from sorted(self.algorithms)


class Keys(Protocol):
    """Where keys come from."""

    async def key(self, algorithm: str, kid: str | None) -> Key:
        """Return the key for a token.

        Raises:
            ReaderRefused: there is none, or it cannot be had now.
        """
        ...

    async def close(self) -> None:
        """Stop asking for keys."""
        ...


class OneKey:
    """The only key there is: tokens need not name it."""

    def __init__(self, key: Key) -> None:
        self._key = key

    async def key(self, algorithm: str, kid: str | None) -> Key:  # noqa: ARG002 - it is the only one
        """Return it."""
        if algorithm not in self._key.algorithms:
            raise wrong_algorithm()
        return self._key

    async def close(self) -> None:
        """Do nothing."""


def wrong_algorithm() -> ReaderRefused:
    """The token is signed in a way that is not allowed here, if it is signed at all."""
    reason = "the token is signed by an algorithm that is not allowed here"
    return unknown(reason, Cause.SIGNATURE)


def secret_key(secret: bytes) -> Key:
    """Make the key of a shared secret.

    Raises:
        SetupError: PyJWT is not installed.
        ValueError: it is a public key, which anybody could sign with.
    """
    jwt = pyjwt()
    try:
        value = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).prepare_key(
            secret
        )
    except jwt.InvalidKeyError:
        raise ValueError(
            "found a public key or certificate; allowed: a shared secret; public keys go into a"
            " file that public_key_file or jwks_file names"
        ) from None
    long_enough = (name for name, size in SECRET_BYTES.items() if len(secret) >= size)
    return Key(value, frozenset(long_enough))


def public_key(pem: bytes) -> Key:
    """Read a public key in PEM.

    Raises:
        SetupError: PyJWT or cryptography is not installed.
        ValueError: it is something else.
    """
    pyjwt()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - needs the extra
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    if b"PRIVATE KEY" in pem:
        raise ValueError(
            "found a private key; allowed: its public one, as openssl pkey -in FILE -pubout prints"
        )
    try:
        value = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(
            "found no public key in PEM; allowed: a file that begins with"
            " -----BEGIN PUBLIC KEY-----"
        ) from None
    return Key(value, _algorithms(value))


def key_set(text: bytes) -> tuple[list[Key], int]:
    """Read a JWK Set (RFC 7517, 5).

    Keys of kinds that are not known, for other uses, too short, or secret are left out, as the
    standard says.

    Returns:
        The keys, and how many were left out.

    Raises:
        ValueError: it is something else.
    """
    try:
        listed = msgspec.json.decode(text, type=_KeySet).keys
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("it is no JWK Set") from None
    keys = [key for one in listed if (key := _from_jwk(one)) is not None]
    return keys, len(listed) - len(keys)


class _KeySet(msgspec.Struct):
    keys: list[Any]


_PUBLIC_MEMBERS: Final = ("kty", "crv", "x", "y", "n", "e")


def _from_jwk(jwk: Any) -> Key | None:
    """Read one key; None if it is not for us."""
    if not isinstance(jwk, Mapping) or jwk.get("use", "sig") != "sig":
        return None
    uses, kid, algorithm = jwk.get("key_ops", ["verify"]), jwk.get("kid"), jwk.get("alg")
    if not isinstance(uses, list) or "verify" not in uses or not isinstance(kid, str | None):
        return None
    # Only its public part: a private key has no business here, and verifies nothing.
    public = {name: jwk[name] for name in _PUBLIC_MEMBERS if name in jwk}
    reader = _readers().get(str(jwk.get("kty")))
    if reader is None:
        return None
    try:
        value = reader(public)
        algorithms = _algorithms(value)
    except _unreadable():
        return None
    if algorithm is not None:
        algorithms &= {algorithm} if isinstance(algorithm, str) else set()
    return Key(value, algorithms, kid) if algorithms else None


def _readers() -> dict[str, Any]:
    """What reads keys of each type; none reads a secret (``oct``)."""
    algorithms = pyjwt().algorithms
    return {
        "RSA": algorithms.RSAAlgorithm.from_jwk,
        "EC": algorithms.ECAlgorithm.from_jwk,
        "OKP": algorithms.OKPAlgorithm.from_jwk,
    }


def _unreadable() -> tuple[type[Exception], ...]:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - needs the extra

    # What is not even of the right type makes PyJWT stumble.
    stumbled = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
    return (pyjwt().PyJWTError, UnsupportedAlgorithm, *stumbled)


def _algorithms(value: Any) -> frozenset[str]:
    """Return what a public key may be used with.

    Raises:
        ValueError: nothing.
    """
    from cryptography.hazmat.primitives.asymmetric import (  # noqa: PLC0415 - needs the extra
        ec,
        ed448,
        ed25519,
        rsa,
    )

    match value:
        case rsa.RSAPublicKey():
            if value.key_size < SMALLEST_RSA_BITS:
                raise ValueError(
                    f"found an RSA key of {value.key_size} bits; allowed: {SMALLEST_RSA_BITS} bits"
                    " or more"
                )
            return _RSA
        case ec.EllipticCurvePublicKey() if value.curve.name in _CURVES:
            return frozenset({_CURVES[value.curve.name]})
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return _EDDSA
        case _:
            raise ValueError(
                "found a key of a kind that signs no tokens; allowed: RSA, EC with P-256, P-384 or"
                " P-521, Ed25519, Ed448"
            )


def pyjwt() -> Any:
    """Import PyJWT, which few need.

    Raises:
        SetupError: it is not installed, or not with cryptography.
    """
    try:
        import cryptography  # noqa: F401, PLC0415 - needs the extra
        import jwt  # noqa: PLC0415
    except ImportError as error:
        message = f"[access] verifies tokens, and the module {error.name} is not installed"
        raise SetupError(message, hint='pip install "walstream[http]"') from None
    return jwt
