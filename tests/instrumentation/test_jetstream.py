"""What only a JetStreamBroker has: events, dead letters with reasons, redeliveries, the state of queues."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import running
from tests.instrumentation.conftest import Recorded
from tests.support.polling import eventually
from tests.support.ports import free_port


@pytest.fixture
def fleet(telemetry: Recorded, broker: JetStreamBroker) -> JetStreamBroker:
    """A JetStreamBroker, made after Dramatiq was instrumented."""
    return broker


@pytest.fixture
def subject() -> Iterator[str]:
    """The first token of subjects that no other test uses."""
    return f"S{uuid4().hex[:8]}"


def test_an_order_is_one_trace_through_events_failures_and_retries(
    fleet: JetStreamBroker, telemetry: Recorded, subject: str
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
    assert (first.attributes["dramatiq.attempt"], second.attributes["dramatiq.attempt"]) == (1, 2)


def _exists(broker: JetStreamBroker, stream: str) -> bool:
    try:
        return bool(broker.connection.api(f"STREAM.INFO.{stream}")["state"]["consumer_count"] >= 2)
    except Exception as error:
        raise AssertionError(str(error)) from error


def test_an_event_of_another_program_brings_its_context(
    fleet: JetStreamBroker, telemetry: Recorded, subject: str
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
        telemetry.wait_until(lambda _: telemetry.all)
    (process,) = telemetry.spans("process pay")
    assert (process.trace_id, process.parent_id) == (trace_id, span_id)


def test_an_event_that_cannot_be_stored_is_an_error(
    fleet: JetStreamBroker, telemetry: Recorded, subject: str
) -> None:
    """The span of the publish is closed with the error that the caller got."""
    with pytest.raises(dramatiq.errors.DramatiqError):
        fleet.publish(f"{subject}.nobody", b"order", timeout=500)
    (send,) = telemetry.spans(f"send {subject}.nobody")
    assert send.is_error
    assert send.attributes["error.type"].startswith("dramatiq_jetstream.errors.")


def test_a_batch_is_created_one_by_one_and_sent_at_once(
    fleet: JetStreamBroker, telemetry: Recorded, queue: str
) -> None:
    """Each message is the parent of its own attempt; the send of the batch links to all of them."""

    @dramatiq.actor(queue_name=queue)
    def act(n: int) -> None:
        pass

    messages = [act.message(n) for n in range(5)]
    fleet.enqueue_many(messages)
    assert all(message.options == {} for message in messages)
    with running(fleet):
        fleet.join(queue, timeout=30_000)
    spans = telemetry.spans(*[f"create {queue}", f"process {queue}"] * 5, f"send {queue}")
    created = {s.span_id: s.attributes["messaging.message.id"] for s in spans if s.kind == "PRODUCER"}
    attempts = {s.parent_id: s.attributes["messaging.message.id"] for s in spans if s.kind == "CONSUMER"}
    assert created == attempts
    (send,) = telemetry.named(f"send {queue}")
    assert send.kind == "CLIENT"
    assert {span_id for _, span_id in send.links} == set(created)
    assert send.attributes["messaging.batch.message_count"] == 5
    (sent,) = telemetry.points("messaging.client.sent.messages", messaging__destination__name=queue)
    assert sent.value == 5


def test_a_batch_that_cannot_be_sent_is_an_error(telemetry: Recorded, queue: str) -> None:
    """The error is the batch's, with the messages left as they were."""
    broker = JetStreamBroker(f"nats://127.0.0.1:{free_port()}", enqueue_timeout=500)
    messages = [Message(queue, "act", (), {}, {}) for _ in range(2)]
    with pytest.raises(dramatiq.errors.DramatiqError):
        broker.enqueue_many(messages)
    *created, send = telemetry.spans(*[f"create {queue}"] * 2, f"send {queue}")
    assert send.is_error
    assert not any(span.is_error for span in created)
    assert all(message.options == {} for message in messages)
    broker.close()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff not a message", "undecodable"),
        (Message("{queue}", "stranger", (), {}, {}).encode(), "unknown actor"),
    ],
)
def test_what_never_reaches_an_actor_is_counted_by_its_reason(
    nats_url: str, namespace: str, telemetry: Recorded, queue: str, body: bytes, reason: str
) -> None:
    """Dead letters that no attempt was made for have a span and count as well."""
    fleet = JetStreamBroker(nats_url, namespace=namespace, unknown_actor_grace=0)
    fleet.declare_queue(queue)
    fleet.setup()
    fleet.connection.publish(fleet.names.task(queue), body.replace(b"{queue}", queue.encode()))
    with running(fleet):
        eventually(lambda: fleet.queue_stats(queue).dead == 1)
        (span,) = telemetry.spans(f"dead_letter {queue}")
    assert span.attributes["dramatiq.dead_letter.reason"] == reason
    (point,) = telemetry.points("dramatiq.messages.dead_lettered")
    assert (point.value, point.attributes["dramatiq.dead_letter.reason"]) == (1, reason)
    fleet.close()


def test_a_dead_letter_and_its_replay_stay_in_the_trace(
    fleet: JetStreamBroker, telemetry: Recorded, queue: str
) -> None:
    """send → attempt, letter; and from the same send: replay → attempt, with a link to the operator."""
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
    fleet: JetStreamBroker, telemetry: Recorded, subject: str
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
    telemetry: Recorded, own_nats_server: NatsServer, queue: str
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
    telemetry: Recorded, nats_url: str, namespace: str, queue: str
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
        broker.join(queue, timeout=30_000)
    broker.close()
    spans = telemetry.spans(f"send {queue}", f"process {queue}")
    assert spans[1].attributes["dramatiq.delivery_count"] >= 2
    (redelivered,) = telemetry.points("dramatiq.messages.redelivered")
    assert redelivered.attributes["messaging.destination.name"] == queue
