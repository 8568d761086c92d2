"""walstream with a live sink, as a process, and what its clients read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpx

from tests.command_line import CommandLine

ANYBODY = """
[access]
anonymous_role = "anybody"
[[access.roles.anybody.tables]]
table = "*.*"
"""


class Event(NamedTuple):
    """A Server-Sent Event."""

    name: str
    id: str
    data: str

    @property
    def content(self) -> Any:
        """Return what its data says."""
        return json.loads(self.data)


class LiveService:
    """A running process."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}"

    @contextmanager
    def stream(
        self,
        parameters: Sequence[tuple[str, str]],
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = 10.0,
    ) -> Iterator[Iterator[Event]]:
        """Read the events of a stream; the first one says that it is live."""
        with httpx.stream(
            "GET",
            f"{self.url}/changes?{urlencode(parameters)}",  # httpx would sort them by name
            headers=dict(headers or {}),
            timeout=seconds,
        ) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
            response.raise_for_status()
            yield events_of(response.iter_lines())


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    """Read events as an EventSource does, those without data too."""
    identity, name, data = "", "", []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "id":
                identity = value
            case "event":
                name = value
            case "data":
                data.append(value)
            case "" if not line and data:
                yield Event(name, identity, "\n".join(data))
                name, data = "", []


@contextmanager
def live_service(
    command_line: CommandLine, dsn: str, slot: str, *, more: str = ANYBODY, routes: str = ""
) -> Iterator[LiveService]:
    """Run walstream with a route of all tables to a live sink.

    Args:
        command_line: where.
        dsn: of the database.
        slot: its name.
        more: further sections of the configuration.
        routes: in place of the route of all tables.
    """
    configure(command_line, dsn, slot, more=more, routes=routes)
    with command_line.running("run") as process:
        address = command_line.wait_for("http_listening")["address"]
        command_line.wait_for("streaming")
        yield LiveService(str(address))
        process.terminate()
        process.wait(20)


def configure(
    command_line: CommandLine, dsn: str, slot: str, *, more: str = ANYBODY, routes: str = ""
) -> None:
    """Write the configuration for `live_service`."""
    everything = '[[routes]]\ntable = "*.*"\nto = "live"\n'
    command_line.write(
        "walstream.toml",
        f"""
[postgres]
dsn = "{dsn}"
[slot]
name = "{slot}"
create = true
[http]
listen = "127.0.0.1:0"
[sinks.live]
type = "live"
{routes or everything}
{more}
""",
    )
