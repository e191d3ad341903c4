"""Products, prices and stock change by API and by pages, and orders keep what they were placed with."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
import requests

from tests.support.polling import eventually
from tests.web.stack import Stack, order_body


def sku() -> str:
    return f"T-{uuid.uuid4().hex[:10]}"


def key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def put(service: Stack, sku: str, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
    return service.session.put(f"{service.url}/api/products/{sku}", json=body, headers=headers, timeout=30)


def delete(service: Stack, address: str) -> requests.Response:
    return service.session.delete(f"{service.url}/api/products/{address}", timeout=30)


def sold(service: Stack, sku: str) -> list[dict[str, Any] | None]:
    """What each of the front end's processes says of a product; connections go to any of them."""
    said = []
    for _ in range(12):
        found = requests.get(f"{service.url}/api/products", timeout=30).json()
        said.append(next((one for one in found if one["sku"] == sku), None))
    return said


@pytest.fixture
def cup(service: Stack) -> str:
    """A product with ten pieces, for 5.00."""
    name = sku()
    assert put(service, name, name="Cup", category="Cups", unit_price_minor=500).status_code == 200
    answer = service.post(f"/api/products/{name}/stock", json={"add": 10}, headers=key())
    assert (answer.status_code, answer.json()["stock"]) == (200, 10)
    return name


def test_an_order_keeps_what_it_was_placed_with(service: Stack, cup: str) -> None:
    """Name and price, through a change of both and a withdrawal; every process follows within seconds."""
    order = service.order((cup, 2))
    assert (order["items"][0]["name"], order["total_minor"]) == ("Cup", 1_000)
    assert put(service, cup, name="Beaker", unit_price_minor=700).json()["unit_price_minor"] == 700
    eventually(lambda: all(one and one["name"] == "Beaker" for one in sold(service, cup)), timeout=30)
    dearer = service.order((cup, 1))
    assert (dearer["items"][0]["name"], dearer["total_minor"]) == ("Beaker", 700)
    assert delete(service, cup).json()["unit_price"] is None
    eventually(lambda: all(one is None for one in sold(service, cup)), timeout=30)
    refused = service.post("/api/orders", json=order_body((cup, 1)))
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "items[0].sku")
    assert service.final(order["order_id"])["total_minor"] == 1_000
    page = service.get(f"/orders/{order['order_id']}").text
    assert "Cup" in page
    assert "Beaker" not in page
    assert service.final(dearer["order_id"])["status"] == "confirmed"


def test_a_request_that_is_sent_again_is_as_good_as_before(service: Stack, cup: str) -> None:
    """The answer was lost, and the product was withdrawn meanwhile: the order is there, at its price."""
    headers, body = key(), order_body((cup, 1))
    first = service.post("/api/orders", json=body, headers=headers)
    delete(service, cup)
    eventually(lambda: all(one is None for one in sold(service, cup)), timeout=30)
    again = service.post("/api/orders", json=body, headers=headers)
    assert (again.status_code, again.json()["order_id"]) == (202, first.json()["order_id"])
    assert again.headers["Idempotency-Replayed"] == "true"
    assert service.post("/api/orders", json=body, headers=key()).status_code == 422


def test_prices_are_planned_and_dropped(service: Stack, cup: str) -> None:
    """They stand in the list, and do not hold yet."""
    planned = put(service, cup, unit_price_minor=900, **{"from": "2029-12-01T08:00:00Z"}).json()
    assert planned["unit_price_minor"] == 500
    assert planned["prices"][-1] == {"from": "2029-12-01T08:00:00.000Z", "unit_price_minor": 900}
    dropped = delete(service, f"{cup}/prices/2029-12-01T08:00:00.000Z").json()
    assert [one["unit_price_minor"] for one in dropped["prices"]] == [500]


def test_a_change_of_the_stock_counts_once(service: Stack, cup: str) -> None:
    """Under its key; with other contents the key is refused, and a count needs a reason."""
    address, headers = f"/api/products/{cup}/stock", key()
    for _ in range(2):
        assert service.post(address, json={"add": 5}, headers=headers).json()["stock"] == 15
    reused = service.post(address, json={"add": 6}, headers=headers)
    assert (reused.status_code, reused.json()["type"]) == (422, "/docs#idempotency-key-reused")
    assert service.post(address, json={"add": 5}).status_code == 400
    nameless = service.post(address, json={"count": 3}, headers=key())
    assert (nameless.status_code, nameless.json()["errors"][0]["field"]) == (422, "reason")
    counted = service.post(address, json={"count": 3, "reason": "broken"}, headers=key())
    assert counted.json()["stock"] == 3
    assert service.post(address, json={"add": -4, "reason": "gone"}, headers=key()).status_code == 422


@pytest.mark.parametrize(
    ("body", "status", "fields"),
    [
        ({"name": 5, "from": "soon"}, 400, ["name"]),
        ({"unit_price_minor": 1.5}, 400, ["unit_price_minor"]),
        ({"from": "soon"}, 400, ["from"]),
        ({"name": " ", "unit_price_minor": 0}, 422, ["name", "unit_price_minor"]),
        ({"from": "2029-01-01"}, 422, ["from"]),
    ],
)
def test_what_is_wrong_with_a_product_is_named(
    service: Stack, cup: str, body: dict[str, Any], status: int, fields: list[str]
) -> None:
    answer = put(service, cup, **body)
    assert (answer.status_code, [one["field"] for one in answer.json()["errors"]]) == (status, fields)


def test_what_is_no_product(service: Stack) -> None:
    """It can be neither shown, withdrawn nor restocked."""
    for sku in ("NONE", "a%20b", "%C3%92", "x" * 300):
        assert service.get(f"/api/products/{sku}").status_code == 404
    assert delete(service, "NONE").status_code == 404
    assert service.post("/api/products/NONE/stock", json={"add": 1}, headers=key()).status_code == 404
    assert put(service, "a%20b", name="X", unit_price_minor=1).status_code == 422


def test_a_file_is_imported(service: Stack) -> None:
    """A dry run says what it would do; one wrong row keeps all out; the same file counts once."""
    name = sku()
    csv = f"sku,name,price,add\n{name},Cup,5.00,3\n{name},,,2\n"
    headers = {"Content-Type": "text/csv"}
    plan = service.post("/api/products?dry_run=true", data=csv, headers=headers).json()
    assert [row["line"] for row in plan["rows"]] == [2, 3]
    assert service.get(f"/api/products/{name}").status_code == 404
    wrong = service.post("/api/products", data=f"{csv}X Y,,1,z\n", headers=headers)
    assert wrong.status_code == 422
    assert [one["field"] for one in wrong.json()["errors"]] == ["line 4.sku", "line 4.add"]
    assert service.get(f"/api/products/{name}").status_code == 404
    for _ in range(2):
        done = service.post("/api/products", data=csv, headers=headers)
        assert done.status_code == 200, done.text
    assert [row["repeated"] for row in done.json()["rows"]] == [True, True]
    assert service.get(f"/api/products/{name}").json()["stock"] == 5
    assert service.post("/api/products", json={}).status_code == 415


# The pages


def token(page: str, act: str) -> str:
    found = re.search(
        rf'name="submission" value="([^"]+)"><input type="hidden" name="act" value="{act}"', page
    )
    assert found is not None
    return found[1]


def test_a_product_is_looked_after_on_its_page(service: Stack) -> None:
    """Added, priced, restocked twice by one form, renamed and withdrawn; each change stands on the page."""
    name = sku()
    added = service.post(
        "/admin/products", data={"sku": name, "name": "Cup", "category": "", "price": "5.00", "stock": "4"}
    )
    assert added.url.endswith(f"/admin/products/{name}")
    assert "4 pieces" in added.text
    address, page = f"/admin/products/{name}", added.text
    again = service.post("/admin/products", data={"sku": name, "name": "Cup", "price": "5"})
    assert (again.status_code, "already" in again.text) == (422, True)
    stock = {"act": "stock", "kind": "add", "pieces": "6", "submission": token(page, "stock")}
    for _ in range(2):
        assert "10 pieces" in service.post(address, data=stock).text
    wrong = service.post(address, data={**stock, "kind": "count", "pieces": "x"})
    assert (wrong.status_code, "Enter a whole number" in wrong.text) == (422, True)
    wrong = service.post(address, data={"act": "price", "price": "five"})
    assert (wrong.status_code, 'value="five"' in wrong.text) == (422, True)
    planned = service.post(address, data={"act": "price", "price": "6.50", "from": "2029-12-01T08:00"})
    assert "€6.50 from" in planned.text
    dropped = service.post(address, data={"act": "drop", "since": "2029-12-01T08:00:00.000Z"})
    assert "€6.50 from" not in dropped.text
    assert "Beaker" in service.post(address, data={"act": "name", "name": "Beaker", "category": "Cups"}).text
    withdrawn = service.post(address, data={"act": "withdraw"})
    assert "it is not sold" in withdrawn.text
    for what in ("Added", "6 pieces came in: restock", "Renamed to Beaker", "Withdrawn"):
        assert what in withdrawn.text
    assert "Withdrawn" in service.get(f"/admin/products?q={name}").text


def test_a_file_is_checked_and_imported_on_its_page(service: Stack) -> None:
    """As text or as a file; what is wrong is named, and the text comes back."""
    name, address = sku(), "/admin/product-import"
    text = f"sku,name,price,add\r\n{name},Cup,5.00,3\r\n"
    wrong = service.post(address, data={"text": f"{text}X Y,,,\r\n", "check": "1"})
    assert wrong.status_code == 422
    assert "Line 3, sku" in wrong.text
    assert name in wrong.text
    checked = service.post(address, files={"file": ("products.csv", text)})
    assert "Import 1 row<" in checked.text
    assert service.get(f"/api/products/{name}").status_code == 404
    for _ in range(2):
        made = service.post(address, data={"text": text, "make": "1"})
        assert made.status_code == 200
    assert "was imported before" in made.text
    assert service.get(f"/api/products/{name}").json()["stock"] == 3


def test_an_import_of_many_rows_is_written_while_it_is_made(service: Stack) -> None:
    """Its answer has the form of a short one; sent again it counts nothing twice; the page says when all is done."""
    names = [sku() for _ in range(120)]
    rows = "".join(f"{name},Thing,5.00,3\n" for name in names)
    content = f"sku,name,price,add\n{rows}"
    headers = {"Content-Type": "text/csv"}
    for repeated in (False, True):
        with service.post("/api/products", data=content, headers=headers, stream=True) as answer:
            assert answer.status_code == 200
            assert "Content-Length" not in answer.headers, "it was not made before it was begun"
            body = answer.json()
        assert (body["dry_run"], body["errors"]) == (False, [])
        assert [row["sku"] for row in body["rows"]] == names
        assert {row["repeated"] for row in body["rows"]} == {repeated}
    assert service.get(f"/api/products/{names[-1]}").json()["stock"] == 3
    more = content.replace(",3\n", ",4\n")
    made = service.post("/admin/product-import", data={"text": more, "make": "1"})
    assert made.text.count("+4 pieces") == len(names)
    assert "All rows are imported." in made.text
    wrong = service.post("/api/products", data=content + "X Y,,,\n", headers=headers)
    assert wrong.status_code == 422


def test_the_form_says_what_has_changed_since_it_was_opened(service: Stack, cup: str) -> None:
    """Another price is shown before it is paid, and what was withdrawn is named."""
    form = {
        "customer_id": "c-42",
        f"quantity-{cup}": "1",
        f"price-{cup}": "500",
        "submission": "x" * 20 + cup,
    }
    assert service.post("/orders", data=form).status_code == 200
    put(service, cup, unit_price_minor=650)
    eventually(lambda: all(one and one["unit_price_minor"] == 650 for one in sold(service, cup)), timeout=30)
    # Sent twice: it is the order that was placed.
    assert service.post("/orders", data=form).status_code == 200
    form["submission"] = "y" * 20 + cup
    refused = service.post("/orders", data=form)
    assert (refused.status_code, "Cup now costs €6.50" in refused.text) == (422, True)
    form[f"price-{cup}"] = "650"
    assert service.post("/orders", data=form).status_code == 200
    delete(service, cup)
    form["submission"] = "z" * 20 + cup
    eventually(lambda: all(one is None for one in sold(service, cup)), timeout=30)
    refused = service.post("/orders", data=form)
    assert (refused.status_code, "Cup is not sold here any more" in refused.text) == (422, True)


def test_what_ran_out_can_be_ordered_once_it_came_in(service: Stack, cup: str) -> None:
    """The form says what is left, as it is now; an order placed right after the restock is confirmed."""
    form = {"customer_id": "c-42", f"quantity-{cup}": "12", "submission": "s" * 20 + cup}
    assert "12 × Cup ordered, 10 left" in service.post("/orders", data=form).text
    order = service.order((cup, 12))
    assert service.final(order["order_id"])["status"] == "rejected"
    service.post(f"/api/products/{cup}/stock", json={"add": 2}, headers=key())
    assert service.final(service.order((cup, 12))["order_id"])["status"] == "confirmed"
