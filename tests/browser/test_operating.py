"""The dashboard of a real walstream: an operator replays dead letters, and a token runs out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.browser.conftest import KeepShot, OpenPage, until
from tests.command_line import CommandLine, slot_name
from tests.postgres import Database, wait_until
from tests.tokens import signed

SECRET: Final = secrets.token_hex(32)

HANDLERS: Final = """
from pathlib import Path
from walstream import Walstream

stream = Walstream()

@stream.on("public.orders", "insert")
async def mailer(change):
    if Path("broken").exists():
        raise TimeoutError("no mail today")
    with Path("mails").open("a") as mails:
        mails.write(f"{change.row['id']}\\n")
"""

CONFIGURATION: Final = """
[handlers]
app = "handlers:stream"
attempts = 1
on_failure = "dead_letter"

[dead_letters]
path = "letters.sqlite3"

[[routes]]
table = "public.orders"
to = "browsers"

[sinks.browsers]
type = "live"

[http]
listen = "127.0.0.1:0"

[access]
leeway_seconds = 0

[access.roles.operator]
status = true
operate = true
tables = [{ table = "public.orders" }]
"""


class Shop:
    """walstream with a handler that can be broken, and a dashboard."""

    def __init__(self, folder: Path, database: Database, opened: ExitStack) -> None:
        self.folder = folder
        self.database = database
        database.execute("CREATE TABLE orders (id int PRIMARY KEY, amount numeric)")
        line = CommandLine(folder)
        line.environment |= {
            "WALSTREAM_POSTGRES_DSN": database.dsn,
            "WALSTREAM_SLOT_NAME": slot_name(),
            "WALSTREAM_SLOT_CREATE": "true",
            "WALSTREAM_ACCESS_SECRET": SECRET,
        }
        line.write("handlers.py", HANDLERS)
        line.write("walstream.toml", CONFIGURATION)
        opened.enter_context(line.running("run"))
        line.wait_for("streaming")
        self.url = f"http://{line.wait_for('http_listening')['address']}/"
        self.line = line

    def token(self, seconds: float) -> str:
        return signed(SECRET, "operator", exp=time.time() + seconds)

    def mails(self) -> list[str]:
        path = self.folder / "mails"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def shop(database: Database, tmp_path: Path) -> Iterator[Shop]:
    with ExitStack() as opened:
        yield Shop(tmp_path, database, opened)


def test_dead_letters_are_delivered_again_by_click_while_it_streams(
    shop: Shop, open_page: OpenPage, keep_shot: KeepShot
) -> None:
    broken = shop.folder / "broken"
    broken.touch()
    shop.database.execute("INSERT INTO orders VALUES (1, 10), (2, 20), (3, 30)")
    shop.line.wait_for("change_dead_lettered", times=3)
    page = open_page(f"{shop.url}#token={shop.token(60)}")
    page.wait_for_selector("#letters tbody tr:nth-child(3)")
    assert "TimeoutError at" in page.inner_text("#letters")
    assert "no mail today" not in page.content()
    replay_all(page)
    until(page, f"/3 failed again, 3 left/.test({REPORT})")
    broken.unlink()
    replay_all(page)
    until(page, f"/mailer: 3 delivered, 0 failed again, 0 left/.test({REPORT})")
    wait_until(lambda: shop.mails() == ["1", "2", "3"])
    until(page, "document.querySelector('#letters').hidden")
    shop.database.execute("INSERT INTO orders VALUES (4, 40)")
    wait_until(lambda: shop.mails() == ["1", "2", "3", "4"])
    keep_shot(page, "dashboard-replayed")


REPORT: Final = "document.querySelector('#replay-report').textContent"


def replay_all(page: Any) -> None:
    page.click("#replay-all")
    page.click("#replay-yes")


def test_a_token_that_runs_out_ends_the_stream_and_the_page_says_so(
    shop: Shop, open_page: OpenPage
) -> None:
    page = open_page(f"{shop.url}#token={shop.token(3)}")
    until(page, "document.querySelector('#link').dataset.tone === 'good'")
    page.wait_for_selector("#link[data-tone=bad]")
    assert "expired" in page.inner_text("#notice")
    shop.database.execute("INSERT INTO orders VALUES (1, 10)")
    wait_until(lambda: shop.mails() == ["1"])
    assert page.query_selector("#feed li") is None
