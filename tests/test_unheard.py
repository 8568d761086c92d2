"""What is kept for clients by HTTP and reaches nobody is told at the start."""

from __future__ import annotations

from typing import Any

import pytest

from walstream import config
from walstream.cli import streaming
from walstream.errors import ConfigError

REALTIME: dict[str, Any] = {
    "realtime": {"enabled": True},
    "access": {"anonymous_role": "anybody", "roles": {"anybody": {}}},
}
LIVE: dict[str, Any] = {"sinks": {"live": {"type": "live"}}}


class Log:
    """Remembers which warnings were written."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warning(self, event: str, *, hint: str) -> None:
        assert hint
        self.events.append(event)


def test_realtime_for_nobody_is_refused() -> None:
    """Without a key, an API key or an anonymous role nobody could connect."""
    with pytest.raises(ConfigError, match="nobody could connect"):
        config.parse({"realtime": {"enabled": True}})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LIVE, ["live_sink_unheard"]),
        (LIVE | {"http": {"listen": "127.0.0.1:0"}}, []),
        (LIVE | {"journal": {"path": "journal.sqlite3"}}, []),
        ({"journal": {"path": "journal.sqlite3"}}, ["journal_unused"]),
        ({}, []),
        (REALTIME | LIVE, ["live_sink_unheard", "realtime_unheard"]),
        (REALTIME | LIVE | {"http": {"listen": "127.0.0.1:0"}}, []),
        (REALTIME | {"http": {"listen": "127.0.0.1:0"}}, ["realtime_without_changes"]),
    ],
)
def test_it_is_told(
    content: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is."""
    log = Log()
    monkeypatch.setattr(streaming, "log", log)
    streaming.tell_unheard(config.parse(content))
    assert log.events == told
