"""Questions about row security that came to nothing: counted, and each kind logged now and then.

The server's own text is not logged where it may hold a value of a row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Hashable
from typing import Final

import psycopg
import structlog

from walstream.access.readers import Persona
from walstream.changes import Relation
from walstream.errors import WalstreamError

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.access")

LOG_SECONDS: Final = 60.0
"""A failure of one kind is logged so often at most."""

MAX_KINDS: Final = 1000


class Failures:
    """Counts and logs them."""

    def __init__(self) -> None:
        self.count = 0
        self._logged: dict[Hashable, float] = {}

    def note(self, persona: Persona, relation: Relation, error: Exception) -> None:
        """Note a question that was not answered."""
        if isinstance(error, psycopg.Error):
            self._note(persona, relation, error.sqlstate or "", *_told(error))
        elif isinstance(error, WalstreamError):
            self._note(persona, relation, "", error.message, error.hint)

    def note_unaskable(self, persona: Persona, relation: Relation) -> None:
        """Note rows that cannot be asked about."""
        self._note(
            persona,
            relation,
            "",
            "the table has no primary key, or what comes of it does not carry it as it is",
            "give it a primary key, and let the routes pass its columns on unmasked",
        )

    def _note(
        self, persona: Persona, relation: Relation, sqlstate: str, error: str, hint: str
    ) -> None:
        self.count += 1
        kind, now = (persona.postgres_role, relation, sqlstate or error), time.monotonic()
        if now - self._logged.get(kind, float("-inf")) < LOG_SECONDS:
            return
        if len(self._logged) >= MAX_KINDS:
            self._logged.clear()
        self._logged[kind] = now
        log.warning(
            "row_security_failed",
            relation=str(relation),
            postgres_role=persona.postgres_role,
            sqlstate=sqlstate,
            error=error,
            hint=hint,
        )


def _told(error: psycopg.Error) -> tuple[str, str]:
    """Say what is wrong, and what mends it."""
    state, text = error.sqlstate or "", error.diag.message_primary or ""
    if state == "57014":
        hint = "what policies look up may need an index; or raise timeout_seconds"
        return "there was no answer in time", hint
    if error.diag.context is not None:  # it comes out of a function, whose words may hold values
        return type(error).__name__, "a function that a policy calls raises this"
    if _OF_ROLE.fullmatch(text):
        return text, "the role of [access.row_security] has to be granted the role of the readers"
    if state.startswith("42"):  # names and rights
        return text, "GRANT SELECT on the table to that role, on all columns that [access] lets it"
    return type(error).__name__, "a policy raises this for a row"


_OF_ROLE: Final = re.compile(r'permission denied to set role ".*"|role ".*" does not exist')
