"""Logging to stderr: a terminal gets colours, anything else one JSON object a line.

The standard output carries data only. Events have constant names; no row value, connection string
or token is ever among their keys.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Literal

import structlog

Format = Literal["auto", "console", "json"]


def configure(level: str = "info", log_format: Format = "auto") -> None:
    """Set up structlog for the process.

    Args:
        level: the lowest level that is written.
        log_format: ``auto`` is ``console`` when stderr is a terminal, ``json`` otherwise.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor
    if console:
        # No local variables in tracebacks: they hold rows.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer(sort_keys=False, separators=(",", ":"))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _in_order,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # What psycopg warns about is told by our own events; as bare lines it would tear the JSON.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())


def type_and_place(error: BaseException) -> str:
    """Name an exception without its text, which may have anything in it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _in_order(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Put first what every line has."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return {**first, **event}
