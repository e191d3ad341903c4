"""An operator with a browser: headless Chromium looks at every page of a live fleet, and makes every change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from dramatiq_jetstream import audit, schedules
from dramatiq_jetstream.ui.charts import chart
from dramatiq_jetstream.ui.live import BEAT_SECONDS
from dramatiq_jetstream.ui.text import duration, number
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY
from tests.support.skips import CHROMIUM, needs_chromium
from tests.ui.conftest import PASSWORD, Shop

pytestmark = needs_chromium

ARTIFACTS = REPOSITORY / ".artifacts" / "browser"
ARGUMENTS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]
WITHIN = 60_000
expect.set_options(timeout=WITHIN)

PAGES = {
    "overview": "",
    "workers": "workers",
    "running": "running",
    "messages": "messages",
    "delayed": "delayed",
    "schedules": "schedules",
    "dead-letters": "dead",
    "limits": "limits",
    "audit": "audit",
    "confirm": "change/replay?all=1",
    "nothing": "nothing-here",
}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, started once."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens pages as a person; the test fails when a script fails or is blocked by the page's own policy."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def visit(who: str = "ada", **options: object) -> Page:
        given = {"viewport": {"width": 1280, "height": 800}, **options}
        credentials = {"username": who, "password": PASSWORD}
        context = browser.new_context(http_credentials=credentials, **given)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WITHIN)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type == "error" and "Failed to load resource" not in message.text
                else None
            ),
        )
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints


def picture(page: Page, name: str) -> Path:
    """Keep a picture of the page, for the documentation and for those who want to see what the test saw."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    path = ARTIFACTS / f"fleet-{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def confirm(page: Page, button: str, says: str) -> None:
    """Confirm a change, and see that it is done."""
    expect(page.get_by_role("heading", level=1)).to_contain_text(says)
    page.get_by_role("button", name=button).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Done", timeout=WITHIN)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "width", "height", "scheme"), [("desktop", 1280, 800, "light"), ("phone", 390, 844, "dark")]
)
def test_every_page_is_accessible_and_fits(
    shop: Shop, visit: Open, kind: str, width: int, height: int, scheme: str
) -> None:
    """Axe finds nothing on any page, and no page scrolls sideways."""
    letter = next(iter(shop.broker.dead_letters.newest("payments")))
    pages = {**PAGES, "dead-letter": f"dead/{letter.id}", "message": f"messages/{letter.message_id}"}
    axe = Axe()
    # What a page is does not change with its width; its colours do with the scheme, and it is what takes the time.
    rules = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
    page = visit(viewport={"width": width, "height": height}, color_scheme=scheme)
    for name, path in pages.items():
        page.goto(f"{shop.url}/{path}")
        assert picture(page, f"{name}-{kind}-{scheme}").stat().st_size > 5_000
        found = axe.run(page, options=rules)
        assert found.violations_count == 0, f"{name}:\n{found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_no_value_beside_a_chart_is_cut(browser: Browser) -> None:
    """Of minutes, hours and days, and of a million."""
    style = files("dramatiq_jetstream.ui").joinpath("static/style.css").read_text()
    page = browser.new_page()
    for shown, values in ((duration, (99_000.0, 380_000.0, 5.9e7, 9.9e8)), (number, (999_000.0, 9e8))):
        for value in values:
            drawn = chart("a chart", [("p50", [None, value])], shown)
            page.set_content(f"<style>{style}</style>{drawn}")
            cut = page.eval_on_selector_all(
                ".chart text",
                "all => all.filter((one) => one.getBBox().x < one.ownerSVGElement.viewBox.baseVal.x)"
                ".map((one) => one.textContent)",
            )
            assert cut == [], value
    page.close()


def test_without_scripts_every_page_is_complete(shop: Shop, visit: Open) -> None:
    """Plain HTML shows the same, and a change is made with it."""
    page = visit(java_script_enabled=False)
    page.goto(shop.url)
    expect(page.locator("tbody tr")).to_have_count(4)
    page.get_by_role("link", name="Running", exact=True).click()
    expect(page.get_by_text("transcode").first).to_be_visible()
    expect(page.locator("#live-state")).to_be_hidden()
    page.get_by_role("link", name="Overview").click()
    page.get_by_role("button", name="Pause mail").click()
    confirm(page, "Pause", "Pause the queue mail?")
    assert shop.broker.is_paused("mail")
    page.get_by_role("link", name="Back").click()
    page.get_by_role("button", name="Resume mail").click()
    confirm(page, "Resume", "Resume the queue mail?")
    assert not shop.broker.is_paused("mail")


def test_a_page_keeps_itself_up_to_date(shop: Shop, visit: Open) -> None:
    """What comes in is shown without a reload; held, the page stays; focus stays where it was."""
    page = visit()
    page.goto(f"{shop.url}/delayed?queue=mail")
    loads: list[str] = []
    page.on("load", lambda loaded: loads.append(loaded.url))
    expect(page.get_by_role("status")).to_have_text("Live")
    focused = page.get_by_role("button", name=re.compile("^Run now")).first
    focused.focus()
    name = focused.get_attribute("aria-label")
    message = shop.send("mail", "send_receipt", 1, "new@example.com", delay=3_600_000)
    expect(page.get_by_text(message.message_id)).to_be_visible(timeout=WITHIN)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name
    page.get_by_role("button", name="Hold").click()
    expect(page.get_by_role("status")).to_have_text("Held")
    shop.broker.cancel(message.message_id, "mail")
    other = visit()
    other.goto(f"{shop.url}/delayed?queue=mail")
    expect(other.get_by_role("status")).to_have_text("Live")
    expect(other.get_by_text(message.message_id)).to_have_count(0, timeout=WITHIN)
    expect(page.get_by_text(message.message_id)).to_be_visible()
    page.get_by_role("button", name="Hold").click()
    expect(page.get_by_text(message.message_id)).to_have_count(0, timeout=WITHIN)
    assert loads == []


def test_a_press_is_not_lost_to_what_comes_in(shop: Shop, visit: Open) -> None:
    """What is under a button that is pressed stays until it is released; then the page catches up."""
    page = visit()
    page.goto(f"{shop.url}/delayed?queue=mail")
    expect(page.get_by_role("status")).to_have_text("Live")
    pressed = shop.send("mail", "send_receipt", 1, "pressed@example.com", delay=3_600_000)
    button = page.locator("tr", has_text=pressed.message_id).get_by_role(
        "button", name=re.compile("^Run now")
    )
    button.hover()
    page.mouse.down()
    message = shop.send("mail", "send_receipt", 2, "new@example.com", delay=3_600_000)
    other = visit()
    other.goto(f"{shop.url}/delayed?queue=mail")
    expect(other.get_by_text(message.message_id)).to_be_visible()
    page.wait_for_timeout(2 * BEAT_SECONDS * 1_000)
    expect(page.get_by_text(message.message_id)).to_have_count(0)
    page.mouse.up()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Run")
    page.go_back()
    expect(page.get_by_text(message.message_id)).to_be_visible()
    for each in (pressed, message):
        shop.broker.cancel(each.message_id, "mail")


def test_a_keyboard_is_enough(shop: Shop, visit: Open) -> None:
    """The first Tab leads past the menu; a change is made without a mouse; focus is seen."""
    page = visit()
    page.goto(shop.url)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_role("button", name="Hold").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Held")
    page.get_by_role("button", name="Pause video").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Pause the queue video?")
    page.get_by_role("link", name="Back, change nothing").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    assert not shop.broker.is_paused("video")


def test_a_running_message_is_aborted(shop: Shop, visit: Open) -> None:
    """Its page says what became of it; the others go on."""
    message = shop.send("video", "transcode", "wrong.mov", preset="4k")
    eventually(lambda: message.message_id in shop.running(), timeout=60)
    page = visit()
    page.goto(f"{shop.url}/running")
    row = page.locator("tr", has_text=message.message_id)
    expect(row).to_contain_text("frame", timeout=WITHIN)
    row.get_by_role("button", name=re.compile("^Abort")).click()
    confirm(page, "Abort", "Abort this message?")
    eventually(lambda: message.message_id not in shop.running(), timeout=60)
    page.goto(f"{shop.url}/messages/{message.message_id}")
    expect(page.locator(".state")).to_contain_text("aborted", timeout=WITHIN)
    picture(page, "aborted")


def test_delayed_messages_run_now_and_are_cancelled(shop: Shop, visit: Open) -> None:
    """One is run, one is cancelled; a message that is gone is nothing to do."""
    now, never = (shop.send("mail", "send_receipt", n, "x@example.com", delay=3_600_000) for n in (1, 2))
    page = visit()
    page.goto(f"{shop.url}/delayed?queue=mail")
    page.get_by_role("button", name=f"Run now {now.message_id}").click()
    confirm(page, "Run now", "Run this delayed message now?")
    page.goto(f"{shop.url}/messages/{never.message_id}")
    expect(page.locator(".state")).to_contain_text("delayed")
    page.get_by_role("button", name="Cancel").click()
    confirm(page, "Cancel message", "Cancel this delayed message?")
    left = [each.message_id for each in shop.delayed("mail")]
    assert never.message_id not in left
    eventually(lambda: now.message_id not in [each.message_id for each in shop.delayed("mail")], timeout=60)
    page.goto(f"{shop.url}/change/run?queue=mail&message={never.message_id}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Nothing to do")


def test_a_retry_is_shown_with_its_error_and_traceback(shop: Shop, visit: Open) -> None:
    """A search by error leads to the message: retrying, when next, what failed, with its traceback."""
    page = visit()
    page.goto(f"{shop.url}/messages")
    page.get_by_label("Error or traceback").fill("warehouse did not answer for Borealis")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody tr")).to_have_count(1, timeout=WITHIN)
    page.locator("tbody a").click()
    expect(page.locator(".state")).to_contain_text("retrying")
    expect(page.get_by_text("TimeoutError: the warehouse did not answer").first).to_be_visible()
    page.get_by_text("Traceback", exact=True).click()
    expect(page.get_by_text("in monthly_report")).to_be_visible()
    picture(page, "retrying")


def test_schedules_are_run_paused_resumed_and_removed(shop: Shop, visit: Open) -> None:
    """Each for itself, and the list says so."""
    page = visit()

    def change(button: str, says: str, confirms: str) -> None:
        page.goto(f"{shop.url}/schedules")
        page.get_by_role("button", name=button).click()
        confirm(page, confirms, says)

    change("Run now newsletter", "Run newsletter now?", "Run now")
    change("Pause newsletter", "Pause the schedule of newsletter?", "Pause schedule")
    page.goto(f"{shop.url}/schedules")
    expect(page.locator("tr", has_text="newsletter")).to_contain_text("paused")
    change("Resume newsletter", "Resume the schedule of newsletter?", "Resume schedule")
    change("Remove newsletter", "Remove the schedule of newsletter?", "Remove schedule")
    assert [each.actor for each in schedules.list_schedules(shop.broker)] == ["refresh_prices"]


def test_dead_letters_are_filtered_replayed_and_dropped(shop: Shop, visit: Open) -> None:
    """Some that were chosen, one, and all that match: with the count before, and only these."""
    for order in (7_001, 7_002, 7_003, 7_004, 7_005):
        shop.send("payments", "capture", order, "7.00 EUR")
    dead = shop.broker.dead_letters
    mine = lambda: [each for each in dead.list("payments") if "order 700" in each.error]  # noqa: E731
    eventually(lambda: len(mine()) == 5, timeout=60)
    others = dead.count() - 5
    page = visit()
    page.goto(f"{shop.url}/dead?text=order 700")
    expect(page.locator("tbody tr")).to_have_count(5)
    for order in (7_001, 7_002):
        (shop.gates / f"order-{order}").touch()
        page.locator("tr", has_text=f"order {order}").get_by_role("checkbox").check()
    page.get_by_role("button", name="Replay", exact=True).click()
    confirm(page, "Replay 2", "Replay 2 dead letters?")
    eventually(lambda: len(mine()) == 3, timeout=60)
    page.goto(f"{shop.url}/dead?text=order 7003")
    page.locator("tbody a").first.click()
    expect(page.get_by_text("Traceback of the last attempt")).to_be_visible()
    page.get_by_role("button", name="Drop").click()
    confirm(page, "Drop 1", "Drop 1 dead letter?")
    page.goto(f"{shop.url}/dead?queue=payments&text=order 700")
    page.get_by_role("link", name="Drop all").click()
    expect(page.locator(".sample li")).to_have_count(2)
    confirm(page, "Drop 2", "Drop 2 dead letters?")
    page.get_by_role("link", name="Back").click()
    expect(page.get_by_label("Error or message id")).to_have_value("order 700")
    assert mine() == []
    assert dead.count() == others
    newest = audit.changes(shop.broker, limit=1)[0]
    assert (newest.who, newest.what, newest.done) == ("ada", "drop", 2)


def test_a_viewer_sees_everything_and_is_offered_nothing(shop: Shop, visit: Open) -> None:
    """No button of a change on any page, and the server refuses the address of one."""
    page = visit("vic")
    for path in ("", "running", "delayed", "schedules", "dead", "messages"):
        page.goto(f"{shop.url}/{path}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.locator("form[action*='/change/'], [formaction], a[href*='/change/']").count() == 0
    page.goto(f"{shop.url}/change/drop?all=1")
    expect(page.get_by_role("heading", level=1)).to_have_text("Forbidden")


def test_a_frame_of_another_site_shows_nothing(shop: Shop, browser: Browser, tmp_path: Path) -> None:
    """A page that frames the dashboard gets an empty frame; a form of it that posts here changes nothing."""
    before = len(audit.changes(shop.broker))
    context = browser.new_context(http_credentials={"username": "ada", "password": PASSWORD})
    page = context.new_page()
    evil = tmp_path / "evil.html"
    evil.write_text(
        f'<iframe src="{shop.url}/"></iframe><form method="post" action="{shop.url}/change/pause">'
        '<input name="queue" value="mail"><button>Win</button></form>'
    )
    page.goto(evil.as_uri())
    page.wait_for_load_state("networkidle")
    assert all("Overview" not in frame.content() for frame in page.frames)
    page.get_by_role("button", name="Win").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Forbidden", timeout=WITHIN)
    context.close()
    assert not shop.broker.is_paused("mail")
    assert len(audit.changes(shop.broker)) == before


def test_a_restart_of_the_dashboard_loses_nothing(shop: Shop, visit: Open) -> None:
    """An open page becomes live again by itself; a form that was shown before can still be sent."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    first = shop.dashboard("--users", str(shop.users), port=port)
    with first:
        first.wait_for_output("is at", timeout=60)
        page, form = visit(), visit()
        page.goto(f"{url}/delayed?queue=mail")
        form.goto(f"{url}/change/pause?queue=reports")
        expect(page.get_by_role("status")).to_have_text("Live")
    message = shop.send("mail", "send_receipt", 1, "again@example.com", delay=3_600_000)
    with shop.dashboard("--users", str(shop.users), port=port) as second:
        second.wait_for_output("is at", timeout=60, count=2)
        expect(page.get_by_text(message.message_id)).to_be_visible(timeout=WITHIN)
        confirm(form, "Pause", "Pause the queue reports?")
        answer = requests.get(f"{url}/audit", auth=("vic", PASSWORD), timeout=60)
        assert "queue reports" in answer.text
        page.close()
        form.close()
    shop.broker.resume("reports")
    shop.broker.cancel(message.message_id, "mail")
