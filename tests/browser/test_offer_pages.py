"""What there is of an order is offered in a browser: a customer sees it, accepts it, and follows it to its end."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import CONFIRMED_WITHIN, watched
from tests.browser.test_every_page import flaws
from tests.support.skips import needs_chromium
from tests.web.stack import Stack
from tests.web.test_offers import CHAIR, LONG_MS, offered, stock_of

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A service that offers what there is."""
    env = {"SHORT_STOCK": "offer", "OFFER_DEADLINE": str(LONG_MS)}
    with Stack(tmp_path_factory.mktemp("offers"), env=env) as stack:
        yield stack


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_from_the_form_to_confirmed(shop: Stack, browser: Browser, width: int, scheme: str) -> None:
    """Each page of an offer can be used, is accessible, and no wider than the screen."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 600
    )
    for page in watched(context):
        stock_of(shop, CHAIR, 2)
        page.goto(shop.url)
        page.locator(f"#quantity-{CHAIR}").fill("5")
        page.locator("#quantity-MUG-01").fill("1")
        page.get_by_label("Customer id").fill("c-42")
        page.get_by_role("button", name="Place order").click()
        page.wait_for_url(re.compile(r"/orders/[^/]+$"))
        expect(page.locator(".status .pill")).to_have_text("Partly in stock", timeout=CONFIRMED_WITHIN)
        pieces = page.locator(".items tbody tr").filter(has_text=CHAIR).locator("td")
        expect(pieces.nth(0)).to_have_text("5")
        expect(pieces.nth(1)).to_have_text("2")
        wrong = flaws(page, f"offered-{width}-{scheme}")
        page.get_by_role("button", name="Accept it for €").click()
        expect(page.locator(".status .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)
        expect(page.get_by_text("Offer accepted")).to_be_visible()
        expect(page.get_by_role("button", name="Accept it for €")).to_have_count(0)
        wrong += flaws(page, f"offer-accepted-{width}-{scheme}")
        declined = offered(shop)
        page.goto(f"{shop.url}/orders/{declined['order_id']}")
        page.get_by_text("Cancel the order").click()
        page.get_by_role("button", name="Cancel it").click()
        expect(page.locator(".status .pill")).to_have_text("Cancelled", timeout=CONFIRMED_WITHIN)
        wrong += flaws(page, f"offer-declined-{width}-{scheme}")
        assert not wrong, "\n".join(wrong)
