"""Log lines carry what they are about, as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tasks import logs
from tasks.settings import Settings
from tests.broker.conformance.workers import running

logger = logging.getLogger("orders")

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Sets logging up as in a worker, with one handler; returns what that writes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure(log_format: str = "json", level: str | None = "INFO") -> io.StringIO:
        output = io.StringIO()
        root.handlers[:] = [logging.StreamHandler(output)]
        logs.configure(Settings(log_format=log_format, log_level=level))
        return output

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def broker() -> StubBroker:
    """A broker with the service's middleware for logs, which stands first as in the service."""
    broker = StubBroker(fail_fast_default=False)
    broker.add_middleware(logs.LogContext(), before=type(broker.middleware[0]))
    return broker


@pytest.fixture
def exporter(broker: StubBroker) -> Iterator[InMemorySpanExporter]:
    """The spans of an instrumented program."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    DramatiqInstrumentor().instrument(tracer_provider=provider)
    yield exporter
    DramatiqInstrumentor().uninstrument()
    provider.shutdown()


@pytest.fixture
def queue() -> str:
    """The name of a queue that no other test uses."""
    return f"q-{uuid4().hex[:12]}"


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_line_of_an_actor_lacks_its_fields(
    configure: Configure, broker: StubBroker, exporter: InMemorySpanExporter, queue: str, log_format: str
) -> None:
    """Whatever logger and level, Dramatiq's own lines included: trace, span, message, actor and order."""
    output = configure(log_format, "DEBUG")

    @dramatiq.actor(queue_name=queue, broker=broker, max_retries=1, min_backoff=10, max_backoff=10)
    def pay(order_id: str) -> None:
        logs.bind(order_id=order_id)
        logger.debug("mark: details")
        logging.getLogger("orders.gateway").info("mark: asking", extra={"gateway": "test"})
        logging.getLogger().warning("mark: slow")
        raise ConnectionError("mark: refused")

    messages = {pay.send(order_id).message_id: order_id for order_id in ("o-1", "o-2")}
    with running(broker, threads=2):
        broker.join(queue, timeout=30_000)
    attempts = {
        f"{span.context.span_id:016x}": span
        for span in exporter.get_finished_spans()
        if span.kind is SpanKind.CONSUMER
    }
    assert len(attempts) == 4

    written = [
        line for line in output.getvalue().splitlines() if re.search("mark: |Failed to|Retrying", line)
    ]
    # Three lines and the failure for each attempt, and one retry for each message. Text has the traceback's line, too.
    about = [line for line in written if "actor" in line]
    assert len(about) == 4 * 4 + 2
    for line in about:
        fields = json.loads(line) if log_format == "json" else dict(re.findall(r"(\w+)=(\S+)", line))
        attempt = attempts[fields["span_id"]]
        assert fields["trace_id"] == f"{attempt.context.trace_id:032x}"
        assert fields["message_id"] == attempt.attributes["messaging.message.id"]
        assert fields["actor"] == "pay"
        assert fields["order_id"] == messages[fields["message_id"]] == attempt.attributes["order_id"]
    after = [line for line in output.getvalue().splitlines() if "Shutting down" in line]
    assert after
    assert not any("order_id" in line for line in after)


def test_fields_do_not_outlive_their_message(configure: Configure, broker: StubBroker, queue: str) -> None:
    """The next message on the same thread starts with none, also after one that was skipped."""
    output = configure()

    class Binds(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            if message.args[0] == "skip":
                logs.bind(order_id="skipped")
                raise dramatiq.middleware.SkipMessage

        def after_ack(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            logger.info("settled")

    broker.add_middleware(Binds())

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act(what: str) -> None:
        if what == "bind":
            logs.bind(order_id="o-1")
        logger.info("seen")

    for what in ("bind", "look", "skip", "look"):
        act.send(what)
    with running(broker, threads=1):
        broker.join(queue, timeout=30_000)
    assert [line.get("order_id") for line in lines(output) if line["message"] == "seen"] == [
        "o-1",
        None,
        None,
    ]
    settled = [line for line in lines(output) if line["message"] == "settled"]
    assert len(settled) == 4
    assert not any({"actor", "message_id", "order_id"} & set(line) for line in settled)


def test_fields_cannot_forge_the_line(configure: Configure, broker: StubBroker, queue: str) -> None:
    """What an actor binds does not replace the level or the message, and a line stays one line."""
    output = configure()

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act() -> None:
        logs.bind(level="NONE", message="forged", order_id="a\nb")
        logger.warning("true\nstory", extra={"thing": object()})

    act.send()
    with running(broker, threads=1):
        broker.join(queue, timeout=30_000)
    (line,) = [line for line in lines(output) if line["logger"] == "orders"]
    assert (line["level"], line["message"], line["order_id"]) == ("WARNING", "true\nstory", "a\nb")


def test_text_has_the_fields_behind_the_message(configure: Configure) -> None:
    """People read the message first; outside of actors there is only what the line itself brings."""
    output = configure("text")
    logger.info("Capturing %s.", "12 €", extra={"order": "o-1"})
    logger.info("Done.")
    first, second = output.getvalue().splitlines()
    assert first.endswith("orders: Capturing 12 €.  order=o-1")
    assert second.endswith("orders: Done.")


def test_handlers_that_exist_are_kept(configure: Configure) -> None:
    """The dramatiq command and gunicorn have set up where lines go; only format and level change."""
    output = configure("json", "WARNING")
    handlers = logging.getLogger().handlers[:]
    logs.configure(Settings(log_format="json", log_level="WARNING"))
    assert logging.getLogger().handlers == handlers
    logger.info("no")
    logger.warning("yes")
    assert [line["message"] for line in lines(output)] == ["yes"]


def test_a_program_without_handlers_gets_one() -> None:
    """Lines go to stderr from INFO on when logging was not set up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        logs.configure(Settings())
        assert [type(handler) for handler in root.handlers] == [logging.StreamHandler]
        assert root.level == logging.INFO
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


# A line of its own in the log, an escape sequence of a terminal, and what turns the direction of writing.
HOSTILE = "a\n2026-11-28 03:42:04,215 CRITICAL forged\r\x1b[2J\x85\u2028\u202e\x7f b"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_text_from_outside_begins_a_line(configure: Configure, log_format: str) -> None:
    """Control characters in a message, in a field and in an exception are escaped; names of people are as they are."""
    output = configure(log_format)
    logger.info("GET %s for Zoë 👩\u200d🚀", HOSTILE, extra={"order": HOSTILE})
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("Failed: %s", HOSTILE)
    written = output.getvalue()
    assert "forged" in written
    assert "Zoë 👩\u200d🚀" in written
    assert not any(mark in written for mark in "\r\x1b\x85\u2028\u202e\x7f")
    first, *rest = written.splitlines()
    if log_format == "json":
        assert len(rest) == 1
        line = json.loads(first)
        assert (line["message"], line["order"]) == (f"GET {HOSTILE} for Zoë 👩\u200d🚀", HOSTILE)
    else:
        assert "Failed" in rest[0]
        assert all(line.startswith("  | ") for line in rest[1:])
