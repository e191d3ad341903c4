"""The pages of webhooks in a browser: a person makes one, follows its deliveries, and finds what is wrong with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import watched
from tests.browser.test_every_page import flaws
from tests.support.polling import eventually
from tests.support.skips import needs_chromium
from tests.web.stack import Stack

pytestmark = needs_chromium


class Receiver(ThreadingHTTPServer):
    """A receiver that answers with the status that its test says."""

    daemon_threads = True
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/orders"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "12")
        self.end_headers()
        self.wfile.write(b"<b>read</b>\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_from_the_form_to_the_last_delivery(
    service: Stack, browser: Browser, receiver: Receiver, width: int, scheme: str
) -> None:
    """Each page of a webhook's life can be used, is accessible, and no wider than the screen."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 600
    )
    for page in watched(context):
        wrong = life(service, page, receiver, f"{width}-{scheme}")
        assert not wrong, "\n".join(wrong)


def life(service: Stack, page: Page, receiver: Receiver, name: str) -> list[str]:
    """Take a webhook from the form to its removal; returns what was wrong with the pages."""
    page.goto(service.url)
    page.get_by_role("link", name="Webhooks").click()
    wrong = flaws(page, f"webhooks-empty-{name}")
    page.get_by_label("Address").fill("https://10.0.0.1/")
    page.get_by_role("button", name="Make the webhook").click()
    expect(page.locator("#errors")).to_be_focused()
    wrong += flaws(page, f"webhooks-errors-{name}")
    page.get_by_label("Address").fill(receiver.url)
    page.get_by_label("Description").fill("the warehouse")
    page.get_by_label("Order confirmed").check()
    page.get_by_role("button", name="Make the webhook").click()
    expect(page.locator(".secret")).to_contain_text("whsec_")
    wrong += flaws(page, f"webhook-made-{name}")

    page.get_by_role("link", name="Webhooks", exact=True).first.click()
    page.get_by_role("link", name=receiver.url).click()
    address = page.url
    expect(page.locator(".secret")).to_have_count(0)
    order_id = service.final(service.order()["order_id"], timeout=60)["order_id"]

    def reload() -> Page:
        page.goto(address)
        return page

    shown(reload, "Delivered")
    expect(page.locator(".deliveries code").first).to_have_text("<b>read</b>")
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    wrong += flaws(page, f"webhook-log-{name}")
    page.goto(f"{service.url}/orders/{order_id}")
    page.locator("#told summary").click()
    expect(page.locator("#told .timeline")).to_contain_text("Webhook delivered")
    wrong += flaws(page, f"webhook-order-{name}")
    page.locator("#told a").click()
    expect(page).to_have_url(f"{address}#{page.locator('.deliveries li').first.get_attribute('id')}")

    receiver.status = 500
    page.get_by_role("button", name="Send again").click()
    shown(reload, "Failing")
    wrong += flaws(page, f"webhook-failing-{name}")
    page.get_by_role("button", name="Disable").click()
    expect(page.locator(".notice")).to_contain_text("Disabled.")
    wrong += flaws(page, f"webhook-disabled-{name}")
    page.goto(f"{service.url}/webhooks")
    wrong += flaws(page, f"webhooks-{name}")
    page.goto(address)
    page.get_by_role("button", name="Enable").click()
    expect(page.locator(".notice")).to_have_count(0)
    page.get_by_text("Remove", exact=True).click()
    page.get_by_role("button", name="Remove it").click()
    expect(page.get_by_text("There are no webhooks yet.")).to_be_visible()
    return wrong


def shown(reload: Any, text: str) -> None:
    """Reload a page until it shows a text."""
    eventually(lambda: text in (reload().locator("main").inner_text()), timeout=60, interval=0.3)
