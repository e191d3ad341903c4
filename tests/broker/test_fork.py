"""Forks: the child of a process that used a broker has a connection of its own, and the parent keeps its."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from tests.broker.conformance.workers import running
from tests.support.polling import eventually
from tests.support.processes import python

forking = multiprocessing.get_context("fork")


class Child:
    """A fork of this process that runs `work(pipe)`; what it returns is its `answer`."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.pipe, theirs = forking.Pipe()

        def run() -> None:
            try:
                theirs.send(("answer", work(theirs)))
            except BaseException as error:  # noqa: BLE001 - the parent raises it
                theirs.send(("error", repr(error)))

        self.process = forking.Process(target=run)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        assert self.pipe.poll(20), "the child did not answer"
        kind, value = self.pipe.recv()
        assert kind != "error", value
        return value

    def answer(self) -> Any:
        value = self.receive()
        self.process.join(10)
        assert self.process.exitcode == 0
        return value


def message(name: str) -> Message[Any]:
    return Message("default", "work", (name,), {}, {})


def client(broker: JetStreamBroker) -> int:
    """The number that the server has given this process's connection."""
    broker.connection.connect()
    return broker.connection._link._client.info["client_id"]


def names(broker: JetStreamBroker, count: int) -> list[str]:
    """The arguments of the ready messages."""
    consumer = broker.consume("default", prefetch=count, timeout=5_000)
    found = [next(consumer) for _ in range(count)]
    for taken in found:
        consumer.ack(taken)
    consumer.close()
    return sorted(taken.args[0] for taken in found)


def test_the_child_of_a_used_broker_has_its_own_connection(broker):
    """Both enqueue, in turns, and neither disturbs the other; also after the child has ended."""
    broker.enqueue(message("parent 1"))

    def work(pipe):
        broker.enqueue(message("child 1"))
        pipe.send(("ready", client(broker)))
        pipe.recv()
        broker.enqueue(message("child 2"), delay=1)
        return client(broker)

    child = Child(work)
    theirs = child.receive()
    assert theirs != client(broker)
    broker.enqueue(message("parent 2"))
    child.pipe.send("go on")
    assert child.answer() == theirs
    broker.enqueue(message("parent 3"))
    eventually(lambda: broker.queue_stats("default").ready == 5)
    assert names(broker, 5) == ["child 1", "child 2", "parent 1", "parent 2", "parent 3"]
    assert broker.connection.state.reconnects == 0


def test_preloaded_web_workers_enqueue_side_by_side(broker):
    """As gunicorn does with --preload: the program is loaded, has used its broker, and is forked many times."""
    broker.setup()
    broker.enqueue(message("master"))

    def work(pipe):
        threads = [
            threading.Thread(target=broker.enqueue, args=(message(f"{os.getpid()}"),)) for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return client(broker)

    children = [Child(work) for _ in range(4)]
    clients = {child.answer() for child in children}
    assert len(clients | {client(broker)}) == 5
    eventually(lambda: broker.queue_stats("default").ready == 41)


def test_a_broker_that_was_never_used_may_be_forked(make_broker):
    """The usual case: everything is loaded, nothing contacted yet."""
    broker = make_broker()
    broker.declare_queue("default")

    def work(pipe):
        broker.enqueue(message("child"))
        return True

    assert Child(work).answer()
    broker.enqueue(message("parent"))
    assert names(broker, 2) == ["child", "parent"]


def test_forking_in_the_middle_of_enqueueing(broker):
    """Threads that hold locks and wait for answers in the parent do not exist in the child."""
    broker.enqueue(message("first"))
    stop = threading.Event()
    sent = []

    def keep_enqueueing():
        while not stop.is_set():
            broker.enqueue(message("parent"))
            sent.append(1)

    threads = [threading.Thread(target=keep_enqueueing) for _ in range(4)]
    for thread in threads:
        thread.start()

    def work(pipe):
        broker.enqueue(message("child"))
        return True

    try:
        eventually(lambda: len(sent) > 20)
        for _ in range(5):
            assert Child(work).answer()
    finally:
        stop.set()
        for thread in threads:
            thread.join(15)
    eventually(lambda: broker.queue_stats("default").ready == 1 + len(sent) + 5)


@pytest.mark.parametrize("max_priority", [None, 3])
def test_an_actor_that_forks_keeps_its_messages_to_itself(make_broker, max_priority):
    """The child may enqueue; it neither takes messages nor keeps any from the worker."""
    broker = make_broker(max_priority=max_priority)
    ran = []
    children = []

    def child_work(pipe):
        broker.enqueue(message("from the child"))
        pipe.send(("ready", None))
        pipe.recv()
        return broker.in_flight.held, len(broker.connection._subscriptions)

    @dramatiq.actor(broker=broker)
    def work(name):
        ran.append((name, os.getpid()))

    @dramatiq.actor(broker=broker)
    def fork():
        children.append(Child(child_work))

    with running(broker, threads=2):
        work.send("before")
        eventually(lambda: len(ran) == 1)
        fork.send()
        eventually(lambda: children)
        (child,) = children
        child.receive()
        for number in range(50):
            work.send(str(number))
        eventually(lambda: len(ran) == 52)
        broker.join("default", timeout=30_000)
        child.pipe.send("end")
        assert child.answer() == (0, 0)
    assert {pid for _, pid in ran} == {os.getpid()}
    assert broker.queue_stats("default").redelivered == 0


def test_closing_the_broker_in_the_child_leaves_the_parent_alone(broker):
    """A child may clean up after itself, and what the parent does goes on."""
    broker.enqueue(message("parent 1"))

    def work(pipe):
        broker.enqueue(message("child"))
        broker.close()
        return True

    assert Child(work).answer()
    broker.enqueue(message("parent 2"))
    assert names(broker, 3) == ["child", "parent 1", "parent 2"]
    assert broker.connection.state.reconnects == 0


IMPORTS = """
import sys
from dramatiq import Message
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.results import JetStreamBackend

sys.modules["uvloop"] = None if sys.argv[3] == "asyncio" else __import__("uvloop")
before = set(sys.modules)
broker = JetStreamBroker(sys.argv[1], namespace=sys.argv[2], middleware=[])
broker.declare_queue("default")
message = Message("default", "work", (), {}, {})
broker.enqueue(message)
results = JetStreamBackend(broker)
results.store_result(message, "done", 60_000)
assert results.get_result(message, block=True) == "done"
broker.close()
assert set(sys.modules) == before, sorted(set(sys.modules) - before)
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_nothing_is_imported_while_a_broker_is_used(
    nats_url: str, namespace: str, tmp_path: Path, loop: str
) -> None:
    """A fork in the middle of an import by our threads leaves its child waiting for the module's lock for ever."""
    with python("-c", IMPORTS, nats_url, namespace, loop, log=tmp_path / "log") as process:
        assert process.wait() == 0, process.output
