"""wal2json: whether the server allows it, has it, and what this version of it can say."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final

import psycopg
from psycopg import sql

from walstream.check.findings import (
    Outcome,
    identifier,
    in_words,
    literal,
    ok,
    problem,
    set_to,
    skipped,
    warning,
)
from walstream.check.server import ALLOWED_PLUGINS, GUARDED_MINORS
from walstream.check.site import Question, Site
from walstream.check.transactions import blockers, ends_of, listed
from walstream.decoder import START_OPTIONS
from walstream.errors import (
    AccessRefused,
    ConnectionLost,
    PluginMissing,
    PluginRefused,
    PluginTooOld,
    SlotCreationBlocked,
    SlotMissing,
    WalstreamError,
)
from walstream.slots import PLUGIN, create_slot, slot_status

PROBE_WAIT_SECONDS: Final = 1
"""How long the temporary slot waits for running transactions before that is what is reported."""

FINISH_SECONDS: Final = 5.0
"""How long the server gets to end the stream that was only a question."""


async def _allowed(site: Site) -> Outcome:
    try:
        ((setting, version),) = await site.catalog.rows(_PLUGIN_LIBRARIES)
    except (AccessRefused, psycopg.errors.InsufficientPrivilege):
        return skipped(
            "output_plugin_libraries is there, and only superusers and members of"
            " pg_read_all_settings may read it",
            f"GRANT pg_read_all_settings TO {identifier(site.catalog_user)};",
        )
    if setting is None:
        major = version // 10_000
        later = f"; from {major}.{GUARDED_MINORS[major]} on not" if major in GUARDED_MINORS else ""
        return ok(f"this server allows every output plugin{later}")
    libraries = [name.strip(' "') for name in setting.split(",") if name.strip()]
    if PLUGIN in libraries:
        return ok(f"output_plugin_libraries is {setting}")
    # SET replaces the list: keep what is in it.
    return problem(
        f"output_plugin_libraries is {setting or 'empty'}, without {PLUGIN}",
        *set_to("output_plugin_libraries", ", ".join(map(literal, [*libraries, PLUGIN]))),
    )


async def _installed(site: Site) -> Outcome:
    """Make a slot to see: the server keeps no list of the output plugins that it has."""
    if site.links["replication"].in_recovery:
        return await _installed_on_standby(site)
    try:
        await _make_probe(site)
    except PluginMissing as missing:
        return problem(missing.message, f"$ {_install(site)}", *in_words(missing.hint))
    except PluginRefused as refused:
        return problem(
            refused.message,
            "-- with what else is in the list:",
            *set_to("output_plugin_libraries", ALLOWED_PLUGINS),
        )
    except SlotCreationBlocked as blocked:
        return await _blocked(site, blocked)
    except ConnectionLost:
        raise
    except WalstreamError as error:
        return skipped(f"cannot be tried: {error.message}")
    return ok("the server makes slots for it")


async def _installed_on_standby(site: Site) -> Outcome:
    """Do not make one: that waits for the primary, for 15 seconds or for ever."""
    try:
        status = await slot_status(site.catalog, site.slot_name)
    except SlotMissing:
        return skipped(
            "cannot be tried on a standby: it makes a slot only when the primary says which"
            " transactions run",
            "-- while walstream slot create waits, on the primary: SELECT"
            " pg_log_standby_snapshot()",
        )
    if status.plugin != PLUGIN:
        return skipped("cannot be tried on a standby")
    return ok("there is a slot for it")


async def _blocked(site: Site, blocked: SlotCreationBlocked) -> Outcome:
    """Name who does not end, which a slot that is there already need not wait for."""
    found = await blockers(site)
    if not found:
        return ok("the server makes slots for it, once transactions have ended that ran just now")
    return warning(
        f"{blocked.message.partition(':')[0]}: {listed(found)}", *await ends_of(site, found)
    )


async def _version(site: Site) -> Outcome:
    """Start a stream with what each version has brought: it does not tell its number."""
    try:
        await _start_probe(site, {**START_OPTIONS, "numeric-data-types-as-string": "1"})
    except PluginTooOld:
        await _make_probe(site)  # the error has ended the session's temporary slot
    else:
        return ok("2.6 or later")
    try:
        await _start_probe(site, START_OPTIONS)
    except PluginTooOld as too_old:
        return problem(too_old.message, f"$ {_install(site)}", *in_words(too_old.hint))
    return warning(
        "before 2.6: NaN and infinity in float and numeric columns arrive as null",
        "-- install wal2json 2.6 or later on the server; no restart is needed",
    )


async def _make_probe(site: Site) -> None:
    name = f"walstream_check_{secrets.token_hex(8)}"
    await create_slot(
        site.replication, site.catalog, name, temporary=True, wait_seconds=PROBE_WAIT_SECONDS
    )
    site.probe_slot = name


async def _start_probe(site: Site, options: Mapping[str, str]) -> None:
    """Start to stream and end at once; after that the connection is of no further use."""
    await site.replication.start(site.probe_slot, options)
    try:
        async with asyncio.timeout(FINISH_SECONDS):
            await site.replication.finish()
    except (TimeoutError, WalstreamError):
        pass  # it did start, and that was the question


def _install(site: Site) -> str:
    version = site.walsender.major if site.walsender else "<version>"
    return f"apt-get install postgresql-{version}-wal2json"


QUESTIONS: Final = (
    Question("wal2json", "allowed", _allowed, ("catalog",)),
    Question("wal2json", "installed", _installed, ("catalog", "replication")),
    Question("wal2json", "version", _version, ("replication", "probe")),
)

_PLUGIN_LIBRARIES: Final = sql.SQL(
    """
    SELECT current_setting('output_plugin_libraries', true),
           current_setting('server_version_num')::int
    """
)
