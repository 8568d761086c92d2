"""The section ``[access]``: whose tokens are believed, and what their roles may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, get_args
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from walstream import postgres
from walstream.config.columns import ColumnsConfig
from walstream.config.section import Bytes, Seconds, Section, read_secret
from walstream.errors import ConfigError, FilterError
from walstream.placeholders import ClaimPath, RowCondition
from walstream.router import TablePattern

PublicKeyAlgorithm: TypeAlias = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
AlgorithmName: TypeAlias = Literal["HS256", "HS384", "HS512", PublicKeyAlgorithm]

SECRET_BYTES: Final[Mapping[str, int]] = {"HS256": 32, "HS384": 48, "HS512": 64}
"""How long a secret has to be: as the hash (RFC 7518, 3.2)."""

PUBLIC_KEY_ALGORITHMS: Final[tuple[AlgorithmName, ...]] = get_args(PublicKeyAlgorithm)

_KEYS: Final = ("secret", "secret_file", "jwks_url", "jwks_file", "public_key_file")
_SECRETS: Final = ("secret", "secret_file")
_MADE_BY: Final = "as openssl rand -hex 32 prints"

NonEmpty = Annotated[str, Field(min_length=1)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


_WORDS_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    ]
}

Words = Annotated[
    list[NonEmpty],
    Field(min_length=1),
    BeforeValidator(_listed),
    WithJsonSchema(_WORDS_SCHEMA, mode="validation"),
]
"""One word, or a list of them."""


class TableConfig(Section):
    """A table that a role may read: which columns, and which rows.

    With ``rls`` the server's row security decides, too; ``deletes`` says whether those rows' keys
    are told when they are deleted, which it cannot be asked about any more. ``rows`` says of a
    table with row security that this role may read all of it.
    """

    table: str
    columns: ColumnsConfig = ColumnsConfig()
    where: str | None = None
    rls: bool = False
    deletes: Literal["none", "key"] = "none"
    rows: Literal["all"] | None = None

    @field_validator("table")
    @classmethod
    def _is_table(cls, value: str) -> str:
        TablePattern.parse(value)
        return value

    @field_validator("where")
    @classmethod
    def _is_condition(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                RowCondition.parse(value)
            except FilterError as error:
                raise ValueError(error.message) from None
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.rls and self.deletes != "none":
            raise ValueError("deletes is about rows that row security hides: it needs rls = true")
        if self.rows is not None and (self.rls or self.where is not None):
            raise ValueError('rows = "all" is said of tables without where and rls')
        return self

    @property
    def condition(self) -> RowCondition | None:
        """Which rows; None for all."""
        return None if self.where is None else RowCondition.parse(self.where)


class RoleConfig(Section):
    """What one role may do; nothing unless it is said.

    ``status`` lets it see how walstream is, ``operate`` deliver dead letters again. Of ``tables``
    the first counts that covers a table. ``postgres_role`` is the role of the server that row
    security is asked as; without it the one of the same name.
    """

    status: bool = False
    operate: bool = False
    tables: list[TableConfig] = []
    postgres_role: Annotated[str, Field(min_length=1, max_length=63)] | None = None


class ApiKeyConfig(Section):
    """A key that is no token, such as ``sb_publishable_...``, and the role of who has it."""

    key: SecretStr | None = None
    key_file: Path | None = None
    role: str

    @field_validator("key")
    @classmethod
    def _is_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _verify_api_key(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if (self.key is None) == (self.key_file is None):
            raise ValueError("needs key or key_file, one of the two")
        return self

    def secret(self, place: int) -> str:
        """Return the key.

        Raises:
            ConfigError: ``key_file`` cannot be read, or what is in it is no key.
        """
        name = f"access.api_keys[{place}].key"
        text = read_secret(name, self.key, self.key_file) or ""
        try:
            _verify_api_key(text)
        except ValueError as error:
            raise ConfigError([f"{name}_file: {error}"]) from None
        return text


class RowSecurityConfig(Section):
    """How the server is asked what its row security shows to whom (``rls``).

    By connections of their own; without ``dsn`` they go where the catalog is.
    """

    dsn: SecretStr | None = None
    dsn_file: Path | None = None
    max_connections: int = Field(2, ge=1, le=100)
    timeout_seconds: Seconds = 1.0

    @field_validator("dsn")
    @classmethod
    def _readable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            postgres.check_dsn(value.get_secret_value())
        return value

    def own_dsn(self) -> str | None:
        """Return the connection string, if one is given.

        Raises:
            ConfigError: ``dsn_file`` cannot be read.
        """
        return read_secret("access.row_security.dsn", self.dsn, self.dsn_file)


class AccessConfig(Section):
    """Nobody may read anything, unless this section says so.

    Tokens are JSON Web Tokens. They are signed with a shared secret (``secret``, ``secret_file``),
    or by a private key whose public one is known here (``jwks_url``, ``jwks_file``,
    ``public_key_file``): one of these. ``role_claim`` is where a token names its role, one of
    ``roles``; ``anonymous_role`` is the role of those who have no token. ``api_keys`` are taken
    where a token is.
    """

    secret: SecretStr | None = None
    secret_file: Path | None = None
    jwks_url: str | None = None
    jwks_file: Path | None = None
    public_key_file: Path | None = None
    algorithms: Annotated[list[AlgorithmName], Field(min_length=1)] | None = None
    issuer: NonEmpty | None = None
    audience: Words | None = None
    leeway_seconds: float = Field(5.0, ge=0, allow_inf_nan=False)
    role_claim: str = "role"
    max_token_bytes: Bytes = 8 << 10
    roles: dict[str, RoleConfig] = {}
    anonymous_role: str | None = None
    api_keys: list[ApiKeyConfig] = []
    row_security: RowSecurityConfig = RowSecurityConfig()

    @field_validator("secret")
    @classmethod
    def _is_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _verify_secret(value.get_secret_value(), "HS256")
        return value

    @field_validator(*_KEYS)
    @classmethod
    def _is_the_only_key(cls, value: Any, info: ValidationInfo) -> Any:
        given = [key for key in _KEYS if info.data.get(key) is not None]
        if value is not None and given:
            raise ValueError(
                f"found beside {given[0]}; allowed: one of {', '.join(_KEYS)}, for whoever has"
                " two kinds of key may sign with the weaker one"
            )
        return value

    @field_validator("jwks_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not _is_http(value):
            raise ValueError(
                "found a value; allowed: a URL that begins with https:// or http://, without a"
                " user and password"
            )
        return value

    @field_validator("algorithms")
    @classmethod
    def _fit_the_key(
        cls, value: list[AlgorithmName] | None, info: ValidationInfo
    ) -> list[AlgorithmName] | None:
        key = next((one for one in _KEYS if info.data.get(one) is not None), None)
        if value is None or key is None:
            return value
        allowed = tuple(SECRET_BYTES) if key in _SECRETS else PUBLIC_KEY_ALGORITHMS
        for algorithm in value:
            if algorithm not in allowed:
                raise ValueError(f"found {algorithm!r}; allowed with {key}: {', '.join(allowed)}")
        secret = info.data.get("secret")
        if secret is not None:
            _verify_secret(secret.get_secret_value(), max(value))
        return value

    @field_validator("role_claim")
    @classmethod
    def _is_path(cls, value: str) -> str:
        ClaimPath.parse(value)
        return value

    @field_validator("roles")
    @classmethod
    def _are_of_the_server(cls, value: dict[str, RoleConfig]) -> dict[str, RoleConfig]:
        for name, role in value.items():
            if any(table.rls for table in role.tables) and (role.postgres_role or name) == "none":
                raise ValueError(
                    f"{name}: row security cannot be asked as 'none', which is no role but whoever"
                    " is connected; allowed: postgres_role, the name of a role of the server"
                )
        return value

    @field_validator("anonymous_role")
    @classmethod
    def _is_role(cls, value: str | None, info: ValidationInfo) -> str | None:
        roles: Mapping[str, RoleConfig] | None = info.data.get("roles")
        if value is not None and roles is not None:
            _verify_claimless(value, roles)
        return value

    @field_validator("api_keys")
    @classmethod
    def _have_roles(cls, value: list[ApiKeyConfig], info: ValidationInfo) -> list[ApiKeyConfig]:
        roles: Mapping[str, RoleConfig] | None = info.data.get("roles")
        for place, one in enumerate(value if roles is not None else ()):
            try:
                _verify_claimless(one.role, roles or {})
            except ValueError as error:
                raise ValueError(f"[{place}].role: {error}") from None
        return value

    @field_validator("api_keys")
    @classmethod
    def _are_different(cls, value: list[ApiKeyConfig]) -> list[ApiKeyConfig]:
        first: dict[str, int] = {}
        for place, one in enumerate(value):
            if one.key is None:
                continue
            before = first.setdefault(one.key.get_secret_value(), place)
            if before != place:
                raise ValueError(f"[{place}].key: found the one of [{before}]; allowed: each once")
        return value

    @property
    def key_name(self) -> str | None:
        """The key of this section that says what tokens are signed with."""
        return next((key for key in _KEYS if getattr(self, key) is not None), None)

    @property
    def allowed_algorithms(self) -> Sequence[AlgorithmName]:
        """The algorithms that a token may be signed by, if its key is for them, too."""
        if self.algorithms is not None:
            return self.algorithms
        return ("HS256",) if self.key_name in _SECRETS else PUBLIC_KEY_ALGORITHMS

    @property
    def is_given(self) -> bool:
        """Whether anybody could be let in."""
        keyless = self.anonymous_role is not None or bool(self.api_keys)
        return self.key_name is not None or keyless

    @property
    def asks_row_security(self) -> bool:
        """Whether the server is asked what a role sees."""
        return any(table.rls for role in self.roles.values() for table in role.tables)

    def signing_secret(self) -> bytes | None:
        """Return the secret that tokens are signed with, if it is one.

        Raises:
            ConfigError: ``secret_file`` cannot be read, or what is in it is too short.
        """
        text = read_secret("access.secret", self.secret, self.secret_file)
        if text is None:
            return None
        try:
            _verify_secret(text, max(self.allowed_algorithms))
        except ValueError as error:
            raise ConfigError([f"access.{self.key_name}: {error}"]) from None
        return text.encode()


_API_KEY_CHARACTERS: Final = 16


def _verify_api_key(key: str) -> None:
    """Raise ValueError, without the key, if it is none."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("found blanks, or what is not ASCII; allowed: a key such as sb_secret_...")
    if len(key) < _API_KEY_CHARACTERS:
        raise ValueError(
            f"found {len(key)} characters; allowed: {_API_KEY_CHARACTERS} or more, as"
            " openssl rand -hex 16 prints"
        )


def _verify_claimless(role: str, roles: Mapping[str, RoleConfig]) -> None:
    """Raise ValueError if there is no such role, or one that is for tokens alone."""
    if role not in roles:
        known = ", ".join(roles) or "none, there is no [access.roles.<name>]"
        raise ValueError(f"found {role!r}; allowed: {known}")
    for place, table in enumerate(roles[role].tables):
        if table.condition is not None and table.condition.claims:
            raise ValueError(
                f"found {role!r}, whose tables[{place}].where needs the claim"
                f" {table.condition.claims[0]}; allowed: a role that needs none, for who has"
                " no token has no claims"
            )


def _verify_secret(secret: str, algorithm: str) -> None:
    """Raise ValueError, without the secret, if it is none or too short."""
    if "-----BEGIN" in secret:
        raise ValueError(
            "found a key or certificate in PEM; allowed: a shared secret; a public key goes into a"
            " file that public_key_file names"
        )
    length = len(secret.encode())
    if length < SECRET_BYTES[algorithm]:
        raise ValueError(
            f"found a value of {length} bytes; allowed for {algorithm}: {SECRET_BYTES[algorithm]}"
            f" bytes or more, {_MADE_BY.replace('32', str(SECRET_BYTES[algorithm]))}"
        )


def _is_http(text: str) -> bool:
    try:
        url = urlsplit(text)
        has_address = bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return url.scheme in ("http", "https") and has_address and "@" not in url.netloc and is_plain
