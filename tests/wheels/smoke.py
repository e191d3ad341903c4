"""What a user gets: the wheels alone run a task, read a result of it, and record its spans.

Run by `make test-wheels` with the interpreter of an environment that holds the wheels and not this checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import dramatiq
from dramatiq.results import Results
from opentelemetry import trace
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from werkzeug.test import Client

import dramatiq_jetstream
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.ui import create_app, viewer


def main() -> None:
    """Run one task and check everything that came of it."""
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    with tempfile.TemporaryDirectory() as directory, NatsServer(store_dir=Path(directory)) as server:
        broker = JetStreamBroker(server.url, namespace="smoke")
        broker.add_middleware(Results(backend=JetStreamBackend(broker)))
        dramatiq.set_broker(broker)
        DramatiqInstrumentor().instrument()
        add = dramatiq.actor(lambda left, right: left + right, actor_name="add", store_results=True)
        worker = dramatiq.Worker(broker, worker_threads=1)
        worker.start()
        message = add.send(1, 2)
        assert message.get_result(block=True, timeout=10_000) == 3
        worker.stop()
        pages = Client(create_app(broker, access=lambda _: viewer("smoke")))
        for path in ("/", "/dead", "/static/style.css", "/static/live.js"):
            assert pages.get(path).status_code == 200, path
        broker.close()
        command = Path(sys.executable).parent / "fleet"
        version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    names = sorted(span.name for span in spans.get_finished_spans())
    assert len(names) == 2, names
    assert dramatiq_jetstream.__version__ in version, version
    assert "site-packages" in dramatiq_jetstream.__file__, dramatiq_jetstream.__file__
    print(
        f"{version.strip()}: a task ran, its result was read, the dashboard is there, its spans are {', '.join(names)}."
    )


if __name__ == "__main__":
    main()
