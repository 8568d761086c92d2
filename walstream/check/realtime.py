"""Clients of Supabase Realtime: how they come, what they get, and who may enter channels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from walstream.check.findings import Outcome, ok, warning
from walstream.check.routes import listed
from walstream.check.site import Question, Site
from walstream.config.access import AccessConfig
from walstream.config.realtime import PrivateConfig
from walstream.placeholders import ClaimPath
from walstream.topic_patterns import TopicPattern


async def _clients(site: Site) -> Outcome | None:
    config = site.config
    if not config.realtime.enabled:
        return None
    if config.http.listen is None:
        return warning(
            "nothing listens: only a program of one's own that serves Walstream.http_app lets"
            " clients in",
            "-- set listen under [http]",
        )
    live = {name for name, sink in config.sinks.items() if sink.type == "live"}
    if not any(route.to in live for route in config.routes):
        return warning(
            "no [[routes]] leads to a sink of type live: clients have broadcasts and presence only",
            '-- route tables to a sink of type = "live"',
        )
    return ok(f"at {config.http.listen}, {_ways_in(config.access)}")


def _ways_in(access: AccessConfig) -> str:
    count = len(access.api_keys)
    ways = [
        f"{count} API keys" if count > 1 else "one API key" if count else "",
        "tokens" if access.key_name is not None else "",
        "or without any" if access.anonymous_role is not None else "",
    ]
    return f"by {', '.join(filter(None, ways))}"


async def _private(site: Site) -> Outcome | None:
    """Look for rules that fit nobody: without tokens there are no claims, and few roles."""
    config = site.config
    rules = config.realtime.private
    if not config.realtime.enabled:
        return None
    if not rules:
        if config.realtime.public_channels:
            return None
        return warning(
            "there are only private channels, and nobody may enter one",
            "-- write [[realtime.private]], or set public_channels = true under [realtime]",
        )
    if config.access.key_name is None:
        useless = [one.topic for one in rules if not _fits_somebody(one, _roles(config.access))]
        if useless:
            return warning(
                f"{listed(useless)}: there is nothing to verify tokens with, and without a token"
                " nobody has these claims or roles",
                "-- set secret, jwks_url, jwks_file or public_key_file under [access]",
            )
    return ok(f"{len(rules)} rules" if len(rules) > 1 else "one rule")


def _roles(access: AccessConfig) -> set[str | None]:
    """Return the roles that somebody without a token may have."""
    return {access.anonymous_role, *(one.role for one in access.api_keys)}


def _fits_somebody(rule: PrivateConfig, roles: Collection[str | None]) -> bool:
    parts = TopicPattern.parse(rule.topic).parts
    needs_claims = any(isinstance(part, ClaimPath) for part in parts)
    return not needs_claims and any(role in roles for role in (*rule.read, *rule.write))


QUESTIONS: Final = (
    Question("realtime", "clients", _clients),
    Question("realtime", "private", _private),
)
