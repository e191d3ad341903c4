"""The state of a message by its id, in states that real workers bring about."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq.results import Results
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker, status
from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.abort import abort_message
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.progress import Progress, progress
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.status import MessageStatus, message_status
from dramatiq_jetstream.worker import presence
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

WAIT = 30.0


class Refused(RuntimeError):
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers say ten times a second what they run."""
    monkeypatch.setattr(presence, "BATCH_SECONDS", 0.1)


@pytest.fixture
def work(broker: JetStreamBroker) -> Any:
    return dramatiq.actor(lambda *args: None, actor_name="work")


def becomes(broker: JetStreamBroker, message_id: str, state: str) -> MessageStatus:
    """The status, when it is that."""
    found: MessageStatus = eventually(
        lambda: (status := broker.status(message_id)).state == state and status, timeout=WAIT
    )
    return found


def test_waiting(broker: JetStreamBroker, work: Any) -> None:
    """By the id or by the message; as it was enqueued."""
    before = int(time.time() * 1000)
    message = work.send("a")
    for found in (broker.status(message.message_id), message_status(message)):
        assert (found.state, found.queue, found.actor) == ("waiting", "default", "work")
        assert found.attempt == 1
        assert found.since is not None
        assert before - 1_000 <= found.since <= time.time() * 1000 + 1_000


def test_one_that_waits_in_a_long_queue(
    broker: JetStreamBroker, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message finds it by its time; by its id the oldest and the newest are found."""
    monkeypatch.setattr(status, "LOOKED_AT", 100)
    monkeypatch.setattr(status, "_SKEW_MS", 0)  # the server's clock is ours
    sent = broker.enqueue_many([work.message(number) for number in range(60)])
    middle = broker.enqueue(work.message("middle"))
    sent += broker.enqueue_many([work.message(number) for number in range(60)])
    assert broker.status(sent[0].message_id).state == "waiting"
    assert broker.status(sent[-1].message_id).state == "waiting"
    assert broker.status(middle.message_id).state == "unknown"
    assert message_status(middle).state == "waiting"


def test_delayed(broker: JetStreamBroker, work: Any) -> None:
    """With the time when it is due; a cancelled one is unknown."""
    message = work.send_with_options(args=("a",), delay=3_600_000)
    found = broker.status(message.message_id)
    assert (found.state, found.queue, found.actor) == ("delayed", "default", "work")
    assert found.due == message.options["eta"]
    broker.cancel(message.message_id)
    assert broker.status(message.message_id).state == "unknown"


def test_a_retry_that_was_cancelled(broker: JetStreamBroker) -> None:
    """It is nowhere; what is known of its attempts is told."""

    @dramatiq.actor(min_backoff=3_600_000, max_backoff=3_600_000)
    def work() -> None:
        raise Refused("no")

    with running(broker):
        message = work.send()
        eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
    broker.cancel(message.message_id)
    found = broker.status(message.message_id)
    assert (found.state, found.actor, found.error) == ("unknown", "work", "Refused: no")


def test_running_with_progress(broker: JetStreamBroker) -> None:
    """Where, since when, and how far; when it is over, nothing says that it runs."""
    broker.add_middleware(Progress())
    go = threading.Event()

    @dramatiq.actor
    def work() -> None:
        progress(3, 4, "packing")
        go.wait(WAIT)

    with running(broker, threads=1):
        message = work.send()
        found = becomes(broker, message.message_id, "running")
        assert (found.worker, found.attempt) == (f"{socket.gethostname()}:{os.getpid()}", 1)
        assert found.since is not None
        found = eventually(lambda: (s := broker.status(message.message_id)).progress and s, timeout=WAIT)
        assert (found.progress.done, found.progress.total, found.progress.note) == (3, 4, "packing")
        go.set()
        becomes(broker, message.message_id, "unknown")


def test_retrying_then_dead_then_replayed(broker: JetStreamBroker) -> None:
    """The retry with its attempt, error and time; the dead letter; and after a replay, the message again."""

    @dramatiq.actor(max_retries=1, min_backoff=3_600_000, max_backoff=3_600_000)
    def work() -> None:
        raise Refused("out of stock")

    with running(broker):
        message = work.send()
        found = becomes(broker, message.message_id, "retrying")
        assert (found.attempt, found.error) == (2, "Refused: out of stock")
        assert found.due is not None
        assert found.due > time.time() * 1000 + 600_000
        work.options["max_retries"] = 0
        broker.cancel(message.message_id)
        broker.enqueue(message.copy(options={"retries": 1}))
        eventually(lambda: len(broker.history.of(message.message_id)) == 2, timeout=WAIT)
        found = becomes(broker, message.message_id, "dead")
    (letter,) = broker.dead_letters.list()
    assert (found.letter, found.error, found.attempt) == (letter.id, letter.error, 2)
    assert broker.dead_letters.replay(letter)
    assert broker.status(message.message_id).state == "waiting"
    broker.flush("default")
    assert broker.status(message.message_id).state == "failed"


def test_done_after_a_replay(broker: JetStreamBroker) -> None:
    """A message that was seen dead is seen to succeed, with the default history too."""
    failures = [Refused("once")]

    @dramatiq.actor(max_retries=0)
    def work() -> None:
        if failures:
            raise failures.pop()

    with running(broker):
        message = work.send()
        (letter,) = eventually(lambda: broker.dead_letters.list(), timeout=WAIT)
        assert broker.dead_letters.replay(letter)
        becomes(broker, message.message_id, "done")


def test_a_retry_that_is_due_waits(broker: JetStreamBroker) -> None:
    """Between its schedule and its worker it waits, and is known to have failed before."""

    @dramatiq.actor(min_backoff=1, max_backoff=2)
    def work() -> None:
        broker.pause("default")
        raise Refused("once")

    with running(broker):
        message = work.send()
        eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
        found = becomes(broker, message.message_id, "waiting")
    assert (found.attempt, found.error) == (2, "Refused: once")


def test_done_by_a_record_or_a_result(make_broker: Any) -> None:
    """With `history="all"`, or with results, which need the message or a program that has the actor."""
    recording = make_broker(history="all")
    dramatiq.actor(lambda: None, actor_name="work", broker=recording)
    with running(recording):
        message = recording.actors["work"].send()
        becomes(recording, message.message_id, "done")
    with_results = make_broker(namespace="r" + recording.names.namespace)
    with_results.add_middleware(Results(backend=JetStreamBackend(with_results), store_results=True))
    dramatiq.actor(lambda: 1, actor_name="work", broker=with_results)
    with running(with_results):
        message = with_results.actors["work"].send()
        becomes(with_results, message.message_id, "done")
    assert message_status(message, with_results).state == "done"


def test_dead_without_a_history(make_broker: Any) -> None:
    """The newest dead letters are looked at; a result tells of a failure whose letter is gone."""
    broker = make_broker(history=None)
    broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))

    @dramatiq.actor(max_retries=0, broker=broker)
    def work() -> None:
        raise Refused("no")

    with running(broker):
        message = work.send()
        eventually(lambda: broker.dead_letters.list(), timeout=WAIT)
        eventually(lambda: broker.queue_stats("default").in_flight == 0, timeout=WAIT)
    without_results = make_broker(history=None)
    assert without_results.status(message.message_id).state == "dead"
    broker.flush("default")
    assert broker.status(message.message_id).state == "failed"


def test_aborted(broker: JetStreamBroker, work: Any) -> None:
    """Before it began."""
    broker.add_middleware(Abortable(backend=AbortBackend(broker)))
    message = work.send("a")
    abort_message(message.message_id, broker)
    with running(broker):
        becomes(broker, message.message_id, "aborted")


def test_unknown(broker: JetStreamBroker, work: Any, make_broker: Any) -> None:
    """What never was, on a broker with queues and on one where nothing exists."""
    work.send("a")
    assert broker.status("nothing-of-the-kind") == MessageStatus("nothing-of-the-kind", "unknown")
    empty = make_broker(namespace="e" + broker.names.namespace, declare=False)
    assert empty.status("x").state == "unknown"


@pytest.mark.parametrize("message_id", ["a b.c>*", "", "ü" * 300], ids=["wild", "empty", "long"])
def test_any_id(broker: JetStreamBroker, work: Any, message_id: str) -> None:
    """Ids may come from anywhere."""
    message = work.message("a").copy(message_id=message_id)
    assert broker.status(message_id).state == "unknown"
    broker.enqueue(message)
    assert broker.status(message_id).state == "waiting"
    delayed: Callable[..., Any] = broker.enqueue
    delayed(message.copy(message_id=message_id + "d"), delay=3_600_000)
    assert broker.status(message_id + "d").state == "delayed"


def test_another_broker_knows_no_status() -> None:
    """One clear error."""
    from dramatiq.brokers.stub import StubBroker

    message = dramatiq.Message("default", "work", (), {}, {})
    with pytest.raises(InvalidOption, match="JetStreamBroker"):
        message_status(message, StubBroker())
