"""W3C headers on what JetStream stores: a trace can be followed by programs that know nothing of Dramatiq."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import dramatiq
import pytest
from dramatiq import Message
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.jetstream.reading import StoredMessage, last_message, messages
from dramatiq_jetstream.periodic import Periodic
from tests.broker.conformance.workers import running
from tests.instrumentation.conftest import Recorded
from tests.support.otlp import Span
from tests.support.polling import eventually

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture
def fleet(telemetry: Recorded, broker: JetStreamBroker) -> JetStreamBroker:
    """A JetStreamBroker, made after Dramatiq was instrumented."""
    return broker


def stored_in(broker: JetStreamBroker, queue: str) -> list[StoredMessage]:
    return list(messages(broker.connection, broker.names.queue_stream(queue), ">"))


def own_headers(stored: StoredMessage) -> dict[str, str]:
    return {name: value for name, value in stored.headers.items() if not name.startswith("Nats-")}


def context_in(headers: Mapping[str, str]) -> str:
    """The trace and the span that headers name; the flags behind them are a matter of the SDK's version."""
    return headers["traceparent"].rpartition("-")[0]


def context_of(span: Span) -> str:
    return f"00-{span.trace_id}-{span.span_id}"


@pytest.mark.parametrize("delay", [None, 60_000])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_message_is_stored_with_its_own_context(
    fleet: JetStreamBroker, telemetry: Recorded, queue: str, delay: int | None, count: int
) -> None:
    """Ready or delayed: that of its send, or in a batch that of its creation."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    if count == 1:
        act.send_with_options(delay=delay)
        made = telemetry.spans(f"send {queue}")
    else:
        fleet.enqueue_many([act.message() for _ in range(count)], delay=delay)
        *made, _ = telemetry.spans(*[f"create {queue}"] * count, f"send {queue}")
    headers = [own_headers(stored) for stored in stored_in(fleet, queue)]
    assert sorted(map(context_in, headers)) == sorted(map(context_of, made))
    assert all(set(found) <= {"traceparent", "tracestate", "baggage"} for found in headers)


def test_a_schedule_hands_its_headers_on(fleet: JetStreamBroker, telemetry: Recorded, queue: str) -> None:
    """The message that a delay becomes has the headers of the send, which no worker put there."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    act.send_with_options(delay=200)
    stream, subject = fleet.names.queue_stream(queue), fleet.names.task(queue)
    fired = eventually(lambda: last_message(fleet.connection, stream, subject))
    (send,) = telemetry.spans(f"send {queue}")
    assert fired is not None
    assert context_in(own_headers(fired)) == context_of(send)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (None, {}),
        ("text", {}),
        ([1], {}),
        ({"traceparent": 5, "tracestate": None, "baggage": ""}, {}),
        ({"traceparent": "a\r\nNats-TTL: 1s", "baggage": "b\nc", "tracestate": "\ud800"}, {}),
        (
            {"traceparent": TRACEPARENT, "tracestate": "a=b", "baggage": "k=v", "Nats-Rollup": "all"},
            {"traceparent": TRACEPARENT, "tracestate": "a=b", "baggage": "k=v"},
        ),
    ],
)
def test_only_what_is_a_header_becomes_one(
    broker: JetStreamBroker, queue: str, context: object, expected: dict[str, str]
) -> None:
    """A message of a program without telemetry has no headers, and one from a stranger cannot add any other."""
    broker.declare_queue(queue)
    broker.enqueue(Message(queue, "act", (), {}, {} if context is None else {"trace_context": context}))
    (stored,) = stored_in(broker, queue)
    assert own_headers(stored) == expected
    assert set(stored.headers) == {*expected, "Nats-Msg-Id"}


def test_a_message_of_another_program_brings_its_context(
    fleet: JetStreamBroker, telemetry: Recorded, queue: str
) -> None:
    """Who puts a message on a queue in another language need not know of Dramatiq's options."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    fleet.setup()
    body = Message(queue, "act", (), {}, {}).encode()
    fleet.connection.publish(fleet.names.task(queue), body, {"Traceparent": TRACEPARENT})
    with running(fleet):
        fleet.join(queue, timeout=30_000)
    (process,) = telemetry.spans(f"process {queue}")
    assert (process.trace_id, process.parent_id) == (TRACE_ID, SPAN_ID)


def test_what_cannot_be_read_stays_in_its_trace(
    fleet: JetStreamBroker, telemetry: Recorded, queue: str
) -> None:
    """A dead letter that never became a message joins by its headers, and so does its replay."""
    fleet.declare_queue(queue)
    fleet.setup()
    fleet.connection.publish(fleet.names.task(queue), b"\xff no message", {"Traceparent": TRACEPARENT})
    with running(fleet):
        eventually(lambda: fleet.queue_stats(queue).dead == 1)
        (first,) = fleet.dead_letters.list(queue)
        assert fleet.dead_letters.replay(first)
        eventually(lambda: [one for one in fleet.dead_letters.list(queue) if one.id != first.id])
    buried, replay, again = telemetry.spans(f"dead_letter {queue}", f"send {queue}", f"dead_letter {queue}")
    assert {span.trace_id for span in (buried, replay, again)} == {TRACE_ID}
    assert buried.parent_id == replay.parent_id == SPAN_ID
    assert again.parent_id == replay.span_id
    (letter,) = fleet.dead_letters.list(queue)
    assert set(letter.headers) == {"traceparent"}
    assert context_in(letter.headers) == context_of(replay)


def test_every_tick_begins_a_trace(
    recorded: Recorded,
    instrument: Callable[..., DramatiqInstrumentor],
    nats_url: str,
    namespace: str,
    queue: str,
) -> None:
    """A schedule remembers nothing of the program that stored it, so that its ticks are not one trace for ever."""
    instrument()
    broker = JetStreamBroker(nats_url, namespace=namespace)
    broker.add_middleware(Periodic())
    ticks: list[int] = []

    @dramatiq.actor(broker=broker, queue_name=queue, every=1_000)
    def tick() -> None:
        ticks.append(1)

    with recorded.tracer_provider.get_tracer("test").start_as_current_span("deployment"):
        broker.setup()
    (schedule,) = stored_in(broker, queue)
    assert not {"traceparent", "Traceparent"} & set(schedule.headers)
    assert Message.decode(schedule.data).options == {}
    with running(broker):
        eventually(lambda: len(ticks) >= 2)
    broker.close()
    processes = recorded.wait_until(
        lambda spans: [span.name for span in spans].count(f"process {queue}") >= 2
    )
    processes = [span for span in processes if span.kind == "CONSUMER"]
    assert [span.parent_id for span in processes] == [""] * len(processes)
    traces = {span.trace_id for span in processes}
    assert len(traces) == len(processes)
    (deployment,) = recorded.named("deployment")
    assert deployment.trace_id not in traces
