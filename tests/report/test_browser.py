"""The page in a browser without a network: nothing fails, all is there, tables sort, hostile strings stay text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from layerpeel.report.page import write_report
from layerpeel.report.runtimes import keep_row
from layerpeel.run.folder import Run
from tests.report.test_runtimes import row_of

pytestmark = pytest.mark.browser


@pytest.fixture
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_in_a_browser(run: Run, browser: Any) -> None:
    keep_row(run, row_of(run, runtime="the server at http://127.0.0.1:8000"))
    address = write_report(run, measure=False).absolute().as_uri()
    for width, scheme, background in ((1400, "light", "rgb(255, 255, 255)"), (400, "dark", "rgb(18, 22, 28)")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        messages: list[str] = []
        page.on("console", lambda message, messages=messages: messages.append(message.text))
        page.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
        page.on("dialog", lambda dialog, messages=messages: (messages.append("dialog"), dialog.dismiss()))
        page.goto(address)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and figures scroll
        assert page.locator("figure svg").count() == 7
        assert all(box["height"] > 100 for box in (each.bounding_box() for each in page.locator("figure svg").all()))
        _sorts(page)
        _changes_theme(page, background)
        assert "owned" not in page.title()
        assert page.locator("img").count() == 0 and page.locator("body script").count() == 1
        assert messages == []
        context.close()


def _sorts(page: Any) -> None:
    def layers() -> list[str]:
        return page.locator("#depths tbody th").all_inner_texts()

    assert layers() == ["6", "5", "4", "4, last pass"]
    button = page.locator("#depths thead th button").first
    button.click()
    assert layers() == ["4", "4, last pass", "5", "6"]
    button.focus()
    page.keyboard.press("Enter")
    assert layers() == ["6", "5", "4", "4, last pass"]
    assert page.locator("#depths thead th").first.get_attribute("aria-sort") == "descending"
    page.locator("#depths thead th button", has_text="parameters").click()
    assert layers() == ["4", "4, last pass", "5", "6"]
    assert page.locator("#depths thead th[aria-sort]").count() == 1


def _changes_theme(page: Any, before: str) -> None:
    page.locator("#theme").focus()
    page.keyboard.press("Space")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("Space")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before
