"""What channels need, without a daemon around it."""

from __future__ import annotations

from typing import Any, Final

from tests.tokens import signed
from walstream import config
from walstream.access import Gate
from walstream.realtime.rooms import Rooms
from walstream.realtime.services import Services
from walstream.realtime.topics import Topics

SECRET: Final = "a secret of thirty-two bytes or more"  # noqa: S105 - of tests


def token(role: str, **claims: Any) -> str:
    return signed(SECRET, role, **{"exp": 4_000_000_000, **claims})


def services(**realtime: Any) -> Services:
    parsed = config.parse(
        {
            "access": {
                "secret": SECRET,
                "roles": {"anon": {}, "authenticated": {}, "service_role": {}},
            },
            "realtime": {
                "enabled": True,
                "private": [
                    {"topic": "user:{claims.sub}", "write": ["authenticated"]},
                    {"topic": "*", "write": ["service_role"]},
                ],
                **realtime,
            },
        }
    )
    return Services(
        hub=lambda: None,
        gate=Gate(parsed.access),
        rooms=Rooms(parsed.realtime),
        topics=Topics(parsed.realtime),
        config=parsed.realtime,
        live=parsed.live,
    )
