"""Every page, by day and by night, on a desktop and on a phone: accessible and no wider than the screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import CONFIRMED_WITHIN, HELD, screenshot, watched
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY
from tests.support.skips import needs_chromium
from tests.web.large_shop import SIZE
from tests.web.stack import Stack
from web.charts import Series, bars
from web.formats import Formats

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A shop with many products and no workers."""
    front_end = "tests.web.large_shop:create_app()"
    with Stack(tmp_path_factory.mktemp("large"), workers=False, web_processes=1, front_end=front_end) as shop:
        yield shop


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_every_page_is_accessible(
    service: Stack, large: Stack, browser: Browser, width: int, scheme: str
) -> None:
    """axe finds nothing, and nothing is wider than the screen, in both schemes of colours."""
    confirmed = service.final(service.order(customer_id="می\u200cخواهم")["order_id"])["order_id"]
    declined = service.final(service.order(payment_token="tok_declined")["order_id"])["order_id"]
    shipped = service.final(service.order()["order_id"])["order_id"]
    service.post(f"/api/orders/{shipped}/shipments", json={"carrier": "DHL", "tracking": "JJD000390007827"})
    addresses = {
        "form": f"{service.url}/",
        "large-form": f"{large.url}/",
        "orders": f"{service.url}/orders",
        "no-orders": f"{service.url}/orders?status=failed&since=2026-01-01&customer=nobody",
        "wrong-filters": f"{service.url}/orders?since=soon&q=%00",
        "confirmed": f"{service.url}/orders/{confirmed}",
        "declined": f"{service.url}/orders/{declined}",
        "shipped": f"{service.url}/orders/{shipped}",
        "api": f"{service.url}/docs",
        "found": f"{service.url}/orders?failure=declined&status=rejected",
        "overview": f"{service.url}/admin",
        "overview-hours": f"{service.url}/admin?by=hour",
        "keys": f"{service.url}/admin/keys",
        "audit": f"{service.url}/admin/audit",
        "wrong-audit": f"{service.url}/admin/audit?kind=x",
        "erasures": f"{service.url}/admin/erasures",
        "products": f"{service.url}/admin/products",
        "product": f"{service.url}/admin/products/LAMP-01",
        "product-import": f"{service.url}/admin/product-import",
        "fleet": f"{service.url}/admin/fleet/",
        "error": f"{service.url}/nothing-here",
    }
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 600
    )
    for page in watched(context):
        wrong = []
        for name, address in addresses.items():
            page.goto(address)
            if "overview" in name:
                page.get_by_text("The same as a table").click()
                expect(page.get_by_role("columnheader", name="Placed")).to_be_visible()
            if name in ("confirmed", "shipped"):
                page.evaluate("document.querySelectorAll('main details').forEach(e => e.open = true)")
            wrong += flaws(page, f"{name}-{width}-{scheme}")
        page.goto(f"{service.url}/")
        page.locator("#quantity-MUG-01").fill("2000")
        page.get_by_role("button", name="Place order").click()
        expect(page.locator("#errors")).to_be_focused()
        wrong += flaws(page, f"form-errors-{width}-{scheme}")
        assert not wrong, "\n".join(wrong)


def flaws(page: Page, name: str) -> list[str]:
    """Return what is wrong with a page as it is now, and keep a picture of it."""
    screenshot(page, name)
    found = Axe().run(page)
    wrong = [f"{name}: {found.generate_report()}"] if found.violations_count else []
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        wrong.append(f"{name} is wider than the screen")
    return wrong


def test_many_products_are_a_page_of_bearable_length(large: Stack, phone: Page) -> None:
    """158 products: a page of some, with the total in sight wherever one is."""
    phone.goto(large.url)
    assert phone.evaluate("document.documentElement.scrollHeight") < 6_000
    expect(phone.locator("#found")).to_have_text(f"Products 1 to 24 of {SIZE}")
    for position in (0, 0.3, 0.6):
        phone.evaluate(f"window.scrollTo(0, {position} * document.documentElement.scrollHeight)")
        expect(phone.locator("#total-amount")).to_be_in_viewport()
        expect(phone.get_by_role("button", name="Place order")).to_be_in_viewport()


def test_what_was_chosen_stays_chosen(large: Stack, page: Page) -> None:
    """Search, categories and pages change what is in sight, and neither the order nor its total."""
    page.goto(large.url)
    page.locator("#quantity-MUG-01").fill("2")
    page.get_by_label("Customer id").fill("c-large")
    page.get_by_label("Search products").press_sequentially("no. 150")
    page.locator("#quantity-EXTRA-150").fill("1")
    expect(page.locator("#found")).to_have_text("1 product")
    page.get_by_label("Search products").fill("")
    page.get_by_role("button", name="Toys").click()
    expect(page.locator("#quantity-EXTRA-002")).to_be_visible()
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("Page 2 of 3")).to_be_visible()
    expect(page.locator("#total-amount")).to_have_text("€175.80")
    page.get_by_role("button", name="Chosen").click()
    expect(page.locator("#shelf .product")).to_have_count(2)
    page.get_by_role("button", name="Place order").click()
    page.wait_for_url(re.compile(r"/orders/[^/]+$"))
    expect(page.get_by_text("Thing no. 150")).to_be_visible()


def test_a_press_in_the_catalogue_is_not_lost(large: Stack, page: Page) -> None:
    """What was searched for comes in while a button is pressed: it is shown when that is released."""
    page.goto(large.url)
    page.evaluate(HELD, "#catalogue")
    page.get_by_role("button", name="One more of Enamel mug").hover()
    page.mouse.down()
    with page.expect_response("**/catalogue") as answer:
        page.evaluate("search.value = 'mug'; search.dispatchEvent(new Event('input', { bubbles: true }))")
    answer.value.finished()
    # By the time that another answer is there, the page has dealt with the first.
    page.evaluate("fetch('/health/live').then((answer) => answer.text())")
    assert page.evaluate("window.replaced") == 0
    page.mouse.up()
    expect(page.locator("#quantity-MUG-01")).to_have_value("1")
    expect(page.locator("#found")).to_have_text(re.compile("^[0-9] product"))
    expect(page.locator("#quantity-MUG-01")).to_have_value("1")


def test_what_was_chosen_stays_chosen_without_scripts(large: Stack, plain: Page) -> None:
    """The same with plain forms, and the total when it is asked for."""
    plain.goto(large.url)
    plain.locator("#quantity-MUG-01").fill("2")
    plain.locator("#customer_id").fill("c-plain")
    plain.locator("#search").fill("no. 150")
    # Enter must not order.
    plain.locator("#search").press("Enter")
    plain.locator("#quantity-EXTRA-150").fill("1")
    plain.get_by_role("button", name="Update the total").click()
    expect(plain.locator("#total-amount")).to_have_text("€175.80")
    plain.locator("#search").fill("")
    plain.get_by_role("button", name="Tools").click()
    plain.get_by_role("button", name="Next").click()
    plain.get_by_role("button", name="Place order").click()
    plain.wait_for_url(re.compile(r"/orders/[^/]+$"))
    expect(plain.get_by_text("Thing no. 150")).to_be_visible()


def test_what_is_not_in_stock_is_said_before_it_is_ordered(large: Stack, page: Page) -> None:
    """How few are left stands at the product, and a quantity beyond that is warned of at once."""
    page.goto(large.url)
    field = page.locator("#quantity-EXTRA-002")
    expect(page.locator("#stock-EXTRA-002")).to_have_text("Only 3 left")
    field.fill("5")
    expect(page.get_by_text("5 chosen, 3 left")).to_be_visible()
    expect(field).to_have_attribute("aria-describedby", re.compile("warning-EXTRA-002"))
    field.fill("3")
    expect(page.get_by_text("3 left").locator("visible=true")).to_have_count(1)
    field.fill("5")
    page.get_by_label("Customer id").fill("c-1")
    page.get_by_role("button", name="Place order").click()
    expect(page.locator("#errors")).to_be_focused()
    page.get_by_role("link", name="5 × Thing no. 2 ordered, 3 left").click()
    expect(page.locator("#quantity-EXTRA-002")).to_be_focused()
    expect(page.locator("#quantity-EXTRA-002")).to_have_attribute(
        "aria-describedby", re.compile("^quantity-EXTRA-002-error")
    )


def test_the_list_keeps_itself_up_to_date(service: Stack, page: Page) -> None:
    """An order that is placed elsewhere appears, its count with it, and is announced."""
    customer = "c-live-list"
    page.goto(f"{service.url}/orders?customer={customer}")
    expect(page.get_by_text("No order fits.")).to_be_visible()
    order = service.order(customer_id=customer)
    expect(page.locator(f"#list a[title='{order['order_id']}']")).to_be_visible(timeout=CONFIRMED_WITHIN)
    expect(page.locator("#announce")).to_have_text("A new order.")
    expect(page.locator("#list .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)
    expect(page.locator("#list .chip", has_text="Confirmed").locator(".count")).to_have_text("1")


def test_times_say_their_zone(service: Stack, browser: Browser) -> None:
    """In UTC without scripts, in the reader's own zone with them."""
    order_id = service.order()["order_id"]
    for scripts, zone in ((False, "UTC"), (True, "GMT+9")):
        context = browser.new_context(java_script_enabled=scripts, timezone_id="Asia/Tokyo")
        for page in watched(context):
            page.goto(f"{service.url}/orders/{order_id}")
            time = page.locator(".timeline time").first
            eventually(lambda: (time.text_content() or "").endswith(zone), timeout=30)  # noqa: B023


def test_no_value_beside_a_chart_is_cut(browser: Browser) -> None:
    """However much was sold, and in whatever locale."""
    style = (REPOSITORY / "web" / "static" / "style.css").read_text()
    page = browser.new_page()
    for locale in ("en_GB", "de_CH"):
        for revenue in (99_900, 10_000_000, 99_999_999_900):
            series = [Series("revenue", "Revenue", [0.0, float(revenue)])]
            shown = partial(_money, Formats(locale))
            drawn = bars("Revenue", series, ("a", "b", "c"), shown)
            page.set_content(f"<style>{style}</style>{drawn}")
            cut = page.eval_on_selector_all(
                ".chart text",
                "all => all.filter((one) => one.getBBox().x < one.ownerSVGElement.viewBox.baseVal.x)"
                ".map((one) => one.textContent)",
            )
            assert cut == [], (locale, revenue)
    page.close()


def _money(formats: Formats, minor: float) -> str:
    return formats.money(round(minor), "EUR")
