"""Random commands and faults against the broker and a real server, in one process, with a model of what was promised.

The model is small: what was acknowledged has run in the end, or was dropped by a command or fault of which that is
said; what raised an error that says *not stored* never runs. To look for longer: `python -m tests.broker.test_stateful
500`, the number of examples.

Each of these faults was put into the code, and found:

- a call whose time was up is sent when the connection is back, although it raised `NotSent`;
- a message is acked although its retry could not be stored, when its time limit expired in an outage;
- a queue's stream that was deleted is not made again by the next call;
- a consumer that was deleted under a worker is not made again, so that the worker stands still;
- a unique key is freed by a call whose outcome is not known, and its message runs twice (found by a longer run).
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any, ClassVar

import dramatiq
import dramatiq.worker
import pytest
from dramatiq import Message
from dramatiq.errors import BrokerError
from dramatiq.middleware import (
    Interrupt,
    Pipelines,
    Retries,
    TimeLimit,
    TimeLimitExceeded,
    raise_thread_exception,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import (
    MessageNotUnique,
    MessageTooLarge,
    NotAllStored,
    NotSent,
    StoreFull,
    TopologyMissing,
)
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import consuming, running
from tests.support.polling import eventually
from tests.support.proxy import Proxy

QUEUE = "default"
#: Milliseconds; short, because every call in an outage takes as long.
ENQUEUE_TIMEOUT = 400
ACK_WAIT = 2_000
LONG_DELAY = 600_000

NOT_STORED = (NotSent, StoreFull, MessageTooLarge, TopologyMissing, MessageNotUnique)

#: How long all that was stored may take to run in the end, in seconds.
PATIENCE_SECONDS = 20.0


class Machine(RuleBasedStateMachine):
    """A broker, its server and the link between them; and what is known of every message.

    Attributes:
      stored: Labels that were acknowledged, and that have to run.
      refused: Labels that were told not to be stored, or were cancelled.
      may: Labels that may or may not have run: not known, or dropped by a fault or a purge.
      delayed: The messages that are due long after the test, by label.
      values: What each key of the bucket may have.
      holders: The labels that were enqueued with a unique key since it was free.
    """

    server: ClassVar[NatsServer]
    #: Its thread keeps the time of all brokers, one after the other.
    time_limit: ClassVar[TimeLimit]
    count: ClassVar[int] = 0

    @initialize()
    def begin(self) -> None:
        Machine.count += 1
        if not self.server.running:
            self.server.start()
        self.proxy = Proxy(self.server.url)
        self.broker = JetStreamBroker(
            self.proxy.url,
            namespace=f"s{Machine.count}",
            enqueue_timeout=ENQUEUE_TIMEOUT,
            ack_wait=ACK_WAIT,
            middleware=[self.time_limit, Pipelines(), Retries()],
        )
        self.ran: list[str] = []
        self.stored: set[str] = set()
        self.refused: set[str] = set()
        self.may: set[str] = set()
        self.delayed: dict[str, Message[Any]] = {}
        self.values: dict[str, set[bytes | None]] = {}
        self.lurking: dict[str, set[bytes | None]] = {}
        self.holders: dict[str, set[str]] = {}
        self.batches: list[list[str]] = []
        self.labels = 0
        self.calm = True
        self._declare()
        self.bucket = self.broker.bucket("state")
        self.bucket.declare()

    def _declare(self) -> None:
        def note(label: str) -> None:
            self.ran.append(label)

        def fail_once(label: str) -> None:
            self.ran.append(label)
            if self.ran.count(label) == 1:
                raise RuntimeError("as always the first time")

        def overrun_once(label: str) -> None:
            self.ran.append(label)
            if self.ran.count(label) == 1:
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    time.sleep(0.005)

        def fail_late(label: str) -> None:
            self.ran.append(label)
            if self.ran.count(label) == 1:
                time.sleep(0.03)
                raise RuntimeError("as always the first time, just before the time limit")

        retried = {"max_retries": 50, "min_backoff": 10, "max_backoff": 100, "broker": self.broker}
        self.actors = {
            "plain": dramatiq.actor(note, actor_name="plain", **retried),
            "failing": dramatiq.actor(fail_once, actor_name="failing", **retried),
            "narrow": dramatiq.actor(fail_late, actor_name="narrow", time_limit=50, **retried),
            "late": dramatiq.actor(overrun_once, actor_name="late", time_limit=50, **retried),
        }

    # Calls

    def _message(self, actor: str = "plain", **options: Any) -> Message[Any]:
        self.labels += 1
        return self.actors[actor].message_with_options(args=(f"{actor}-{self.labels}",), **options)

    def _tell(self, messages: list[Message[Any]], call: Callable[[], object]) -> BaseException | None:
        """Make a call and note what it was told of each message; returns what it raised."""
        labels = {str(message.args[0]) for message in messages}
        try:
            call()
        except (BrokerError, Interrupt) as error:
            cause = error.__cause__
            if isinstance(cause, NotAllStored):
                self.stored |= {str(message.args[0]) for message in cause.stored}
                self.refused |= {str(message.args[0]) for message, _ in cause.not_stored}
                self.may |= {str(message.args[0]) for message, _ in cause.unknown}
            elif isinstance(error, NOT_STORED):
                self.refused |= labels
            else:
                self.may |= labels
            failure: BaseException = error
        else:
            self.stored |= labels
            return None
        assert not isinstance(failure, TopologyMissing), f"the stream was not made again: {failure}"
        return failure

    @rule(actor=st.sampled_from(["plain", "failing", "narrow", "late"]))
    def send(self, actor: str) -> None:
        message = self._message(actor)
        self._tell([message], lambda: self.broker.enqueue(message))

    @rule(count=st.integers(2, 5), atomic=st.booleans())
    def send_many(self, count: int, atomic: bool) -> None:
        messages = [self._message() for _ in range(count)]
        self._tell(messages, lambda: self.broker.enqueue_many(messages, atomic=atomic))
        if atomic:
            self.batches.append([str(message.args[0]) for message in messages])

    @rule(delay=st.integers(1, 300))
    def send_soon(self, delay: int) -> None:
        message = self._message()
        self._tell([message], lambda: self.broker.enqueue(message, delay=delay))

    @rule()
    def send_much_later(self) -> None:
        message = self._message()
        if self._tell([message], lambda: self.broker.enqueue(message, delay=LONG_DELAY)) is None:
            self.delayed[str(message.args[0])] = message

    @rule(key=st.sampled_from("ab"))
    def send_unique(self, key: str) -> None:
        message = self._message(unique_key=key, unique_window=LONG_DELAY)
        error = self._tell([message], lambda: self.broker.enqueue(message))
        holders = self.holders.setdefault(key, set())
        if isinstance(error, MessageNotUnique):
            assert holders, f"nothing was enqueued with the key {key!r}, and yet: {error}"
        elif not isinstance(error, NOT_STORED):
            holders.add(str(message.args[0]))

    @rule(key=st.sampled_from("ab"), fault=st.sampled_from(["mute", "deaf", "hold"]), after=st.integers(0, 8))
    def send_unique_until_known(self, key: str, fault: str, after: int) -> None:
        """A call meets an outage and is repeated, as the guarantees recommend when its outcome is not known."""
        self.restore()
        self.broker.connection.connect()
        outage = threading.Timer(after / 2000, self._break, [fault])
        outage.start()
        self.send_unique(key)
        outage.join()
        self.restore()
        self.send_unique(key)

    @rule(after=st.integers(0, 20))
    def send_and_interrupt(self, after: int) -> None:
        """A time limit strikes in the call; a later call must not notice."""
        message = self._message()
        self.may.add(str(message.args[0]))

        def call() -> None:
            try:
                self.broker.enqueue(message)
            except (BrokerError, Interrupt):
                pass

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(after / 1000)
        raise_thread_exception(thread.ident, TimeLimitExceeded)
        thread.join(10)
        assert not thread.is_alive(), "an interrupted call does not end"

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        label = data.draw(st.sampled_from(sorted(self.delayed)))
        try:
            cancelled = self.broker.cancel(self.delayed[label].message_id, QUEUE)
        except NotSent:
            return
        except BrokerError:
            self._may_be_gone({label})
            return
        message = self.delayed.pop(label)
        if label in self.stored:
            self.stored.discard(label)
            assert cancelled == 1, f"{message} was waiting, and cancelled {cancelled} times"
        self.refused.add(label)

    @rule()
    def purge(self) -> None:
        before = self.stored | self.may
        try:
            self.broker.flush(QUEUE)
        except NotSent:
            # It has several steps; the first may have been done.
            if not self.calm:
                self._may_be_gone(before)
            return
        except BrokerError:
            self._may_be_gone(before)
            return
        self._may_be_gone(before)
        self.holders.clear()

    @rule(key=st.sampled_from("xy"))
    def put(self, key: str) -> None:
        self.labels += 1
        value = str(self.labels).encode()
        try:
            self.bucket.put(key, value)
        except NOT_STORED:
            return
        except BrokerError:
            self.lurking.setdefault(key, set()).add(value)
            return
        self.values[key] = {value}

    @rule(key=st.sampled_from("xy"))
    def get(self, key: str) -> None:
        try:
            entry = self.bucket.get(key)
        except BrokerError:
            return
        found = None if entry is None else entry.value
        right = self.values.get(key, {None}) | self.lurking.get(key, set())
        assert found in right, f"{key} has {found!r}, which is none of {right}"

    # A worker

    @rule(seconds=st.sampled_from([0.05, 0.3]))
    def work(self, seconds: float) -> None:
        with running(self.broker, threads=2):
            time.sleep(seconds)

    @rule(
        fault=st.sampled_from(["lose", "cut", "mute", "deaf", "hold"]),
        actor=st.sampled_from(["plain", "narrow", "late"]),
    )
    def work_through(self, fault: str, actor: str) -> None:
        """A fault that begins while an actor runs and outlasts a call, so that what follows the actor meets it."""
        self.restore()
        with running(self.broker, threads=2) as worker:
            eventually(lambda: consuming(worker, QUEUE), PATIENCE_SECONDS)
            self.send(actor)
            time.sleep(0.02)
            self._break(fault)
            time.sleep(ENQUEUE_TIMEOUT / 1000 + 0.2)
            self.restore()
            time.sleep(0.1)

    @rule(what=st.sampled_from(["stream", "consumer", "store"]))
    def work_over_a_loss(self, what: str) -> None:
        """What a worker reads disappears under it; it goes on with what is sent then."""
        self.restore()
        with running(self.broker, threads=2):
            time.sleep(0.05)
            if what == "store":
                self.empty_server()
            else:
                self.delete(what)
            message = self._message()
            label = str(message.args[0])
            if self._tell([message], lambda: self.broker.enqueue(message)) is None:
                eventually(lambda: label in self.ran, PATIENCE_SECONDS, message=f"{label}, after a loss, ran")

    # Faults

    def _break(self, fault: str) -> None:
        self.calm = False
        if fault == "lose":
            self.proxy.lose()
        elif fault == "cut":
            self.proxy.cut()
        elif fault == "hold":
            self.proxy.hold()
        else:
            setattr(self.proxy, fault, True)

    @rule(fault=st.sampled_from(["lose", "cut", "mute", "deaf", "hold"]))
    def break_link(self, fault: str) -> None:
        self._break(fault)

    @rule()
    def restore(self) -> None:
        self.proxy.restore()
        self.proxy.release()

    @rule(kill=st.booleans())
    def restart_server(self, kill: bool) -> None:
        self.calm = False
        if kill:
            self.server.kill()
        else:
            self.server.stop()
        self.server.start()

    @rule()
    def empty_server(self) -> None:
        self.calm = False
        self.server.stop()
        shutil.rmtree(self.server.store_dir / "jetstream")
        self.server.start()
        self._may_be_gone(self.stored)
        self.values.clear()
        self.holders.clear()

    @precondition(lambda self: self.server.running)
    @rule(what=st.sampled_from(["stream", "consumer"]))
    def delete(self, what: str) -> None:
        self.calm = False
        stream = self.broker.names.queue_stream(QUEUE)
        other = JetStreamBroker(self.server.url, namespace=self.broker.config.namespace, middleware=[])
        try:
            request = f"STREAM.DELETE.{stream}" if what == "stream" else f"CONSUMER.DELETE.{stream}.worker"
            other.connection.api(request)
        except BrokerError:
            return  # it was not there
        finally:
            other.close()
        if what == "stream":
            self._may_be_gone(self.stored)

    def _may_be_gone(self, labels: set[str]) -> None:
        labels = set(labels)
        self.stored -= labels
        self.may |= labels
        for label in labels & self.delayed.keys():
            del self.delayed[label]

    # In the end

    def teardown(self) -> None:
        if not hasattr(self, "proxy"):
            return
        try:
            self._check()
        finally:
            self.broker.close()
            self.proxy.close()

    def _check(self) -> None:
        self.restore()
        with running(self.broker, threads=2):
            due = self.stored - self.delayed.keys()
            eventually(lambda: self._all_ran(due), PATIENCE_SECONDS, message="what was stored ran")
            for label, message in self.delayed.items():
                assert label not in self.ran, f"{label} ran long before it is due"
                # A connection that was just broken may need another call.
                eventually(lambda m=message: self._cancelled(m), 10, message=f"{label} is delayed")
        counts = Counter(self.ran)
        ghosts = self.refused & counts.keys()
        assert not ghosts, f"{sorted(ghosts)} were told not to be stored, and ran"
        for labels in self.batches:
            ran = {label for label in labels if counts[label]}
            if not set(labels) & self.may:
                assert ran in (set(), set(labels)), f"of {labels} only {sorted(ran)} ran"
        for key, holders in self.holders.items():
            ran = {label for label in holders if counts[label]}
            assert len(ran) <= 1, f"{sorted(ran)} ran with the one key {key!r}"
        if self.calm:
            twice = {label for label, count in counts.items() if count > 1 and label.startswith("plain")}
            assert not twice, f"{sorted(twice)} ran twice without a fault"

    def _all_ran(self, due: set[str]) -> bool:
        counts = Counter(self.ran)
        missing = {label for label in due if counts[label] < (1 if label.startswith("plain") else 2)}
        assert not missing, f"{sorted(missing)} did not, or not to the end; {dict(counts)} did"
        return True

    def _cancelled(self, message: Message[Any]) -> bool:
        try:
            return self.broker.cancel(message.message_id, QUEUE) == 1
        except BrokerError:
            return False


def check(server: NatsServer, *, examples: int, derandomize: bool) -> None:
    """Run the machine against a server of its own."""
    Machine.server = server
    Machine.time_limit = TimeLimit(interval=20)
    with closing(JetStreamBroker(server.url, middleware=[Machine.time_limit])) as first:
        first.emit_after("process_boot")
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=derandomize,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(480)  # for the time that it may take to make a failure small
def test_promises_hold_over_random_commands_and_faults(own_nats_server, monkeypatch):
    """What was acknowledged runs; what was refused never does; keys, batches and values are as they were told."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    check(own_nats_server, examples=14, derandomize=True)


if __name__ == "__main__":
    dramatiq.worker.CONSUMER_RESTART_DELAY_SECS = 0.2  # type: ignore[attr-defined]
    with NatsServer(sync="2m") as node:
        check(node, examples=int(sys.argv[1]), derandomize=False)
