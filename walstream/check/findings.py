"""What checks come to: findings, and the report of all of them."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from psycopg import sql

from walstream.errors import EX_CONFIG, EX_OK, EX_TEMPFAIL, Unavailable, WalstreamError


class Status(StrEnum):
    """What a check comes to, the gravest last. What is ``unreachable`` may be there later."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    UNREACHABLE = "unreachable"
    PROBLEM = "problem"


class Outcome(msgspec.Struct, frozen=True):
    """The answer to one question; ``mend`` is SQL, a command, or what to do, one a line."""

    status: Status
    found: str
    mend: str = ""


class Finding(msgspec.Struct, frozen=True):
    """One line of the report: an outcome, and what was asked."""

    group: str
    name: str
    status: Status
    found: str
    mend: str

    @classmethod
    def of(cls, group: str, name: str, outcome: Outcome) -> Finding:
        """Put an outcome under its heading."""
        return cls(group, name, outcome.status, outcome.found, outcome.mend)


class Report(msgspec.Struct, frozen=True):
    """All findings, in the order in which they are best read."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The gravest of all; what was skipped counts by the reason, which has its own finding."""
        asked = [found.status for found in self.findings if found.status is not Status.SKIPPED]
        return max(asked, key=list(Status).index, default=Status.OK)

    @property
    def exit_code(self) -> int:
        """What the command exits with: warnings are allowed."""
        match self.status:
            case Status.PROBLEM:
                return EX_CONFIG
            case Status.UNREACHABLE:
                return EX_TEMPFAIL
            case _:
                return EX_OK

    def to_json(self) -> bytes:
        """Return the report as one JSON object."""
        return msgspec.json.encode({"status": self.status, "findings": self.findings})


def ok(found: str) -> Outcome:
    """As it should be."""
    return Outcome(Status.OK, found)


def skipped(reason: str) -> Outcome:
    """Could not be asked, or has no meaning here."""
    return Outcome(Status.SKIPPED, reason)


def warning(found: str, mend: str = "") -> Outcome:
    """Streaming works, until it does not."""
    return Outcome(Status.WARNING, found, mend)


def problem(found: str, mend: str = "") -> Outcome:
    """Streaming does not start, or changes never arrive."""
    return Outcome(Status.PROBLEM, found, mend)


def failed(error: WalstreamError) -> Outcome:
    """The error that answered in place of the server."""
    status = Status.UNREACHABLE if isinstance(error, Unavailable) else Status.PROBLEM
    return Outcome(status, error.message, error.hint)


def identifier(*names: str) -> str:
    """Quote a name for the SQL that mends something; several are joined by dots."""
    return sql.Identifier(*names).as_string()


def literal(text: str) -> str:
    """Quote a string for the SQL that mends something."""
    return sql.Literal(text).as_string()
