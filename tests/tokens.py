"""Tokens of readers: good ones, and all that somebody might try."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from functools import cached_property
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER: Final = "https://issuer.example"
AUDIENCE: Final = "walstream"


class Tokens:
    """Makes tokens: the configuration believes RS256 by ``key``, and nothing else."""

    def __init__(self) -> None:
        self.key: Final = rsa.generate_private_key(65537, 2048)

    @cached_property
    def foreign_key(self) -> rsa.RSAPrivateKey:
        """Another one, as good as ours."""
        return rsa.generate_private_key(65537, 2048)

    @cached_property
    def public_pem(self) -> bytes:
        """What the configuration names."""
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Return the claims of Ada, who may read; None takes one away."""
        good = {
            "role": "reader",
            "sub": "ada",
            "iss": ISSUER,
            "aud": AUDIENCE,
            "exp": int(time.time()) + 600,
        }
        return {name: value for name, value in (good | changed).items() if value is not None}

    def good(self, **changed: Any) -> str:
        """Sign claims as it has to be."""
        return self.signed(self.claims(**changed))

    def signed(self, claims: dict[str, Any], **header: Any) -> str:
        """Sign any claims."""
        return jwt.encode(claims, self.key, "RS256", headers=header or None)

    def tampered(self) -> str:
        """Change the claims behind the signature's back."""
        header, _, signature = self.good(sub="bob").split(".")
        return f"{header}.{_part(self.claims(sub='bob', role='admin'))}.{signature}"

    def unsigned(self, algorithm: str) -> str:
        """Name an algorithm that is none, and sign nothing."""
        return f"{_part({'alg': algorithm, 'typ': 'JWT'})}.{_part(self.claims())}."

    def by_public_key(self) -> str:
        """Take the public key for the secret of an HMAC, as the algorithm's name would have it."""
        content = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(self.claims())}"
        signature = hmac.digest(self.public_pem, content.encode(), hashlib.sha256)
        return f"{content}.{_text(signature)}"

    def by_foreign_key(self, algorithm: str = "RS256", **header: Any) -> str:
        """Sign with a key that nobody knows."""
        return jwt.encode(self.claims(), self.foreign_key, algorithm, headers=header or None)

    def with_its_own_key(self) -> str:
        """Bring the key along that verifies the signature."""
        numbers = self.foreign_key.public_key().public_numbers()
        jwk = {
            "kty": "RSA",
            "n": _text(numbers.n.to_bytes(256, "big")),
            "e": _text(numbers.e.to_bytes(3, "big")),
        }
        return self.by_foreign_key(jwk=jwk)


def signed(secret: str, role: str, *, seconds: float = 3600, **claims: Any) -> str:
    """Sign by HMAC a token of this role, which expires so soon."""
    content = {"role": role, "exp": int(time.time() + seconds), **claims}
    return jwt.encode(content, secret, "HS256")


def _part(content: dict[str, Any]) -> str:
    return _text(json.dumps(content).encode())


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
