"""What the sections of the configuration are made of: sizes, times, secrets from files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema

from walstream import mistakes, postgres
from walstream.errors import ConfigError

MASKING_KEY: Final = "masking.key"

Seconds = Annotated[float, Field(gt=0)]

_UNITS: Final = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def in_bytes(value: object) -> object:
    """Read a size as Postgres' settings do, whose units are powers of 1,024."""
    if not isinstance(value, str):
        return value
    matched = re.fullmatch(r"(\d+)\s*(B|kB|MB|GB|TB)?", value.strip())
    if matched is None:
        raise ValueError(f"found {value!r}; allowed: bytes, or a size such as '512MB' or '50GB'")
    return int(matched[1]) * _UNITS[matched[2] or "B"]


_BYTES_SCHEMA: Final = {
    "anyOf": [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*\d+\s*(B|kB|MB|GB|TB)?\s*$"},
    ]
}

Bytes = Annotated[
    int, BeforeValidator(in_bytes), Field(gt=0), WithJsonSchema(_BYTES_SCHEMA, mode="validation")
]


class Section(BaseModel):
    """A table of the configuration file: it has no other keys, and what is wrong is not shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def read_secret(key: str, value: SecretStr | None, file: Path | None) -> str | None:
    """Return a secret that is given by itself or by a file.

    Raises:
        ConfigError: it is given twice, or the file cannot be read.
    """
    if value is not None and file is not None:
        raise ConfigError([f"{key}: is given twice, as {key} and as {key}_file"])
    if value is not None:
        return value.get_secret_value()
    if file is None:
        return None
    shown = mistakes.shown_path(file)
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError([f"{key}_file: {shown} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        problem = f"{key}_file: {shown} is not text in UTF-8"
        hint = (
            "a key may be any text, such as openssl rand -hex 32 gives"
            if key == MASKING_KEY
            else ""
        )
        raise ConfigError([problem], hint=hint) from None
    except ValueError:  # a NUL in its name
        raise ConfigError([f"{key}_file: {shown!r} is not a path"]) from None
    try:
        if key.endswith("dsn"):
            postgres.check_dsn(text)
    except ValueError as error:
        raise ConfigError([f"{key}_file: {shown} {error}"]) from None
    return text
