"""The commands and faults, in a hypothesis state machine.

What a rule draws depends on nothing that happened before, so that every program can be run again and made smaller.
Every wait is for a condition, with a bound that a slow machine does not reach; no rule expects a call to succeed.
"""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, ClassVar

import dramatiq.worker
import pytest
from dramatiq import Message
from dramatiq.errors import BrokerError
from dramatiq.middleware import Interrupt, TimeLimit, TimeLimitExceeded, raise_thread_exception
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from dramatiq_jetstream import JetStreamBroker, group, queues
from dramatiq_jetstream.errors import MessageNotUnique, MessageTooLarge, NotAllStored, NotSent
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.worker import rerouting
from tests.broker.conformance.workers import consuming, running
from tests.support.polling import eventually
from tests.support.proxy import Proxy

from .app import ENQUEUE_TIMEOUT, RESULTFUL, TROUBLES, Program
from .model import NOT_STORED, Model

__all__ = ["Machine", "drive", "prepared", "search"]

QUEUE = "default"
LONG_DELAY = 600_000

#: How long something that has to happen may take, in seconds, at first and once something has failed.
PATIENCE, IMPATIENCE = 30.0, 6.0

#: How long a fault lasts that is to outlast a call, in seconds.
OUTLASTING_SECONDS = ENQUEUE_TIMEOUT / 1000 + 0.2

FAULTS = st.sampled_from(["lose", "cut", "mute", "deaf", "hold", "refuse"])


def refuse_login(client: socket.socket) -> None:
    """What a server says to a client whose credentials it does not accept."""
    client.sendall(
        b'INFO {"server_id": "A", "version": "2.15.1", "max_payload": 1048576, "jetstream": true}\r\n'
    )
    client.recv(4096)
    client.sendall(b"-ERR 'Authorization Violation'\r\n")


class _Warnings(logging.Handler):
    """Tells whether something was logged."""

    heard = False

    def emit(self, record: logging.LogRecord) -> None:
        self.heard = True


@contextmanager
def warnings_of(module: Any) -> Iterator[_Warnings]:
    heard = _Warnings(logging.WARNING)
    module.logger.addHandler(heard)
    try:
        yield heard
    finally:
        module.logger.removeHandler(heard)


class Machine(RuleBasedStateMachine):
    """A program with a broker, its server and the link between them, and the model of what was promised."""

    server: ClassVar[NatsServer]
    #: Its thread keeps the time of all brokers, one after the other.
    time_limit: ClassVar[TimeLimit]
    count: ClassVar[int] = 0
    patience: ClassVar[float] = PATIENCE

    @initialize()
    def begin(self) -> None:
        Machine.count += 1
        if not self.server.running:
            self.server.start()
        self.proxy = Proxy(self.server.url)
        self.program = Program(self.proxy.url, self.server.url, f"s{Machine.count}", self.time_limit)
        self.broker = self.program.broker
        self.model = Model()
        self.labels = 0
        self.calm = True
        self.over = False  # nothing more can be checked
        self.bucket = self.broker.bucket("state")
        self.eventually(self._answers(self.bucket.declare), "the bucket was declared")

    def eventually(self, condition: Callable[[], object], what: str) -> None:
        try:
            eventually(condition, self.patience, message=what)
        except AssertionError:
            Machine.patience = min(self.patience, IMPATIENCE)  # making it small needs many more such failures
            raise

    @staticmethod
    def _answers(call: Callable[[], object]) -> Callable[[], bool]:
        """What is true once a call succeeds."""

        def answers() -> bool:
            try:
                call()
            except BrokerError as error:
                raise AssertionError(error) from error
            return True

        return answers

    # Calls

    def _message(self, actor: str = "plain", *args: Any, **options: Any) -> Message[Any]:
        self.labels += 1
        label = f"{actor}-{self.labels}"
        message = self.program.message(actor, label, *args, **options)
        if actor == RESULTFUL:
            self.model.results[label] = message
        return message

    def _enqueue(self, message: Message[Any]) -> BaseException | None:
        """Enqueue a message; returns what that raised."""
        return self.model.tell([message], lambda: self.broker.enqueue(message))

    @rule(actor=st.sampled_from(["plain", RESULTFUL, *TROUBLES]))
    def send(self, actor: str = "plain") -> None:
        self._enqueue(self._message(actor))

    @rule(count=st.integers(2, 5), atomic=st.booleans(), too_large=st.booleans())
    def send_many(self, count: int, atomic: bool, too_large: bool) -> None:
        messages = [self._message() for _ in range(count)]
        if too_large:
            messages[1] = self._message("plain", "x" * 2_000_000)
        error = self.model.tell(messages, lambda: self.broker.enqueue_many(messages, atomic=atomic))
        if atomic:
            self.model.batches.append([str(message.args[0]) for message in messages])
        elif error is not None:
            cause = error.__cause__
            alone = isinstance(cause, NotAllStored) and not any(
                isinstance(reason, MessageTooLarge)
                for message, reason in cause.not_stored
                if message is not messages[1]
            )
            assert alone, f"one of {count} messages stopped the others: {error}"

    @rule(delay=st.integers(-300, 300))
    def send_soon(self, delay: int) -> None:
        message = self._message()
        self.model.tell([message], lambda: self.broker.enqueue(message, delay=delay))

    @rule()
    def send_much_later(self) -> None:
        self._delay(self.broker)

    @rule(later=st.booleans())
    def send_from_elsewhere(self, later: bool) -> None:
        """Another program stores a message, whatever the state of our connection."""
        if later:
            self._delay(self.program.elsewhere)
        else:
            message = self._message()
            self.model.tell([message], lambda: self.program.elsewhere.enqueue(message))

    def _delay(self, broker: JetStreamBroker) -> None:
        message = self._message()
        self.model.tell([message], lambda: broker.enqueue(message, delay=LONG_DELAY))
        label = str(message.args[0])
        if label in self.model.stored:
            self.model.delayed[label] = message

    @rule(key=st.sampled_from("ab"))
    def send_unique(self, key: str) -> None:
        message = self._message(unique_key=key, unique_window=LONG_DELAY)
        error = self._enqueue(message)
        holders = self.model.holders.setdefault(key, set())
        if isinstance(error, MessageNotUnique):
            assert holders or key in self.model.unsure, (
                f"nothing was enqueued with the key {key!r}, and yet: {error}"
            )
        elif not isinstance(error, NOT_STORED):
            holders.add(str(message.args[0]))
        elif not isinstance(error, NotSent):
            self.model.unsure.add(key)  # it was refused, and freeing its key may have failed

    @rule(key=st.sampled_from("ab"), fault=FAULTS)
    def send_unique_until_known(self, key: str, fault: str) -> None:
        """A message arrives and its ack does not; its call is repeated, as the guarantees recommend."""
        self.repair()
        self.send()  # so that the next one finds its queue
        self.break_behind(b".task", fault)
        self.send_unique(key)
        self.repair()
        self.send_unique(key)

    @rule(after=st.integers(0, 20))
    def send_and_interrupt(self, after: int) -> None:
        """An exception strikes in the call, `after` milliseconds; later calls must not notice."""
        message = self._message()
        self.model.may.add(str(message.args[0]))
        struck = threading.Event()

        def call() -> None:
            try:
                try:
                    self.broker.enqueue(message)
                except BrokerError:
                    pass
                struck.wait(self.patience)  # the thread's identity must not go to another one before
            except Interrupt:
                pass

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        time.sleep(after / 1000)
        assert thread.ident is not None
        raise_thread_exception(thread.ident, TimeLimitExceeded)
        struck.set()
        self._ends(thread, "a call that was interrupted")
        told: list[BaseException | None] = []
        following = self._message()
        thread = threading.Thread(target=lambda: told.append(self._enqueue(following)), daemon=True)
        thread.start()
        self._ends(thread, "the call after one that was interrupted")
        assert told, "the call after one that was interrupted failed in a way that is not promised"

    def _ends(self, thread: threading.Thread, what: str) -> None:
        thread.join(self.patience)
        self.over = thread.is_alive()
        assert not self.over, f"{what} does not end"

    @rule(which=st.integers(0, 2), fault=st.sampled_from([None, "cut", "lose", "deaf"]))
    def cancel(self, which: int, fault: str | None) -> None:
        """Cancel a delay; with `fault` the link breaks behind the request."""
        delayed = sorted(self.model.delayed)
        if not delayed:
            return
        label = delayed[which % len(delayed)]
        if fault is not None:
            self.break_behind(b"STREAM.PURGE", fault)
        try:
            cancelled = self.broker.cancel(self.model.delayed[label].message_id, QUEUE)
        except NotSent:
            return
        except BrokerError:
            self.model.may_be_gone({label})
            return
        self.model.delayed.pop(label)
        self.model.stored.discard(label)
        self.model.refused.add(label)
        assert cancelled == 1, f"{label} was waiting, and cancelled {cancelled} times"

    @rule()
    def purge(self) -> None:
        before = self.model.stored | self.model.may
        freed = False
        with warnings_of(queues) as heard:
            try:
                self.broker.flush(QUEUE)
            except NotSent:
                # It has several steps; the first may have been done.
                if self.calm:
                    return
            except BrokerError:
                self.model.haunted = True
            else:
                freed = not heard.heard
        self.model.unsure = set() if freed else set("ab")
        self.model.holders.clear()
        self.model.may_be_gone(before)

    @rule(key=st.sampled_from("xy"))
    def put(self, key: str) -> None:
        self.labels += 1
        value = str(self.labels).encode()
        try:
            self.bucket.put(key, value)
        except NOT_STORED:
            return
        except BrokerError:
            self.model.lurking.setdefault(key, set()).add(value)
            return
        self.model.values[key] = {value}

    @rule(key=st.sampled_from("xy"))
    def get(self, key: str) -> None:
        try:
            entry = self.bucket.get(key)
        except BrokerError:
            return
        found = None if entry is None else entry.value
        right = self.model.values.get(key, {None}) | self.model.lurking.get(key, set())
        assert found in right, f"{key} has {found!r}, which is none of {right}"

    # A worker

    @rule(seconds=st.sampled_from([0.0, 0.2]))
    def work(self, seconds: float) -> None:
        with self._working():
            time.sleep(seconds)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """A worker runs during the block, and no thread of it dies."""
        with running(self.broker, threads=2) as worker:
            try:
                self.eventually(lambda: consuming(worker, QUEUE) or not self.calm, "the queue has a consumer")
                yield
                assert all(thread.is_alive() for thread in worker.workers), "a thread of the worker died"
            finally:
                self.program.let_go()

    @rule(fault=FAULTS, actor=st.sampled_from(["plain", RESULTFUL, *TROUBLES]))
    def work_through(self, fault: str, actor: str) -> None:
        """A fault begins while an actor runs and outlasts a call, so that what follows the actor meets it."""
        self.repair()
        message = self._message(actor)
        label = str(message.args[0])
        self.program.hold(label)
        with self._working():
            self._enqueue(message)
            self._begins(label)
            self._break(fault)
            self.program.let_go()
            time.sleep(OUTLASTING_SECONDS)
            self.restore()

    @rule(fault=FAULTS)
    def group_through(self, fault: str) -> None:
        """A member of a group is counted, its result meets a fault, and it runs again; another one still runs."""
        self.repair()
        members = [self._message(RESULTFUL), self._message()]
        labels = [str(message.args[0]) for message in members]
        callback = self._message("finished", labels)
        whole = group(members, broker=self.broker)
        whole.add_completion_callback(callback)
        self.model.groups[str(callback.args[0])] = labels
        behind = self.program.behind
        behind.arm(lambda: self._break(fault))
        self.program.hold(labels[1])
        with self._working():
            self.model.tell(members, whole.run)
            if labels[0] in self.model.stored:
                self.eventually(lambda: not behind.armed, f"{labels[0]} ran")
                time.sleep(OUTLASTING_SECONDS)
            behind.disarm()
            self.repair()
            if labels[0] in self.model.stored:
                self.eventually(lambda: self.program.result(members[0]), f"{labels[0]} has a result")
                time.sleep(0.2)  # in which a callback would come that is too early

    @rule(what=st.sampled_from(["stream", "consumer", "store"]), stop=st.booleans())
    def work_over_a_loss(self, what: str, stop: bool) -> None:
        """What a worker reads disappears under it; it goes on with what is sent then.

        With `stop` it has messages that it has not begun when it ends, and answers for those of before.
        """
        self.repair()
        lose = self.empty_server if what == "store" else lambda: self.delete(what)
        if not stop:
            with self._working():
                self._send_and_wait("before")
                lose()
                self._send_and_wait("after")
            return
        held = [self._message() for _ in range(2)]
        labels = [str(message.args[0]) for message in held]
        self.program.hold(*labels)
        with self._working():
            for message in held:
                self._enqueue(message)
            self._begins(*labels)
            lose()
            for _ in range(4):
                self.send()
            self.repair()
            time.sleep(0.3)  # in which it fetches what it cannot begin

    def _begins(self, *labels: str) -> None:
        """Wait until these run, if they have to."""
        if self.model.stored.issuperset(labels):
            begun = self.program.begun
            self.eventually(lambda: all(begun[label] for label in labels), f"{labels} began")

    def _send_and_wait(self, when: str) -> None:
        message = self._message()
        label = str(message.args[0])
        self._enqueue(message)
        if label in self.model.stored:
            self.eventually(lambda: label in self.program.ran, f"{label}, sent {when} a loss, ran")

    # Faults

    def _break(self, fault: str) -> None:
        self.calm = False
        if fault == "lose":
            self.proxy.lose()
        elif fault == "cut":
            self.proxy.cut()
        elif fault == "hold":
            self.proxy.hold()
        elif fault == "refuse":
            self.proxy.impostor = refuse_login
            self.proxy.cut()
        else:
            setattr(self.proxy, fault, True)

    @rule(fault=FAULTS)
    def break_link(self, fault: str) -> None:
        self._break(fault)

    @rule(words=st.sampled_from([b"HPUB ", b".task", b"$KV.", b"STREAM.PURGE"]), fault=FAULTS)
    def break_behind(self, words: bytes, fault: str) -> None:
        """What is asked next arrives, its reply does not, and then the link breaks."""
        self.calm = False
        self.proxy.behind = words, lambda: self._break(fault)

    @rule()
    def restore(self) -> None:
        self.proxy.restore()  # first, because no fault comes after it
        self.proxy.impostor = None
        self.proxy.release()

    @rule()
    def repair(self) -> None:
        """All is well again, and the connection is made again by itself."""
        self.restore()
        self.eventually(self._answers(self.broker.connection.confirm), "the connection came back")

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
        self.server.kill()
        shutil.rmtree(self.server.store_dir / "jetstream")
        self.server.start()
        self.model.may_be_gone(self.model.stored)
        self.model.values.clear()
        self.model.holders.clear()

    @rule(what=st.sampled_from(["stream", "consumer"]))
    def delete(self, what: str) -> None:
        self.calm = False
        stream = self.broker.names.queue_stream(QUEUE)
        request = f"STREAM.DELETE.{stream}" if what == "stream" else f"CONSUMER.DELETE.{stream}.worker"
        with closing(JetStreamBroker(self.server.url, middleware=[])) as other:
            try:
                other.connection.api(request)
            except BrokerError:
                pass  # it was not there
        if what == "stream":
            self.model.may_be_gone(self.model.stored)

    # In the end

    def teardown(self) -> None:
        if not hasattr(self, "program"):
            return
        try:
            if not self.over:
                self._check()
        finally:
            self.program.close()
            self.proxy.close()

    def _check(self) -> None:
        self.repair()
        with self._working():
            self.eventually(self._all_ran, "what was stored ran")
            self.eventually(self._answers(self._look_for_leftovers), "nothing is left over")
        elsewhere = self.program.elsewhere
        for label, message in self.model.delayed.items():
            assert not self.program.begun[label], f"{label} ran long before it is due"
            self.eventually(
                self._answers(lambda m=message, of=label: self._look_for(m, of, elsewhere)),
                f"{label} is delayed",
            )
        assert not self.program.early, f"the callback of a group ran before {self.program.early}"
        self.model.check(self.program.ran, self.program.begun, calm=self.calm)

    def _all_ran(self) -> bool:
        due = self.model.due
        missing = self.program.unfinished(due)
        assert not missing, (
            f"{sorted(missing)} did not, or not to the end; {dict(Counter(self.program.ran))} did"
        )
        for label in due & self.model.results.keys():
            assert self.program.result(self.model.results[label]) == label
        return True

    def _look_for_leftovers(self) -> None:
        """Whether all that the queue has is delayed: what a call left behind must have come by now."""
        stats = self.program.elsewhere.queue_stats(QUEUE)
        assert stats.ready == stats.in_flight == 0, stats

    def _look_for(self, message: Message[Any], label: str, elsewhere: JetStreamBroker) -> None:
        state = elsewhere.status(message).state
        assert state == "delayed", f"{label} is {state}"


@contextmanager
def prepared(server: NatsServer) -> Iterator[None]:
    """Have the machine use this server, and short pauses."""
    Machine.patience = PATIENCE
    Machine.server = server
    Machine.time_limit = TimeLimit(interval=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dramatiq.worker, "CONSUMER_RESTART_DELAY_SECS", 0.2)
        patch.setattr(rerouting, "FIRST_DELAY_MS", 100)
        with closing(JetStreamBroker(server.url, middleware=[Machine.time_limit])) as first:
            first.emit_after("process_boot")
        yield


def search(examples: int, *, steps: int = 12, derandomize: bool) -> None:
    """Run random programs; raises what one of them finds, made small."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def drive(program: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Run one program: the names of rules, each with what it draws."""
    machine = Machine()
    try:
        machine.begin()
        for name, drawn in program:
            getattr(machine, name)(**drawn)
    except BaseException:
        machine.over = True
        raise
    finally:
        machine.teardown()
