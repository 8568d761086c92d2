"""The sections of what clients see by HTTP: ``[http]``, ``[live]`` and ``[journal]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from walstream.config.section import Bytes, Seconds, Section

_ORIGIN: Final = re.compile(
    r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]*]+)(:\d{1,5})?|null|\*", re.IGNORECASE
)
_HOST: Final = re.compile(r"\[?[0-9a-fA-F:]*:[0-9a-fA-F:.]*\]?|[^\s:/?#@\[\]*]+|\*")


class HttpConfig(Section):
    """Where health, metrics and changes are answered by HTTP; nowhere without it.

    ``cors_origins`` are the origins whose pages may read the answers, as browsers write them, or
    ``*``. ``hosts`` are names that a request may ask for besides the address itself, without port,
    or ``*`` for any. ``max_connections`` bounds all but health and metrics.
    """

    listen: str | None = Field(None, pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s\[\]]+):\d{1,5}$")
    max_connections: int = Field(10_000, ge=1)
    cors_origins: list[str] = []
    hosts: list[str] = []

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for one in value:
            if not _ORIGIN.fullmatch(one):
                raise ValueError(
                    f"found {one!r}; allowed: https://app.example.org, without path and with the"
                    " port when the address has one, 'null' for pages from files, or '*'"
                )
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: list[str]) -> list[str]:
        for one in value:
            if not _HOST.fullmatch(one):
                raise ValueError(
                    f"found {one!r}; allowed: a name such as changes.example.org or an address,"
                    " without scheme and port, or '*'"
                )
        return value


class LiveSinkConfig(Section):
    """Clients by HTTP: what its routes keep is what clients may ask for."""

    type: Literal["live"]


class LiveConfig(Section):
    """What a client may ask for, and how much waits for it.

    ``recent_changes`` and ``recent_bytes`` bound what is kept in memory for clients that come back,
    where there is no journal.
    """

    max_subscriptions: int = Field(20, ge=1)
    max_filter_bytes: int = Field(4096, ge=1)
    max_queue_bytes: Bytes = 1 << 20
    recent_changes: int = Field(10_000, ge=0)
    recent_bytes: Bytes = 32 << 20
    heartbeat_seconds: Seconds = 15.0
    retry_seconds: Seconds = 2.0
    compress: bool = False


class JournalConfig(Section):
    """The changes that clients can ask for again: where, how many, for how long.

    ``max_bytes`` bounds the file with its ``-wal``. With ``durable`` a change is on disk before the
    slot moves.
    """

    path: Path | None = None
    max_bytes: Annotated[Bytes, Field(ge=1 << 20)] = 1 << 30
    max_age_seconds: Seconds = 7 * 86400.0
    durable: bool = False

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        given = [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]
        if self.path is None and given:
            raise ValueError(f"{given[0]} is given, and no path: without one there is no journal")
        return self
