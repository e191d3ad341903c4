"""Spans end and contexts are detached also when an exception strikes from outside."""

from __future__ import annotations

import threading
import time
from typing import Any

import dramatiq
import pytest
from dramatiq import Broker, MessageProxy
from dramatiq.middleware import Interrupt, Shutdown, TimeLimit, TimeLimitExceeded, raise_thread_exception
from dramatiq_abort import Abortable, abort
from dramatiq_abort.backends import StubBackend

from tests.broker.conformance.workers import running
from tests.instrumentation.conftest import Fleet, Recorded
from tests.support.polling import eventually


def wait_for(event: threading.Event) -> None:
    """Wait in small steps: an asynchronous exception arrives between two of them."""
    deadline = time.monotonic() + 10
    while not event.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_time_limit_ends_the_attempt(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """An actor that is cut off was an error, and its retry runs in the same trace."""
    limit = next(m for m in stub.broker.middleware if isinstance(m, TimeLimit))
    limit.manager.interval = 0.05
    stub.broker.emit_after("process_boot")
    attempts: list[int] = []

    @dramatiq.actor(queue_name=queue, time_limit=200, min_backoff=10, max_backoff=10)
    def slow() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            wait_for(threading.Event())

    slow.send()
    stub.work(queue)

    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 2)
    assert len({span.trace_id for span in spans}) == 1
    assert spans[1].attributes["dramatiq.outcome"] == "retried"
    assert spans[1].attributes["error.type"].endswith("TimeLimitExceeded")
    assert spans[3].attributes["dramatiq.outcome"] == "done"


def test_a_shutdown_ends_the_attempt(stub: Fleet, telemetry: Recorded, queue: str) -> None:
    """The attempt that the stopping worker interrupts is exported, and says why it ended."""
    started = threading.Event()

    @dramatiq.actor(queue_name=queue, notify_shutdown=True)
    def slow() -> None:
        started.set()
        wait_for(threading.Event())

    slow.send()
    with running(stub.broker):
        assert started.wait(30)

    spans = telemetry.spans(f"send {queue}", f"process {queue}", f"send {queue}")
    assert spans[1].attributes["error.type"] == f"{Shutdown.__module__}.Shutdown"
    assert spans[1].attributes["dramatiq.outcome"] == "retried"


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_aborted_messages_are_told_apart(
    stub: Fleet, telemetry: Recorded, queue: str, while_it_runs: bool
) -> None:
    """An aborted message is neither failed nor just skipped."""
    abortable = Abortable(backend=StubBackend())
    stub.broker.add_middleware(abortable)
    started = threading.Event()

    @dramatiq.actor(queue_name=queue, max_retries=0)
    def slow() -> None:
        started.set()
        wait_for(threading.Event())

    message = slow.send()
    if not while_it_runs:
        abort(message.message_id, middleware=abortable)
    with running(stub.broker):
        if while_it_runs:
            assert started.wait(30)
            abort(message.message_id, middleware=abortable)
        stub.broker.join(queue, timeout=30_000)  # type: ignore[attr-defined]

    _, process = telemetry.spans(f"send {queue}", f"process {queue}")
    assert process.attributes["dramatiq.outcome"] == "aborted"
    assert started.is_set() is while_it_runs


class Strikes(dramatiq.Middleware):
    """Raises an exception on the worker thread in one of Dramatiq's own signals, once."""

    def __init__(self, *signals: str) -> None:
        self.struck: list[str] = []
        for signal in signals:
            setattr(self, signal, self._strike(signal))

    def _strike(self, signal: str) -> Any:
        def strike(broker: Broker, message: MessageProxy, **_: Any) -> None:
            if signal not in self.struck:
                self.struck.append(signal)
                raise_thread_exception(threading.get_ident(), TimeLimitExceeded)
                time.sleep(0.01)

        return strike


@pytest.mark.parametrize("signal", ["before_process_message", "after_process_message"])
def test_an_exception_that_strikes_in_middleware_leaves_nothing_open(
    stub: Fleet, telemetry: Recorded, queue: str, signal: str
) -> None:
    """Dramatiq reports the end of such a message once more, with the exception."""
    stub.broker.add_middleware(Strikes(signal))

    @dramatiq.actor(queue_name=queue, max_retries=0)
    def act() -> None:
        pass

    act.send()
    act.send()
    with running(stub.broker, threads=1):
        stub.broker.join(queue, timeout=30_000)  # type: ignore[attr-defined]

    spans = telemetry.spans(*[f"send {queue}", f"process {queue}"] * 2)
    outcomes = [span.attributes["dramatiq.outcome"] for span in spans if span.kind == "CONSUMER"]
    assert outcomes == ["failed", "done"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_that_kills_the_worker_thread_leaves_no_open_span(
    stub: Fleet, telemetry: Recorded, queue: str
) -> None:
    """A second exception, while Dramatiq handles the first, ends the thread; the span ends before it."""

    class StrikesAgain(dramatiq.Middleware):
        def after_process_message(self, *_: Any, **__: Any) -> None:
            raise Interrupt("again")

    stub.broker.add_middleware(StrikesAgain())

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        raise ValueError("first")

    act.send()
    with running(stub.broker, threads=1):
        eventually(lambda: telemetry.named(f"process {queue}"))
    (process,) = telemetry.named(f"process {queue}")
    assert process.attributes["dramatiq.outcome"] == "unresolved"
    assert process.attributes["error.type"] == f"{Interrupt.__module__}.Interrupt"
