"""Fuzzing from seeds on, or with the files that libFuzzer's arguments name."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris


def fuzz(target: Callable[[bytes], None], seeds: Sequence[bytes], arguments: Sequence[str]) -> None:
    """Fuzz until it is stopped, something breaks, or as often as the arguments say; then exit."""
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds):
            (Path(folder) / str(number)).write_bytes(seed)
        is_corpus = all(one.startswith("-") for one in arguments)
        atheris.Setup([sys.argv[0], *arguments, *([folder] * is_corpus)], target)
        atheris.Fuzz()
