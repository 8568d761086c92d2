"""Errors say who must act and what to do."""

from __future__ import annotations

import re

from walstream import errors
from walstream.backoff import Backoff
from walstream.errors import ConfigError, SlotBusy, WalstreamError


def test_an_error_prints_its_message_and_its_hint() -> None:
    assert str(SlotBusy("found", hint="do")) == "found\nhint: do"
    assert str(SlotBusy("found")) == "found"


def test_a_config_error_keeps_its_problems_apart() -> None:
    error = ConfigError(["one", "two"])
    assert (error.problems, str(error)) == (["one", "two"], "one\ntwo")


def test_every_error_has_one_of_the_documented_exit_codes() -> None:
    kinds = [WalstreamError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds} == {64, 70, 75, 78}


def test_the_tree_shows_every_error_below_its_parent() -> None:
    drawn: dict[str, str] = {}
    way = ["WalstreamError"]
    for branch, name in re.findall(r"^    ([│ ]*[├└]── )(\w+)", errors.__doc__ or "", re.MULTILINE):
        way = [*way[: len(branch) // 4], name]
        drawn[name] = way[-2]
    kinds = [WalstreamError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = [kind for kind in kinds[1:] if kind.__module__ == errors.__name__]
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in ours if kind.__base__}


def test_pauses_double_up_to_the_longest() -> None:
    """Less up to half by chance; however long an outage lasts."""
    backoff = Backoff(first_seconds=1.0, longest_seconds=5.0)
    for failures, longest in enumerate([1, 2, 4, 5, 5], 1):
        assert longest / 2 <= backoff.pause_seconds(failures) <= longest
    assert backoff.pause_seconds(5_000) <= 5
