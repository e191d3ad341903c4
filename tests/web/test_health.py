"""What monitoring reads while all is well; test_unavailable has what it reads when it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import Process
from tests.web.stack import Stack, gunicorn


def test_health_tells_what_it_is_connected_to(service: Stack) -> None:
    """The detail names the server, its version and how often the connection was made again."""
    body = service.get("/health").json()
    assert body["status"] == "ok"
    assert body["nats"]["connected"] is True
    assert re.fullmatch(r"\d+\.\d+\.\d+", body["nats"]["version"])
    assert body["nats"]["reconnects"] == 0


def test_metrics_tell_the_state_of_the_queues(service: Stack) -> None:
    """Prometheus reads the queues and the connection from any process of the front end."""
    service.final(service.order()["order_id"])
    answer = service.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert re.search(r"^dramatiq_connection_up\S* 1\.0$", answer.text, re.MULTILINE)
    queues = set(re.findall(r'^dramatiq_\w*ready\{[^}]*queue="([^"]+)"', answer.text, re.MULTILINE))
    assert len(queues) >= 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TRACE_URL_TEMPLATE", "https://traces.example.com/"),
        ("TRACE_URL_TEMPLATE", "javascript:alert('{trace_id}')"),
        ("WEB_THREADS", "0"),
        ("PORT", "http"),
        ("STREAM_DURATION", "30s"),
    ],
)
def test_a_wrong_setting_stops_the_front_end(tmp_path: Path, variable: str, value: str) -> None:
    """One line names the variable, and the process ends."""
    process = Process(gunicorn(), log=tmp_path / "web.log", env={variable: value}).start()
    assert process.wait() != 0
    assert variable in process.output
    assert "Traceback" not in process.output
