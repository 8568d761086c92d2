"""What is different where the server is a standby (PostgreSQL 16 and later)."""

from __future__ import annotations

from typing import Final

from psycopg import sql

from walstream.check.findings import Outcome, ok, set_to, warning
from walstream.check.site import Question, Site


async def _feedback(site: Site) -> Outcome | None:
    """Without it the primary removes rows of its catalog that the slot needs, and it is lost."""
    ((in_recovery, feedback, slot_name),) = await site.catalog.rows(_STANDBY)
    if not in_recovery:
        return None
    if not feedback:
        return warning(
            "off: the primary's vacuum removes what the slot needs, and it is lost",
            *set_to("hot_standby_feedback", "on"),
        )
    if not slot_name:
        return warning(
            "on, but forgotten while this standby is not connected: it has no slot at the primary",
            "-- make a physical slot there, and set primary_slot_name here",
        )
    return ok(f"on, and kept by the primary's slot {slot_name}")


async def _meaning(site: Site) -> Outcome | None:
    ((in_recovery, _, _),) = await site.catalog.rows(_STANDBY)
    if not in_recovery:
        return None
    return ok(
        "changes come when the standby has replayed them; a new slot waits for the primary (SELECT"
        " pg_log_standby_snapshot() there)"
    )


QUESTIONS: Final = (
    Question("standby", "decoding", _meaning, ("catalog",)),
    Question("standby", "hot_standby_feedback", _feedback, ("catalog",)),
)

_STANDBY: Final = sql.SQL(
    """
    SELECT pg_is_in_recovery(),
           current_setting('hot_standby_feedback')::boolean,
           current_setting('primary_slot_name', true)
    """
)
