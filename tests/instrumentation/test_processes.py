"""Programs that know nothing of telemetry, as real processes under `opentelemetry-instrument`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from tests.support.otlp import OtlpReceiver
from tests.support.processes import Process

PROGRAM = """
import os
import dramatiq
from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(os.environ["NATS_URL"], namespace=os.environ["NAMESPACE"])
dramatiq.set_broker(broker)
attempts = []

@dramatiq.actor(queue_name="pay", min_backoff=10, max_backoff=10)
def pay(order_id):
    attempts.append(1)
    if len(attempts) == 1:
        raise ValueError("declined")
    confirm.send()

@dramatiq.actor(queue_name="confirm")
def confirm():
    print("confirmed", flush=True)

if __name__ == "__main__":
    pay.send("o-1")
"""

TRACE = ["send pay", "process pay", "send pay", "process pay", "send confirm", "process confirm"]


@pytest.mark.parametrize("arguments", [[], ["--use-spawn"]], ids=["fork", "spawn"])
def test_an_unchanged_program_is_traced(
    tmp_path: Path, receiver: OtlpReceiver, nats_url: str, namespace: str, arguments: list[str]
) -> None:
    """The sender's spans arrive when it ends, the worker's when it is told to stop: one trace, with its metrics."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    environment = {
        "NATS_URL": nats_url,
        "NAMESPACE": namespace,
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_PYTHON_CONFIGURATOR": "configurator",
        # Long enough that only what is exported at the end of a process arrives in time.
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
        "OTEL_METRIC_EXPORT_INTERVAL": "600000",
        # How long idle threads of a worker take to notice that it stops.
        "dramatiq_worker_timeout": "100",
    }
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    sender = Process(
        [instrument, sys.executable, "shop.py"], log=tmp_path / "send.log", env=environment, cwd=tmp_path
    )
    command = [instrument, sys.executable, "-m", "dramatiq", "shop", "--processes", "1", "--threads", "2"]
    with Process(
        [*command, *arguments], log=tmp_path / "worker.log", env=environment, cwd=tmp_path
    ) as worker:
        assert sender.start().wait() == 0, sender.output
        worker.wait_for_output("confirmed")
        assert worker.stop() == 0
    spans = receiver.wait_for(*TRACE)
    assert [span.name for span in spans] == TRACE
    assert len({span.trace_id for span in spans}) == 1
    for before, after in itertools.pairwise(spans):
        assert after.parent_id == before.span_id
    assert {span.scope for span in spans} == {"opentelemetry.instrumentation.dramatiq"}
    assert {span.service for span in spans} == {"shop"}
    done = receiver.points("messaging.process.duration", dramatiq__outcome="done")
    assert sum(point.value for point in done) == 2
