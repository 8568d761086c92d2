"""What checks come to: findings, and the report of all of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

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
    """The answer to one question.

    ``mend`` is one step a line: SQL that ends in ``;``, for a superuser in the database; a command
    behind ``$ ``, for a shell where walstream runs; what to do in words behind ``-- ``. Done from
    top to bottom they make the answer ``ok``.
    """

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


RELOAD: Final = "SELECT pg_reload_conf();"
RESTART: Final = "-- then restart the server"


def ok(found: str) -> Outcome:
    """As it should be."""
    return Outcome(Status.OK, found)


def skipped(reason: str, *mend: str) -> Outcome:
    """Could not be asked, or has no meaning here."""
    return Outcome(Status.SKIPPED, reason, "\n".join(mend))


def warning(found: str, *mend: str) -> Outcome:
    """Streaming works, until it does not."""
    return Outcome(Status.WARNING, found, "\n".join(mend))


def unreachable(found: str, *mend: str) -> Outcome:
    """Not there now, and perhaps later."""
    return Outcome(Status.UNREACHABLE, found, "\n".join(mend))


def problem(found: str, *mend: str) -> Outcome:
    """Streaming does not start, or changes never arrive."""
    return Outcome(Status.PROBLEM, found, "\n".join(mend))


def failed(error: WalstreamError) -> Outcome:
    """The error that answered in place of the server."""
    answer = unreachable if isinstance(error, Unavailable) else problem
    return answer(error.message, *in_words(error.hint))


def in_words(hint: str) -> list[str]:
    """Write an error's hint as a step, if there is one."""
    return [f"-- {line}" for line in hint.splitlines()]


def set_to(setting: str, value: str) -> list[str]:
    """Write the steps that give a setting a value, which may be a list of literals."""
    return [f"ALTER SYSTEM SET {setting} = {value};", RELOAD]


def identifier(*names: str) -> str:
    """Quote a name for the SQL that mends something; several are joined by dots."""
    return sql.Identifier(*names).as_string()


def literal(text: str) -> str:
    """Quote a string for the SQL that mends something."""
    return sql.Literal(text).as_string()


def size(size_bytes: float) -> str:
    """Write a number of bytes with the unit that Postgres would take."""
    scaled = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if scaled < 1024:  # noqa: PLR2004 - binary units under the names that Postgres gives them
            return f"{scaled:.0f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} GB"


def duration(seconds: float) -> str:
    """Write a duration by its largest unit."""
    for length, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds:.0f} s"
