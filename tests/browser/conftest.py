"""A headless Chromium, driven by Playwright: the one of this machine, nothing is downloaded.

``WALSTREAM_CHROMIUM`` names the program. Where there is none the tests are skipped, but under
``CI=true`` they fail. Screenshots go to ``tests/artefacts``, or where ``WALSTREAM_ARTEFACTS`` says.

Playwright's synchronous interface runs an event loop under the test, so that a module that uses it
can have no ``async def`` tests; the browser is closed at the module's end.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
ROOT: Final = Path(__file__).parent.parent.parent

OpenPage: TypeAlias = Callable[..., "Page"]
KeepShot: TypeAlias = Callable[..., Path]


def until(page: Page, expression: str, timeout_seconds: float = 20.0) -> None:
    """Wait until an expression holds in a page.

    Playwright's own waiting evaluates text within the page, which the dashboard's policy refuses.
    """
    deadline = time.monotonic() + timeout_seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {expression}"
        page.wait_for_timeout(10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program; without it the test is skipped."""
    names = (os.environ.get("WALSTREAM_CHROMIUM"), *PROGRAMS)
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is not None:
        return found
    reason = "needs Chromium: apt-get install chromium, or name it in WALSTREAM_CHROMIUM"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """The browser of a module's tests."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - not asked for elsewhere

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """``open_page(url, **context)``: a page of a session of its own; it must raise no error.

    What its policy refuses is an error, too; answers that are no success are not.
    """
    contexts, errors = [], []

    def on_console(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            errors.append(message.text)

    def open_page(url: str, **differs: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **differs})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", on_console)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def keep_shot() -> KeepShot:
    """``keep_shot(page, name)``: a screenshot that stays after the tests, to be looked at."""
    folder = Path(os.environ.get("WALSTREAM_ARTEFACTS") or ROOT / "tests" / "artefacts")

    def keep_shot(page: Page, name: str, *, full_page: bool = True) -> Path:
        path = folder / f"{name}.png"
        page.screenshot(path=path, full_page=full_page)
        return path

    return keep_shot
