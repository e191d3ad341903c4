"""A person with a browser: headless Chromium places orders and watches them become confirmed."""

from __future__ import annotations

import re
import threading

from playwright.sync_api import Page, Response, expect

from tests.browser.conftest import CONFIRMED_WITHIN, HELD, screenshot
from tests.browser.test_webhook_pages import Handler, Receiver
from tests.support.skips import needs_chromium
from tests.web.stack import Stack

pytestmark = needs_chromium


def test_an_order_is_placed_and_confirmed_without_a_reload(service: Stack, page: Page) -> None:
    """The form shows the total; the order's page turns to confirmed by itself."""
    page.goto(service.url)
    page.get_by_label("Enamel mug", exact=True).fill("2")
    page.get_by_role("button", name="One more of Canvas bag").click()
    expect(page.locator("#total-amount")).to_have_text("€45.79")
    page.get_by_label("Customer id").fill("c-42")
    screenshot(page, "form")
    page.get_by_role("button", name="Place order").click()
    page.wait_for_url(re.compile(r"/orders/[^/]+$"))

    loads: list[str] = []
    page.on("load", lambda loaded: loads.append(loaded.url))
    expect(page.locator(".status .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)
    expect(page.get_by_text("Order confirmed")).to_be_visible()
    expect(page).to_have_title(re.compile("^Confirmed"))
    expect(page.locator(".steps .done")).to_have_count(4)
    assert loads == []
    assert screenshot(page, "order-confirmed").stat().st_size > 10_000


def test_the_change_is_announced_to_a_screen_reader(service: Stack, page: Page) -> None:
    """What changes is also said: a live region has the new status in words."""
    order = service.order(payment_token="tok_declined")
    page.goto(f"{service.url}/orders/{order['order_id']}")
    expect(page.locator("#announce")).to_have_attribute("aria-live", "polite")
    expect(page.locator("#announce")).to_have_text(re.compile("^Rejected"), timeout=CONFIRMED_WITHIN)
    expect(page.locator(".status .pill")).to_have_text("Rejected")
    expect(page.locator(".reason")).to_contain_text("declined")


def test_without_scripts_an_order_is_placed_and_confirmed(service: Stack, plain: Page) -> None:
    """Plain HTML does it all: the form, and a page that asks again until the order is final."""
    plain.goto(service.url)
    plain.locator("#quantity-NOTE-01").fill("3")
    plain.locator("#customer_id").fill("c-plain")
    plain.get_by_role("button", name="Place order").click()
    plain.wait_for_url(re.compile(r"/orders/[^/]+$"))
    expect(plain.locator(".status .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)
    screenshot(plain, "order-without-scripts")


def test_the_keyboard_alone_is_enough(service: Stack, page: Page) -> None:
    """Tab, arrows, letters and Enter place an order, and what has the focus can be seen."""
    page.goto(service.url)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "quantity-MUG-01":
            break
    expect(page.locator("#quantity-MUG-01")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#quantity-MUG-01")).to_have_value("2")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "customer_id":
            break
    page.keyboard.type("c-keys")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/orders/[^/]+$"))
    expect(page.locator(".status .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)


def test_a_wrong_form_is_explained_where_it_is_wrong(service: Stack, page: Page) -> None:
    """The errors get the focus, and lead to their fields."""
    page.goto(service.url)
    page.get_by_role("button", name="Place order").click()
    expect(page.locator("#errors")).to_be_focused()
    page.get_by_role("link", name="Enter a customer id").click()
    expect(page.get_by_label("Customer id")).to_be_focused()
    expect(page.get_by_label("Customer id")).to_have_attribute("aria-invalid", "true")
    screenshot(page, "form-errors")


def test_a_phone_shows_everything_without_scrolling_sideways(service: Stack, phone: Page) -> None:
    """No page is wider than a narrow phone, and what is tapped is large enough to be tapped."""
    order_id = service.final(service.order()["order_id"])["order_id"]
    for name, path in {
        "form": "/",
        "orders": "/orders",
        "order": f"/orders/{order_id}",
        "api": "/docs",
        "overview": "/admin",
        "error": "/nothing-here",
    }.items():
        phone.goto(service.url + path)
        screenshot(phone, f"phone-{name}")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 360, path
        phone.evaluate("document.querySelectorAll('main details').forEach(e => e.open = true)")
        small = phone.evaluate(
            "[...document.querySelectorAll('main button, main .button, main input:not([type=hidden]), main select')]"
            ".filter(e => e.getBoundingClientRect().height < 44).map(e => e.outerHTML)"
        )
        assert small == [], path


def test_orders_are_found_and_saved(service: Stack, page: Page) -> None:
    """A person looks for a reason, sees the order, and saves what is on the list as a table."""
    order = service.final(service.order(customer_id="c-found", payment_token="tok_declined")["order_id"])
    page.goto(f"{service.url}/orders")
    page.get_by_text("Filters").click()
    page.get_by_label("Reason").fill("DECLINED")
    page.get_by_label("Customer id", exact=True).fill("c-found")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#list [data-order]")).to_have_count(1)
    expect(page.locator("#list .pill")).to_have_text("Rejected")
    with page.expect_download() as saved:
        page.get_by_role("link", name="CSV").click()
    assert saved.value.suggested_filename.endswith(".csv")
    lines = saved.value.path().read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(order["order_id"])


def test_back_and_again_is_a_second_order(service: Stack, page: Page) -> None:
    """The Back button and another press of the button place another order, not an error."""
    addresses = []
    page.goto(service.url)
    for _ in range(2):
        page.locator("#quantity-MUG-01").fill("1")
        page.get_by_label("Customer id").fill("c-again")
        page.get_by_role("button", name="Place order").click()
        page.wait_for_url(re.compile(r"/orders/[^/]+$"))
        addresses.append(page.url)
        page.go_back()
        page.wait_for_url(re.compile(r"/$"))
    assert len(set(addresses)) == 2


def test_recent_orders_appear_by_themselves(service: Stack, page: Page) -> None:
    """The form's list of recent orders shows an order that another customer placed."""
    page.goto(service.url)
    order = service.order(customer_id="c-somebody-else")
    expect(page.locator(f"#recent a[title='{order['order_id']}']")).to_be_visible()


def test_without_a_stream_the_page_polls(service: Stack, page: Page) -> None:
    """When the stream is refused, the page asks for the state every two seconds and gets there as well."""
    page.route("**/stream", lambda route: route.fulfill(status=503, body="{}"))
    page.goto(service.url)
    page.locator("#quantity-MUG-01").fill("1")
    page.get_by_label("Customer id").fill("c-poll")
    page.get_by_role("button", name="Place order").click()
    page.wait_for_url(re.compile(r"/orders/[^/]+$"))
    expect(page.locator(".status .pill")).to_have_text("Confirmed", timeout=CONFIRMED_WITHIN)


def test_a_press_is_not_lost_to_what_comes_in(service: Stack, page: Page) -> None:
    """What is under a button that is pressed stays until it is released; then the page catches up."""
    order_id = service.final(service.order()["order_id"], timeout=60)["order_id"]
    page.clock.install()
    page.goto(f"{service.url}/orders/{order_id}")
    page.locator("#refund summary").hover()
    page.mouse.down()
    service.post(f"/api/orders/{order_id}/shipments", json={"carrier": "DHL"})
    for _ in range(2):  # when the second is asked for, the first was dealt with
        comes_in(page, "/state", "shipped")
    expect(page.locator(".status .pill")).to_have_text("Confirmed")
    page.mouse.up()
    expect(page.get_by_label("Amount")).to_be_visible()
    expect(page.locator(".status .pill")).to_have_text("Shipped")
    expect(page.get_by_label("Amount")).to_be_visible()


def test_a_press_on_a_list_is_not_lost(service: Stack, page: Page) -> None:
    """Neither on the list of orders, nor on the recent orders of the form."""
    order_id = service.order()["order_id"]
    page.clock.install()
    for path, asked, part in (("/orders", "/orders", "#list"), ("/", "/recent-orders", "#recent")):
        page.goto(service.url + path)
        link = page.locator(f"{part} a[title='{order_id}']")
        link.hover()
        page.evaluate(HELD, part)
        page.mouse.down()
        # As on a screen that is touched, where a press gives no focus.
        page.evaluate("document.activeElement.blur()")
        newer = service.order()["order_id"]
        comes_in(page, asked, newer)
        comes_in(page, asked, newer)
        assert page.evaluate("window.replaced") == 0
        page.mouse.up()
        page.wait_for_url(f"**/orders/{order_id}")


def comes_in(page: Page, address: str, text: str) -> None:
    """Let time pass until the page has asked at an address and was answered with a text."""

    def answered(response: Response) -> bool:
        return response.url.partition("?")[0].endswith(address) and text in response.text()

    with page.expect_response(answered) as answer:
        page.clock.run_for(16_000)
    answer.value.finished()


def test_deliveries_of_webhooks_appear_without_a_reload(service: Stack, page: Page) -> None:
    """On the page of an order that is final already, folded, with their number."""
    order_id = service.final(service.order()["order_id"], timeout=60)["order_id"]
    page.goto(f"{service.url}/orders/{order_id}")
    expect(page.locator("#told")).to_have_count(0)
    with Receiver(("127.0.0.1", 0), Handler) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        made = service.post("/api/webhooks", json={"url": receiver.url, "events": ["order.shipped"]}).json()
        service.post(f"/api/orders/{order_id}/shipments", json={})
        expect(page.locator("#told summary")).to_have_text("Webhooks: 1 delivery", timeout=60_000)
        page.locator("#told summary").click()
        expect(page.get_by_text("Webhook delivered")).to_be_visible()
        expect(page.locator(".timeline").first).to_contain_text("by anyone on this machine through the API")
        screenshot(page, "order-told")
        service.session.delete(f"{service.url}/api/webhooks/{made['id']}", timeout=20)
        receiver.shutdown()


def test_the_api_can_be_tried_on_its_page(service: Stack, page: Page) -> None:
    """The API page sends the example order and shows the answer."""
    page.goto(f"{service.url}/docs")
    page.locator("form.try[data-method=POST][data-path='/api/orders']").get_by_role(
        "button", name="Send"
    ).click()
    expect(page.locator(".answer pre").first).to_contain_text("202")
    expect(page.locator(".answer pre").first).to_contain_text("location: /api/orders/")
    screenshot(page, "api")
