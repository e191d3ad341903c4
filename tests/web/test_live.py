"""Live pages: the stream of an order's states, its bounds, and what happens beyond them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.polling import eventually
from tests.web.stack import Stack


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A service without workers, where an order stays accepted, with few threads and short streams."""
    environment = {"WEB_THREADS": "6", "STREAM_DURATION": "6000"}
    with Stack(tmp_path_factory.mktemp("quiet"), workers=False, env=environment) as stack:
        yield stack


def states(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """Yield the data of each event of a stream."""
    for line in answer.iter_lines():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_a_stream_shows_an_order_to_its_end(service: Stack) -> None:
    """The stream sends what the page shows after each step, and ends with the order."""
    order = service.order()
    with service.get(f"/orders/{order['order_id']}/stream", stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        seen = list(states(answer))
    assert seen[-1]["status"] == "confirmed"
    assert seen[-1]["final"] is True
    assert "Order confirmed" in seen[-1]["html"]
    revisions = [state["revision"] for state in seen]
    assert revisions == sorted(set(revisions))


def test_without_scripts_a_page_asks_again(quiet: Stack) -> None:
    """The page of an order that is not final yet refreshes itself where no script can follow it."""
    text = quiet.get(f"/orders/{quiet.order()['order_id']}").text
    assert '<noscript><meta http-equiv="refresh" content="2"></noscript>' in text


def test_a_stream_ends_after_a_while(quiet: Stack) -> None:
    """An order that does not move holds its stream no longer than is set; the browser then asks again."""
    order = quiet.order()
    start = time.monotonic()
    with quiet.get(f"/orders/{order['order_id']}/stream", stream=True) as answer:
        seen = list(states(answer))
    assert [state["status"] for state in seen] == ["accepted"]
    assert 5 < time.monotonic() - start < 20  # by default it would be 30 s


def test_open_pages_leave_threads_for_orders(quiet: Stack) -> None:
    """Half the threads may follow orders; the next page is told to poll, and orders are taken meanwhile."""
    order_id = quiet.order()["order_id"]
    streams = [
        requests.get(f"{quiet.url}/orders/{order_id}/stream", stream=True, timeout=10) for _ in range(3)
    ]
    try:
        assert [stream.status_code for stream in streams] == [200, 200, 200]
        refused = quiet.get(f"/orders/{order_id}/stream")
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        assert quiet.get(f"/orders/{order_id}/state").json()["status"] == "accepted"
        start = time.monotonic()
        assert quiet.order()["status"] == "accepted"
        assert time.monotonic() - start < 5  # what waits for a stream to end waits 6 s
    finally:
        for stream in streams:
            stream.close()
    # The places are free again, also when readers just go away.
    eventually(lambda: _opens(quiet, order_id))


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /api/orders HTTP/1.1\r\nHost: loc",
        b"POST /api/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["in its headers", "in its body"],
)
def test_clients_that_stall_do_not_hold_the_threads(quiet: Stack, sent: bytes) -> None:
    """More clients than threads stop in the middle of a request: soon the front end answers again."""
    stalled = [socket.create_connection(("127.0.0.1", quiet.web_port), timeout=5) for _ in range(8)]
    try:
        for connection in stalled:
            connection.sendall(sent)
        start = time.monotonic()
        assert quiet.session.get(f"{quiet.url}/health/live", timeout=30).status_code == 200
        assert time.monotonic() - start < 25
    finally:
        for connection in stalled:
            connection.close()
    assert "Traceback" not in quiet.web.output


def _opens(stack: Stack, order_id: str) -> bool:
    with stack.get(f"/orders/{order_id}/stream", stream=True) as answer:
        return answer.status_code == 200


def test_an_order_that_does_not_exist_has_no_stream(service: Stack) -> None:
    """The stream of nothing is a 404."""
    assert service.get("/orders/no-such-order/stream").status_code == 404
    assert service.get("/orders/no-such-order/state").status_code == 404


def test_a_stop_does_not_wait_for_open_pages(tmp_path: Path) -> None:
    """SIGTERM ends the streams, so that the front end stops at once."""
    with Stack(tmp_path, workers=False, env={"STREAM_DURATION": "600000"}) as stack:
        order_id = stack.order()["order_id"]
        with stack.get(f"/orders/{order_id}/stream", stream=True) as answer:
            # Kept, because a dropped iterator would close the stream from this side.
            stream = states(answer)
            next(stream)
            start = time.monotonic()
            assert stack.web.stop(timeout=60) == 0
            # What is not ended by itself is given 20 s.
            assert time.monotonic() - start < 18
            assert list(stream) == []
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", stack.web_port), timeout=1)
