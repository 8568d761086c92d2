"""A receiver of webhooks that refuses, is slow, and fails after it has accepted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

from tests.proxy import LOOPBACK

SLOW_SECONDS: Final = 0.3
HANG_SECONDS: Final = 3.0


class Behaviour(Enum):
    """What becomes of a request; all of them have been read, and what was in them counts."""

    ACCEPTS = auto()
    IS_SLOW = auto()
    FAILS_AFTER_ACCEPTING = auto()
    HANGS_UP_AFTER_ACCEPTING = auto()
    DOES_NOT_ANSWER = auto()
    IS_BUSY = auto()


class Endpoint:
    """Listens on a free port of 127.0.0.1 while the block runs."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        """Of the changes, in the order in which they came."""
        self.behaviour = Behaviour.ACCEPTS
        self._port = 0
        self._server: _Server | None = None
        self._serving: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}/changes"

    @contextmanager
    def behaving(self, behaviour: Behaviour) -> Iterator[None]:
        """Behave so while the block runs."""
        self.behaviour = behaviour
        try:
            yield
        finally:
            self.behaviour = Behaviour.ACCEPTS

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Do not listen while the block runs."""
        self._close()
        try:
            yield
        finally:
            self._open()

    def _open(self) -> None:
        self._server = _Server((LOOPBACK, self._port), self)
        self._port = self._server.server_port
        self._serving = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="endpoint"
        )
        self._serving.start()

    def _close(self) -> None:
        assert self._server is not None
        assert self._serving is not None
        self._server.shutdown()
        self._serving.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        super().__init__(address, _Requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no surprise here."""


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        endpoint = self.server.endpoint
        behaviour = endpoint.behaviour
        if behaviour is Behaviour.IS_BUSY:
            self._answer(503, {"retry-after": "1"})
            return
        endpoint.ids += [json.loads(line)["id"] for line in body.splitlines()]
        match behaviour:
            case Behaviour.ACCEPTS:
                self._answer(200)
            case Behaviour.IS_SLOW:
                time.sleep(SLOW_SECONDS)
                self._answer(200)
            case Behaviour.FAILS_AFTER_ACCEPTING:
                self._answer(500)
            case Behaviour.HANGS_UP_AFTER_ACCEPTING:
                self.close_connection = True
            case Behaviour.DOES_NOT_ANSWER:
                time.sleep(HANG_SECONDS)
                self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Say nothing."""
