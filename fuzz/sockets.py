"""What comes through a WebSocket before it is a message: any bytes, in any pieces.

The arguments are libFuzzer's, ``-runs=1000000`` or a file that it has kept. The first byte of an
input says how large the pieces are.
"""

from __future__ import annotations

import sys

import atheris

from fuzz.corpus import fuzz
from tests.frames import masked

with atheris.instrument_imports(include=["walstream.gateway.incoming"]):
    from walstream.gateway.incoming import Arrival, Incoming, Violation

MAX_BYTES = 200
CODES = {1002, 1007, 1009}


def take(data: bytes) -> None:
    """Run one input: it is read, or refused with a code, however it is cut."""
    size, sent = (data[0] or 1, data[1:]) if data else (1, b"")
    at_once = read([sent])
    assert read([sent[at : at + size] for at in range(0, len(sent), size)]) == at_once


def read(pieces: list[bytes]) -> list[Arrival | int]:
    """Return what is found, and the code of what ends it."""
    incoming = Incoming(MAX_BYTES)
    found: list[Arrival | int] = []
    for piece in pieces:
        incoming.feed(piece)
        try:
            while (arrival := incoming.read()) is not None:
                assert not isinstance(arrival, str | bytes) or len(arrival) <= MAX_BYTES
                found.append(arrival)
        except Violation as violation:
            found.append(violation.code)
            break
        assert len(incoming._buffer) < MAX_BYTES + 14  # noqa: SLF001 - what it keeps is bounded
    assert CODES.issuperset(one for one in found if isinstance(one, int))
    return found


SEEDS = (
    masked(0x1, b"text"),
    masked(0x1, b"a\xc3", fin=False) + masked(0x9, b"1") + masked(0x0, b"\xa4"),
    masked(0x2, b"x" * 130) + masked(0xA),
    masked(0x8, b"\x03\xe8why"),
)


def main() -> None:
    """Fuzz from the seeds on, or with the files that are named."""
    fuzz(take, [bytes((size,)) + seed for size, seed in enumerate(SEEDS, start=1)], sys.argv[1:])


if __name__ == "__main__":
    main()
