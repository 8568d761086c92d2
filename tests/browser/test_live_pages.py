"""The example's page and the dashboard, on a real walstream and Postgres: at once, and gapless."""

from __future__ import annotations

import functools
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.browser.conftest import ROOT, KeepShot, OpenPage, until
from tests.command_line import CommandLine, slot_name
from tests.postgres import Database
from tests.proxy import Proxy

if TYPE_CHECKING:
    from playwright.sync_api import Page

EXAMPLE: Final = ROOT / "examples" / "live-dashboard"

ROWS: Final = 30
MISSED: Final = 1000
MEDIAN_MS: Final = 100

INSERT: Final = "INSERT INTO messages_v2 (conversation_id, sender, content) VALUES (%s, 'Ada', %s)"

NOTE_ARRIVALS: Final = """
(selector) => {
  window.arrivals = [];
  const note = (records) => requestAnimationFrame(() => {
    const at = performance.timeOrigin + performance.now();
    for (const record of records)
      for (const _ of record.addedNodes) window.arrivals.push(at);
  });
  new MutationObserver(note).observe(document.querySelector(selector), { childList: true });
}
"""
"""Note when a row is shown: in the frame that is painted with it, by the clock of the machine."""


class Site:
    """The example as its README says: its page from a server of its own, walstream beside it.

    Between the browser and walstream there is a proxy.
    """

    def __init__(self, folder: Path, database: Database, opened: ExitStack) -> None:
        self.database = database
        database.execute((EXAMPLE / "schema.sql").read_text())
        self._line = CommandLine(folder)
        self._pages = ThreadingHTTPServer(("127.0.0.1", 0), _quiet(folder))
        threading.Thread(target=self._pages.serve_forever, daemon=True).start()
        opened.callback(self._pages.server_close)
        opened.callback(self._pages.shutdown)
        self.example_url = f"http://127.0.0.1:{self._pages.server_port}/index.html"
        self._configure(folder)
        opened.enter_context(self._line.running("run"))
        self._line.wait_for("streaming")
        address = str(self._line.wait_for("http_listening")["address"])
        port = address.rpartition(":")[2]
        self.proxy = opened.enter_context(Proxy(f"host=127.0.0.1 port={port}", is_postgres=False))
        self.url = f"http://127.0.0.1:{self.proxy.port}"
        text = (EXAMPLE / "index.html").read_text()
        (folder / "index.html").write_text(text.replace("http://127.0.0.1:8432", self.url))

    def _configure(self, folder: Path) -> None:
        self._line.environment |= {
            "WALSTREAM_POSTGRES_DSN": self.database.dsn,
            "WALSTREAM_SLOT_NAME": slot_name(),
            "WALSTREAM_HTTP_LISTEN": "127.0.0.1:0",
        }
        text = (EXAMPLE / "walstream.toml").read_text()
        origin = self.example_url.removesuffix("/index.html")
        (folder / "walstream.toml").write_text(text.replace("http://127.0.0.1:8000", origin))

    def write(self, conversation: str, content: str) -> int:
        """Commit a message, and return its id."""
        [(number,)] = self.database.execute(f"{INSERT} RETURNING id", conversation, content)
        return int(number)


def _quiet(folder: Path) -> Any:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - its name there
            pass

    return functools.partial(Handler, directory=folder)


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as opened:
        yield Site(tmp_path, database, opened)


@dataclass(frozen=True)
class Shown:
    """A page, and the list in it where rows are shown, the newest first."""

    name: str
    page: Page
    rows_in: str

    def count(self, comparison: str) -> None:
        """Wait until so many rows are shown."""
        until(self.page, f"document.querySelector('{self.rows_in}').children.length {comparison}")

    def rows(self) -> list[str]:
        """The text of the rows that are shown, the oldest first."""
        found: list[str] = self.page.evaluate(
            "(rows) => [...document.querySelector(rows).children].map((one) => one.innerText)",
            self.rows_in,
        )
        return found[::-1]


@pytest.fixture
def pages(site: Site, open_page: OpenPage) -> list[Shown]:
    """Both pages, which show one conversation."""
    example = open_page(site.example_url)
    example.wait_for_selector("#state.live")
    example.fill("#conversation", "abc-123")
    example.keyboard.press("Enter")
    dashboard = open_page(f"{site.url}/#table=public.messages_v2")
    dashboard.select_option("#keep", "2000")
    dashboard.fill("[name=where]", "conversation_id=eq.abc-123")
    dashboard.keyboard.press("Enter")
    example.wait_for_selector("#state.live")
    dashboard.wait_for_selector("#link[data-tone=good]")
    return [Shown("example", example, "#messages"), Shown("dashboard", dashboard, "#feed")]


def test_a_row_is_shown_within_100_ms_of_its_commit_and_only_those_asked_for(
    site: Site, pages: list[Shown], keep_shot: KeepShot
) -> None:
    for one in pages:
        one.page.evaluate(NOTE_ARRIVALS, one.rows_in)
    begun = []
    with site.database.connect(autocommit=False) as connection:
        for number in range(ROWS):
            connection.execute(INSERT, ["another", "not asked for"])
            connection.execute(INSERT, ["abc-123", f"Hello {number}"])
            begun.append(time.time() * 1000)
            connection.commit()
            for one in pages:
                until(one.page, f"window.arrivals.length === {number + 1}")
    for one in pages:
        shown: list[float] = one.page.evaluate("window.arrivals")
        waits = [at - before for at, before in zip(shown, begun, strict=True)]
        print(  # noqa: T201 - to be read where tests are run
            f"\n{one.name}: commit to shown, median {statistics.median(waits):.1f} ms, longest"
            f" {max(waits):.1f} ms"
        )
        keep_shot(one.page, f"{one.name}-live")
        assert len(one.rows()) == ROWS
        assert "not asked for" not in one.page.inner_text("body")
        assert statistics.median(waits) < MEDIAN_MS


def test_what_was_missed_while_the_network_was_cut_is_shown_once_in_order(
    site: Site, pages: list[Shown], keep_shot: KeepShot
) -> None:
    site.write("abc-123", "before")
    for one in pages:
        one.count("=== 1")
    site.proxy.refuse()
    site.proxy.cut()
    for one in pages:
        state = "document.querySelector('#state, #link').textContent"
        until(one.page, f"/cut off|connecting/.test({state})")
        keep_shot(one.page, f"{one.name}-cut-off")
    with site.database.connect(autocommit=False) as connection:
        for number in range(MISSED):
            connection.execute(INSERT, ["abc-123", f"missed {number}"])
            if number % 10 == 0:
                connection.execute(INSERT, ["another", "not asked for"])
                connection.commit()
        connection.commit()
    site.proxy.restore()
    site.write("abc-123", "the last one")
    for one in pages:
        one.count(f">= {MISSED + 2}")
        first, *missed, last = one.rows()
        assert "before" in first
        assert [re.findall(r"missed (\d+)", text) for text in missed] == [
            [str(number)] for number in range(MISSED)
        ]
        assert "the last one" in last
        keep_shot(one.page, f"{one.name}-back", full_page=False)
