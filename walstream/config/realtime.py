"""The section ``[realtime]``: clients of Supabase Realtime, and who may enter which channels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from walstream.config.section import Bytes, Seconds, Section
from walstream.topic_patterns import TopicPattern

NonEmpty = Annotated[str, Field(min_length=1)]


class PrivateConfig(Section):
    """Private channels by a pattern of their names: which roles may enter, and which may write.

    To write is to broadcast and to be present. A role that may write and not read has the REST
    endpoint only: to be in a channel it has to read.
    """

    topic: NonEmpty
    read: list[NonEmpty] = []
    write: list[NonEmpty] = []

    @field_validator("topic")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        TopicPattern.parse(value)
        return value

    @model_validator(mode="after")
    def _lets_somebody_in(self) -> Self:
        if not self.read and not self.write:
            raise ValueError("has neither read nor write; allowed: names of roles in one of them")
        return self


class RealtimeConfig(Section):
    """Whether the clients of Supabase Realtime are answered, and how much one of them may do.

    ``max_channels`` and the rates are for one socket, ``max_bindings`` for one channel.
    ``presence_calls`` may come within ``presence_seconds``. Private channels are closed to
    everybody but those whom ``private`` names.
    """

    enabled: bool = False
    public_channels: bool = True
    max_channels: int = Field(100, ge=1)
    max_bindings: int = Field(20, ge=1)
    max_frame_bytes: Bytes = 5_000_000
    max_broadcast_bytes: Bytes = 3_000_000
    max_presence_bytes: Bytes = 64 << 10
    messages_per_second: int = Field(100, ge=1)
    joins_per_second: int = Field(100, ge=1)
    presence_calls: int = Field(5, ge=1)
    presence_seconds: Seconds = 30.0
    refusal_seconds: float = Field(2.0, ge=0, allow_inf_nan=False)
    private: list[PrivateConfig] = []

    @field_validator("max_broadcast_bytes")
    @classmethod
    def _fits_into_a_frame(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_frame_bytes")
        if largest is not None and value > largest:
            raise ValueError(f"found {value}; allowed: up to max_frame_bytes, which is {largest}")
        return value

    def verify_roles(self, known: Collection[str]) -> None:
        """Raise ValueError for a role that there is not."""
        allowed = ", ".join(known) or "none, there is no [access.roles.<name>]"
        for place, one in enumerate(self.private):
            for key, roles in (("read", one.read), ("write", one.write)):
                for role in roles:
                    if role not in known:
                        raise ValueError(
                            f"private[{place}].{key}: found {role!r}; allowed: {allowed}"
                        )
