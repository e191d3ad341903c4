"""The whole service, started once for the tests in a browser, and the pages that they look at it with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support.processes import REPOSITORY
from tests.support.skips import CHROMIUM
from tests.web.stack import Stack

ARTIFACTS = REPOSITORY / ".artifacts" / "browser"
ARGUMENTS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]
CONFIRMED_WITHIN = 60_000
expect.set_options(timeout=CONFIRMED_WITHIN)

#: Counts in a page how often a part of it is replaced.
HELD = """(part) => {
  window.replaced = 0;
  new MutationObserver(() => { window.replaced += 1; }).observe(document.querySelector(part), { childList: true });
}"""


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The running service that tests share. A test that stops a part of it starts a Stack of its own."""
    env = {"WEBHOOK_NETWORKS": "127.0.0.0/8"}
    with Stack(tmp_path_factory.mktemp("service"), web_processes=2, env=env) as stack:
        yield stack


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium, started once."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def slow_gateway(service: Stack) -> None:
    """Give the browser time to show an order before it is paid, so that the change is what is seen."""
    service.knobs(latency_ms=1_500)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test when a script fails or is blocked by the page's own policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield from watched(context)


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    """A page as wide as a phone."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    yield from watched(context)


@pytest.fixture
def plain(browser: Browser) -> Iterator[Page]:
    """A page on which no script runs."""
    context = browser.new_context(java_script_enabled=False)
    yield from watched(context)


def watched(context: BrowserContext) -> Iterator[Page]:
    page = context.new_page()
    page.set_default_timeout(CONFIRMED_WITHIN)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    yield page
    context.close()
    assert not complaints


def screenshot(page: Page, name: str) -> Path:
    """Keep a picture of the page, to see what the test saw."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    path = ARTIFACTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path
