"""Spans of messages: one trace from the send through every attempt, on every broker."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import dramatiq
import pytest
from dramatiq import Message, group, pipeline
from dramatiq.middleware import GroupCallbacks, SkipMessage
from dramatiq.rate_limits.backends import StubBackend
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor

from tests.instrumentation.conftest import Fleet, Recorded
from tests.support.otlp import Span


def one_trace(spans: list[Span]) -> None:
    assert len({span.trace_id for span in spans}) == 1, spans


def children(spans: list[Span]) -> dict[str, list[str]]:
    """For each span its children, by name; "" stands for the root."""
    names = {span.span_id: span.name for span in spans}
    tree: dict[str, list[str]] = defaultdict(list)
    for span in spans:
        tree[names.get(span.parent_id, span.parent_id)].append(span.name)
    return dict(tree)


class Refused(Exception):
    pass


def test_a_message_is_a_send_and_an_attempt_in_one_trace(
    fleet: Fleet, telemetry: Recorded, queue: str
) -> None:
    """The attempt is a child of the send, and both say by the conventions what they are."""
    seen: list[str] = []

    @dramatiq.actor(queue_name=queue)
    def greet(name: str) -> None:
        seen.append(format(trace.get_current_span().get_span_context().trace_id, "032x"))

    message = greet.send("you")
    fleet.work(queue)

    send, process = telemetry.spans(f"send {queue}", f"process {queue}")
    one_trace([send, process])
    assert (send.parent_id, process.parent_id) == ("", send.span_id)
    assert (send.kind, process.kind) == ("PRODUCER", "CONSUMER")
    common = {
        "messaging.system": fleet.system,
        "messaging.destination.name": queue,
        "messaging.message.id": message.message_id,
        "dramatiq.actor": "greet",
    }
    assert send.attributes == common | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    assert (
        process.attributes.items()
        >= (
            common
            | {
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "dramatiq.attempt": 1,
                "dramatiq.outcome": "done",
            }
        ).items()
    )
    assert not send.is_error
    assert not process.is_error
    assert seen == [send.trace_id]


def test_a_retry_is_sent_by_the_failed_attempt(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """send → process (fails) → send (delayed) → process: each is the child of the one before."""
    attempts: list[int] = []

    @dramatiq.actor(queue_name=queue, max_retries=3, min_backoff=100, max_backoff=100)
    def pay() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise Refused("card declined")

    pay.send()
    fleet.work(queue)

    first_send, first, second_send, second = telemetry.spans(
        f"send {queue}", f"process {queue}", f"send {queue}", f"process {queue}"
    )
    one_trace([first_send, first, second_send, second])
    assert first.parent_id == first_send.span_id
    assert second_send.parent_id == first.span_id
    assert second.parent_id == second_send.span_id
    assert first.attributes["dramatiq.outcome"] == "retried"
    assert first.attributes["error.type"] == f"{__name__}.Refused"
    assert first.is_error
    assert [e["exception.message"] for e in first.exceptions] == ["card declined"]
    assert "Traceback" in first.exceptions[0]["exception.stacktrace"]
    assert second_send.attributes["dramatiq.attempt"] == 2
    assert 50 <= second_send.attributes["dramatiq.delay"] <= 100
    assert not second_send.is_error
    assert (second.attributes["dramatiq.attempt"], second.attributes["dramatiq.outcome"]) == (2, "done")
    assert not second.is_error
    assert first.end < second.start


def test_a_message_that_fails_for_good_says_so(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """The last attempt is told apart from the ones that are followed by another."""

    @dramatiq.actor(queue_name=queue, max_retries=1, min_backoff=10, max_backoff=10)
    def pay() -> None:
        raise Refused("no")

    pay.send()
    fleet.work(queue)

    def attempts(spans: list[Span]) -> list[Span]:
        return [span for span in spans if span.name == f"process {queue}"]

    spans = telemetry.wait_until(lambda spans: len(attempts(spans)) == 2)
    one_trace(spans)
    first, last = attempts(spans)
    assert first.attributes["dramatiq.outcome"] == "retried"
    assert last.attributes["dramatiq.outcome"] == "failed"
    assert last.is_error


def test_a_delayed_message_has_one_send(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """Moving a message on when it is due is no second send, and loses no context."""

    @dramatiq.actor(queue_name=queue)
    def later() -> None:
        pass

    later.send_with_options(delay=200)
    fleet.work(queue)

    send, process = telemetry.spans(f"send {queue}", f"process {queue}")
    assert send.attributes["dramatiq.delay"] == 200
    assert process.parent_id == send.span_id
    assert process.start - send.start >= 100_000_000


def test_each_step_of_a_pipeline_is_sent_by_the_step_before(
    fleet: Fleet, telemetry: Recorded, queue: str
) -> None:
    """A pipeline is one trace, a chain of sends and attempts."""

    @dramatiq.actor(queue_name=queue)
    def add(a: int, b: int) -> int:
        return a + b

    pipeline([add.message(1, 2), add.message(3), add.message(4)]).run()
    fleet.work(queue)

    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 3)
    one_trace(spans)
    for before, after in itertools.pairwise(spans):
        assert after.parent_id == before.span_id


def test_a_group_belongs_to_where_it_is_run(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """Every message of a group is a child of the span it was run in; the callback of the last attempt."""
    fleet.broker.add_middleware(GroupCallbacks(StubBackend()))

    @dramatiq.actor(queue_name=queue)
    def part(n: int) -> None:
        pass

    @dramatiq.actor(queue_name=queue)
    def whole() -> None:
        pass

    tracer = telemetry.tracer_provider.get_tracer("test")
    with tracer.start_as_current_span("checkout"):
        parts = group([part.message(n) for n in range(3)])
        parts.add_completion_callback(whole.message())
        parts.run()
    fleet.work(queue)

    spans = telemetry.spans("checkout", *[f"send {queue}", f"process {queue}"] * 4)
    one_trace(spans)
    by_id = {span.span_id: span for span in spans}
    sends = [span for span in spans if span.name.startswith("send")]
    of_parts = [span for span in sends if span.attributes["dramatiq.actor"] == "part"]
    assert {by_id[span.parent_id].name for span in of_parts} == {"checkout"}
    (of_whole,) = [span for span in sends if span.attributes["dramatiq.actor"] == "whole"]
    assert by_id[of_whole.parent_id].attributes["dramatiq.actor"] == "part"
    assert by_id[of_whole.parent_id].kind == "CONSUMER"
    assert all(
        by_id[span.parent_id].attributes["messaging.message.id"] == span.attributes["messaging.message.id"]
        for span in spans
        if span.kind == "CONSUMER"
    )


def test_baggage_goes_along(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """What a request put into the baggage is there in the actor, and in what the actor sends."""
    found: dict[str, Any] = {}

    @dramatiq.actor(queue_name=queue)
    def second() -> None:
        found["second"] = baggage.get_baggage("tenant")

    @dramatiq.actor(queue_name=queue)
    def first() -> None:
        found["first"] = baggage.get_baggage("tenant")
        second.send()

    token = context.attach(baggage.set_baggage("tenant", "acme"))
    try:
        first.send()
    finally:
        context.detach(token)
    fleet.work(queue)

    assert found == {"first": "acme", "second": "acme"}


def test_a_send_that_fails_is_an_error(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """The span of a send that raised is closed, with the error; the caller gets the exception."""

    @dramatiq.actor(queue_name=queue)
    def unsendable(thing: object) -> None:
        pass

    with pytest.raises(TypeError):
        unsendable.send(object())

    (send,) = telemetry.spans(f"send {queue}")
    assert send.is_error
    assert send.attributes["error.type"] == "TypeError"
    assert len(send.exceptions) == 1
    assert not trace.get_current_span().get_span_context().is_valid


def test_options_are_left_as_they_were(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """A message object that a program sends again does not end up in the trace of the first time."""

    @dramatiq.actor(queue_name=queue)
    def tick() -> None:
        pass

    message = tick.message_with_options(colour="blue")
    tracer = telemetry.tracer_provider.get_tracer("test")
    for name in ("monday", "tuesday"):
        with tracer.start_as_current_span(name):
            fleet.broker.enqueue(message)
        assert message.options == {"colour": "blue"}
    fleet.work(queue)

    spans = telemetry.spans("monday", "tuesday", *[f"send {queue}", f"process {queue}"] * 2)
    by_trace = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span.name)
    assert sorted(by_trace.values()) == [
        ["monday", f"send {queue}", f"process {queue}"],
        ["tuesday", f"send {queue}", f"process {queue}"],
    ]


def test_a_replayed_message_stays_in_its_trace(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """Enqueueing a message that carries a context continues its trace, with a link to the span that did it."""
    attempts: list[int] = []

    @dramatiq.actor(queue_name=queue, max_retries=0)
    def pay() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise Refused("no")

    letters: list[Message[Any]] = []

    class Keep(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            letters.append(Message.decode(message.encode()))

    fleet.broker.add_middleware(Keep())
    pay.send()
    fleet.work(queue)
    tracer = telemetry.tracer_provider.get_tracer("test")
    with tracer.start_as_current_span("replay"):
        fleet.broker.enqueue(letters[0])
    fleet.work(queue)

    process = f"process {queue}"
    spans = telemetry.wait_until(lambda spans: [s.name for s in spans].count(process) == 2)
    spans = [span for span in spans if not span.name.startswith("dead_letter")]
    replay = next(span for span in spans if span.name == "replay")
    order = [span for span in spans if span is not replay]
    one_trace(order)
    assert [span.name for span in order] == [f"send {queue}", process] * 2
    assert order[2].parent_id == order[0].span_id
    assert order[3].parent_id == order[2].span_id
    assert order[2].links == ((replay.trace_id, replay.span_id),)


def test_skipped_messages_are_told_apart(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """A message that a middleware skipped is neither done nor failed."""

    class Picky(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            raise SkipMessage("not today")

    stub.broker.add_middleware(Picky())

    @dramatiq.actor(queue_name=queue)
    def never() -> None:
        raise AssertionError("ran")

    @dramatiq.actor(queue_name=queue, max_age=1)
    def too_old() -> None:
        raise AssertionError("ran")

    never.send()
    stub.broker.enqueue(Message(queue, "too_old", (), {}, {}, message_timestamp=1))
    stub.work(queue)

    processes = [
        span
        for span in telemetry.spans(*[f"send {queue}", f"process {queue}"] * 2)
        if span.kind == "CONSUMER"
    ]
    by_actor = {span.attributes["dramatiq.actor"]: span.attributes for span in processes}
    assert by_actor["never"]["dramatiq.outcome"] == by_actor["too_old"]["dramatiq.outcome"] == "skipped"
    assert by_actor["never"]["dramatiq.skip_reason"] == "not today"


def test_a_retry_that_the_actor_asks_for_is_no_error(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """Raising dramatiq.Retry is how an actor waits for something; running out of them is an error."""

    @dramatiq.actor(queue_name=queue, max_retries=1)
    def poll() -> None:
        raise dramatiq.Retry("not there yet", delay=10)

    poll.send()
    stub.work(queue)

    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 2)
    first, last = (span for span in spans if span.kind == "CONSUMER")
    assert (first.attributes["dramatiq.outcome"], first.is_error) == ("retried", False)
    assert "error.type" not in first.attributes
    assert (last.attributes["dramatiq.outcome"], last.is_error) == ("failed", True)


def test_an_attempt_without_a_retry_is_unresolved(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """Without the Retries middleware Dramatiq drops a failed message; that is not called done."""
    stub.broker.middleware[:] = [m for m in stub.broker.middleware if type(m).__name__ != "Retries"]

    @dramatiq.actor(queue_name=queue)
    def fails() -> None:
        raise Refused("no")

    fails.send()
    stub.work(queue)

    _, process = telemetry.spans(f"send {queue}", f"process {queue}")
    assert process.attributes["dramatiq.outcome"] == "unresolved"
    assert process.is_error


def test_parents_can_be_links(stub: Fleet, telemetry: Recorded, instrument: Any, queue: str) -> None:
    """With link_parents an attempt begins its own trace; its retry belongs to it, and baggage goes on."""
    DramatiqInstrumentor().uninstrument()
    instrument(link_parents=True)
    attempts: list[object] = []

    @dramatiq.actor(queue_name=queue, min_backoff=10, max_backoff=10)
    def pay() -> None:
        attempts.append(baggage.get_baggage("tenant"))
        if len(attempts) == 1:
            raise Refused("no")

    token = context.attach(baggage.set_baggage("tenant", "acme"))
    try:
        pay.send()
    finally:
        context.detach(token)
    stub.work(queue)

    send, first, retry, second = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 2)
    assert (first.parent_id, first.links) == ("", ((send.trace_id, send.span_id),))
    assert first.trace_id != send.trace_id
    assert retry.parent_id == first.span_id
    assert (second.parent_id, second.links) == ("", ((retry.trace_id, retry.span_id),))
    assert attempts == ["acme", "acme"]


@pytest.mark.parametrize(
    "carrier", ["nonsense", 7, ["traceparent"], {"traceparent": 5}, {"traceparent": "00-x"}]
)
def test_a_carrier_that_makes_no_sense_is_ignored(
    stub: Fleet, telemetry: Recorded, queue: str, carrier: object
) -> None:
    """What a stranger wrote into the options breaks neither the message nor its span."""
    ran: list[int] = []

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        ran.append(1)

    message = Message(queue, "act", (), {}, {"trace_context": carrier, "event": carrier})
    stub.broker.queues[queue].put(message.encode())  # type: ignore[attr-defined]
    stub.work(queue)

    (process,) = telemetry.spans(f"process {queue}")
    assert process.parent_id == ""
    assert ran == [1]


def test_async_actors_run_in_the_context(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """A coroutine runs on another thread and still sees the attempt's span."""
    stub.broker.add_middleware(dramatiq.middleware.AsyncIO())
    seen: list[str] = []

    @dramatiq.actor(queue_name=queue)
    async def act() -> None:
        seen.append(format(trace.get_current_span().get_span_context().span_id, "016x"))

    act.send()
    stub.work(queue)

    _, process = telemetry.spans(f"send {queue}", f"process {queue}")
    assert seen == [process.span_id]
