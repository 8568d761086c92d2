"""What comes through the sockets of Realtime's clients: any bytes at all, and never a crash.

There are two targets, named by the first argument; the others are libFuzzer's, ``-runs=1000000`` or
a file that it has kept.

``frame``: one frame, behind a byte that says how it is read. ``session``: all that one client
sends, line by line::

    1       or anything else: the version
    T...    a text frame
    B...    a binary frame
    J, R    its oldest join that is not answered yet is accepted, or refused

It has joined another channel before. Frames that are to that one are left out, and so it must stay
as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

from fuzz.corpus import fuzz

with atheris.instrument_imports(include=["walstream.realtime"]):
    from walstream.realtime.channels import Channel
    from walstream.realtime.events import Answer, Event, Joining, Left, Overrun
    from walstream.realtime.frames import split
    from walstream.realtime.messages import (
        ClientMessage,
        Malformed,
        Message,
        Version,
        decode,
        decode_binary,
        decode_text_broadcast,
    )
    from walstream.realtime.protocol import Protocol, ProtocolLimits

DIALOGUES = Path(__file__).parents[1] / "tests" / "core" / "realtime_dialogues.txt"
OTHER = "realtime:other"
BINARY = b'\x03\x01\x01\x0e\x01\x02\x0167realtime:room1x{}{"a":1}'


def take_frame(data: bytes) -> None:
    """Run one input of the decoders."""
    match data[:1]:
        case b"1":
            look(Version.V1, data[1:])
        case b"2":
            # Also what no decoder of UTF-8 lets through, should a server be less strict.
            look(Version.V2, data[1:].decode(errors="surrogateescape"))
        case b"3":
            look(Version.V2, data[1:].decode(errors="replace"))
        case _:
            look(Version.V2, data[1:])


def look(version: Version, data: str | bytes) -> ClientMessage | None:
    """Read a frame and all that is in it; nothing but `Malformed` may come of it."""
    try:
        if isinstance(data, bytes) and version is Version.V2:
            found: ClientMessage = decode_binary(data)
        else:
            found = decode(version, data)
    except Malformed:
        return None
    try:
        if isinstance(found, Message):
            json.dumps(found.payload)
            bytes(decode_text_broadcast(found).payload).decode()
        elif found.is_json:
            json.loads(found.payload)
    except Malformed:
        pass
    return found


def take_session(data: bytes) -> None:
    """Run one input of the protocol."""
    version, *lines = data.split(b"\n")
    session = Session(Version.V1 if version == b"1" else Version.V2)
    for line in lines:
        session.take(line)
    assert session.core.channels[OTHER] is session.other
    assert session.other.is_joined


class Session:
    """One socket, and what has to be true of it by what has come of it."""

    def __init__(self, version: Version) -> None:
        self.core = Protocol(version, ProtocolLimits(max_channels=4, messages_per_second=2))
        self.waiting: list[Channel] = []
        self.begun: set[Channel] = set()
        self.is_overrun = False
        self.now = 0.0
        names = {"topic": OTHER, "event": "phx_join", "payload": {}, "ref": "1", "join_ref": "1"}
        join = names if version is Version.V1 else ["1", "1", OTHER, "phx_join", {}]
        self.other: Channel | None = None
        self.handle(self.core.receive_text(json.dumps(join), self.now))
        [self.other] = self.begun
        self.answer(accept=True)

    def take(self, line: bytes) -> None:
        """Do what a line says."""
        self.now += 0.1
        kind, rest = line[:1], line[1:]
        match kind:
            case b"T":
                self.hear(rest.decode(errors="replace"))
            case b"B":
                self.hear(rest)
            case b"J" | b"R":
                self.answer(accept=kind == b"J")

    def hear(self, data: str | bytes) -> None:
        """Receive a frame, unless it is to the other channel."""
        found = look(self.core.version, data)
        if found is not None and found.topic == OTHER:
            return
        if isinstance(data, str):
            events = self.core.receive_text(data, self.now)
        else:
            events = self.core.receive_bytes(data, self.now)
        assert found is not None or not any(isinstance(one, Answer) for one in events)
        self.handle(events)

    def answer(self, *, accept: bool) -> None:
        """Answer a join."""
        if not self.waiting:
            return
        channel = self.waiting.pop(0)
        if accept:
            frames = self.core.joined(channel, {"postgres_changes": channel.join.bindings})
        else:
            frames = self.core.refuse_join(channel, "no")
        assert bool(frames) == (channel in self.begun)
        self.read(frames)
        if accept:
            self.handle(self.core.resume(self.now))
        else:
            self.begun.discard(channel)

    def handle(self, events: list[Event]) -> None:
        """Verify that each event is possible."""
        assert not (self.is_overrun and events)
        for event in events:
            match event:
                case Answer(frames):
                    self.read(frames)
                case Overrun():
                    self.is_overrun = True
                case Joining(channel):
                    assert channel not in self.begun
                    self.begun.add(channel)
                    self.waiting.append(channel)
                case Left(channel):
                    assert channel is not self.other
                    self.begun.remove(channel)
                case _:
                    assert event.channel in self.begun
                    assert event.channel.is_joined
                    assert event.channel is not self.other
        assert set(self.core.channels.values()) == self.begun

    def read(self, frames: bytes) -> None:
        """Verify that a client can read an answer."""
        for is_text, payload in split(frames):
            assert is_text
            message = json.loads(payload.decode())
            assert len(message) == (4 if self.core.version is Version.V1 else 5)


def frames() -> list[bytes]:
    """Return what to begin with: all frames of the dialogues, and a broadcast in binary."""
    said = [line for session in sessions() for line in session.split(b"\n")[1:]]
    texts = [line[1:] for line in said if line.startswith(b"T")]
    ways = [b"1" if text.startswith(b"{") else b"3" for text in texts]
    return [b"4" + BINARY, *(way + text for way, text in zip(ways, texts, strict=True))]


def sessions() -> list[bytes]:
    """Return what to begin with: the dialogues, and one with a broadcast in binary."""
    inputs = []
    for block in DIALOGUES.read_text().split("\n# ")[1:]:
        said = [line[2:] for line in block.splitlines() if line.startswith("C ")]
        version = "1" if 'S {"topic"' in block else "2"
        inputs.append("\nJ\n".join([version, *("T" + one for one in said)]).encode())
    return [*inputs, inputs[2] + b"\nJ\nB" + BINARY]


TARGETS = {"frame": (take_frame, frames), "session": (take_session, sessions)}


def main() -> None:
    """Fuzz one target, from its seeds on or with the files that are named."""
    name, *arguments = sys.argv[1:]
    target, seeds = TARGETS[name]
    fuzz(target, seeds(), arguments)


if __name__ == "__main__":
    main()
