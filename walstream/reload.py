"""Reloading: which parts of a configuration may change while it is used, and how sinks change.

What is refused is refused whole: either all of the new configuration holds, or none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from walstream.config import Config
from walstream.destinations import Sink
from walstream.errors import ConfigError, SinkFailed, WalstreamError

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.reload")

RELOADABLE: Final = frozenset({"routes", "sinks", "handlers", "masking", "retained_wal", "log"})
"""The sections that may change; of ``handlers`` all but ``app``, whose code is loaded once."""


def verify_reloadable(old: Config, new: Config) -> None:
    """Refuse a configuration that differs in more than can be changed while streaming.

    Raises:
        ConfigError: with one sentence for each section.
    """
    changed = [
        section
        for section in Config.model_fields
        if section not in RELOADABLE and getattr(old, section) != getattr(new, section)
    ]
    if old.handlers.app != new.handlers.app:
        changed.append("handlers.app")
    if changed:
        raise ConfigError(
            [f"{key}: has changed, which takes a restart" for key in changed],
            hint="a reload takes over routes, sinks, masking, retained_wal, log, and how handlers"
            " are tried again; nothing was changed",
        )


async def exchange_sinks(old: Sequence[Sink], new: Sequence[Sink]) -> None:
    """Close the sinks that are gone and open those that are new; what is in both stays open.

    The old ones are closed first: two sinks may not have the same file.

    Raises:
        WalstreamError: a new one cannot be opened; the old ones are open again.
    """
    closed: list[Sink] = []
    opened: list[Sink] = []
    try:
        for sink in old:
            if sink not in new:
                closed.append(sink)
                await sink.close()
        for sink in new:
            if sink not in old:
                await open_sink(sink)
                opened.append(sink)
    except WalstreamError:
        for sink in opened:
            await sink.close()
        for sink in closed:
            await open_sink(sink)
        raise


async def open_sink(sink: Sink) -> None:
    """Open a sink.

    Raises:
        SinkFailed: it cannot be opened.
    """
    try:
        await sink.open()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise SinkFailed(f"sink {sink.name} cannot be opened: {why}") from error
