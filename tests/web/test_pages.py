"""The pages as a browser without scripts sees them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.support.polling import eventually
from tests.web.stack import Stack


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A shop without workers that speaks German and offers test cards."""
    env = {"LOCALE": "de-DE", "TEST_CARDS": "1"}
    with Stack(tmp_path_factory.mktemp("german"), workers=False, web_processes=1, env=env) as shop:
        yield shop


def form_of(service: Stack) -> dict[str, str]:
    """Return the fields of the form, as a browser would send them."""
    text = service.get("/").text
    fields = {}
    for tag in re.findall(r"<input[^>]*>", text):
        name, value = re.search(r'name="([^"]*)"', tag), re.search(r'value="([^"]*)"', tag)
        if name and value and "disabled" not in tag:
            fields[html.unescape(name[1])] = html.unescape(value[1])
    return {**fields, "customer_id": "c-form", "quantity-MUG-01": "2"}


def test_the_form_places_an_order(service: Stack) -> None:
    """The form leads to the order's page, which asks again by itself until the order is confirmed."""
    answer = service.post("/orders", data=form_of(service), allow_redirects=False)
    assert answer.status_code == 303
    location = answer.headers["Location"]
    assert service.get(location).status_code == 200

    def page() -> str:
        text = service.get(location).text
        assert "Order confirmed" in text
        return text

    text = eventually(page)
    assert "http-equiv" not in text
    assert "€25.80" in text
    assert "Enamel mug" in text


def test_sending_the_form_twice_places_one_order(service: Stack) -> None:
    """A double click, or a reload of the answer, leads to the same order."""
    fields = form_of(service)
    first = service.post("/orders", data=fields, allow_redirects=False)
    second = service.post("/orders", data=fields, allow_redirects=False)
    assert first.headers["Location"] == second.headers["Location"]


def test_a_changed_form_that_was_sent_before_asks_again(service: Stack) -> None:
    """Back, change, send: the form comes back with a key of its own, and then places a second order."""
    fields = form_of(service)
    first = service.post("/orders", data=fields, allow_redirects=False)
    answer = service.post("/orders", data={**fields, "quantity-MUG-01": "3"}, allow_redirects=False)
    assert answer.status_code == 409
    key = re.search(r'name="submission" value="([^"]*)"', answer.text)
    assert key is not None
    again = {**fields, "quantity-MUG-01": "3", "submission": key[1]}
    second = service.post("/orders", data=again, allow_redirects=False)
    assert second.status_code == 303
    assert second.headers["Location"] != first.headers["Location"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantity-MUG-01": "0"}, "Choose at least one product"),
        ({"quantity-MUG-01": ""}, "Choose at least one product"),
        ({"quantity-MUG-01": "-1"}, "Enamel mug: enter a whole number from 1 to 1,000."),
        ({"quantity-MUG-01": "1000000000"}, "Enamel mug: enter a whole number"),
        ({"quantity-MUG-01": "two"}, "Enamel mug: enter a whole number"),
        ({"quantity-MUG-01": "٣"}, "Enamel mug: enter a whole number"),
        ({"quantity-<script>": "1"}, "not sold here any more"),
        ({"customer_id": ""}, "Enter a customer id"),
        ({"customer_id": "c" * 65}, "Enter a customer id of 1 to 64 characters"),
        ({"customer_id": "c\r\nd"}, "The customer id must not have control characters"),
        ({"payment_token": "x" * 1000}, "Choose a way to pay"),
    ],
)
def test_a_wrong_form_comes_back_with_what_is_wrong(
    service: Stack, changes: dict[str, str], says: str
) -> None:
    """Nothing is lost: what was typed is still there, and the errors are named."""
    answer = service.post("/orders", data={**form_of(service), **changes}, allow_redirects=False)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert says in answer.text
    assert "<script>" not in answer.text
    typed = changes.get("customer_id", "c-form")
    assert f'value="{typed}"' in answer.text or "\r" in typed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({}, 303),
    ],
)
def test_a_form_of_another_site_is_refused(service: Stack, headers: dict[str, str], status: int) -> None:
    """Only this site's own form places orders."""
    answer = service.post("/orders", data=form_of(service), headers=headers, allow_redirects=False)
    assert answer.status_code == status


@pytest.mark.parametrize("path", ["/", "/orders", "/docs", "/nothing-here", "/orders/no-such-order"])
def test_a_page_may_run_only_this_sites_scripts(service: Stack, path: str) -> None:
    """Every page, errors too, forbids scripts, styles and frames from elsewhere, and has none inline."""
    answer = service.get(path, headers={"Accept": "text/html"})
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", answer.text)
    for address in re.findall(r'(?:src|href|action)="([^"]*)"', answer.text):
        assert not urlsplit(html.unescape(address)).netloc, address


def test_every_link_of_the_pages_leads_somewhere(service: Stack) -> None:
    """Following all links, scripts and pictures from the form finds nothing that is missing."""
    service.order()
    seen: set[str] = set()
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        answer = service.get(path)
        assert answer.status_code == 200, path
        if "text/html" not in answer.headers["Content-Type"]:
            continue
        for address in re.findall(r'(?:src|href)="(/[^"]*)"', answer.text):
            target = html.unescape(address).split("#")[0]
            if target not in seen and len(seen) < 60:
                seen.add(target)
                waiting.append(target)
    assert len(seen) > 8


def test_static_files_may_be_kept_and_pages_not(service: Stack) -> None:
    """A file's address changes with its content, so it may be kept; a page shows what is now."""
    stylesheet = re.search(r'href="(/static/style\.css[^"]*)"', service.get("/").text)
    assert stylesheet is not None
    assert "immutable" in service.get(stylesheet[1]).headers["Cache-Control"]
    assert service.get("/").headers["Cache-Control"] == "no-store"


def test_a_missing_page_is_readable_and_a_missing_api_address_is_a_problem(service: Stack) -> None:
    """People get a page, programs get a problem."""
    page = service.get("/orders/no-such-order", headers={"Accept": "text/html,*/*"})
    assert page.status_code == 404
    assert "There is no order" in page.text
    api = service.get("/nothing", headers={"Accept": "application/json"})
    assert api.status_code == 404
    assert api.headers["Content-Type"] == "application/problem+json"


def test_hostile_text_is_shown_as_text(service: Stack) -> None:
    """A customer id full of markup is displayed, not interpreted."""
    order = service.order(customer_id="<img src=x onerror=1>&\"'")
    for path in ("/", "/orders", f"/orders/{order['order_id']}"):
        text = service.get(path).text
        assert "<img" not in text
        assert "&lt;img src=x onerror=1&gt;" in text


def test_the_list_of_orders_has_pages(service: Stack) -> None:
    """More orders than fit on one page are reached by a link."""
    for _ in range(26):
        service.order()
    text = service.get("/orders").text
    older = re.search(r'rel="next" href="([^"]*)"', text)
    assert older is not None
    second = service.get(html.unescape(older[1]))
    assert second.status_code == 200
    assert "Newest orders" in second.text
    assert requests.get(f"{service.url}/orders?before=nonsense", timeout=10).status_code == 400


def test_a_customer_reads_words_and_not_the_service(service: Stack) -> None:
    """Products by their names, no names of exceptions, fields or skus in what went wrong."""
    order = service.final(service.order(("PRINT-01", 51), ("MUG-01", 2))["order_id"])
    page = service.get(f"/orders/{order['order_id']}").text
    assert "51 × Print, signed, limited to 50 ordered, 50 left" in page
    assert "51 × PRINT-01 ordered" in order["reason"]  # programs read the sku


def test_test_cards_are_the_stand_ins(service: Stack, german: Stack) -> None:
    """The form offers them where the gateway is the stand-in, and nowhere else."""
    for shop, offered in ((service, False), (german, True)):
        page = shop.get("/").text
        assert ("tok_declined" in page) == offered
        assert "Customer’s account" in page


def test_all_that_is_wrong_with_a_form_is_said_at_once(service: Stack) -> None:
    """Quantities, customer and payment: each is in the summary, and at its field."""
    changes = {
        "quantity-MUG-01": "two",
        "quantity-PRINT-01": "60",
        "customer_id": "",
        "payment_token": "x" * 1000,
    }
    answer = service.post("/orders", data={**form_of(service), **changes})
    assert answer.status_code == 422
    for control in changes:
        tag = re.search(rf'<(?:input|select)[^>]* id="{control}"[^>]*>', answer.text)
        assert tag is not None, control
        assert 'aria-invalid="true"' in tag[0]
        assert re.search(rf'aria-describedby="{control}-error\b', tag[0])
        assert f'id="{control}-error"' in answer.text
        assert f'<a href="#{control}">' in answer.text
    assert "60 × Print, signed, limited to 50 ordered, 50 left" in answer.text


def test_all_that_is_wrong_with_a_request_is_said_at_once(service: Stack) -> None:
    """The header and every field of the body are in the errors of one problem."""
    body = {
        "customer_id": "",
        "items": [{"sku": "NOPE", "quantity": 0}, {"sku": "", "quantity": "1"}] + [{}] * 60,
        "payment_token": 5,
    }
    answer = service.post("/api/orders", json=body, headers={"Idempotency-Key": "k" * 256})
    assert answer.status_code == 422
    problem = answer.json()
    fields = {error["field"] for error in problem["errors"]}
    items = {f"items[{n}].{name}" for n in range(62) for name in ("sku", "quantity")}
    assert fields == {"customer_id", "payment_token", "Idempotency-Key"} | items
    assert len(problem["detail"]) < 500


def test_an_order_that_is_sent_again_is_that_order_although_it_took_the_last(tmp_path: Path) -> None:
    """The check of the stock is for orders that are new."""
    with Stack(tmp_path, web_processes=1) as own:
        fields = {**form_of(own), "quantity-PRINT-01": "50"}
        first = own.post("/orders", data=fields, allow_redirects=False)
        own.final(first.headers["Location"].rpartition("/")[2])
        again = own.post("/orders", data=fields, allow_redirects=False)
        assert (again.status_code, again.headers["Location"]) == (303, first.headers["Location"])
        other = own.post("/orders", data={**form_of(own), "quantity-PRINT-01": "1"}, allow_redirects=False)
        assert other.status_code == 422
        assert "1 × Print, signed, limited to 50 ordered, none left" in other.text


def test_the_form_comes_back_with_all_that_was_typed(service: Stack) -> None:
    """Another part of the catalogue changes nothing of what was typed, and says nothing about it yet."""
    fields = {**form_of(service), "quantity-BAG-01": "3", "customer_id": ""}
    text = service.post("/", data=fields).text
    assert 'id="errors"' not in text
    assert re.search(r'id="quantity-BAG-01"[^>]*value="3"', text)
    assert "€85.77" in text
    part = service.post("/catalogue", data=fields).text
    assert "<html" not in part
    assert re.search(r'id="quantity-BAG-01"[^>]*value="3"', part)


def test_one_locale_writes_numbers_dates_and_money(german: Stack) -> None:
    """LOCALE decides for all of them; times say their time zone."""
    order_id = german.order(("CHAIR-01", 10))["order_id"]
    page, form = german.get(f"/orders/{order_id}").text, german.get("/").text
    assert german.get(f"/api/orders/{order_id}").json()["total_amount"] == 1290.0
    assert 'data-locale="de-DE"' in form
    assert "1.290,00\N{NO-BREAK SPACE}€" in page
    assert "100.000 in stock" in form
    assert re.search(r"<time[^>]*>\d\d\.\d\d\.\d{4}, \d\d:\d\d:\d\d UTC</time>", page)
