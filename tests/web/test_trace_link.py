"""The order page leads to the order's trace when a viewer is configured."""

from __future__ import annotations

import secrets
from pathlib import Path

from tests.support.ports import free_port
from tests.web.stack import Stack, order_body


def test_an_order_links_the_trace_of_the_request_that_placed_it(tmp_path: Path) -> None:
    """The caller's trace is the order's trace; that the collector is down keeps no order waiting."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "TRACE_URL_TEMPLATE": "http://traces.example.com/trace/{trace_id}?view=all",
    }
    trace_id = secrets.token_hex(16)
    with Stack(tmp_path, env=environment) as stack:
        answer = stack.post(
            "/api/orders",
            json=order_body(),
            headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"},
        )
        order_id = answer.json()["order_id"]
        assert stack.final(order_id)["status"] == "confirmed"
        page = stack.get(f"/orders/{order_id}").text
        assert f'href="http://traces.example.com/trace/{trace_id}?view=all"' in page


def test_without_a_viewer_there_is_no_link(service: Stack) -> None:
    """No template, no link."""
    assert "Show the trace" not in service.get(f"/orders/{service.order()['order_id']}").text
