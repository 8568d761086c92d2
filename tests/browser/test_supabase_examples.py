"""The examples for clients of Supabase in a browser: built, served, run as their READMEs say."""

from __future__ import annotations

import functools
import json
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.browser.conftest import KeepShot, OpenPage, until
from tests.postgres import Database, wait_until
from tests.proxy import Proxy
from tests.test_examples import Service, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Page

WALSTREAM: Final = "http://127.0.0.1:8432"
PAGE: Final = "http://127.0.0.1:8000"
MISSED: Final = 1000


class Site:
    """An example that runs: walstream, its page from a server of its own, a proxy in between."""

    def __init__(self, service: Service, node_folder: Path, opened: ExitStack) -> None:
        self.service = service
        self.database = service.database
        page_port, port = free_port(), free_port()
        self.page_url = f"http://127.0.0.1:{page_port}"
        self.proxy = opened.enter_context(Proxy(f"host=127.0.0.1 port={port}", is_postgres=False))
        self._configure(port)
        self._build(node_folder)
        self._serve(page_port, opened)
        opened.enter_context(service.running())

    def _configure(self, port: int) -> None:
        self.service.environment |= {
            "WALSTREAM_HTTP_LISTEN": f"127.0.0.1:{port}",
            "WALSTREAM_HTTP_HOSTS": '["*"]',  # of the proxy
        }
        self._replace("walstream.toml", PAGE, self.page_url)
        [script] = self.service.folder.glob("main.js*")
        self._replace(script.name, WALSTREAM, f"http://127.0.0.1:{self.proxy.port}")

    def _replace(self, name: str, old: str, new: str) -> None:
        text = (self.service.folder / name).read_text()
        assert old in text
        self.service.write(name, text.replace(old, new))

    def _build(self, node_folder: Path) -> None:
        """As ``npm run build``, with the packages of tests/node."""
        folder = self.service.folder
        (folder / "node_modules").symlink_to(node_folder / "node_modules")
        script = json.loads((folder / "package.json").read_text())["scripts"]["build"]
        program, *arguments = shlex.split(script)
        command = ["node", f"node_modules/{program}/bin/{program}", *arguments]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr

    def _serve(self, port: int, opened: ExitStack) -> None:
        if (self.service.folder / "server.py").exists():
            self.service.environment["PORT"] = str(port)
            process = self.service.start("server.py")
            opened.callback(process.communicate)
            opened.callback(process.kill)
            wait_until(lambda: is_served(port))
            return
        handler = functools.partial(Quiet, directory=self.service.folder / "public")
        pages = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        opened.callback(pages.server_close)
        opened.callback(pages.shutdown)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - its name there
        pass


SiteOf = Callable[[str], Site]


@pytest.fixture
def site_of(database: Database, tmp_path: Path, node_folder: Path) -> Iterator[SiteOf]:
    with ExitStack() as opened:

        def service_of(name: str) -> Site:
            return Site(Service(name, tmp_path, database), node_folder, opened)

        yield service_of


@pytest.fixture
def open_live(browser: Any) -> Iterator[OpenPage]:
    """``open_live(site, path)``: a page of the example, once it is live, or ``shown``."""
    contexts = []
    errors: list[str] = []

    def open_live(site: Site, path: str = "/", shown: str = "[role=status].live") -> Page:
        context = browser.new_context(viewport={"width": 900, "height": 700})
        contexts.append(context)
        page: Page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site.page_url + path)
        page.wait_for_selector(shown)
        return page

    yield open_live
    for context in contexts:
        context.close()
    assert errors == []


def is_served(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)"


def shows(page: Page, selector: str, expected: list[str]) -> None:
    """Wait until these, and no others, are shown in this order."""
    until(page, f"JSON.stringify({texts(selector)}) === JSON.stringify({json.dumps(expected)})")


# ---- live-messages

LOADED: Final = "performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)"
SAY: Final = "INSERT INTO messages_v2 (conversation_id, sender, content) VALUES (%s, %s, %s)"


def test_a_list_of_messages_in_react_has_all_of_its_conversation_and_no_other(
    site_of: SiteOf, open_live: OpenPage, keep_shot: KeepShot
) -> None:
    site = site_of("live-messages")
    execute = site.database.execute
    execute(SAY, "abc-123", "Ada", "was there before")
    page = open_live(site)
    shows(page, "li", ["Ada was there before"])
    execute(SAY, "another", "Ben", "not asked for")
    execute(SAY, "abc-123", "Ben", "<b>Hello</b>")
    shows(page, "li", ["Ada was there before", "Ben <b>Hello</b>"])
    page.fill("[name=content]", "from the page")
    page.keyboard.press("Enter")
    shows(page, "li", ["Ada was there before", "Ben <b>Hello</b>", "me from the page"])
    execute("UPDATE messages_v2 SET content = 'Good morning' WHERE sender = 'Ben'")
    shows(page, "li", ["Ada was there before", "Ben Good morning", "me from the page"])
    keep_shot(page, "example-live-messages")
    execute("UPDATE messages_v2 SET conversation_id = 'another' WHERE sender = 'me'")
    execute("DELETE FROM messages_v2 WHERE sender = 'Ada'")
    shows(page, "li", ["Ben Good morning"])
    page.fill("[name=conversation]", 'a,"b".c')
    page.keyboard.press("Enter")
    shows(page, "li", [])
    page.wait_for_selector("[role=status].live")
    execute(SAY, 'a,"b".c', "Ada", "here, too")
    shows(page, "li", ["Ada here, too"])


def test_messages_that_were_missed_while_the_network_was_cut_are_shown(
    site_of: SiteOf, open_live: OpenPage
) -> None:
    site = site_of("live-messages")
    page = open_live(site)
    site.database.execute(SAY, "abc-123", "Ada", "0")
    shows(page, "li", ["Ada 0"])
    until(page, f"{LOADED}.includes('/messages')")
    page.evaluate("performance.clearResourceTimings()")
    site.proxy.refuse()
    site.proxy.cut()
    page.wait_for_selector("[role=status]:not(.live)")
    site.database.execute(
        "INSERT INTO messages_v2 (conversation_id, sender, content)"
        " SELECT 'abc-123', 'Ada', n::text FROM generate_series(1, %s) n",
        MISSED,
    )
    site.proxy.restore()
    shows(page, "li", [f"Ada {number}" for number in range(MISSED + 1)])
    assert "/messages" not in page.evaluate(LOADED), "they came as changes"


# ---- collaborative-editing


def test_two_pages_edit_one_row(site_of: SiteOf, open_live: OpenPage, keep_shot: KeepShot) -> None:
    site = site_of("collaborative-editing")
    site.database.execute("INSERT INTO reminders (id, title) VALUES (2, 'another')")
    first, second = open_live(site), open_live(site)
    for page in (first, second):
        until(page, "document.querySelector('[name=title]').value === 'Buy cat food'")
    first.fill("[name=title]", "Buy dog food")
    second.fill("[name=notes]", "for two")
    second.check("[name=is_done]")
    for page in (first, second):
        until(page, "document.querySelector('[name=title]').value === 'Buy dog food'")
        until(page, "document.querySelector('[name=notes]').value === 'for two'")
        until(page, "document.querySelector('[name=is_done]').checked")
    keep_shot(first, "example-collaborative-editing")
    site.database.execute("UPDATE reminders SET title = 'not this one' WHERE id = 2")
    site.database.execute("UPDATE reminders SET title = 'by psql' WHERE id = 1")
    for page in (first, second):
        until(page, "document.querySelector('[name=title]').value === 'by psql'")
    assert site.database.execute("SELECT title, notes, is_done FROM reminders WHERE id = 1") == [
        ("by psql", "for two", True)
    ]


def test_a_row_that_is_not_there_is_told(site_of: SiteOf, open_live: OpenPage) -> None:
    site = site_of("collaborative-editing")
    page = open_live(site, "/?id=999", "text=there is no reminder 999")
    assert not page.is_visible("form")


# ---- online-users


def test_pages_know_who_is_there_and_what_they_do(
    site_of: SiteOf, open_live: OpenPage, keep_shot: KeepShot
) -> None:
    site = site_of("online-users")
    ada = open_live(site, "/?user=Ada")
    ben, other_tab = open_live(site, "/?user=Ben"), open_live(site, "/?user=Ben")
    for page in (ada, ben, other_tab):
        shows(page, "#users li", ["Ada", "Ben (2 tabs)"])
    site.database.execute(
        "INSERT INTO user_interactions (user_id, action) VALUES ('Ada', 'has fed the cat')"
    )
    for page in (ada, ben):
        shows(page, "#interactions li", ["Ada has fed the cat"])
    keep_shot(ada, "example-online-users")
    other_tab.close()
    shows(ada, "#users li", ["Ada", "Ben"])
    ben.fill("[name=name]", "Benjamin")
    ben.keyboard.press("Enter")
    shows(ada, "#users li", ["Ada", "Benjamin"])
    ben.close()
    shows(ada, "#users li", ["Ada"])
    site.proxy.cut()
    ada.wait_for_selector("[role=status]:not(.live)")
    ada.wait_for_selector("[role=status].live")
    shows(ada, "#users li", ["Ada"])
