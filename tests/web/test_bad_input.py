"""Whatever a client sends, it gets a clear 4xx problem: never a 500, and the service goes on."""

from __future__ import annotations

import gzip
import json
import socket
import struct

import pytest

from orders.v1.events_pb2 import OrderConfirmed, OrderCreated, OrderItem
from tests.web.stack import Stack, order_body

JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}


def item(**members: object) -> bytes:
    return json.dumps({"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": 1, **members}]}).encode()


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "not json": b"{",
    "truncated": b'{"customer_id": "c-1", "items": [{"sku"',
    "invalid utf-8": b'{"customer_id": "\xff\xfe", "items": []}',
    "utf-16": '{"customer_id": "c-1"}'.encode("utf-16"),
    "deeply nested": b"[" * 100_000,
    "deeply nested member": b'{"a":' * 50_000,
}
INVALID: dict[str, bytes] = {
    "an array": b"[]",
    "a number": b"1",
    "null": b"null",
    "a text": b'"order"',
    "nothing in it": b"{}",
    "no items": b'{"customer_id": "c-1"}',
    "empty items": b'{"customer_id": "c-1", "items": []}',
    "items is an object": b'{"customer_id": "c-1", "items": {}}',
    "an item is a text": b'{"customer_id": "c-1", "items": ["MUG-01"]}',
    "customer is a number": b'{"customer_id": 1, "items": [{"sku": "MUG-01", "quantity": 1}]}',
    "customer is empty": b'{"customer_id": "", "items": [{"sku": "MUG-01", "quantity": 1}]}',
    "customer is blank": b'{"customer_id": "  ", "items": [{"sku": "MUG-01", "quantity": 1}]}',
    "customer is long": json.dumps(order_body(customer_id="c" * 65)).encode(),
    "customer has a line break": json.dumps(order_body(customer_id="c\r\nX-Evil: 1")).encode(),
    "customer has a null": json.dumps(order_body(customer_id="c\0")).encode(),
    "customer has a lone surrogate": b'{"customer_id": "\\ud800", "items": [{"sku": "MUG-01", "quantity": 1}]}',
    "quantity is negative": item(quantity=-1),
    "quantity is zero": item(quantity=0),
    "quantity is huge": item(quantity=10**9),
    "quantity is over 64 bits": item(quantity=2**70),
    "quantity has 5000 digits": b'{"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": %s}]}'
    % (b"9" * 5000),
    "quantity is a fraction": item(quantity=1.5),
    "quantity is a text": item(quantity="1"),
    "quantity is true": item(quantity=True),
    "quantity is null": item(quantity=None),
    "quantity is NaN": b'{"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": NaN}]}',
    "quantity is Infinity": b'{"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": Infinity}]}',
    "quantity is 1e400": b'{"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": 1e400}]}',
    "sku is unknown": item(sku="NO-SUCH-SKU"),
    "sku is a number": item(sku=1),
    "sku is a list": item(sku=["MUG-01"]),
    "sku is an empty text": item(sku=""),
    "sku has wildcards": item(sku="*.>"),
    "token is a number": json.dumps(order_body(payment_token=5)).encode(),
    "token has a line break": json.dumps(order_body(payment_token="tok\r\nX: 1")).encode(),
    "10,000 items": json.dumps(order_body(*[("MUG-01", 1)] * 10_000)).encode(),
}


def problem_of(answer: object) -> dict[str, object]:
    """Check that an answer is a problem of RFC 9457 and return it."""
    assert answer.headers["Content-Type"] == "application/problem+json"  # type: ignore[attr-defined]
    body: dict[str, object] = answer.json()  # type: ignore[attr-defined]
    assert body["status"] == answer.status_code  # type: ignore[attr-defined]
    assert body["type"]
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_body_that_cannot_be_read(service: Stack, body: bytes) -> None:
    """Bytes that are not JSON at all."""
    answer = service.post("/api/orders", data=body, headers=JSON)
    assert answer.status_code == 400
    assert problem_of(answer)["type"] == "/docs#malformed-request"


@pytest.mark.parametrize("body", INVALID.values(), ids=INVALID.keys())
def test_a_body_that_is_not_an_order(service: Stack, body: bytes) -> None:
    """JSON that breaks a rule: the answer names the field."""
    answer = service.post("/api/orders", data=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert len(answer.text) < 2_000


def protobuf(**members: object) -> bytes:
    values: dict[str, object] = {
        "customer_id": "c-1",
        "items": [OrderItem(sku="MUG-01", quantity=1)],
        "total_amount": 12.9,
    }
    return OrderCreated(**{**values, **members}).SerializeToString()  # type: ignore[arg-type]


BAD_PROTOBUF: dict[str, bytes] = {
    "nothing": b"",
    "random bytes": bytes(range(255, 0, -1)),
    "json": json.dumps(order_body()).encode(),
    "truncated": protobuf()[:-3],
    "another type": OrderConfirmed(order_id="x", charge_id="y", total_minor=5).SerializeToString(),
    "NaN total": protobuf(total_amount=float("nan")),
    "infinite total": protobuf(total_amount=float("inf")),
    "negative total": protobuf(total_amount=-12.9),
    "wrong total": protobuf(total_amount=1.0),
    "negative quantity": protobuf(items=[OrderItem(sku="MUG-01", quantity=-1)], total_amount=-12.9),
    "unknown sku": protobuf(items=[OrderItem(sku="NOPE", quantity=1)]),
    "a path as its id": protobuf(order_id="../../etc/passwd"),
    "wildcards as its id": protobuf(order_id="*.>"),
    "a line break in its id": protobuf(order_id="a\r\nb"),
    "a long id": protobuf(order_id="x" * 65),
    "10,000 items": protobuf(items=[OrderItem(sku="MUG-01", quantity=1)] * 10_000),
    "a double where text is meant": b"\x0a\x08" + struct.pack("<d", 1.5) + b"\x12\x01c",
}


@pytest.mark.parametrize("body", BAD_PROTOBUF.values(), ids=BAD_PROTOBUF.keys())
def test_protobuf_that_is_not_an_order(service: Stack, body: bytes) -> None:
    """Bytes that are no OrderCreated, or one that breaks a rule."""
    answer = service.post("/api/orders", data=body, headers=PROTOBUF)
    assert answer.status_code in (400, 422), answer.text
    problem_of(answer)


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/xml", "multipart/form-data", "application/json, text/x"],
)
def test_another_content_type(service: Stack, content_type: str | None) -> None:
    """A body of another type is refused, and the answer says what is taken."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = service.post("/api/orders", data=json.dumps(order_body()).encode(), headers=headers)
    assert answer.status_code == 415
    problem_of(answer)
    assert "application/json" in answer.headers["Accept"]


def test_a_compressed_body(service: Stack) -> None:
    """A body that would have to be unpacked first is refused, and so cannot be a bomb."""
    body = gzip.compress(json.dumps(order_body()).encode())
    answer = service.post("/api/orders", data=body, headers={**JSON, "Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "gzip" in str(problem_of(answer)["detail"])


@pytest.mark.parametrize("size", [1_000_001, 10_000_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_body_that_is_too_large(service: Stack, size: int, chunked: bool) -> None:
    """10 MB get an answer, not a reset connection, whether they were announced or not."""
    body = b" " * size
    data = (body[n : n + 65_536] for n in range(0, size, 65_536)) if chunked else body
    answer = service.post("/api/orders", data=data, headers=JSON)
    assert answer.status_code == 413
    problem_of(answer)


@pytest.mark.parametrize("size", [b"0x5", b"+5", b"-5", b"5_0", b"", b" 5", b"5 ", b"g"])
@pytest.mark.parametrize("path", ["/api/orders", "/orders"])
def test_a_chunk_size_that_is_none(service: Stack, path: str, size: bytes) -> None:
    """It is the client's error, not ours, and the service goes on."""
    with socket.create_connection(("127.0.0.1", service.web_port), timeout=20) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path.encode()
            + b"Transfer-Encoding: chunked\r\n\r\n%s\r\nhello\r\n0\r\n\r\n" % size
        )
        connection.shutdown(socket.SHUT_WR)
        head = read_all(connection).partition(b"\r\n")[0]
    assert int(head.split()[1]) in (400, 413, 415, 422), head
    assert service.get("/health").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/orders/../../etc/passwd",
        "/api/orders/..%2F..%2Fetc%2Fpasswd",
        "/api/orders//etc/passwd",
        "/api/orders/%00",
        "/api/orders/a%0d%0aX-Evil:%201",
        "/api/orders/" + "x" * 65,
        "/api/orders/%ff%fe",
        "/api/orders/*",
        "/api/orders/%3E",
        "/api/orders/a b",
        "/api/orders/.",
        "/api/orders/",
        "/api/orders/no-such-order",
        "/api/orders/no-such-order/",
        "/api/",
        "/api",
        "/api/nothing",
    ],
)
def test_an_order_id_that_is_none(service: Stack, path: str) -> None:
    """A path, wildcards, line breaks: there is no such order, and nothing of it comes back in a header."""
    with socket.create_connection(("127.0.0.1", service.web_port), timeout=10) as connection:
        target = path.replace(" ", "%20")
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 "), head
    assert b"application/problem+json" in head
    assert b"evil" not in head.lower()
    assert json.loads(body)["status"] == 404


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "limit=-1",
        "limit=1e3",
        "limit=",
        "limit=٣",
        "limit=+1",
        "limit=1_0",
        "limit=000001999999999",
        "limit=%201",
        f"limit={'0' * 4000}1",
        f"limit={'9' * 4000}",
    ],
)
def test_a_limit_that_is_none(service: Stack, query: str) -> None:
    """The limit of a page is a number from 1 to 100."""
    answer = service.get(f"/api/orders?{query}")
    assert answer.status_code == 400
    assert "limit" in str(problem_of(answer)["detail"])


@pytest.mark.parametrize("cursor", ["x", "../..", "%00", "9" * 400, "%ff", "*", "-1", "1.5"])
def test_a_cursor_that_is_none(service: Stack, cursor: str) -> None:
    """A cursor that the service did not make is refused."""
    answer = service.get(f"/api/orders?before={cursor}")
    assert answer.status_code == 400, answer.text
    assert "before" in str(problem_of(answer)["detail"])


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_another_method(service: Stack, method: str) -> None:
    """A method that an address does not have gets 405 and what it has."""
    answer = service.session.request(method, service.url + "/api/orders", timeout=10)
    assert answer.status_code == 405
    problem_of(answer)
    assert {"GET", "POST"} <= set(answer.headers["Allow"].replace(" ", "").split(","))


@pytest.mark.parametrize(
    "header",
    [
        b"Idempotency-Key: a\r\n folded",
        b"Idempotency-Key: a\nX-Evil: 1",
        b"Idempotency-Key: a\rX-Evil: 1",
        b"Idempotency-Key: a\x00b",
        b"Idempotency Key: a",
        b"Content-Length: -1",
        b"Content-Length: abc",
        b"X-Long: " + b"x" * 10_000,
    ],
)
def test_headers_that_are_none(service: Stack, header: bytes) -> None:
    """Line breaks and the like in a header are refused; no order comes of them and the service goes on."""
    body = json.dumps(order_body(customer_id="c-evil-header")).encode()
    length = b"" if header.startswith(b"Content-Length") else b"Content-Length: %d\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", service.web_port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/orders HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\n" + length + header + b"\r\n\r\n" + body
        )
        head = read_all(connection).partition(b"\r\n")[0]
    assert int(head.split()[1]) in range(400, 500), head
    assert service.get("/health").status_code == 200


def test_headers_of_a_trace_that_are_nonsense(service: Stack) -> None:
    """An unreadable traceparent harms nothing."""
    headers = {"traceparent": "00-zz-zz-zz", "tracestate": "=,=", "baggage": "=%%"}
    assert service.post("/api/orders", json=order_body(), headers=headers).status_code == 202


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the other side closes."""
    received = b""
    while True:
        try:
            chunk = connection.recv(65_536)
        except ConnectionResetError:
            return received
        if not chunk:
            return received
        received += chunk
