"""Reading orders out of request bodies: whatever comes, the answer is an order or InvalidOrder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import parsing
from tasks.model import InvalidOrder, OrderRequest, RequestedItem
from tasks.parsing import check_customer_id, order_id_in
from tasks.products import Offer, first_products

Parse = Callable[..., OrderRequest]

OFFER = Offer(first_products(), 0)
parse_order_json = partial(parsing.parse_order_json, offer=OFFER)
parse_order_protobuf = partial(parsing.parse_order_protobuf, offer=OFFER)


def body(**members: Any) -> bytes:
    good = {"customer_id": "c-42", "items": [{"sku": "MUG-01", "quantity": 2}]}
    return json.dumps({**good, **members}).encode()


def test_json_of_the_design() -> None:
    """The JSON of the documentation is read as it stands; unknown members are ignored."""
    assert parse_order_json(body(note="hello")) == OrderRequest("c-42", [RequestedItem("MUG-01", 2)])
    assert parse_order_json(body(payment_token="tok_visa")).payment_token == "tok_visa"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe{}", "body"),
        (b'{"customer_id": "\xff"}', "body"),
        (body()[:-1] + b', "x": NaN}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"customer_id": ' + b"9" * 5_000 + b"}", "body"),
        (b" " * 1_000_001, "body"),
        (body(customer_id=1), "customer_id"),
        (body(customer_id="c" * 65), "customer_id"),
        (body(customer_id="a\nb"), "customer_id"),
        (body(items=None), "items"),
        (body(items=[]), "items"),
        (body(items=[{"sku": "MUG-01", "quantity": 1}] * 101), "items"),
        (body(items=["MUG-01"]), "items[0]"),
        (body(items=[{"quantity": 1}]), "items[0].sku"),
        (body(items=[{"sku": "NOPE", "quantity": 1}]), "items[0].sku"),
        (body(items=[{"sku": "MUG-01"}]), "items[0].quantity"),
        (body(items=[{"sku": "MUG-01", "quantity": True}]), "items[0].quantity"),
        (body(items=[{"sku": "MUG-01", "quantity": 1.0}]), "items[0].quantity"),
        (body(items=[{"sku": "MUG-01", "quantity": 1001}]), "items[0].quantity"),
        (body(payment_token=""), "payment_token"),
        (body(payment_token="a\r\nb"), "payment_token"),
    ],
)
def test_wrong_json_names_the_field(data: bytes, field: str) -> None:
    """Each problem is found where it is."""
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(data)
    assert refusal.value.field == field
    assert len(refusal.value.problem) < 200


def created(**members: Any) -> bytes:
    good: dict[str, Any] = {"customer_id": "c-1", "items": [OrderItem(sku="MUG-01", quantity=2)]}
    return OrderCreated(**{**good, **members}).SerializeToString()


def test_protobuf_with_and_without_optional_fields() -> None:
    """An order id, prices and totals may be left out, and are checked when they are there."""
    assert parse_order_protobuf(created()) == OrderRequest("c-1", [RequestedItem("MUG-01", 2)])
    full = created(order_id="o-1", total_amount=25.8, total_minor=2580, currency="EUR", payment_token="tok")
    assert parse_order_protobuf(full) == OrderRequest("c-1", [RequestedItem("MUG-01", 2)], "tok", "o-1")


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "body"),
        (b"\xff\xff\xff", "body"),
        (created(order_id="../../etc/passwd"), "order_id"),
        (created(order_id=".."), "order_id"),
        (created(order_id="x" * 65), "order_id"),
        (created(items=[OrderItem(sku="MUG-01", quantity=-1)]), "items[0].quantity"),
        (
            created(items=[OrderItem(sku="MUG-01", quantity=1, unit_price_minor=1)]),
            "items[0].unit_price_minor",
        ),
        (created(total_amount=25.79), "total_amount"),
        (created(total_amount=float("nan")), "total_amount"),
        (created(total_minor=1), "total_minor"),
        (created(currency="USD"), "currency"),
    ],
)
def test_wrong_protobuf_names_the_field(data: bytes, field: str) -> None:
    """Each problem is found where it is."""
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_protobuf(data)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("parse", "data", "field", "problem"),
    [
        (parse_order_json, b"\xff", "body", "is not UTF-8."),
        (parse_order_json, b"[" * 100_000, "body", "is nested too deeply."),
        (
            parse_order_json,
            b'{"x": -Infinity}',
            "body",
            "has a number that cannot be read: JSON has no -Infinity.",
        ),
        (parse_order_json, b"[]", "body", "must be a JSON object with customer_id and items."),
        (parse_order_json, body(items={}), "items", "must be an array of items."),
        (
            parse_order_json,
            body(items=[1]),
            "items[0]",
            'must be an object such as {"sku": "MUG-01", "quantity": 2}.',
        ),
        (parse_order_protobuf, b"\x08", "body", "is not an orders.v1.OrderCreated message."),
        (
            parse_order_protobuf,
            b"",
            "body",
            "has none of the fields of an orders.v1.OrderCreated message.",
        ),
        (
            parse_order_protobuf,
            created(order_id="a b"),
            "order_id",
            "must be 1 to 64 letters, digits, '-', '_', '.' or '~'.",
        ),
    ],
)
def test_what_is_wrong_is_said(parse: Parse, data: bytes, field: str, problem: str) -> None:
    """In words for the author of the program."""
    with pytest.raises(InvalidOrder) as refusal:
        parse(data)
    assert (refusal.value.field, refusal.value.problem) == (field, problem)


def test_every_item_is_read() -> None:
    """In the order of the request, however it is written."""
    items = [("MUG-01", 2), ("NOTE-01", 1), ("MUG-01", 3)]
    wanted = [RequestedItem(sku, quantity) for sku, quantity in items]
    data = body(items=[{"sku": sku, "quantity": quantity} for sku, quantity in items])
    assert parse_order_json(data).items == wanted
    data = created(items=[OrderItem(sku=sku, quantity=quantity) for sku, quantity in items])
    assert parse_order_protobuf(data).items == wanted


@pytest.mark.parametrize(
    ("parse", "said", "silent"),
    [
        (parse_order_json, body(), json.dumps({"items": [{"sku": "MUG-01", "quantity": 1}]}).encode()),
        (parse_order_protobuf, created(customer_id="c-42"), created(customer_id="")),
    ],
)
def test_who_orders_when_the_body_does_not_say(parse: Parse, said: bytes, silent: bytes) -> None:
    """The caller, if there is one; what the body says comes first."""
    assert parse(said, "c-7").customer_id == "c-42"
    assert parse(silent, "c-7").customer_id == "c-7"
    with pytest.raises(InvalidOrder) as refusal:
        parse(silent)
    assert refusal.value.field == "customer_id"


def test_a_token_in_protobuf_is_checked() -> None:
    """As one in JSON."""
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_protobuf(created(payment_token="a\r\nb"))
    assert refusal.value.field == "payment_token"


def test_a_body_may_have_as_many_bytes_as_is_said() -> None:
    """One more is refused."""
    data = body()
    assert parse_order_json(data + b" " * (1_000_000 - len(data))).customer_id == "c-42"
    with pytest.raises(InvalidOrder, match=r"is larger than 1,000,000 bytes\."):
        parse_order_json(data + b" " * (1_000_001 - len(data)))


@pytest.mark.parametrize("name", ["", "a\nb", 7])
def test_a_customer_id_is_checked_alone(name: object) -> None:
    """Its flaw is that of an order's field."""
    with pytest.raises(InvalidOrder) as alone:
        check_customer_id(name)
    with pytest.raises(InvalidOrder) as in_order:
        parse_order_json(body(customer_id=name))
    assert (alone.value.field, alone.value.problem) == (in_order.value.field, in_order.value.problem)
    assert check_customer_id("Zoe\u0308") == "Zoë"


def test_all_flaws_are_named_at_once() -> None:
    """A client corrects its request once, whatever form it has."""
    items = [{"sku": "NOPE", "quantity": 0}, "MUG-01", {"sku": "MUG-01", "quantity": 1}, {"quantity": 2}]
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(body(customer_id="", items=items, payment_token=5))
    wrong = ["customer_id", "items[0].sku", "items[0].quantity", "items[1]", "items[3].sku", "payment_token"]
    assert [flaw.field for flaw in refusal.value.flaws] == wrong

    bad = [OrderItem(sku="NOPE", quantity=-1), OrderItem(sku="MUG-01", quantity=1, unit_price_minor=5)]
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_protobuf(created(order_id="a b", customer_id=" ", items=bad, currency="USD"))
    wrong = ["order_id", "customer_id", "items[0].sku", "items[0].quantity"]
    wrong += ["items[1].unit_price_minor", "currency"]
    assert [flaw.field for flaw in refusal.value.flaws] == wrong

    with pytest.raises(InvalidOrder) as refusal:
        parse_order_protobuf(created(total_amount=1.0, total_minor=1, currency="USD"))
    assert [flaw.field for flaw in refusal.value.flaws] == ["total_amount", "total_minor", "currency"]


def test_the_flaws_of_a_large_request_are_bounded() -> None:
    """As many items as an order can have may all be wrong, and each is named in few words; more are one flaw."""
    wrong = {"sku": "x" * 9_000, "quantity": "many"}
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(body(items=[wrong] * 100))
    assert len(refusal.value.flaws) == 200
    assert max(len(flaw.problem) for flaw in refusal.value.flaws) < 150
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(body(items=[{}] * 10_000))
    assert [flaw.field for flaw in refusal.value.flaws] == ["items"]
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_protobuf(created(items=[OrderItem(sku="MUG-01", unit_price_minor=1)] * 10_000))
    assert len(refusal.value.flaws) == 101


def test_how_a_number_cannot_be_read_is_said_in_a_hundred_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reader of JSON says of it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("x" * 101)

    monkeypatch.setattr(parsing.json, "loads", refuse)
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(b"{}")
    assert refusal.value.problem == f"has a number that cannot be read: {'x' * 100}."


def test_the_id_that_a_message_chooses() -> None:
    """None when it chooses none, one that cannot be used, or is no such message."""
    assert order_id_in(created(order_id="o-1")) == "o-1"
    for data in (created(), created(order_id="a b"), b"\xff\xff\xff", b""):
        assert order_id_in(data) is None


NAMES = {
    "Persian, with a joiner that is none": "می\u200cخواهم",
    "Hindi, with a joiner": "क्\u200dष",
    "an emoji of four people": "Familie 👨\u200d👩\u200d👧\u200d👦",
    "a flag of tags": "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "Hebrew, with a mark of direction": "דוד\u200f",
    "a space between": "Ana María de la O",
    "a no-break space": "J.\u00a0R.",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_of_people_are_taken(name: str) -> None:
    """What other scripts and emoji need is no control character."""
    assert parse_order_json(body(customer_id=name)).customer_id == name
    assert parse_order_protobuf(created(customer_id=name)).customer_id == name


def test_the_same_name_is_the_same_text() -> None:
    """Composed and decomposed, a name is one customer."""
    assert parse_order_json(body(customer_id="Zoe\u0308")).customer_id == "Zoë"
    assert parse_order_json(body(customer_id="e\u0301" * 64)).customer_id == "é" * 64


@pytest.mark.parametrize(
    "name",
    [
        *("a\0", "a\x1b[31m", "a\x85", "a\u2028b", "a\u2029b", "a\x7f", "\ud800"),
        *("a\u202eb", "a\u202db", "a\u202ab", "a\u2066b", "a\u2069b"),
        *("", " ", "\u200d", "\u200b\u2060", "\u0301", "é" * 65, "e\u0301" * 65, "c" * 900_000),
    ],
)
def test_what_is_no_name(name: str) -> None:
    """Control characters, overrides of direction, and what shows nothing at all."""
    with pytest.raises(InvalidOrder) as refusal:
        parse_order_json(body(customer_id=name))
    assert refusal.value.field == "customer_id"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["customer_id", "items", "sku", "quantity", "payment_token"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_read_or_refused(value: Any) -> None:
    """No JSON value makes the reader fail in another way."""
    try:
        parse_order_json(json.dumps(value).encode())
    except InvalidOrder:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """No bytes make either reader fail in another way."""
    for parse in (parse_order_json, parse_order_protobuf):
        try:
            parse(data)
        except InvalidOrder:
            pass
