"""Options that several commands share, and the configuration that they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import structlog
import typer

from walstream import config as configuration
from walstream.config import Config

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.cli")

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE",
        help="Configuration file. Without it walstream.toml in the current folder, if there is one,"
        " and WALSTREAM_... environment variables.",
    ),
]
Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="DSN",
        help="Connection string, instead of the configuration's. Passwords are better kept in"
        " ~/.pgpass or PGPASSWORD.",
    ),
]


def load_config(file: Path | None, dsn: str | None) -> Config:
    """Read the configuration; a DSN of the command line takes the place of its own.

    Raises:
        ConfigError: with one sentence for each mistake.
    """
    settings = configuration.load(file)
    if dsn is None:
        return settings
    database = configuration.PostgresConfig.declared(
        "--dsn", dsn=dsn, application_name=settings.postgres.application_name
    )
    return settings.model_copy(update={"postgres": database})


def tell_ignored_environment() -> None:
    """Warn of variables that look like configuration and are none; their values may be secrets."""
    for variable in configuration.ignored_variables():
        log.warning("environment_ignored", variable=variable)
