"""All subscribers of a scenario, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec

from bench.fanout.clients import Arrived, Collect, Collected, Connect, Connected, Counting, Expect
from bench.fanout.scenarios import Scenario
from bench.processes import ROOT, own_environment

PROCESSES: Final = 2

MANY: Final = 100
REST_SECONDS: Final = 0.002
"""Where so many clients get a change, their process rests between two looks at the sockets.

Otherwise each single write of the server would wake it, which costs both more than all else: these
clients stand for as many machines. The rest is a part of the time that is measured.
"""

Answer = TypeVar("Answer")


class Spoken:
    """A module of this package as a process that is told what to do by lines of JSON."""

    def __init__(self, module: str) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=own_environment(),
        )

    def tell(self, order: msgspec.Struct) -> None:
        """Write an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()

    def hear(self, kind: type[Answer]) -> Answer:
        """Wait for an answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args!r} failed"
        return msgspec.json.decode(line, type=kind)

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid


class Crowd:
    """The subscribers of a scenario, connected to one address; they go with the block."""

    def __init__(self, scenario: Scenario, address: str) -> None:
        """Connect them, and wait until all stream."""
        self._scenario = scenario
        host, _, port = address.rpartition(":")
        targets = scenario.targets()
        self._processes = [Spoken("bench.fanout.clients") for _ in range(PROCESSES)]
        try:
            for number, process in enumerate(self._processes):
                process.tell(Connect(host, int(port), scenario.speech, targets[number::PROCESSES]))
            connected = [process.hear(Connected) for process in self._processes]
        except BaseException:
            self._end()
            raise
        self.connect_seconds = max(one.seconds for one in connected)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def expect(self, rows: range, *, is_timed: bool = False, is_kept: bool = False) -> None:
        """Count from now on what comes of the rows that will be written."""
        is_woken = is_timed and self._scenario.events_per_change >= MANY
        rest = REST_SECONDS if is_woken else 0.0
        for number, process in enumerate(self._processes):
            wanted = sum(len(expected) for expected in self._expected(number, rows))
            process.tell(Expect(wanted, is_timed, is_kept, rest))
        for process in self._processes:
            process.hear(Counting)

    def arrived(self) -> list[Arrived]:
        """Wait until all has come to each process, or nothing comes any more."""
        return [process.hear(Arrived) for process in self._processes]

    def verify(self, rows: range) -> list[tuple[int, int]]:
        """Make sure that each client got its rows; return when rows came, if that was noted.

        Raises:
            AssertionError: a client was cut off, or got other rows than it should.
        """
        for process in self._processes:
            process.tell(Collect())
        collected = [process.hear(Collected) for process in self._processes]
        failures = list(chain.from_iterable(one.failures for one in collected))
        assert not failures, f"{len(failures)} clients failed, the first: {failures[0]}"
        ids: dict[int, str] = {}
        for number, one in enumerate(collected):
            self._verify_counts(one, list(self._expected(number, rows)))
            self._verify_kept(one, list(self._expected(number, rows)), ids)
        return list(chain.from_iterable(one.times for one in collected))

    def _verify_counts(self, collected: Collected, expected: Sequence[range]) -> None:
        assert collected.counts == list(map(len, expected)), "a client got too much or too little"
        last = [rows[-1] if rows else -1 for rows in expected]
        assert collected.last_rows == last, "a client's last event is of another row"

    def _verify_kept(
        self, collected: Collected, expected: Sequence[range], ids: dict[int, str]
    ) -> None:
        for kept, rows in zip(collected.kept, expected, strict=bool(collected.kept)):
            assert [one.row for one in kept] == list(rows), (
                "a client got other rows, or in disorder"
            )
            for one in kept:
                if not one.id:  # clients of Supabase are told none
                    continue
                assert ids.setdefault(one.row, one.id) == one.id, "a change has two ids"

    def _expected(self, number: int, rows: range) -> Iterator[range]:
        """List the rows for each client of a process."""
        subscribers = range(self._scenario.subscribers)[number::PROCESSES]
        return (self._scenario.rows_of(subscriber, rows) for subscriber in subscribers)

    def _end(self) -> None:
        for process in self._processes:
            process.end()
