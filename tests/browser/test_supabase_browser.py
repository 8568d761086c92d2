"""The stock client of Supabase in a page, as its UMD build is loaded by a script element."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.postgres import Database
from tests.proxy import Proxy
from tests.supabase_service import SupabaseService, module_service, supabase_service
from tests.supabase_tests import (
    AccessTests,
    ChangesTests,
    ReturnTests,
    RoomsTests,
    client_of,
    every_change_comes_once,
    rejoins_after_a_restart,
)
from tests.told import Change, Client, Content, Failed, Told, change_of_javascript

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VERSIONS: Final = ("1.0.0", "2.0.0")

UMD: Final = "node_modules/@supabase/supabase-js/dist/umd/supabase.js"

INDEX: Final = """<!doctype html>
<meta charset="utf-8"><link rel="icon" href="data:,">
<script src="supabase.js"></script>
<script type="module">
  import { makeTold } from "./told.mjs"
  window.told = []
  window.tell = makeTold(supabase, (event) => window.told.push(event))
</script>
"""

TELL: Final = "async (command) => { await window.tell(command); return window.told.splice(0) }"


class PageClient(Told):
    """@supabase/supabase-js in a page."""

    def __init__(self, page: Page, version: str) -> None:
        super().__init__()
        self._page = page
        self._version = version

    def client(self, url: str, key: str, **options: Any) -> Client:
        return super().client(url, key, **{"realtime": {"vsn": self._version}, **options})

    def tell(self, action: str, **given: Any) -> Any:
        self._count += 1
        command = {"id": self._count, "action": action, **given}
        answers = [
            event for event in self._page.evaluate(TELL, command) if not self._is_news(event)
        ]
        (answer,) = answers
        if answer["kind"] == "failed":
            raise Failed(answer["error"])
        return answer["result"]

    def look(self) -> None:
        for event in self._page.evaluate("() => window.told.splice(0)"):
            self._take(event)

    def change(self, payload: Content) -> Change:
        return change_of_javascript(payload)

    def _is_news(self, event: Content) -> bool:
        if event["kind"] in ("done", "failed"):
            return False
        self._take(event)
        return True


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture(scope="module")
def origin(node_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the page, another one than walstream."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text(INDEX)
    shutil.copy(node_folder / "told.mjs", folder)
    shutil.copy(node_folder / UMD, folder)
    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def service(
    server_dsn: str, database_template: str, origin: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SupabaseService]:
    folder = tmp_path_factory.mktemp("service")
    with module_service(folder, server_dsn, database_template, origin=origin) as it:
        yield it


@pytest.fixture(scope="module", params=VERSIONS)
def program(request: pytest.FixtureRequest, browser: Browser, origin: str) -> Iterator[PageClient]:
    """A page that speaks one of the versions.

    That a connection fails is written to the console, and is no error of the page.
    """
    errors: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{origin}/index.html")
    page.wait_for_function("'tell' in window")
    yield PageClient(page, request.param)
    context.close()
    assert errors == []


@pytest.fixture
def told(program: PageClient) -> Iterator[Told]:
    yield program
    program.close_all()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy("host=127.0.0.1 port=1", is_postgres=False) as proxy:
        yield proxy


class TestChanges(ChangesTests):
    pass


class TestRooms(RoomsTests):
    pass


class TestAccess(AccessTests):
    pass


class TestReturn(ReturnTests):
    pass


@pytest.mark.parametrize("program", ["2.0.0"], indirect=True)
def test_bytes(told: Told, service: SupabaseService) -> None:
    """Only this version has them."""
    topic = service.topic()
    hears = client_of(told, service).channel(topic).on("broadcast", event="*").join()
    speaker = client_of(told, service).channel(topic, broadcast={"ack": True}).join()
    raw = {"$bytes": "AAEC/w=="}
    assert speaker.tell("send", message={"type": "broadcast", "event": "x", "payload": raw}) == "ok"
    speaker.tell("httpSend", event="x", payload=raw)
    hears.wait_for_payloads("broadcast", 2)
    assert [one["payload"] for one in hears.payloads("broadcast")] == [raw, raw]


def test_a_restart_of_walstream(
    told: Told, database: Database, proxy: Proxy, tmp_path: Path, origin: str
) -> None:
    rejoins_after_a_restart([told], database, proxy, tmp_path, origin=origin)


def test_connections_that_are_cut_lose_and_double_nothing(
    told: Told, database: Database, proxy: Proxy, tmp_path: Path, origin: str
) -> None:
    with supabase_service(tmp_path, database, proxy, origin=origin) as service:
        every_change_comes_once([told], service, count=2_000, rounds=5)
