"""The slot: whether it can be streamed from, where it stands, and the WAL that it retains."""

from __future__ import annotations

from typing import Final

from walstream.check.findings import Outcome, literal, ok, problem, skipped, warning
from walstream.check.site import Question, Site
from walstream.errors import SlotBusy, SlotLost, SlotMissing, SlotUnfit
from walstream.slots import PLUGIN, slot_status, usable_slot


async def _state(site: Site) -> Outcome:
    name = site.slot_name
    try:
        status = await slot_status(site.catalog, name)
    except SlotMissing as missing:
        if site.config.slot.create:
            return ok(f"{name} does not exist yet, the first start creates it")
        return problem(missing.message, _create(name))
    site.slot_exists = True
    try:
        await usable_slot(site.catalog, name)
    except SlotUnfit as unfit:
        return problem(unfit.message, unfit.hint)
    except SlotLost as lost:
        return problem(lost.message, _create_again(name))
    except SlotBusy:
        return ok(f"{name} is in use by {status.holder}")
    return ok(f"{name} is there, nobody streams from it")


async def _position(site: Site) -> Outcome:
    """Compare the slot with the server, which stores a position that it has not reached itself."""
    status = await slot_status(site.catalog, site.slot_name)
    if status.confirmed_flush_lsn is None or status.lag_bytes is None:
        return skipped("the slot has none")
    if status.lag_bytes < 0:
        return problem(
            f"{status.confirmed_flush_lsn} is beyond the server's own: until it is there, no change"
            " is sent",
            _create_again(site.slot_name),
        )
    return ok(f"{status.confirmed_flush_lsn}, {_size(status.lag_bytes)} behind the server's")


async def _retained_wal(site: Site) -> Outcome:
    status = await slot_status(site.catalog, site.slot_name)
    if status.retained_wal_bytes is None:
        return skipped("the slot retains none")
    found = f"{_size(status.retained_wal_bytes)}, wal_status {status.wal_status}"
    match status.wal_status:
        case "unreserved":
            return warning(
                f"{found}: the slot is about to be lost",
                "start walstream now, or raise max_slot_wal_keep_size",
            )
        case "extended":
            return warning(f"{found}: more than max_wal_size", "start walstream")
        case _:
            return ok(found)


def _create_again(name: str) -> str:
    return f"SELECT pg_drop_replication_slot({literal(name)});\n{_create(name)}"


def _create(name: str) -> str:
    return f"SELECT pg_create_logical_replication_slot({literal(name)}, '{PLUGIN}');"


def _size(size_bytes: int) -> str:
    scaled = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if scaled < 1024:  # noqa: PLR2004 - binary units under the names that Postgres gives them
            return f"{scaled:.0f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} GB"


QUESTIONS: Final = (
    Question("slot", "state", _state, ("catalog",)),
    Question("slot", "position", _position, ("catalog", "slot")),
    Question("slot", "retained WAL", _retained_wal, ("catalog", "slot")),
)
