"""The configuration: ``walstream.toml`` and ``WALSTREAM_...`` environment variables.

Every key can be given as an environment variable: ``WALSTREAM_POSTGRES_DSN`` for ``dsn`` under
``[postgres]``; ``WALSTREAM_ROUTES`` and ``WALSTREAM_SINKS`` as JSON. The environment wins over the
file. Secrets can be read from files: ``dsn_file`` instead of ``dsn``.

Mistakes are reported all at once, each with its key path, what was found and what is allowed.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from walstream import filters, mistakes, postgres
from walstream.backoff import Backoff
from walstream.changes import Operation, Relation
from walstream.config.access import (
    AccessConfig,
    ApiKeyConfig,
    RoleConfig,
    RowSecurityConfig,
    TableConfig,
)
from walstream.config.columns import ColumnsConfig
from walstream.config.live import HttpConfig, JournalConfig, LiveConfig, LiveSinkConfig
from walstream.config.realtime import PrivateConfig, RealtimeConfig
from walstream.config.section import MASKING_KEY, Bytes, Seconds, Section, in_bytes, read_secret
from walstream.destinations import MAX_TRANSACTION_CHANGES, HandlerOptions
from walstream.errors import ConfigError, FilterError
from walstream.moments import parse_moment
from walstream.policy import FailurePolicy, OnFailure
from walstream.router import (
    ALL_OPERATIONS,
    DEAD_LETTER_TABLES,
    OWN_TABLES,
    MessageRoute,
    Route,
    TablePattern,
)
from walstream.typed import RowModel

ENV_PREFIX: Final = "WALSTREAM_"
DEFAULT_FILE: Final = Path("walstream.toml")

_NOT_CONFIGURATION: Final = re.compile(
    r"WALSTREAM_(TEST_.*|PG_BIN|SERVICE_.*|PORT(_.*)?)"  # SERVICE and PORT are Kubernetes' links
)

OperationName = Literal["insert", "update", "delete", "truncate"]


class _Declared(Section):
    """What decorators and options say, too."""

    @classmethod
    def declared(cls, where_from: str, /, **content: Any) -> Self:
        """Check what a decorator or an option says.

        Args:
            where_from: what messages begin with.
            **content: the keys.

        Raises:
            ConfigError: with one sentence for each mistake.
        """
        try:
            return cls(**content)
        except ValidationError as error:
            raise ConfigError(
                [f"{where_from}: {problem.removeprefix(': ')}" for problem in _problems(error)]
            ) from None


class PostgresConfig(_Declared):
    """How to reach the database.

    ``dsn`` serves the catalog and, unless ``replication_dsn`` is given, replication too. Give both
    when a pooler stands before the catalog: a pooler cannot carry replication.
    """

    dsn: SecretStr | None = None
    dsn_file: Path | None = None
    replication_dsn: SecretStr | None = None
    replication_dsn_file: Path | None = None
    application_name: str = Field("walstream", min_length=1, max_length=63)

    @field_validator("dsn", "replication_dsn")
    @classmethod
    def _readable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            postgres.check_dsn(value.get_secret_value())
        return value

    def catalog_dsn(self) -> str:
        """Return the connection string for ordinary queries; without any, libpq's defaults count.

        Raises:
            ConfigError: ``dsn_file`` cannot be read.
        """
        return read_secret("postgres.dsn", self.dsn, self.dsn_file) or ""

    def streaming_dsn(self) -> str:
        """Return the connection string for replication.

        Raises:
            ConfigError: ``replication_dsn_file`` or ``dsn_file`` cannot be read.
        """
        own = read_secret(
            "postgres.replication_dsn", self.replication_dsn, self.replication_dsn_file
        )
        return own or self.catalog_dsn()


class SlotConfig(_Declared):
    """The replication slot. ``create`` makes it when it is not there.

    ``failover`` makes it one that standbys keep a copy of (PostgreSQL 17 and later). ``shared``
    says that other processes of the same service stream from it, too: what they have confirmed
    counts, and a slot that they have moved is no gap.
    """

    name: str = Field("walstream", pattern=r"^[a-z0-9_]{1,63}$")
    create: bool = False
    failover: bool = False
    shared: bool = False


_WARN_AT_BYTES: Final = 10 << 30


class RetainedWalConfig(Section):
    """What is done when the slot retains much WAL on the server's disk; None for nothing.

    At ``warn_at_bytes`` it is logged. At ``stop_at_bytes`` the process ends with an error, so that
    whoever supervises it is told; the slot goes on retaining. At ``drop_slot_at_bytes`` the slot is
    dropped and **what was not delivered is lost**: for databases that matter more than their
    changes.
    """

    warn_at_bytes: Bytes | None = _WARN_AT_BYTES
    stop_at_bytes: Bytes | None = None
    drop_slot_at_bytes: Bytes | None = None

    @model_validator(mode="before")
    @classmethod
    def _warns_in_time(cls, content: Any) -> Any:
        """Let the default give way to a lower limit."""
        if not isinstance(content, Mapping) or "warn_at_bytes" in content:
            return content
        limits = [content.get("stop_at_bytes"), content.get("drop_slot_at_bytes")]
        try:
            given = [size for size in map(in_bytes, limits) if isinstance(size, int)]
        except ValueError:
            return content  # told of the key itself
        lower = min([_WARN_AT_BYTES, *(size * 4 // 5 for size in given if size > 1)])
        return {**content, "warn_at_bytes": lower}

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        limits = [
            (key, limit)
            for key in ("warn_at_bytes", "stop_at_bytes", "drop_slot_at_bytes")
            if (limit := getattr(self, key)) is not None
        ]
        for (lower, less), (higher, more) in itertools.pairwise(limits):
            if less >= more:
                raise ValueError(
                    f"found {higher} = {more}; allowed: more than {lower}, which is {less}"
                )
        return self


class StateConfig(Section):
    """Where it is kept which cluster and position were confirmed last.

    With it a failover, a restore or a slot made anew while the process did not run is noticed.
    Without ``path`` it is ``<slot>.json`` in the folder that systemd names in ``STATE_DIRECTORY``,
    if there is one, and otherwise it is not kept.
    """

    path: Path | None = None


class TracingConfig(Section):
    """OpenTelemetry: spans of calls; where they go is told by OTEL_... variables."""

    enabled: bool = False


OnFailureName = Literal["stop", "dead_letter", "skip"]
ColumnNames = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class HandlersConfig(Section):
    """The handlers, and what is done when a destination fails, unless its route says otherwise."""

    app: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    attempts: int = Field(5, ge=1)
    deadline_seconds: Seconds | None = None
    backoff_seconds: Seconds = 0.2
    max_backoff_seconds: Seconds = 30.0
    on_failure: OnFailureName = "stop"


class FailureSpec(_Declared):
    """What is done when a route's destination fails; None for what ``[handlers]`` says."""

    attempts: int | None = Field(None, ge=1)
    deadline_seconds: Seconds | None = None
    on_failure: OnFailureName | None = None

    def policy(self, defaults: HandlersConfig) -> FailurePolicy:
        """Return the policy of the route."""
        return FailurePolicy(
            attempts=self.attempts or defaults.attempts,
            deadline_seconds=self.deadline_seconds or defaults.deadline_seconds,
            backoff=Backoff(defaults.backoff_seconds, defaults.max_backoff_seconds),
            on_failure=OnFailure(self.on_failure or defaults.on_failure),
        )


class _Wanted(_Declared):
    table: str
    operations: list[OperationName] | None = Field(None, min_length=1)
    where: str | None = None
    changed: ColumnNames | None = None
    columns: ColumnsConfig = ColumnsConfig()
    leaving: bool = False


class RouteSpec(FailureSpec, _Wanted):
    """Which changes a route wants, and what of them: what decorators and the file both say."""

    @field_validator("table")
    @classmethod
    def _is_table(cls, value: str) -> str:
        TablePattern.parse(value)
        return value

    @field_validator("where")
    @classmethod
    def _is_filter(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                filters.parse(value)
            except FilterError as error:
                raise ValueError(error.message) from None
        return value

    def route(
        self,
        name: str,
        destination: Any,
        masking_key: bytes | None,
        defaults: HandlersConfig = HandlersConfig(),  # noqa: B008 - it is frozen
        own_tables: frozenset[Relation] = OWN_TABLES,
    ) -> Route:
        """Make the route.

        Raises:
            ConfigError: a ``hash`` mask without a key.
        """
        try:
            kept = self.columns.projection(masking_key)
        except ValueError as error:
            raise ConfigError([f"{name}: {error}"]) from None
        return Route(
            name=name,
            pattern=TablePattern.parse(self.table),
            destination=destination,
            operations=frozenset(map(Operation, self.operations or ALL_OPERATIONS)),
            explicit=self.operations is not None,
            where=None if self.where is None else filters.parse(self.where),
            projection=kept,
            leaving=self.leaving,
            changed=self.changed or (),
            policy=self.policy(defaults),
            own_tables=own_tables,
        )


class MessageSpec(FailureSpec):
    """Which logical messages a handler wants."""

    prefix: str = Field(min_length=1)

    def route(self, name: str, destination: Any, defaults: HandlersConfig) -> MessageRoute:
        """Make the route."""
        return MessageRoute(name, self.prefix, destination, self.policy(defaults))


class CallSpec(_Declared):
    """How a handler wants to be called: what decorators say beside the route."""

    model_config = ConfigDict(strict=True)  # "yes" is no way to say True in Python

    batch: int | None = Field(None, ge=1)
    linger_seconds: float | None = Field(None, ge=0)
    transactions: bool = False
    max_transaction_changes: int | None = Field(None, ge=1)
    concurrency: int = Field(1, ge=1, le=1000)
    key: ColumnNames | None = None
    visible: bool = False
    transactional: SecretStr | None = None
    since: str | None = None

    @field_validator("since")
    @classmethod
    def _is_moment(cls, value: str | None) -> str | None:
        if value is not None:
            parse_moment(value)
        return value

    @field_validator("transactional")
    @classmethod
    def _readable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            postgres.check_dsn(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.transactions and self.batch is not None:
            raise ValueError("batch and transactions are two kinds of list: choose one")
        if self.linger_seconds is not None and self.batch is None:
            raise ValueError("linger_seconds is how long a batch waits: it needs batch")
        if self.max_transaction_changes is not None and not self.transactions:
            raise ValueError("max_transaction_changes needs transactions=True")
        in_order = self.transactions or self.transactional is not None
        if self.concurrency > 1 and in_order:
            raise ValueError(
                "whole transactions, and what is recorded in the order of the stream, come one"
                " after another: no concurrency above 1"
                + (", take batches instead" if self.transactional is not None else "")
            )
        return self

    def options(self, model: RowModel[Any] | None) -> HandlerOptions:
        """Return what the handler is made with."""
        secret = self.transactional
        return HandlerOptions(
            batch=self.batch or 0,
            linger_seconds=0.05 if self.linger_seconds is None else self.linger_seconds,
            transactions=self.transactions,
            max_transaction_changes=self.max_transaction_changes or MAX_TRANSACTION_CHANGES,
            concurrency=self.concurrency,
            key=self.key,
            visible=self.visible,
            transactional=None if secret is None else secret.get_secret_value(),
            model=model,
            since=None if self.since is None else parse_moment(self.since),
        )


class RouteConfig(RouteSpec):
    """A route of the file: it goes to a sink by name."""

    to: str
    name: str | None = Field(None, min_length=1)


class StdoutSinkConfig(Section):
    """The standard output, one JSON object a line."""

    type: Literal["stdout"]


class FileSinkConfig(Section):
    """A file, one JSON object a line, fsynced before a change counts as taken.

    ``fsync``, which can say otherwise, and what is about rotation are explained in
    `walstream.sinks.file.FileOptions`.
    """

    type: Literal["file"]
    path: Path
    fsync: Literal["always", "interval", "never"] = "always"
    fsync_seconds: Seconds = 1.0
    max_bytes: Bytes | None = None
    max_age_seconds: Seconds | None = None
    keep: int | None = Field(None, ge=1)
    compress: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "fsync_seconds" in self.model_fields_set and self.fsync != "interval":
            raise ValueError(
                'fsync_seconds is how often an interval ends: it needs fsync = "interval"'
            )
        is_rotated = self.max_bytes is not None or self.max_age_seconds is not None
        if not is_rotated and (self.keep is not None or self.compress):
            raise ValueError(
                "keep and compress are about rotated files: they need max_bytes or max_age_seconds"
            )
        return self


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


_SECRETS_SCHEMA: Final = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
    "writeOnly": True,
}

SigningSecrets = Annotated[
    tuple[SecretStr, ...],
    Field(min_length=1),
    BeforeValidator(_listed),
    WithJsonSchema(_SECRETS_SCHEMA),
]
"""One secret of a webhook, or several while they are exchanged."""

_WHSEC: Final = "whsec_"
_SIGNING_KEY_BYTES: Final = range(24, 65)
_URI: Final = r"([\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})"
_URI_REFERENCE: Final = re.compile(  # RFC 3986, 4.1
    r"([A-Za-z][A-Za-z0-9+.-]*:|(?![^/?#]*:))"  # without a scheme no colon before a slash
    rf"(//({_URI}*@)?\[[0-9A-Fa-f:.]+\])?{_URI}*(\?({_URI}|\?)*)?(#({_URI}|\?)*)?",
    re.ASCII,
)
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]*")
_OWN_HEADERS: Final = {
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
}


class WebhookSinkConfig(Section):
    """A receiver of changes by HTTP.

    ``secret`` signs as Standard Webhooks do. What the other keys mean is explained in
    `walstream.sinks.webhook.WebhookOptions` and `walstream.sinks.envelopes.Packing`.
    """

    type: Literal["webhook"]
    url: SecretStr
    headers: dict[str, SecretStr] = {}
    secret: SigningSecrets | None = None
    secret_file: Path | None = None
    format: Literal["json", "ndjson", "cloudevents"] = "json"
    source: str | None = Field(None, min_length=1)
    max_changes: int = Field(100, ge=1)
    max_request_bytes: Bytes = 1 << 20
    timeout_seconds: Seconds = 30.0
    connect_timeout_seconds: Seconds = 10.0
    max_retry_after_seconds: Seconds = 300.0
    proxy: SecretStr | None = None
    ca_file: Path | None = None
    verify: bool = True
    allow_private_redirects: bool = False

    @field_validator("url", "proxy")
    @classmethod
    def _is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _verify_url(value.get_secret_value())
        return value

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, its_value in value.items():
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError("found a name that no header can have")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"{name} is set by walstream")
            if not _HEADER_VALUE.fullmatch(its_value.get_secret_value()):
                raise ValueError(f"the value of {name} is not one of printable ASCII characters")
        return value

    @field_validator("secret")
    @classmethod
    def _are_secrets(cls, value: tuple[SecretStr, ...] | None) -> tuple[SecretStr, ...] | None:
        for secret in value or ():
            _signing_key(secret.get_secret_value())
        return value

    @field_validator("source")
    @classmethod
    def _is_uri_reference(cls, value: str | None) -> str | None:
        if value is not None and not _URI_REFERENCE.fullmatch(value):
            raise ValueError(
                f"found {value!r}; allowed: a URI-reference, such as /shop/orders,"
                " urn:example:shop or https://example.org/shop"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("the secret is given twice, as secret and as secret_file")
        if self.source is not None and self.format != "cloudevents":
            raise ValueError('source is a key of CloudEvents: it needs format = "cloudevents"')
        if not self.verify and self.ca_file is not None:
            raise ValueError("verify = false makes no use of ca_file: leave one of them out")
        return self

    def signing_keys(self, name: str) -> tuple[bytes, ...]:
        """Return the keys that requests are signed with; none when they are not signed.

        Raises:
            ConfigError: ``secret_file`` cannot be read, or holds something else.
        """
        if self.secret_file is None:
            secrets = [secret.get_secret_value() for secret in self.secret or ()]
        else:
            secrets = _lines(f"sinks.{name}.secret_file", self.secret_file)
        try:
            return tuple(_signing_key(secret) for secret in secrets)
        except ValueError as error:
            raise ConfigError([f"sinks.{name}.secret_file: {error}"]) from None


def _verify_url(text: str) -> None:
    """Raise ValueError, without the text, if it is not a URL of HTTP."""
    try:
        url = urlsplit(text)
        is_fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_fine = False
    if not is_fine or re.search(r"[\s\x00-\x1f]", text):
        raise ValueError("found a value; allowed: a URL that begins with http:// or https://")


def _signing_key(secret: str) -> bytes:
    """Return the key in a secret of Standard Webhooks.

    Raises:
        ValueError: there is none in it.
    """
    prefix, encoded = secret[: len(_WHSEC)], secret[len(_WHSEC) :]
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if prefix != _WHSEC or len(key) not in _SIGNING_KEY_BYTES:
        raise ValueError(
            "found a value; allowed: whsec_ and 24 to 64 bytes in base64, as"
            " echo whsec_$(openssl rand -base64 32) prints"
        )
    return key


def _lines(key: str, file: Path) -> list[str]:
    """Read a file of secrets, one a line."""
    shown = mistakes.shown_path(file)
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError([f"{key}: {shown} cannot be read: {why}"]) from None
    if not lines:
        raise ConfigError([f"{key}: {shown} is empty"])
    return lines


SinkConfig = Annotated[
    StdoutSinkConfig | FileSinkConfig | WebhookSinkConfig | LiveSinkConfig,
    Field(discriminator="type"),
]

_SINKS: Final[dict[str, type[Section]]] = {
    "stdout": StdoutSinkConfig,
    "file": FileSinkConfig,
    "webhook": WebhookSinkConfig,
    "live": LiveSinkConfig,
}


class DeadLettersConfig(Section):
    """Where the changes are kept that their destinations did not take.

    ``path`` is for ``sqlite``, ``dsn`` and ``schema`` for ``postgres``; without a ``dsn`` it is the
    database that is streamed from.
    """

    store: Literal["sqlite", "postgres"] = "sqlite"
    path: Path = Path("walstream-dead-letters.sqlite3")
    dsn: SecretStr | None = None
    dsn_file: Path | None = None
    schema_name: str = Field("walstream", alias="schema", min_length=1, max_length=63)
    max_letters: int = Field(100_000, ge=1)
    max_bytes: int = Field(1 << 30, ge=1)

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
        return read_secret("dead_letters.dsn", self.dsn, self.dsn_file)


class MaskingConfig(Section):
    """The key of ``hash`` masks."""

    key: SecretStr | None = None
    key_file: Path | None = None

    def secret(self) -> bytes | None:
        """Return the key.

        Raises:
            ConfigError: ``key_file`` cannot be read.
        """
        text = read_secret(MASKING_KEY, self.key, self.key_file)
        return text.encode() if text else None


class StreamConfig(Section):
    """How long things may take, and how much may be in flight.

    ``drain_seconds`` bounds what a stop waits for. A call that lasts longer than
    ``stuck_after_seconds`` is logged with where it stands; after ``release_after_seconds`` the slot
    is given up. Reconnecting starts at ``reconnect_seconds`` and doubles to
    ``max_reconnect_seconds``; after a shutdown of the server it waits ``after_shutdown_seconds``.
    Reading pauses while more changes, or more bytes of their records, are in flight than
    ``max_in_flight_changes`` and ``max_in_flight_bytes``.

    When changes have not got through for ``stalled_after_seconds`` the process is not ready any
    more. A server that says nothing for ``receive_timeout_seconds`` and does not decode is given up
    and connected to again, as by Postgres' own wal_receiver_timeout. While another process streams
    from the slot it is looked at every ``standby_poll_seconds``. Every ``heartbeat_seconds`` a
    logical message is written into the WAL; None for never.
    """

    drain_seconds: Seconds = 10.0
    stuck_after_seconds: Seconds = 60.0
    max_in_flight_changes: int = Field(10_000, ge=1)
    max_in_flight_bytes: int = Field(64 << 20, ge=1)
    release_after_seconds: Seconds = 300.0
    reconnect_seconds: Seconds = 0.5
    max_reconnect_seconds: Seconds = 30.0
    after_shutdown_seconds: Seconds = 10.0
    standby_poll_seconds: Seconds = 1.0
    stalled_after_seconds: Seconds = 5.0
    receive_timeout_seconds: Seconds = 60.0
    heartbeat_seconds: Annotated[float, Field(ge=0.1)] | None = None


class LogConfig(Section):
    """Logging to stderr.

    ``error_messages`` lets the text of handlers' exceptions into the log: it may hold row values.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    error_messages: bool = False


class Config(BaseSettings):
    """Everything that can be configured."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    postgres: PostgresConfig = PostgresConfig()
    slot: SlotConfig = SlotConfig()
    retained_wal: RetainedWalConfig = RetainedWalConfig()
    state: StateConfig = StateConfig()
    routes: list[RouteConfig] = []
    sinks: dict[str, SinkConfig] = {}
    handlers: HandlersConfig = HandlersConfig()
    dead_letters: DeadLettersConfig = DeadLettersConfig()
    masking: MaskingConfig = MaskingConfig()
    stream: StreamConfig = StreamConfig()
    http: HttpConfig = HttpConfig()
    live: LiveConfig = LiveConfig()
    journal: JournalConfig = JournalConfig()
    access: AccessConfig = AccessConfig()
    realtime: RealtimeConfig = RealtimeConfig()
    tracing: TracingConfig = TracingConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file, whose content comes as arguments."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    @field_validator("sinks")
    @classmethod
    def _has_one_live_sink(cls, value: dict[str, SinkConfig]) -> dict[str, SinkConfig]:
        live = [name for name, sink in value.items() if isinstance(sink, LiveSinkConfig)]
        if len(live) > 1:
            raise ValueError(
                f"found {len(live)} of type live ({', '.join(live)}); allowed: one, which several"
                " routes may lead to"
            )
        return value

    @field_validator("realtime")
    @classmethod
    def _names_roles(cls, value: RealtimeConfig, info: ValidationInfo) -> RealtimeConfig:
        access: AccessConfig | None = info.data.get("access")
        if access is not None:
            value.verify_roles(access.roles)
            if value.enabled and not access.is_given:
                raise ValueError(
                    "found enabled = true, and nobody could connect; allowed: with a key of tokens,"
                    " api_keys or an anonymous_role under [access]"
                )
        return value

    def own_tables(self) -> frozenset[Relation]:
        """Return the tables that are walstream's, which only routes that name them get."""
        schema = self.dead_letters.schema_name
        return OWN_TABLES | {Relation(schema, table) for table in DEAD_LETTER_TABLES}


def load(file: Path | None = None) -> Config:
    """Read the configuration.

    Args:
        file: a TOML file; None for ``walstream.toml`` in the current folder, if there is one.

    Raises:
        ConfigError: with one sentence for each mistake.
    """
    if file is None and DEFAULT_FILE.is_file():
        file = DEFAULT_FILE
    if file is None:
        return parse({})
    return parse(_read(file), source=str(file))


def parse(content: Mapping[str, Any], *, source: str = "environment") -> Config:
    """Check the content of a configuration file, together with the environment.

    Args:
        content: what TOML gives.
        source: where it came from, for messages.

    Raises:
        ConfigError: with one sentence for each mistake.
    """
    config = None
    problems = []
    try:
        config = Config(**content)
        content = config.model_dump()
    except ValidationError as error:
        problems = _problems(error)
    except SettingsError as error:
        raise ConfigError([f"environment: {error}"], hint="it has to be JSON") from None
    problems += _dangling(content)
    if config is None or problems:
        raise ConfigError([f"{_source(problem, source)}: {problem}" for problem in problems])
    return config


def ignored_variables() -> list[str]:
    """Name the environment variables that look like ours and belong to no section."""
    sections = "|".join(section.upper() for section in Config.model_fields)
    ours = re.compile(rf"{ENV_PREFIX}({sections})(_.*)?")
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith(ENV_PREFIX)
        and not ours.fullmatch(name.upper())
        and not _NOT_CONFIGURATION.fullmatch(name.upper())
    )


def _source(problem: str, source: str) -> str:
    """Name the environment variable that a problem comes from, if there is one of that name."""
    section, _, rest = problem.partition(":")[0].partition(".")
    key = rest.partition(".")[0]
    for name in (f"{ENV_PREFIX}{section}_{key}", f"{ENV_PREFIX}{section}"):
        if name.upper() in os.environ:
            return name.upper()
    return source


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: is not TOML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{file}: is nested too deeply"]) from None


def _dangling(content: Mapping[str, Any]) -> list[str]:
    """Name the routes that lead to a sink that is not there.

    Looked up in what was written, so that these mistakes are told together with the others.
    """
    routes, sinks = content.get("routes"), content.get("sinks") or {}
    if f"{ENV_PREFIX}SINKS" in os.environ and not sinks:
        return []
    if not isinstance(routes, list) or not isinstance(sinks, Mapping):
        return []
    known = ", ".join(sinks) or "none, there is no [sinks.<name>]"
    return [
        f"routes[{index}].to: found {route['to']!r}; allowed: {known}"
        for index, route in enumerate(routes)
        if isinstance(route, Mapping)
        and isinstance(route.get("to"), str)
        and route["to"] not in sinks
    ]


def _problems(error: ValidationError) -> list[str]:
    return [mistakes.problem(detail, keys=_keys, sinks=_SINKS) for detail in error.errors()]


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """List the keys that are allowed at a place, of a sink behind its type."""
    match location:
        case ():
            model: Any = Config
        case ("sinks", _, str(kind)):
            model = _SINKS[kind]
        case (str(section),):
            model = Config.model_fields[section].annotation
        case _:
            model = _inner_model(location)
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner_model(location: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = ColumnsConfig  # of a route, or of a role's table
    match location:
        case ("routes", _):
            model = RouteConfig
        case ("access", "api_keys", _):
            model = ApiKeyConfig
        case ("access", "roles", _):
            model = RoleConfig
        case ("access", "roles", _, "tables", _):
            model = TableConfig
        case ("access", "row_security"):
            model = RowSecurityConfig
        case ("realtime", "private", _):
            model = PrivateConfig
    return model
