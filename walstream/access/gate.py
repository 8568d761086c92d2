"""Who is let in: a token becomes a reader, or is refused."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from walstream import mistakes
from walstream.access.jwks import jwks_of_file, jwks_of_url
from walstream.access.keys import (
    Key,
    Keys,
    OneKey,
    key_set,
    public_key,
    pyjwt,
    secret_key,
)
from walstream.access.readers import Reader
from walstream.access.refusals import Cause, forbidden, unknown
from walstream.access.roles import Roles
from walstream.access.tokens import Verifier
from walstream.changes import Relation
from walstream.config.access import AccessConfig
from walstream.errors import ConfigError
from walstream.placeholders import ClaimPath
from walstream.router import OWN_TABLES

_NOT_GIVEN: Final = "nobody may read here: [access] is not configured"


class Gate:
    """Lets readers in."""

    def __init__(
        self,
        config: AccessConfig,
        *,
        masking_key: bytes | None = None,
        own_tables: frozenset[Relation] = OWN_TABLES,
    ) -> None:
        """Read secrets and files of keys; what has to be asked for by HTTP is asked for later.

        Raises:
            ConfigError: a file cannot be read, or is not what it has to be; a ``hash`` mask
                without a key.
            SetupError: tokens are to be verified, and PyJWT is not installed.
        """
        self._config = config
        self._role_claim = ClaimPath.parse(config.role_claim)
        self._roles = Roles(config, masking_key, own_tables)
        self._api_keys = _api_keys(config)
        self._keys = keys_of(config)
        self._verifier = None if self._keys is None else Verifier(config, self._keys)

    async def admit(self, token: str | None) -> Reader:
        """Return who it is that has this token, or none.

        Raises:
            ReaderRefused: 401, it is not known who it is; 403, they may not read; 503, the keys
                that would tell cannot be had now.
        """
        if token is None:
            return self._anonymous()
        role_of_key = self._role_of_key(token)
        if role_of_key is not None:
            return self._roles.reader(role_of_key, {})
        if self._verifier is None:
            hint = "" if self._config.is_given else _hint()
            raise unknown("tokens are not taken here" if not hint else _NOT_GIVEN, hint=hint)
        verified = await self._verifier.verify(token)
        role = self._role_claim.find(verified.claims)
        return self._roles.reader(self._named(role), verified.claims, verified.expires_at)

    async def close(self) -> None:
        """Stop asking for keys."""
        if self._keys is not None:
            await self._keys.close()

    def _anonymous(self) -> Reader:
        if self._config.anonymous_role is not None:
            claims: Mapping[str, Any] = {}
            return self._roles.reader(self._config.anonymous_role, claims)
        if not self._config.is_given:
            raise unknown(_NOT_GIVEN, Cause.MISSING, hint=_hint())
        raise unknown(
            "there is no token",
            Cause.MISSING,
            hint="send the header Authorization: Bearer TOKEN, or ?token=TOKEN where no header can"
            " be set",
        )

    def _role_of_key(self, token: str) -> str | None:
        """Return the role of an API key, None for what is none; how long it takes tells nothing."""
        if not token.isascii():
            return None
        given, found = token.encode(), None
        for key, role in self._api_keys:
            if hmac.compare_digest(key, given):
                found = role
        return found

    def _named(self, role: object) -> str:
        if role is None:
            reason = f"the token has no claim {self._role_claim}, which would be its role"
            raise forbidden(reason, Cause.INCOMPLETE)
        if not isinstance(role, str):
            raise forbidden(f"the token's claim {self._role_claim} is not one role's name")
        return role


def _api_keys(config: AccessConfig) -> list[tuple[bytes, str]]:
    return [(one.secret(place).encode(), one.role) for place, one in enumerate(config.api_keys)]


def _hint() -> str:
    return (
        "give [access] a secret, a jwks_url or an anonymous_role, and roles with their tables; see"
        " docs/access.md"
    )


def keys_of(config: AccessConfig) -> Keys | None:
    """Return where the keys for tokens come from; None when no token is taken.

    Raises:
        ConfigError: a file cannot be read, or is not what it has to be.
        SetupError: PyJWT is not installed.
    """
    secret = config.signing_secret()
    try:
        if secret is not None:
            return OneKey(secret_key(secret))
        if config.public_key_file is not None:
            key = public_key(_content("public_key_file", config.public_key_file))
            return OneKey(_fitting(config, key))
    except ValueError as error:
        raise ConfigError([f"access.{config.key_name}: {error}"]) from None
    if config.jwks_file is None and config.jwks_url is None:
        return None
    pyjwt()
    if config.jwks_url is not None:
        return jwks_of_url(config.jwks_url)
    assert config.jwks_file is not None  # noqa: S101 - one of them is given
    try:
        key_set(_content("jwks_file", config.jwks_file))
    except ValueError as error:
        raise ConfigError([f"access.jwks_file: {error}"]) from None
    return jwks_of_file(config.jwks_file)


def _fitting(config: AccessConfig, key: Key) -> Key:
    """Refuse algorithms that the key is not for."""
    for algorithm in config.algorithms or ():
        if algorithm not in key.algorithms:
            allowed = ", ".join(sorted(key.algorithms))
            raise ConfigError(
                [f"access.algorithms: found {algorithm!r}; allowed with this key: {allowed}"]
            )
    return key


def _content(key: str, file: Path) -> bytes:
    shown = mistakes.shown_path(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError([f"access.{key}: {shown} cannot be read: {error.strerror}"]) from None
    except ValueError:  # a NUL in its name
        raise ConfigError([f"access.{key}: {shown!r} is not a path"]) from None
