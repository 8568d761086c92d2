"""The standard output: whole lines through any pipe, and nothing that holds up the end."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from typing import TypeAlias

import pytest

from tests.test_file_sink import change
from walstream.sinks import stdout
from walstream.sinks.stdout import _Output

Pipe: TypeAlias = tuple[FileIO, FileIO]

FILLS_A_PIPE = 3_000
"""Changes whose lines are longer than the 64 KiB that a pipe holds."""

SCRIPT = """
import asyncio, contextlib, os, sys
from tests.test_file_sink import change
from walstream.sinks.stdout import StdoutSink, write_stdout
sink = StdoutSink("out")
changes = [change(number) for number in range(1, {count} + 1)]
async def main():
{body}
asyncio.run(main())
"""


def start(
    body: str, *, unbuffered: bool = False, descriptor: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(
        body="".join(f"    {line}\n" for line in body.splitlines()), count=FILLS_A_PIPE
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=descriptor,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
    )


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    with FileIO(reading, "r") as reader, FileIO(writing, "w") as writer:
        yield reader, writer


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("blocking", [True, False])
def test_all_lines_get_through_a_pipe_with_a_slow_reader(
    pipe: Pipe, *, blocking: bool, unbuffered: bool
) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), blocking)
    with start(
        "await sink.take(changes)", unbuffered=unbuffered, descriptor=writer.fileno()
    ) as process:
        writer.close()
        received = b""
        while chunk := reader.read(1000):
            received += chunk
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, b"")
    assert [json.loads(line) for line in received.splitlines()] == [
        json.loads(change(number).to_json()) for number in range(1, FILLS_A_PIPE + 1)
    ]


def test_what_handlers_print_comes_before_the_line_that_follows() -> None:
    body = """
for number in (1, 2):
    print("handler", number)
    await write_stdout(b"sink %d\\n" % number)
"""
    with start(body) as process:
        out, _ = process.communicate(timeout=20)
    assert out.splitlines() == [b"handler 1", b"sink 1", b"handler 2", b"sink 2"]


@pytest.mark.parametrize("printed", ["", "print('from a handler')"])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_is_gone_is_told(pipe: Pipe, *, blocking: bool, printed: str) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), blocking)
    reader.close()
    body = f"""
{printed}
try:
    await sink.take(changes)
except Exception as error:
    print(type(error).__name__, file=sys.stderr, flush=True)
    os._exit(0)
"""
    with start(body, descriptor=writer.fileno()) as process:
        _, stderr = process.communicate(timeout=20)
    assert stderr == b"OutputClosed\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nobody_reads_does_not_keep_the_process_from_ending(
    pipe: Pipe, *, blocking: bool
) -> None:
    _, writer = pipe
    os.set_blocking(writer.fileno(), blocking)
    body = """
with contextlib.suppress(TimeoutError):
    await asyncio.wait_for(sink.take(changes), 0.1)
"""
    with start(body, descriptor=writer.fileno()) as process:
        try:
            _, stderr = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (0, b"")


class Faults:
    """An os.write that takes so many bytes at a time, and fails where the script holds an error."""

    def __init__(self, *script: int | OSError) -> None:
        self.script = list(script)
        self.written = b""

    def __call__(self, descriptor: int, data: memoryview) -> int:
        step = self.script.pop(0) if self.script else len(data)
        if isinstance(step, OSError):
            raise step
        self.written += bytes(data[:step])
        return min(step, len(data))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("script", "failures", "written"),
    [
        ([2, 1, 3], 0, b"aaaa\nbbbb\n"),
        ([FULL], 1, b"aaaa\nbbbb\n"),
        ([2, FULL], 1, b"aaaa\naaaa\nbbbb\n"),
        ([4, FULL], 1, b"aaaa\naaaa\nbbbb\n"),
        ([5, FULL], 1, b"aaaa\naaaa\nbbbb\n"),
        ([7, FULL], 1, b"aaaa\nbbbb\naaaa\nbbbb\n"),
        ([2, FULL, FULL, 1, FULL], 3, b"aaaa\naaaa\nbbbb\n"),
        ([2, FULL, 3, 2, FULL], 2, b"aaaa\naaaa\naaaa\nbbbb\n"),
    ],
)
def test_a_line_that_a_failure_tore_is_finished_first(
    pipe: Pipe,
    monkeypatch: pytest.MonkeyPatch,
    script: list[int | OSError],
    failures: int,
    written: bytes,
) -> None:
    faults = Faults(*script)
    output = _Output(pipe[1].fileno())
    monkeypatch.setattr(os, "write", faults)
    for _ in range(failures):
        with pytest.raises(OSError, match="No space left"):
            output.write(b"aaaa\nbbbb\n")
    output.write(b"aaaa\nbbbb\n")
    assert faults.written == written


def test_a_full_pipe_is_waited_for_and_not_polled(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    lines = b"x" * 100_000 + b"\n"
    refused = []
    full = threading.Event()
    real = os.write

    def counted(descriptor: int, data: memoryview) -> int:
        try:
            return real(descriptor, data)
        except BlockingIOError:
            refused.append(descriptor)
            full.set()
            raise

    monkeypatch.setattr(os, "write", counted)
    thread = threading.Thread(target=_Output(writer.fileno()).write, args=(lines,), daemon=True)
    thread.start()
    assert full.wait(10)
    received = b""
    while len(received) < len(lines):
        received += reader.read(65_536)
    thread.join(10)
    assert received == lines
    assert len(refused) < 10


def test_an_output_that_was_closed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _Output(writing).write(b"line\n")


def test_there_is_one_standard_output() -> None:
    """Every sink that writes to it must know of the line that another one tore."""
    assert stdout._stdout._descriptor == 1
