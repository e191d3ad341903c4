"""Instrumenting and taking it back: every broker is reached, and Dramatiq is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import dramatiq
import dramatiq.broker
import dramatiq.worker
import pytest
from dramatiq import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from opentelemetry import context, trace
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
from opentelemetry.instrumentation.dramatiq.middleware import TelemetryMiddleware

from tests.broker.conformance.workers import running
from tests.instrumentation.conftest import Recorded, stub_broker


def snapshot(broker: Broker) -> dict[str, object]:
    """Everything that instrumenting could touch, by identity."""
    classes = (
        Broker,
        StubBroker,
        RedisBroker,
        RabbitmqBroker,
        dramatiq.Actor,
        dramatiq.Message,
        dramatiq.MessageProxy,
        dramatiq.Middleware,
        dramatiq.Worker,
        dramatiq.worker.WorkerThread,
        dramatiq.worker.ConsumerThread,
    )
    seen: dict[str, object] = {
        f"{cls.__qualname__}.{name}": value for cls in classes for name, value in vars(cls).items()
    }
    for module in (dramatiq, dramatiq.broker, dramatiq.worker):
        seen |= {f"{module.__name__}.{name}": value for name, value in vars(module).items()}
    seen |= {f"broker.{name}": value for name, value in vars(broker).items()}
    seen |= {f"middleware {i}": m for i, m in enumerate(broker.middleware)}
    return seen


def is_instrumented(broker: Broker) -> bool:
    return any(isinstance(m, TelemetryMiddleware) for m in broker.middleware)


def test_uninstrument_leaves_dramatiq_as_it_was(instrument: Callable[..., DramatiqInstrumentor]) -> None:
    """Every attribute is the same object as before, on the classes and on the broker."""
    broker = stub_broker()
    before = snapshot(broker)
    instrumentor = instrument()
    assert is_instrumented(broker)
    instrumentor.uninstrument()
    after = snapshot(broker)

    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []


def test_brokers_of_before_and_after_are_reached(instrument: Callable[..., DramatiqInstrumentor]) -> None:
    """A program may make its broker before it is instrumented, and a worker makes it after."""
    before = stub_broker()
    instrumentor = instrument()
    after = stub_broker()
    assert is_instrumented(before)
    assert is_instrumented(after)
    instrumentor.uninstrument()
    assert not is_instrumented(before)
    assert not is_instrumented(after)
    assert not is_instrumented(stub_broker())


def test_instrumenting_twice_changes_nothing(instrument: Callable[..., DramatiqInstrumentor]) -> None:
    """A message has one span for its send, however often a program instruments."""
    broker = stub_broker()
    instrument()
    instrument()
    assert sum(isinstance(m, TelemetryMiddleware) for m in broker.middleware) == 1


def test_it_can_be_instrumented_again(recorded: Recorded, instrument: Any, queue: str) -> None:
    """After uninstrument() there are no spans; after another instrument() there are."""
    broker = stub_broker()

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act() -> None:
        pass

    instrument().uninstrument()
    act.send()
    instrument()
    act.send()
    with running(broker):
        broker.join(queue, timeout=30_000)
    recorded.spans(f"send {queue}", *[f"process {queue}"] * 2)


def test_the_middleware_stands_before_all_others(telemetry: Recorded) -> None:
    """Also before one that a program puts in front of Dramatiq's own."""
    broker = stub_broker()

    class First(dramatiq.Middleware):
        pass

    broker.add_middleware(First(), before=type(broker.middleware[1]))
    assert isinstance(broker.middleware[0], TelemetryMiddleware)
    assert broker.actor_options == stub_broker().actor_options


def test_a_wrapper_that_was_added_since_survives(
    instrument: Callable[..., DramatiqInstrumentor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch of the constructor by another library is not undone with ours."""
    instrumentor = instrument()
    ours = Broker.__init__
    calls: list[int] = []

    def theirs(self: Broker, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        ours(self, *args, **kwargs)

    monkeypatch.setattr(Broker, "__init__", theirs)
    instrumentor.uninstrument()
    assert not is_instrumented(stub_broker())
    assert calls == [1]


def test_uninstrumenting_in_the_middle_of_a_message(
    recorded: Recorded, instrument: Callable[..., DramatiqInstrumentor], queue: str
) -> None:
    """What the program does next on that thread is in no trace by accident once it is instrumented again."""
    broker = stub_broker()
    instrumentor = instrument()

    @dramatiq.actor(queue_name=queue, broker=broker)
    def stop() -> None:
        instrumentor.uninstrument()

    @dramatiq.actor(queue_name=queue, broker=broker)
    def after() -> None:
        pass

    stop.send()
    with running(broker, threads=1):
        broker.join(queue, timeout=30_000)
        instrument()
        after.send()
        broker.join(queue, timeout=30_000)
    first, last, process = recorded.spans(f"send {queue}", f"send {queue}", f"process {queue}")
    assert process.parent_id == last.span_id
    assert first.trace_id != last.trace_id


def test_no_context_is_left_behind(telemetry: Recorded, queue: str) -> None:
    """After a message a worker thread is in no trace, whatever became of the message."""
    left: list[object] = []

    class Watch(dramatiq.Middleware):
        def after_ack(self, broker: Broker, message: dramatiq.MessageProxy) -> None:
            left.append(dict(context.get_current()))

        after_nack = after_ack

    broker = stub_broker()
    broker.add_middleware(Watch())

    @dramatiq.actor(queue_name=queue, broker=broker, max_retries=0)
    def act(fail: bool) -> None:
        assert trace.get_current_span().get_span_context().is_valid
        if fail:
            raise ValueError("no")

    for fail in (False, True):
        act.send(fail)
    broker.enqueue(act.message_with_options(args=(False,), max_age=-1))
    with running(broker):
        broker.join(queue, timeout=30_000)
    assert left == [{}, {}, {}]


def test_it_is_registered_for_auto_instrumentation() -> None:
    """`opentelemetry-instrument` finds it under the name dramatiq."""
    (found,) = entry_points(group="opentelemetry_instrumentor", name="dramatiq")
    assert found.load() is DramatiqInstrumentor
    assert any("dramatiq" in dependency for dependency in found.load()().instrumentation_dependencies())
