"""What is kept for clients by HTTP and reaches nobody is told at the start."""

from __future__ import annotations

from typing import Any

import pytest

from walstream import config
from walstream.cli.streaming import tell_unheard

LIVE: dict[str, Any] = {"sinks": {"live": {"type": "live"}}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LIVE, ["live_sink_unheard"]),
        (LIVE | {"http": {"listen": "127.0.0.1:0"}}, []),
        (LIVE | {"journal": {"path": "journal.sqlite3"}}, []),
        ({"journal": {"path": "journal.sqlite3"}}, ["journal_unused"]),
        ({}, []),
    ],
)
def test_it_is_told(
    content: dict[str, Any], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is."""
    tell_unheard(config.parse(content))
    out = capsys.readouterr().out
    assert [event for event in ("live_sink_unheard", "journal_unused") if event in out] == told
