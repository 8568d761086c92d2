"""``walstream check``: clients of Supabase Realtime."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checks import SLOT, finding, findings
from walstream import config as configuration
from walstream.check import Status
from walstream.config import Config

KEYS = {"api_keys": [{"key": "sb_publishable_of_the_tests", "role": "anon"}]}
SECRET = {"secret": "of-the-tests-alone-and-long-enough"}
OF_SUB = [{"topic": "user:{claims.sub}", "read": ["anon"]}]


def parsed(
    *,
    access: dict[str, Any] = KEYS,
    live: bool = True,
    listen: str | None = "127.0.0.1:0",
    **more: Any,
) -> Config:
    """A configuration with clients; nothing is there to connect to."""
    return configuration.parse(
        {
            "postgres": {"dsn": "host=127.0.0.1 port=1"},
            "slot": SLOT,
            "http": {"listen": listen},
            "routes": [{"table": "*.*", "to": "clients"}],
            "sinks": {"clients": {"type": "live" if live else "stdout"}},
            "access": {"roles": {"anon": {}, "owner": {}}, **access},
            "realtime": {"enabled": True, **more},
        }
    )


async def test_nothing_is_said_where_they_are_not_answered() -> None:
    assert await findings(parsed(enabled=False), "realtime") == []


async def test_it_is_told_where_and_by_what_they_come() -> None:
    found = await finding(parsed(access=KEYS | SECRET), "realtime", "clients")
    assert (found.status, found.found) == (Status.OK, "at 127.0.0.1:0, by one API key, tokens")


@pytest.mark.parametrize("lack", [{"listen": None}, {"live": False}])
async def test_clients_that_cannot_come_or_get_no_changes_are_a_warning(
    lack: dict[str, Any],
) -> None:
    found = await finding(parsed(**lack), "realtime", "clients")
    assert found.status is Status.WARNING


@pytest.mark.parametrize(
    "rule", [OF_SUB[0], {"topic": "room:*", "write": ["owner"]}], ids=["claim", "role"]
)
async def test_a_rule_that_fits_nobody_without_tokens_is_a_warning(rule: dict[str, Any]) -> None:
    rules = [{"topic": "news", "read": ["anon"]}, rule]
    found = await finding(parsed(private=rules), "realtime", "private")
    assert found.status is Status.WARNING
    assert rule["topic"] in found.found
    assert "news" not in found.found


@pytest.mark.parametrize(
    "config",
    [parsed(private=OF_SUB, access=SECRET), parsed(private=[{"topic": "*", "read": ["anon"]}])],
    ids=["tokens", "keys"],
)
async def test_rules_that_fit_somebody_are_well(config: Config) -> None:
    found = await finding(config, "realtime", "private")
    assert (found.status, found.found) == (Status.OK, "one rule")


async def test_private_channels_alone_and_no_rule_are_a_warning() -> None:
    found = await finding(parsed(public_channels=False), "realtime", "private")
    assert found.status is Status.WARNING
