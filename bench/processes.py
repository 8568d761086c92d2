"""Running the processes that are measured.

A worker is a module of this package. It reads a job from its standard input and writes what it
measured to its standard output, both as JSON.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec

ROOT: Final = Path(__file__).parent.parent
"""The folder that modules are started from."""

TIMEOUT_SECONDS: Final = 600.0
"""A process that takes longer hangs."""

_MAXRSS_PER_MIB: Final = 1 << 20 if sys.platform == "darwin" else 1 << 10
"""getrusage(2) counts in kilobytes, on macOS in bytes."""

Content = TypeVar("Content")


class Usage(msgspec.Struct, frozen=True):
    """What a process took, from its start to its end; ``cpu_seconds`` is user and system time."""

    seconds: float
    cpu_seconds: float


class Worker:
    """A module of this package as a process of its own; it ends with the block at the latest."""

    def __init__(self, module: str, job: msgspec.Struct) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=own_environment(),
        )
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(msgspec.json.encode(job))
        self._process.stdin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def result(self, kind: type[Content]) -> Content:
        """Wait until it ends, and return what it measured."""
        output, _ = self._process.communicate(timeout=TIMEOUT_SECONDS)
        assert self._process.returncode == 0, f"{self._process.args!r} failed"
        return msgspec.json.decode(output, type=kind)


def read_job(kind: type[Content]) -> Content:
    """Return the job that this process was started for."""
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)


def write_result(result: msgspec.Struct) -> None:
    """Hand over what this process measured."""
    sys.stdout.buffer.write(msgspec.json.encode(result))


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run a program that is not ours, and wait for its end."""
    used_before, started = _cpu_seconds(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        command, env={**own_environment(), **environment}, timeout=TIMEOUT_SECONDS, check=True
    )
    seconds = time.monotonic() - started
    return Usage(seconds, _cpu_seconds(resource.RUSAGE_CHILDREN) - used_before)


def cpu_seconds() -> float:
    """Return the user and system time of this process so far."""
    return _cpu_seconds(resource.RUSAGE_SELF)


def peak_mib() -> float:
    """Return the highest resident memory of this process so far."""
    # ru_maxrss may be that of the process that started us: it outlives execve(2).
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_PER_MIB


def _cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").splitlines() if path.exists() else []


def own_environment() -> dict[str, str]:
    """Ours, without what would change how a client behaves."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "WALSTREAM_"))
    }
