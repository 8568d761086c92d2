"""Patterns of the names of channels.

    room:*
    user:{claims.sub}
    team:{claims.app_metadata.teams}:*

``*`` stands for any text, also none. A placeholder stands for the claim of whoever comes, as it is:
a ``*`` in a claim means itself. Of a list each element counts. A claim that is missing, empty, or
no text or whole number fits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

import msgspec

from walstream.placeholders import ClaimPath

_PART: Final = re.compile(r"(\*+)|\{claims\.([^{}]+)\}|([^*{}]+)")

_ANY: Final = None


class TopicPattern(msgspec.Struct, frozen=True):
    """Texts, placeholders, and None for any text."""

    parts: tuple[str | ClaimPath | None, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a pattern.

        Raises:
            ValueError: a brace is no placeholder's.
        """
        parts: list[str | ClaimPath | None] = []
        position = 0
        while matched := _PART.match(text, position):
            stars, path, plain = matched.groups()
            if path is not None:
                parts.append(ClaimPath.parse(path))
            else:
                parts.append(plain if stars is None else _ANY)
            position = matched.end()
        if position != len(text):
            raise ValueError(
                f"found {text!r}; allowed: a name, with * for any text and placeholders for claims"
                " such as {claims.sub}"
            )
        return cls(tuple(parts))

    def fits(self, name: str, claims: Mapping[str, Any]) -> bool:
        """Whether the pattern means this name, for whoever has these claims."""
        # All places are kept at which the rest may begin: no claim makes this take long.
        places = {0}
        for part in self.parts:
            if part is _ANY:
                places = set(range(min(places), len(name) + 1))
                continue
            texts = [part] if isinstance(part, str) else list(_texts(part.find(claims)))
            places = {
                place + len(text)
                for text in texts
                for place in places
                if name.startswith(text, place)
            }
            if not places:
                return False
        return len(name) in places


def _texts(claim: object) -> Iterator[str]:
    for one in claim if isinstance(claim, list) else [claim]:
        if isinstance(one, str) and one:
            yield one
        elif isinstance(one, int) and not isinstance(one, bool):
            yield str(one)
