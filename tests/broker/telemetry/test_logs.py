"""Log lines carry what they are about, as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq import Broker, MessageProxy

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.telemetry import LogContext, bind_log_fields, configure_logging, log_fields
from dramatiq_jetstream.telemetry.logs import current_log_fields
from tests.broker.conformance.workers import running
from tests.broker.telemetry.conftest import Providers, stub_broker
from tests.support.polling import eventually

logger = logging.getLogger("orders")


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What the root logger writes once `configure` was called; its handlers and level are put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def configure(output: io.StringIO, **options: Any) -> None:
    """Set logging up as in a program of its own, where pytest has put no handlers."""
    logging.getLogger().handlers[:] = []
    configure_logging(stream=output, **options)


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_every_line_of_an_actor_says_what_it_is_about(
    telemetry: Providers, output: io.StringIO, queue: str
) -> None:
    """Trace, span, message, actor and the order that the actor bound; also on Dramatiq's own lines."""
    configure(output, log_format="json")
    broker = stub_broker()
    broker.middleware.insert(0, LogContext())

    @dramatiq.actor(queue_name=queue, broker=broker, max_retries=1, min_backoff=10, max_backoff=10)
    def pay(order_id: str) -> None:
        bind_log_fields(order_id=order_id, amount=12)
        logger.info("Capturing.", extra={"gateway": "test"})
        raise ValueError("declined")

    messages = [pay.send(order_id) for order_id in ("o-1", "o-2")]
    with running(broker, threads=1):
        broker.join(queue, timeout=10_000)

    logged = lines(output)
    capturing = [line for line in logged if line["message"] == "Capturing."]
    # The backoff is random, so either may be retried first.
    assert sorted(line["order_id"] for line in capturing) == ["o-1", "o-1", "o-2", "o-2"]
    first = capturing[0]
    assert first["level"] == "INFO"
    assert first["logger"] == "orders"
    assert first["actor"] == "pay"
    assert first["message_id"] == messages[0].message_id
    assert (first["gateway"], first["amount"]) == ("test", 12)
    own = [line for line in logged if line.get("span_id") == first["span_id"]]
    failed = next(line for line in own if line["message"].startswith("Failed to process"))
    retrying = next(line for line in own if line["message"].startswith("Retrying"))
    for line in (failed, retrying):
        assert {k: line[k] for k in ("order_id", "message_id", "trace_id", "span_id")} == {
            k: first[k] for k in ("order_id", "message_id", "trace_id", "span_id")
        }
    assert "ValueError: declined" in failed["exception"]
    after = [line for line in logged if line["message"].startswith("Shutting down")]
    assert "order_id" not in after[0]

    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 4)
    process = next(span for span in spans if span.span_id == first["span_id"])
    assert process.trace_id == first["trace_id"]
    assert process.attributes["order_id"] == "o-1"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_line_of_an_actor_lacks_its_fields(
    telemetry: Providers, output: io.StringIO, queue: str, log_format: str
) -> None:
    """Whatever logger and level, for programs and for people: trace id, message id, actor and order id."""
    configure(output, log_format=log_format, level="DEBUG")
    broker = stub_broker()

    @dramatiq.actor(queue_name=queue, broker=broker, max_retries=1, min_backoff=10, max_backoff=10)
    def pay(order_id: str) -> None:
        bind_log_fields(order_id=order_id)
        logger.debug("mark: details")
        logging.getLogger("orders.gateway").info("mark: asking", extra={"gateway": "test"})
        logging.getLogger().warning("mark: slow")
        try:
            raise ConnectionError("refused")
        except ConnectionError:
            logger.exception("mark: failed")
            raise

    messages = {pay.send(order_id).message_id: order_id for order_id in ("o-1", "o-2")}
    with running(broker, threads=2):
        broker.join(queue, timeout=10_000)
    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 4)
    attempts = {span.span_id: span for span in spans if span.kind == "CONSUMER"}

    written = [line for line in output.getvalue().splitlines() if "mark: " in line]
    assert len(written) == 2 * 2 * 4
    for line in written:
        fields = json.loads(line) if log_format == "json" else dict(re.findall(r"(\w+)=(\S+)", line))
        attempt = attempts[fields["span_id"]]
        assert fields["trace_id"] == attempt.trace_id
        assert fields["message_id"] == attempt.attributes["messaging.message.id"]
        assert fields["actor"] == "pay"
        assert fields["order_id"] == messages[fields["message_id"]]


def test_fields_do_not_outlive_their_message(output: io.StringIO, queue: str) -> None:
    """The next message on the same thread starts with none, also after one that was skipped."""
    configure(output, log_format="json")
    broker = stub_broker()
    broker.middleware.insert(0, LogContext())

    class Binds(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            if message.args[0] == "skip":
                bind_log_fields(order_id="skipped")
                raise dramatiq.middleware.SkipMessage

        def after_ack(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            settled.append(current_log_fields())

    broker.add_middleware(Binds())
    settled: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act(what: str) -> None:
        if what == "bind":
            bind_log_fields(order_id="o-1")
        seen.append(current_log_fields())

    for what in ("bind", "look", "skip", "look"):
        act.send(what)
    with running(broker, threads=1):
        broker.join(queue, timeout=10_000)
    assert [fields.get("order_id") for fields in seen] == ["o-1", None, None]
    assert settled == [{}] * 4
    assert current_log_fields() == {}


def test_async_actors_bind_too(output: io.StringIO, queue: str) -> None:
    """What a coroutine binds is on the lines that Dramatiq logs about its message afterwards."""
    configure(output, log_format="json")
    broker = stub_broker()
    broker.middleware.insert(0, LogContext())
    broker.add_middleware(dramatiq.middleware.AsyncIO())
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)

    @dramatiq.actor(queue_name=queue, broker=broker, max_retries=0)
    async def act() -> None:
        bind_log_fields(order_id="o-1")
        logger.info("Inside.")
        raise ValueError("no")

    act.send()
    try:
        with running(broker):
            broker.join(queue, timeout=10_000)
    finally:
        dramatiq.broker.global_broker = before
    about = [line for line in lines(output) if line["message"].startswith(("Inside.", "Failed to process"))]
    assert [line["order_id"] for line in about] == ["o-1", "o-1"]


def test_fields_of_a_block_end_with_it(output: io.StringIO) -> None:
    """A web request's fields are its own; a block inside keeps those around it."""
    configure(output, log_format="json")
    with log_fields(request="r1"):
        with log_fields(order_id="o-1"):
            logger.info("inner")
        logger.info("outer")
    logger.info("outside")
    inner, outer, outside = lines(output)
    assert (inner["request"], inner["order_id"]) == ("r1", "o-1")
    assert outer["request"] == "r1"
    assert "order_id" not in outer
    assert "request" not in outside


def test_fields_cannot_forge_the_line(output: io.StringIO) -> None:
    """What an actor binds does not replace the level or the message, and a line stays one line."""
    configure(output, log_format="json")
    with log_fields(level="NONE", message="forged", order_id="a\nb", thing=object()):
        logger.warning("true\nstory")
    (line,) = lines(output)
    assert (line["level"], line["message"], line["order_id"]) == ("WARNING", "true\nstory", "a\nb")


def test_text_has_the_fields_behind_the_message(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """People read the message first; text is what they get when nothing is set."""
    monkeypatch.delenv("LOG_FORMAT", raising=False)
    configure(output)
    with log_fields(order_id="o-1"):
        logger.info("Capturing %s.", "12 €")
    logger.info("Done.")
    first, second = output.getvalue().splitlines()
    assert first.endswith("orders: Capturing 12 €.  order_id=o-1")
    assert second.endswith("orders: Done.")


def test_handlers_that_exist_are_kept(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dramatiq command and gunicorn have set up where lines go; only the format changes."""
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    monkeypatch.setenv("LOG_LEVEL", "warning")
    handler = logging.StreamHandler(output)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    configure_logging()
    configure_logging()
    assert root.handlers == [handler]
    logger.info("no")
    logger.warning("yes")
    assert [line["message"] for line in lines(output)] == ["yes"]


@pytest.mark.parametrize("variable", ["LOG_FORMAT", "LOG_LEVEL"])
def test_a_wrong_value_names_the_variable(
    output: io.StringIO, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A misspelt setting stops the program with its name."""
    monkeypatch.setenv(variable, "yaml")
    with pytest.raises(InvalidOption, match=variable):
        configure_logging()


def test_what_was_bound_outside_stays_outside(broker: JetStreamBroker, queue: str) -> None:
    """Also where telemetry is off: the lines of a message have its own fields, and only its own."""
    seen: list[dict[str, Any]] = []

    class Binds(dramatiq.Middleware):
        def after_worker_thread_boot(self, broker: Broker, thread: Any) -> None:
            bind_log_fields(thread=thread.name)

        def after_ack(self, broker: Broker, message: MessageProxy) -> None:
            seen.append(current_log_fields())

    broker.add_middleware(Binds())

    @dramatiq.actor(queue_name=queue)
    def act(number: int) -> None:
        if number == 0:
            bind_log_fields(order_id="o-0")
        with log_fields(step="s"):
            seen.append(current_log_fields())
        seen.append(current_log_fields())

    messages = [act.send(number) for number in range(2)]
    with running(broker, threads=1):
        broker.join(queue, timeout=10_000)
        eventually(lambda: len(seen) == 6)
    about = [{"actor": "act", "message_id": message.message_id} for message in messages]
    first = {"order_id": "o-0", **about[0]}
    thread = {"thread": seen[2]["thread"]}
    assert seen[:3] == [{"step": "s", **first}, first, thread]
    assert seen[3:] == [{"step": "s", **about[1]}, about[1], thread]
