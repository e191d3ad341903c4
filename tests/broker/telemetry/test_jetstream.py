"""What only a JetStreamBroker has: events, dead letters with reasons, redeliveries, the state of queues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import Message
from prometheus_client.parser import text_string_to_metric_families

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.telemetry import prometheus_text
from dramatiq_jetstream.telemetry.fleet import FleetReader
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import running
from tests.broker.telemetry.conftest import Providers
from tests.support.polling import eventually
from tests.support.ports import free_port


@pytest.fixture
def fleet(telemetry: Providers, broker: JetStreamBroker) -> JetStreamBroker:
    """A JetStreamBroker, made after Dramatiq was instrumented."""
    return broker


@pytest.fixture
def subject() -> Iterator[str]:
    """The first token of subjects that no other test uses."""
    return f"S{uuid4().hex[:8]}"


def test_an_order_is_one_trace_through_events_failures_and_retries(
    fleet: JetStreamBroker, telemetry: Providers, subject: str
) -> None:
    """request → event → attempt fails → retry → attempt → next event → next actor, parent by parent."""
    fleet.add_middleware(Events(stream=subject, subjects=[f"{subject}.>"]))
    done: list[str] = []

    @dramatiq.actor(
        subscribe=subscription(f"{subject}.created", bytes), queue_name="pay", min_backoff=50, max_backoff=50
    )
    def pay(event: bytes) -> None:
        done.append("pay")
        if done.count("pay") == 1:
            raise ConnectionError("gateway down")
        fleet.publish(f"{subject}.paid", event)

    @dramatiq.actor(subscribe=subscription(f"{subject}.paid", bytes), queue_name="confirm")
    def confirm(event: bytes) -> None:
        done.append("confirm")

    with running(fleet):
        # The stream and the durables exist once the consumers run.
        eventually(lambda: _exists(fleet, subject))
        tracer = telemetry.tracer_provider.get_tracer("test")
        with tracer.start_as_current_span("POST /api/orders"):
            fleet.publish(f"{subject}.created", b"order", event_id="order-1")
        eventually(lambda: "confirm" in done)

    spans = telemetry.spans(
        "POST /api/orders",
        f"send {subject}.created",
        "process pay",
        "send pay",
        "process pay",
        f"send {subject}.paid",
        "process confirm",
    )
    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    chain = [spans[-1]]
    while chain[-1].parent_id:
        chain.append(by_id[chain[-1].parent_id])
    assert [(span.name, span.attributes.get("dramatiq.outcome")) for span in reversed(chain)] == [
        ("POST /api/orders", None),
        (f"send {subject}.created", None),
        ("process pay", "retried"),
        ("send pay", None),
        ("process pay", "done"),
        (f"send {subject}.paid", None),
        ("process confirm", "done"),
    ]
    created = next(span for span in spans if span.name == f"send {subject}.created")
    assert created.kind == "PRODUCER"
    assert created.attributes["messaging.destination.name"] == f"{subject}.created"
    assert created.attributes["messaging.message.id"] == "order-1"
    first, second = (span for span in spans if span.name == "process pay")
    assert first.attributes["dramatiq.event.subject"] == f"{subject}.created"
    assert (first.attributes["dramatiq.attempt"], second.attributes["dramatiq.attempt"]) == (1, 2)


def _exists(broker: JetStreamBroker, stream: str) -> bool:
    try:
        return bool(broker.connection.api(f"STREAM.INFO.{stream}")["state"]["consumer_count"] >= 2)
    except Exception as error:
        raise AssertionError(str(error)) from error


def test_an_event_of_another_program_brings_its_context(
    fleet: JetStreamBroker, telemetry: Providers, subject: str
) -> None:
    """A publisher in another language may write the header as its libraries do: capitalised."""
    fleet.add_middleware(Events(stream=subject, subjects=[f"{subject}.>"]))

    @dramatiq.actor(subscribe=subscription(f"{subject}.created", bytes), queue_name="pay")
    def pay(event: bytes) -> None:
        pass

    fleet.setup()
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"Traceparent": f"00-{trace_id}-{span_id}-01", "Nats-Msg-Id": "e1"}
    fleet.connection.publish(f"{subject}.created", b"order", headers)
    with running(fleet):
        telemetry.receiver.wait_until(
            lambda _: telemetry.tracer_provider.force_flush() and telemetry.receiver.spans
        )
    (process,) = telemetry.spans("process pay")
    assert (process.trace_id, process.parent_id) == (trace_id, span_id)


def test_an_event_that_cannot_be_stored_is_an_error(
    fleet: JetStreamBroker, telemetry: Providers, subject: str
) -> None:
    """The span of the publish is closed with the error that the caller got."""
    with pytest.raises(dramatiq.errors.DramatiqError):
        fleet.publish(f"{subject}.nobody", b"order", timeout=500)
    (send,) = telemetry.spans(f"send {subject}.nobody")
    assert send.is_error
    assert send.attributes["error.type"].startswith("dramatiq_jetstream.errors.")


def test_many_messages_have_a_send_each(fleet: JetStreamBroker, telemetry: Providers, queue: str) -> None:
    """enqueue_many makes one span for each message, and each attempt is the child of its own."""

    @dramatiq.actor(queue_name=queue)
    def act(n: int) -> None:
        pass

    fleet.enqueue_many([act.message(n) for n in range(5)])
    with running(fleet):
        fleet.join(queue, timeout=10_000)
    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 5)
    sends = {s.span_id: s.attributes["messaging.message.id"] for s in spans if s.kind == "PRODUCER"}
    attempts = {s.parent_id: s.attributes["messaging.message.id"] for s in spans if s.kind == "CONSUMER"}
    assert sends == attempts


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff not a message", "undecodable"),
        (Message("{queue}", "stranger", (), {}, {}).encode(), "unknown actor"),
    ],
)
def test_what_never_reaches_an_actor_is_counted_by_its_reason(
    fleet: JetStreamBroker, telemetry: Providers, queue: str, body: bytes, reason: str
) -> None:
    """Dead letters that no attempt was made for have a span and count as well."""
    fleet.declare_queue(queue)
    fleet.setup()
    fleet.connection.publish(fleet.names.task(queue), body.replace(b"{queue}", queue.encode()))
    with running(fleet):
        eventually(lambda: fleet.queue_stats(queue).dead == 1)
        (span,) = telemetry.spans(f"dead_letter {queue}")
    assert span.attributes["dramatiq.dead_letter.reason"] == reason
    (point,) = telemetry.metrics().points("dramatiq.messages.dead_lettered")
    assert (point.value, point.attributes["dramatiq.dead_letter.reason"]) == (1, reason)


def test_a_dead_letter_and_its_replay_stay_in_the_trace(
    fleet: JetStreamBroker, telemetry: Providers, queue: str
) -> None:
    """send → attempt, letter; and from the same send: replay → attempt. Whoever replays is linked."""
    attempts: list[int] = []

    @dramatiq.actor(queue_name=queue, max_retries=0)
    def pay() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("no")

    message = pay.send()
    tracer = telemetry.tracer_provider.get_tracer("test")
    with running(fleet):
        eventually(lambda: fleet.queue_stats(queue).dead == 1)
        (letter,) = fleet.dead_letters.list(queue)
        with tracer.start_as_current_span("operator"):
            assert fleet.dead_letters.replay(letter)
        eventually(lambda: len(attempts) == 2)
    send_name, process_name = f"send {queue}", f"process {queue}"
    spans = telemetry.spans(
        send_name, process_name, f"dead_letter {queue}", "operator", send_name, process_name
    )
    operator = next(span for span in spans if span.name == "operator")
    assert len({span.trace_id for span in spans if span is not operator}) == 1
    send, replay = (span for span in spans if span.name == send_name)
    failed, done = (span for span in spans if span.name == process_name)
    assert [s.attributes["dramatiq.outcome"] for s in (failed, done)] == ["failed", "done"]
    assert replay.parent_id == failed.parent_id == send.span_id
    assert done.parent_id == replay.span_id
    assert replay.kind == "PRODUCER"
    assert replay.links == ((operator.trace_id, operator.span_id),)
    assert "dramatiq.replay" not in send.attributes
    assert replay.attributes["dramatiq.replay"] is True
    assert replay.attributes["messaging.message.id"] == message.message_id
    assert replay.attributes["dramatiq.actor"] == "pay"


def test_a_replay_of_an_event_stays_in_its_trace(
    fleet: JetStreamBroker, telemetry: Providers, subject: str
) -> None:
    """The attempt is the replay's child, although the event itself carries the context of its publisher."""
    fleet.add_middleware(Events(stream=subject, subjects=[f"{subject}.>"]))
    attempts: list[bytes] = []

    @dramatiq.actor(subscribe=subscription(f"{subject}.created", bytes), queue_name="pay", max_retries=0)
    def pay(event: bytes) -> None:
        attempts.append(event)
        if len(attempts) == 1:
            raise ValueError("no")

    fleet.setup()
    fleet.publish(f"{subject}.created", b"order")
    with running(fleet):
        eventually(lambda: fleet.queue_stats("pay").dead == 1)
        (letter,) = fleet.dead_letters.list("pay")
        assert fleet.dead_letters.replay(letter)
        eventually(lambda: len(attempts) == 2)
    spans = telemetry.spans(
        f"send {subject}.created", "process pay", "dead_letter pay", "send pay", "process pay"
    )
    assert len({span.trace_id for span in spans}) == 1
    published, first, _, replay, second = spans
    assert first.parent_id == replay.parent_id == published.span_id
    assert second.parent_id == replay.span_id


def test_a_replay_that_cannot_be_stored_is_an_error(
    telemetry: Providers, own_nats_server: NatsServer, queue: str
) -> None:
    """The span of the replay is closed with the error that the caller got, and the letter is kept."""
    broker = JetStreamBroker(own_nats_server.url, enqueue_timeout=1_000)
    broker.declare_queue(queue)
    broker.setup()
    body = Message(queue, "pay", (), {}, {}).encode()
    broker.dead_letters.store(
        queue=queue, origin="1", subject="nobody.listens", data=body, headers={}, reason="rejected", error="",
        deliveries=1,
    )  # fmt: skip
    (letter,) = broker.dead_letters.list(queue)
    with pytest.raises(dramatiq.errors.DramatiqError):
        broker.dead_letters.replay(letter)
    (replay,) = telemetry.spans(f"send {queue}")
    assert replay.is_error
    assert len(broker.dead_letters.list(queue)) == 1
    broker.close()


def test_a_redelivered_message_says_so(
    telemetry: Providers, nats_url: str, namespace: str, queue: str
) -> None:
    """A message that an earlier worker did not settle has a delivery count above one."""
    gone, broker = (JetStreamBroker(nats_url, namespace=namespace, ack_wait=1_000) for _ in range(2))

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act() -> None:
        pass

    act.send()
    gone.declare_queue(queue)
    assert next(gone.consume(queue, timeout=5_000)) is not None
    gone.connection.close()
    with running(broker):
        broker.join(queue, timeout=20_000)
    broker.close()
    spans = telemetry.spans(f"send {queue}", f"process {queue}")
    assert spans[1].attributes["dramatiq.delivery_count"] >= 2
    (redelivered,) = telemetry.metrics().points("dramatiq.messages.redelivered")
    assert redelivered.attributes["messaging.destination.name"] == queue


def test_the_state_of_the_queues_is_observed(
    fleet: JetStreamBroker, telemetry: Providers, namespace: str, queue: str
) -> None:
    """Ready, in flight, delayed, dead, age and connection arrive as metrics."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    act.send()
    act.send()
    act.send_with_options(delay=60_000)

    def value(name: str, **attributes: str) -> float:
        (point,) = telemetry.metrics().points(name, **attributes)
        return point.value

    of_broker = {"messaging__system": "nats", "dramatiq__namespace": namespace}
    of_queue = of_broker | {"messaging__destination__name": queue}
    assert value("dramatiq.queue.ready", **of_queue) == 2
    assert value("dramatiq.queue.in_flight", **of_queue) == 0
    assert value("dramatiq.queue.delayed", **of_queue) == 1
    assert value("dramatiq.queue.dead", **of_queue) == 0
    assert 0 <= value("dramatiq.queue.oldest_ready_age", **of_queue) < 60
    assert value("dramatiq.connection.up", **of_broker) == 1
    assert value("dramatiq.connection.reconnects", **of_broker) == 0


def test_a_gauge_does_not_connect_a_process(
    telemetry: Providers, nats_url: str, namespace: str, queue: str
) -> None:
    """A process that has not used its broker yet reports that it is not connected, and stays so."""
    broker = JetStreamBroker(nats_url, namespace=namespace)
    broker.declare_queue(queue)
    metrics = telemetry.metrics()
    assert metrics.points("dramatiq.queue.ready", messaging__destination__name=queue) == []
    (up,) = metrics.points("dramatiq.connection.up", dramatiq__namespace=namespace)
    assert up.value == 0
    assert not broker.connection.state.connected
    broker.close()


def samples(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("queue", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_text(broker: JetStreamBroker, queue: str) -> None:
    """The text parses, has every queue, and needs neither instrumentation nor exporters."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    broker.declare_queue("other")
    act.send()
    found = samples(prometheus_text(broker))
    assert found["dramatiq_queue_ready", queue] == 1
    assert found["dramatiq_queue_ready", "other"] == 0
    assert found["dramatiq_queue_dead", queue] == 0
    assert ("dramatiq_queue_oldest_ready_age_seconds", queue) in found
    assert ("dramatiq_queue_oldest_ready_age_seconds", "other") not in found
    assert found["dramatiq_connection_up", ""] == 1
    assert found["dramatiq_connection_reconnects_total", ""] == 0


def test_prometheus_text_without_a_server(queue: str) -> None:
    """A scrape is answered while the server is away: no queues, and a connection that is down."""
    broker = JetStreamBroker(f"nats://127.0.0.1:{free_port()}", enqueue_timeout=2_000)
    broker.declare_queue(queue)
    found = samples(prometheus_text(broker))
    assert found == {("dramatiq_connection_up", ""): 0, ("dramatiq_connection_reconnects_total", ""): 0}
    # The server that did not answer is not waited for again at once.
    assert _seconds(lambda: prometheus_text(broker)) < 1
    broker.close()


def _seconds(action: Callable[[], object]) -> float:
    """How long it took, once the reading of a moment ago is used no more."""
    time.sleep(1.01)
    began = time.monotonic()
    action()
    return time.monotonic() - began


def test_prometheus_text_comes_back_with_the_server(own_nats_server: NatsServer, queue: str) -> None:
    """The connection's fall and return are seen, and counted."""
    broker = JetStreamBroker(own_nats_server.url, enqueue_timeout=500)

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act() -> None:
        pass

    act.send()
    own_nats_server.kill()
    eventually(lambda: samples(prometheus_text(broker))["dramatiq_connection_up", ""] == 0)
    own_nats_server.start()
    eventually(lambda: samples(prometheus_text(broker)).get(("dramatiq_queue_ready", queue)) == 1, timeout=20)
    found = samples(prometheus_text(broker))
    assert found["dramatiq_connection_up", ""] == 1
    assert found["dramatiq_connection_reconnects_total", ""] >= 1
    broker.close()


def test_one_reading_serves_for_a_moment() -> None:
    """Seven gauges of one collection ask the server once."""
    asked: list[str] = []

    class Told:
        connection = SimpleNamespace(state=SimpleNamespace(connected=True, reconnects=0))

        def get_declared_queues(self) -> set[str]:
            return {"a"}

        def queue_stats(self, queue: str) -> object:
            asked.append(queue)
            return SimpleNamespace(ready=1)

    reader = FleetReader(lambda: [Told()], max_age=60_000)
    first, second = reader.read(), reader.read()
    assert asked == ["a"]
    assert first is second
    assert (first[0].queues[0].ready, first[0].queues[0].dead) == (1, None)
