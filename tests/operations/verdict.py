"""What a run of faults must have left: everything, in order, and no position ahead of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.oracle import Record, assert_same, expected_lines
from tests.stages import end_lsn
from walstream.lsn import Lsn

RELEVANT: Final = frozenset("IUDT")


class Look(NamedTuple):
    """A position of the slot, and how much had been written into the files by then."""

    confirmed: Lsn
    size_bytes: int


class Written(NamedTuple):
    """A line of a sink's files: of which change, what it says, and where it ends."""

    identity: str
    text: str
    end: int


class Expected(NamedTuple):
    """What must have come, in commit order."""

    texts: list[str]
    ids: list[str]
    places: dict[str, int]
    begins: set[int]


def expected_of(records: Iterable[Record]) -> Expected:
    """Read what must come from the records that pg_recvlogical saw."""
    lines = [_plain(line) for line in expected_lines(records)]
    ids = [line["id"] for line in lines]
    transactions = [identity.partition(":")[0] for identity in ids]
    begins = {
        place
        for place, transaction in enumerate(transactions)
        if place == 0 or transactions[place - 1] != transaction
    }
    places = {identity: place for place, identity in enumerate(ids)}
    return Expected([json.dumps(line) for line in lines], ids, places, begins)


def written(paths: Sequence[Path]) -> list[Written]:
    """Read the files of a sink, the oldest first."""
    found = []
    end = 0
    for path in paths:
        content = path.read_bytes()
        assert content.endswith(b"\n") or not content, f"{path} ends within a line"
        for line in content.splitlines(keepends=True):
            end += len(line)
            plain = _plain(json.loads(line, parse_float=str))
            found.append(Written(plain["id"], json.dumps(plain), end))
    return found


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """Leave out what walstream looks up: a partition's root may be dropped by then."""
    line.pop("root", None)
    return line


def assert_all_there(lines: Sequence[Written], expected: Expected) -> None:
    """Nothing is missing, nothing is unknown, each is as it must be, and repeats are equal."""
    first: dict[str, str] = {}
    for line in lines:
        assert first.setdefault(line.identity, line.text) == line.text, "a repeat differs"
    assert_same([*first.values()], expected.texts)


def assert_goes_on(name: str, ids: Sequence[str], expected: Expected) -> int:
    """From one change to the next one, or back, but never ahead; return how often back."""
    back = 0
    previous = -1
    for number, identity in enumerate(ids):
        place = expected.places.get(identity)
        assert place is not None, f"{name}: {identity} is unknown"
        assert place <= previous + 1, (
            f"{name}, number {number}: {place - previous - 1} changes are missing before {identity}"
        )
        back += place <= previous
        previous = place
    assert len(set(ids)) == len(expected.ids), (
        f"{name}: {len(expected.ids) - len(set(ids))} of {len(expected.ids)} are missing"
    )
    return back


def assert_comes_again_from_the_begin(lines: Sequence[Written], expected: Expected) -> None:
    """What comes again after a fault comes from the begin of its transaction on."""
    previous = -1
    for line in lines:
        place = expected.places[line.identity]
        assert place == previous + 1 or place in expected.begins, (
            f"{line.identity} came again without the changes before it in its transaction"
        )
        previous = place


def assert_never_ahead(looks: Iterable[Look], lines: Sequence[Written], expected: Expected) -> int:
    """When a position was read, all before it had been written; return how often it went back."""
    back = 0
    reached = -1  # all up to this place were in the files
    number = 0
    last = Lsn(0)
    for look in looks:
        while number < len(lines) and lines[number].end <= look.size_bytes:
            reached = max(reached, expected.places[lines[number].identity])
            number += 1
        if reached + 1 < len(expected.ids):
            missing = expected.ids[reached + 1]
            assert look.confirmed < end_lsn(missing), (
                f"{look.confirmed} was confirmed before {missing} was written"
            )
        back += look.confirmed < last
        last = look.confirmed
    return back
