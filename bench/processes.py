"""Running the processes that are measured.

A process of ours is a module of this package. It reads a job from its standard input and writes
what it measured to its standard output, both as JSON.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

_ROOT: Final = Path(__file__).parent.parent

TIMEOUT_SECONDS: Final = 600.0
"""After this long a process hangs, and the benchmark with it."""

Measured = TypeVar("Measured")


class Usage(msgspec.Struct, frozen=True):
    """What a process took, from its start to its end; ``cpu_seconds`` is user and system time."""

    seconds: float
    cpu_seconds: float


class Worker:
    """A module of this package that runs as a process of its own."""

    def __init__(self, module: str, job: msgspec.Struct) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=_environment({}),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(job))
        self._process.stdin.close()
        self._process.stdin = None

    def result(self, kind: type[Measured]) -> Measured:
        """Wait until it ends, and return what it measured."""
        try:
            output, _ = self._process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
        assert self._process.returncode == 0, f"{self._process.args!r} failed"
        return msgspec.json.decode(output, type=kind)


def read_job(kind: type[Measured]) -> Measured:
    """Return the job that this process was started for."""
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)


def write_result(result: msgspec.Struct) -> None:
    """Hand over what this process measured."""
    sys.stdout.buffer.write(msgspec.json.encode(result))


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run a program that is not ours to its end."""
    used_before, started = _cpu_seconds_of_children(), time.monotonic()
    subprocess.run(
        command, cwd=_ROOT, env=_environment(environment), timeout=TIMEOUT_SECONDS, check=True
    )
    return Usage(time.monotonic() - started, _cpu_seconds_of_children() - used_before)


def cpu_seconds() -> float:
    """Return the CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    """Return the highest resident memory of this process so far."""
    # getrusage(2): kilobytes, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _environment(additions: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would change how a client behaves."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "WALSTREAM_"))
    }
    return {**kept, **additions}
