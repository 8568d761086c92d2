"""A stock client of Supabase that a test tells what to do, and what came of it.

It is a program (tests/node/supabase.mjs, tests/told_python.py) or a page (tests/browser); all are
told the same, by lines of JSON, and none of them is more than the calls of an application.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self

from tests.postgres import wait_until

ANSWER_SECONDS: Final = 20.0
STOPPED_SECONDS: Final = 10.0

Content = Mapping[str, Any]


class Failed(Exception):
    """The client has thrown an error."""


class Change(NamedTuple):
    """What an application is given of a change."""

    type: str
    new: Mapping[str, Any]
    old: Mapping[str, Any]
    table: str
    schema: str
    errors: Sequence[str] | None
    commit_timestamp: str

    @property
    def id(self) -> int:
        """The id of the row."""
        return int((self.new or self.old)["id"])


class Told(ABC):
    """Makes clients, and keeps what they tell."""

    reconnect_ms: int | None = 20
    """None for the client's own pauses, the first of which is a second."""
    stays_joined_after_errors: ClassVar[bool] = True
    """Whether a system message of an error is no reason to join anew."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], list[Content]] = defaultdict(list)
        self._clients: list[str] = []
        self._count = 0

    @abstractmethod
    def tell(self, action: str, **given: Any) -> Any:
        """Do something, and return what the client's call returned.

        Raises:
            Failed: the call threw an error.
        """

    @abstractmethod
    def change(self, payload: Content) -> Change:
        """Read what a callback for changes was called with."""

    def look(self) -> None:  # noqa: B027 - for most it comes by itself
        """Take in what was told meanwhile."""

    def client(self, url: str, key: str, **options: Any) -> Client:
        """Make a client; options are of tests/node/told.mjs."""
        name = self._name("client")
        self._clients.append(name)
        if self.reconnect_ms is not None:
            options = {"reconnectMs": self.reconnect_ms, **options}
        self.tell("client", name=name, url=url, key=key, **options)
        return Client(self, name)

    def channel(self, client: str, topic: str, config: Content | None) -> Channel:
        name = self._name("channel")
        self.tell("channel", client=client, name=name, topic=topic, config=config)
        return Channel(self, client, name)

    def events(self, kind: str, channel: str) -> list[Content]:
        """Return what was told of a channel, in its order."""
        self.look()
        return self._events[kind, channel]

    def close_all(self) -> None:
        """Close all clients, and forget what they told."""
        self.tell("close", names=self._clients)
        self._clients.clear()
        wrong = [
            event["error"]
            for (kind, _), events in self._events.items()
            if kind == "status"
            for event in events
            if "mismatch" in (event["error"] or "")
        ]
        self._events.clear()
        assert wrong == []

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def _take(self, event: Content) -> None:
        self._events[event["kind"], event["channel"]].append(event)


class Client:
    """A client: one socket."""

    def __init__(self, told: Told, name: str) -> None:
        self._told = told
        self.name = name

    def channel(self, topic: str, **config: Any) -> Channel:
        return self._told.channel(self.name, topic, config or None)

    def tell(self, action: str, **given: Any) -> Any:
        return self._told.tell(action, client=self.name, **given)

    def close(self) -> None:
        self._told.tell("close", names=[self.name])


class Channel:
    """A channel of a client, and what its callbacks were called with."""

    def __init__(self, told: Told, client: str, name: str) -> None:
        self._told = told
        self._client = client
        self.name = name

    def on(self, type: str, label: str = "", *, follow: bool = False, **filter: Any) -> Self:  # noqa: A002 - their words
        self.tell("on", type=type, filter=filter, label=label, follow=follow)
        return self

    def on_changes(self, label: str = "", *, follow: bool = False, **filter: Any) -> Self:  # noqa: A002
        """Ask for changes; all of schema public, if it is not said otherwise."""
        asked = {"event": "*", "schema": "public", **filter}
        return self.on("postgres_changes", label, follow=follow, **asked)

    def subscribe(self) -> Self:
        """Join, and do not wait for it."""
        self.tell("subscribe")
        return self

    def join(self) -> Self:
        """Join, and wait until that is done."""
        self.subscribe()
        wait_until(lambda: self.statuses)
        assert self.statuses == ["SUBSCRIBED"], self.errors
        return self

    def tell(self, action: str, **given: Any) -> Any:
        return self._told.tell(action, channel=self.name, **given)

    def remove(self) -> Any:
        return self.tell("removeChannel", client=self._client)

    @property
    def statuses(self) -> list[str]:
        return [event["status"] for event in self._told.events("status", self.name)]

    @property
    def errors(self) -> list[str]:
        return [one["error"] for one in self._told.events("status", self.name) if one["error"]]

    def payloads(self, kind: str, label: str = "") -> list[Any]:
        """Return what a callback was called with."""
        events = self._told.events(kind, self.name)
        return [event["payload"] for event in events if event["label"] == label]

    def changes(self, label: str = "") -> list[Change]:
        return [self._told.change(one) for one in self.payloads("postgres_changes", label)]

    def ids(self, label: str = "") -> list[int]:
        """The ids of the rows that came, in their order."""
        return [change.id for change in self.changes(label)]

    def last(self, label: str = "") -> Change | None:
        payloads = self.payloads("postgres_changes", label)
        return self._told.change(payloads[-1]) if payloads else None

    def wait_for_joins(self, count: int) -> None:
        """Wait until it was joined so often."""
        wait_until(lambda: self.statuses.count("SUBSCRIBED") >= count)

    def wait_for_payloads(self, kind: str, count: int, label: str = "") -> None:
        """Wait until a callback was called so often."""
        wait_until(lambda: len(self.payloads(kind, label)) >= count)

    def wait_for(self, condition: Callable[[Self], object], seconds: float = 10.0) -> None:
        wait_until(lambda: condition(self), seconds)


class Program(Told):
    """A stock client in a process of its own."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        super().__init__()
        self._answers: dict[int, queue.SimpleQueue[Content]] = {}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        )
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOPPED_SECONDS)
        finally:
            self._process.kill()
            self._thread.join(STOPPED_SECONDS)
            self._process.stdout.close()
            self._log.close()

    def tell(self, action: str, **given: Any) -> Any:
        self._count += 1
        number, answers = self._count, queue.SimpleQueue[Content]()
        self._answers[number] = answers
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "action": action, **given}) + "\n")
        self._process.stdin.flush()
        answer = answers.get(timeout=ANSWER_SECONDS)
        if answer["kind"] == "failed":
            raise Failed(answer["error"])
        return answer["result"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["kind"] in ("done", "failed"):
                self._answers.pop(event["id"]).put(event)
            else:
                self._take(event)


def change_of_javascript(payload: Content) -> Change:
    """Read what the client for JavaScript gives to an application."""
    return Change(
        payload["eventType"],
        payload["new"],
        payload["old"],
        payload["table"],
        payload["schema"],
        payload["errors"],
        payload["commit_timestamp"],
    )


class NodeClient(Program):
    """@supabase/supabase-js in Node."""

    def __init__(self, folder: Path, log: Path, version: str | None = None) -> None:
        super().__init__(["node", str(folder / "supabase.mjs")], log)
        self._version = version

    def client(self, url: str, key: str, **options: Any) -> Client:
        if self._version is not None:
            options = {"realtime": {"vsn": self._version}, **options}
        return super().client(url, key, **options)

    def change(self, payload: Content) -> Change:
        return change_of_javascript(payload)


class PythonClient(Program):
    """The package realtime."""

    stays_joined_after_errors = False

    def __init__(self, python: str, log: Path) -> None:
        super().__init__([python, "-m", "tests.told_python"], log)

    def change(self, payload: Content) -> Change:
        data = payload["data"]
        return Change(
            data["type"],
            data.get("record") or {},
            data.get("old_record") or {},
            data["table"],
            data["schema"],
            data["errors"],
            data["commit_timestamp"],
        )
