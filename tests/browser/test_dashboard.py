"""The dashboard in a browser, over a made-up walstream: hostile rows, keyboard, tokens, screens.

What it shows of a real one is in `test_live_pages` and `test_operating`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.browser.conftest import KeepShot, OpenPage, until
from tests.browser.fake import OPERATOR, VISITOR, FakeServer, letter

if TYPE_CHECKING:
    from playwright.sync_api import Page

LIVE: Final = "document.querySelector('#link').dataset.tone === 'good'"
SIZES: Final = {"wide": (1440, 1000), "tablet": (820, 1100), "phone": (360, 740)}

HOSTILE: Final = (
    "<img src=x onerror='window.harmed = 1'><script>window.harmed = 1</script>"
    "\"'><svg onload=window.harmed=1>{{constructor.constructor('window.harmed=1')()}}\u202e"
)

CONTRASTS: Final = """
() => {
  const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const opaque = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(one).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((one) => {
      const c = one / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const levels = [luminance(channels(style.color).slice(0, 3)), luminance(opaque(element))];
    const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return found;
}
"""
"""Texts whose contrast is below what WCAG asks for at level AA, of normal size."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def open_dashboard(server: FakeServer, open_page: OpenPage, **context: Any) -> Page:
    page = open_page(f"{server.url}#token={OPERATOR}", **context)
    until(page, LIVE)
    return page


def rows(page: Page) -> int:
    count: int = page.evaluate("document.querySelectorAll('#feed > li').length")
    return count


def publish_all_kinds(server: FakeServer) -> None:
    server.publish(
        server.change(),
        server.change("update", row={"id": 2, "status": "active"}, identity={"id": 2}),
        server.change(
            "update",
            table="orders",
            row={"id": 9007199254740993, "status": "active", "note": None},
            identity={"id": 9007199254740993, "status": "new", "note": None},
            unchanged=["body"],
        ),
        server.change("update", row=None, identity={"id": 2}),
        server.change("delete", row=None, identity={"id": 2}),
        server.change("truncate", row=None, identity=None),
    )


# ---- What rows can do


def test_a_hostile_row_is_only_text(server: FakeServer, open_page: OpenPage) -> None:
    page = open_dashboard(server, open_page)
    names = {HOSTILE: HOSTILE, "__proto__": "x", "constructor": [HOSTILE, {HOSTILE: None}]}
    server.publish(
        server.change(row=names, schema=HOSTILE, table=HOSTILE),
        server.change("update", row={"a": HOSTILE}, identity={"a": "b"}, root=HOSTILE),
        {**server.change(), "operation": "insert", "commit_time": HOSTILE.replace("\u202e", "")},
    )
    until(page, "document.querySelectorAll('#feed > li').length === 3")
    for summary in page.query_selector_all("#feed summary"):
        summary.click()
    page.wait_for_timeout(100)
    assert page.evaluate("window.harmed") is None
    made = "document.querySelectorAll('#feed img, #feed svg, #feed script').length"
    assert page.evaluate(made) == 0
    assert HOSTILE[:40] in page.inner_text("#feed")


def test_the_page_lets_no_other_script_run_and_nothing_be_sent_elsewhere(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_page(server.url)
    headers = page.request.get(server.url).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    text = page.content()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "").replace(server.url, "")


def test_numbers_are_shown_as_they_are_in_the_database(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_dashboard(server, open_page)
    server.publish(server.change(row={"id": 9007199254740993, "of": {"a": [1.10, None]}}))
    until(page, "document.querySelectorAll('#feed > li').length === 1")
    assert "9007199254740993" in page.inner_text("#feed")
    assert '{"a": [1.1, null]}' in page.inner_text("#feed")


# ---- The feed


def test_what_comes_while_it_pauses_is_shown_when_it_goes_on(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_dashboard(server, open_page)
    page.click("#pause")
    server.publish(*(server.change() for _ in range(3)))
    until(page, "/3 waiting/.test(document.querySelector('#feed-count').textContent)")
    assert rows(page) == 0
    page.click("#pause")
    until(page, "document.querySelectorAll('#feed > li').length === 3")


def test_the_last_rows_are_kept(server: FakeServer, open_page: OpenPage) -> None:
    page = open_dashboard(server, open_page)
    page.select_option("#keep", "100")
    server.publish(
        *(server.change(id=f"0/{number + 1:X}:1", row={"id": number}) for number in range(250))
    )
    until(page, "document.querySelector('#feed > li')?.textContent.includes('id249')")
    assert rows(page) == 100


def test_a_reset_is_shown_as_such(server: FakeServer, open_page: OpenPage) -> None:
    page = open_dashboard(server, open_page)
    server.publish(
        server.change(), {"reason": "trimmed", "since": "0/1:1", "begins": "0/5:1"}, server.change()
    )
    until(page, "document.querySelectorAll('#feed > li').length === 3")
    assert "not all here: trimmed; asked for 0/1:1" in page.inner_text(".reset")


def test_a_stream_that_ends_goes_on_behind_the_last_id(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_dashboard(server, open_page)
    server.publish(server.change(), server.change(id="0/2:1"))
    until(page, "document.querySelectorAll('#feed > li').length === 2")
    server.end("slow")
    until(page, f"!({LIVE})")
    server.publish(server.change(id="0/3:1"))
    server.end("")
    until(page, "document.querySelectorAll('#feed > li').length === 3")
    assert server.asked[-1]["last"] == "0/2:1"


def test_the_filter_is_asked_for_and_stays_in_the_address(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_dashboard(server, open_page)
    page.fill("[name=table]", "public.messages_v2")
    page.fill("[name=where]", 'content=eq."a, b & c"')
    page.fill("[name=columns]", "id,content")
    page.uncheck("[value=truncate]")
    page.click("#filter [type=submit]")
    until(page, LIVE)
    assert server.asked[-1] == {
        "table": "public.messages_v2",
        "operations": "insert,update,delete",
        "where": 'content=eq."a, b & c"',
        "columns": "id,content",
        "last": "",
    }
    page.reload()
    until(page, LIVE)
    assert server.asked[-1] == server.asked[-2]


# ---- Tokens


def test_a_token_is_in_no_address(server: FakeServer, open_page: OpenPage) -> None:
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}#token={OPERATOR}&table=public.orders")
    until(page, LIVE)
    assert OPERATOR not in page.url
    assert all(OPERATOR not in url.partition("#")[0] for url in asked)
    assert page.evaluate("sessionStorage['walstream.token']") == OPERATOR
    assert page.evaluate("localStorage.length") == 0


def test_without_a_token_the_page_says_so_and_takes_one(
    server: FakeServer, open_page: OpenPage, keep_shot: KeepShot
) -> None:
    page = open_page(server.url)
    page.wait_for_selector("#notice:not([hidden])")
    assert "a token is needed" in page.inner_text("#notice")
    page.click("#notice-token")
    keep_shot(page, "dashboard-token", full_page=False)
    page.fill("#token", f"Bearer {OPERATOR}")
    page.keyboard.press("Enter")
    until(page, LIVE)
    assert not page.is_visible("#notice")
    page.wait_for_function(
        "document.querySelector('#foot').innerText.includes('you read as admin')"
    )


def test_an_expired_token_is_told(
    server: FakeServer, open_page: OpenPage, keep_shot: KeepShot
) -> None:
    page = open_dashboard(server, open_page)
    server.gate.expired = True
    server.end("expired")
    page.wait_for_selector("#notice:not([hidden])")
    assert "expired" in page.inner_text("#notice")
    assert page.inner_text("#link") == "not connected"
    keep_shot(page, "dashboard-expired")


def test_a_role_without_figures_reads_changes_all_the_same(
    server: FakeServer, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}#token={VISITOR}")
    until(page, LIVE)
    server.publish(server.change())
    until(page, "document.querySelectorAll('#feed > li').length === 1")
    until(page, "/not for this role/.test(document.querySelector('#phase').textContent)")
    assert page.inner_text("#letters-state") == "Not for this role."


# ---- Dead letters


def test_chosen_dead_letters_are_replayed_by_click(
    server: FakeServer, open_page: OpenPage, keep_shot: KeepShot
) -> None:
    server.letters.stored = [letter(1), letter(2), letter(3, route="search-index")]
    page = open_dashboard(server, open_page)
    page.check("[data-letter='1']")
    assert page.inner_text("#replay-chosen") == "Replay 1 chosen"
    page.click("#replay-chosen")
    keep_shot(page, "dashboard-replay", full_page=False)
    page.click("#replay-yes")
    until(page, "/mailer: 1 delivered/.test(document.querySelector('#replay-report').textContent)")
    until(page, "!document.querySelector(\"[data-letter='1']\")")
    page.select_option("#replay-route", "search-index")
    page.click("#replay-all")
    page.click("#replay-dialog .plain")
    assert len(server.letters.stored) == 2


# ---- Everybody


def test_all_can_be_done_by_keyboard(server: FakeServer, open_page: OpenPage) -> None:
    server.letters.stored = [letter(1)]
    page = open_dashboard(server, open_page)
    publish_all_kinds(server)
    until(page, "document.querySelectorAll('#feed > li').length === 6")
    page.wait_for_selector("[data-letter='1']")
    press_until(page, "document.activeElement.className === 'skip'")
    page.keyboard.press("Enter")
    press_until(page, "document.activeElement.name === 'table'")
    page.keyboard.type("public.orders")
    page.keyboard.press("Enter")
    until(page, LIVE)
    publish_all_kinds(server)
    until(page, "document.querySelectorAll('#feed > li').length === 6")
    press_until(page, "document.activeElement.id === 'pause'")
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    press_until(page, "document.activeElement.tagName === 'SUMMARY'")
    page.keyboard.press("Enter")
    page.wait_for_selector(".inside")
    press_until(page, "document.activeElement.dataset.letter === '1'")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    press_until(page, "document.activeElement.id === 'replay-chosen'", "Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    until(page, "/1 delivered/.test(document.querySelector('#replay-report').textContent)")


def press_until(page: Page, expression: str, key: str = "Tab") -> None:
    """Go on with Tab; wherever the focus is, it can be seen."""
    for _ in range(80):
        page.keyboard.press(key)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'"), (
            page.evaluate("document.activeElement.outerHTML")
        )
        if page.evaluate(expression):
            return
    pytest.fail(f"the focus does not come to where {expression}")


def test_everything_that_can_be_pressed_has_a_name(server: FakeServer, open_page: OpenPage) -> None:
    server.letters.stored = [letter(1)]
    page = open_dashboard(server, open_page)
    page.wait_for_selector("[data-letter='1']")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, summary")]
          .filter((one) => !one.textContent.trim() && !one.labels?.[0]?.textContent.trim()
            && !one.ariaLabel).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('[aria-live], [role=status]').length") > 0
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))"
    )
    assert levels[0] == 1
    assert set(levels[1:]) == {2}


def test_it_can_be_read_on_every_screen(
    server: FakeServer, open_page: OpenPage, keep_shot: KeepShot
) -> None:
    """No text is pale, nothing is cut off at the side, nothing moves where that is not wanted."""
    server.letters.stored = [letter(1), letter(2, parked=True, attempts=0, error="")]
    page = open_dashboard(server, open_page, reduced_motion="reduce")
    publish_all_kinds(server)
    until(page, "document.querySelectorAll('#feed > li').length === 6")
    page.click("#feed li:nth-child(4) summary")
    page.wait_for_selector("[data-letter='1']")
    until(page, "/\\d/.test(document.querySelector('#sign-rate').textContent)")
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CONTRASTS) == []
            moving = "document.getAnimations().some((one) => one.playState === 'running')"
            assert not page.evaluate(moving)
            keep_shot(page, f"dashboard-{size}-{scheme}")
