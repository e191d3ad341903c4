"""Counters and histograms of sending and processing, as the SDK exports them."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq import Message

from tests.instrumentation.conftest import Fleet, Recorded


def test_sending_and_processing_are_counted_by_the_conventions(
    fleet: Fleet, telemetry: Recorded, queue: str
) -> None:
    """Sent and consumed messages and both durations carry system, destination and operation."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    for _ in range(3):
        act.send()
    fleet.work(queue)

    metrics = telemetry
    common = {"messaging__system": fleet.system, "messaging__destination__name": queue}
    send = common | {"messaging__operation__name": "send", "messaging__operation__type": "send"}
    process = common | {"messaging__operation__name": "process", "messaging__operation__type": "process"}
    (sent,) = metrics.points("messaging.client.sent.messages", **send)
    (sending,) = metrics.points("messaging.client.operation.duration", **send)
    (consumed,) = metrics.points("messaging.client.consumed.messages", **process)
    (processing,) = metrics.points("messaging.process.duration", **process, dramatiq__outcome="done")
    assert [p.value for p in (sent, sending, consumed, processing)] == [3, 3, 3, 3]
    assert (sent.unit, sending.unit, processing.unit) == ("{message}", "s", "s")
    assert 0 < sending.sum < 30
    assert 0 < processing.sum < 30
    assert processing.attributes["dramatiq.actor"] == "act"
    assert "error.type" not in processing.attributes


def test_failures_and_retries_are_counted(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """A failed attempt counts with its error and outcome, the dead letter with its reason."""

    @dramatiq.actor(queue_name=queue, max_retries=2, min_backoff=10, max_backoff=10)
    def fails() -> None:
        raise ValueError("no")

    fails.send()
    fleet.work(queue)

    metrics = telemetry
    attempts = {
        point.attributes["dramatiq.outcome"]: point.value
        for point in metrics.points("messaging.process.duration", error__type="ValueError")
    }
    assert attempts == {"retried": 2, "failed": 1}
    (dead,) = metrics.points("dramatiq.messages.dead_lettered", messaging__destination__name=queue)
    reason = "retries exhausted" if fleet.system == "nats" else "rejected"
    assert (dead.value, dead.attributes["dramatiq.dead_letter.reason"]) == (1, reason)
    (sent,) = metrics.points("messaging.client.sent.messages", messaging__destination__name=queue)
    assert sent.value == 3


def test_a_delayed_message_is_sent_once(fleet: Fleet, telemetry: Recorded, queue: str) -> None:
    """A worker that moves it on when it is due has not sent it."""

    @dramatiq.actor(queue_name=queue)
    def later() -> None:
        pass

    later.send_with_options(delay=50)
    fleet.work(queue)
    (sent,) = telemetry.points("messaging.client.sent.messages", messaging__destination__name=queue)
    assert sent.value == 1


def test_a_send_that_fails_counts_with_its_error(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """The counter is of attempts to send, by the conventions; the error tells the failed ones."""

    @dramatiq.actor(queue_name=queue)
    def act(thing: object) -> None:
        pass

    with pytest.raises(TypeError):
        act.send(object())
    (sent,) = telemetry.points("messaging.client.sent.messages", messaging__destination__name=queue)
    assert (sent.value, sent.attributes["error.type"]) == (1, "TypeError")


def test_redeliveries_are_counted_and_told_apart(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """A broker that knows how often it delivered a message says so; the second time is a redelivery."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    for deliveries in (1, 2):
        proxy = dramatiq.MessageProxy(Message(queue, "act", (), {}, {}))
        proxy.delivery_count = deliveries  # type: ignore[attr-defined]
        stub.broker.emit_before("process_message", proxy)
        stub.broker.emit_after("process_message", proxy)
    spans = telemetry.spans(*[f"process {queue}"] * 2)
    assert [span.attributes.get("dramatiq.delivery_count") for span in spans] == [None, 2]
    (redelivered,) = telemetry.points("dramatiq.messages.redelivered")
    assert redelivered.value == 1
