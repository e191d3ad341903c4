"""A stub of the broker for tests without a server: everything stays in memory, and time passes when a test says so.

    def test_a_parcel_is_announced(stub_broker):
        deliver(parcel_id=7)
        stub_broker.assert_enqueued(announce.message(7), delay=60_000)
        stub_broker.run(within=60_000)
        assert sent == [7]

`StubBroker` is Dramatiq's, with what a `JetStreamBroker` has besides. Delayed messages, retries and ticks of periodic
actors wait for `advance` or `run`; its clock stands still between. `stub` puts one in the place of a program's broker.

A message over the `rate` of its actor waits too, for its moment on that clock. `run` runs one message at a time, so
that no `concurrency` is exceeded; threads of a worker do not keep it.

Not in it: the dashboard and the operators' side (queues, workers, dead letter store, history), key-value buckets,
priorities, and anything that only a crash or an outage shows. Use a real server for these (`NatsServer`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from queue import PriorityQueue
from typing import Any

import dramatiq
from dramatiq.actor import Actor
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.stub import StubBroker as DramatiqStubBroker
from dramatiq.common import current_millis, q_name
from dramatiq.message import Message
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.middleware.threading import Interrupt
from dramatiq.results import Results
from dramatiq.worker import ConsumerThread, Worker, WorkerThread

from dramatiq_jetstream import backends
from dramatiq_jetstream.aio import with_asend
from dramatiq_jetstream.broker import ACTOR_OPTIONS, JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption, MessageNotUnique
from dramatiq_jetstream.events import Event, Subscription, event_of
from dramatiq_jetstream.jetstream.names import covers
from dramatiq_jetstream.limits import Snooze, limit_of
from dramatiq_jetstream.periodic import Periodic, expression_of
from dramatiq_jetstream.progress import Progress
from dramatiq_jetstream.sending.envelope import to_message
from dramatiq_jetstream.status import MessageStatus
from dramatiq_jetstream.wire.connection import PubAck
from dramatiq_jetstream.worker.current import current_message

__all__ = ["StubBroker", "stub"]

#: How many messages one `run` runs at most, in case an actor sends to itself for ever.
RUN_LIMIT = 10_000


class _OverRate(Snooze):
    """A message waits for its moment."""


class StubBroker(DramatiqStubBroker):
    """Dramatiq's StubBroker with what a `JetStreamBroker` has besides, all in memory. All times are milliseconds.

    Parameters:
      middleware: As for every Dramatiq broker; None for Dramatiq's defaults, `Periodic` and `Progress`.
      fail_fast_default: Whether `join` and `run` raise what an actor raised whose message became a dead letter.

    Attributes:
      now: The time, since 1970. It stands still but for `advance` and `run`.
      published: All events that were published, oldest first.

    Examples:
      >>> from dramatiq_jetstream.testing import StubBroker
      >>> broker = StubBroker()
      >>> @dramatiq.actor(broker=broker)
      ... def remind(customer):
      ...     print("reminds", customer)
      >>> message = remind.send_with_options(args=("c-42",), delay=60_000)
      >>> found = broker.assert_enqueued(remind.message("c-42"), delay=60_000)
      >>> broker.run(within=60_000)
      reminds c-42
      1
      >>> broker.assert_not_enqueued(remind)
      >>> broker.status(message).state
      'done'
      >>> later = broker.enqueue(remind.message("c-43"), delay=60_000)
      >>> others = broker.enqueue_many([remind.message("c-44"), remind.message("c-45")])
      >>> broker.run_now(later.message_id), broker.cancel(later.message_id)
      (1, 0)
      >>> len(broker.enqueued(remind))
      3
      >>> broker.flush_all()
    """

    def __init__(self, middleware: list[Middleware] | None = None, *, fail_fast_default: bool = True) -> None:
        self.now = current_millis()
        self.published: list[Event] = []
        self._delayed: list[Message[Any]] = []
        self._ticks: dict[str, int] = {}
        self._ticked = 0
        self._holders: dict[tuple[str, str], tuple[str, int]] = {}  # unique keys: whose, until when
        self._states: dict[str, MessageStatus] = {}
        self._attempts: Counter[str] = Counter()
        self._moments: dict[
            tuple[str, str], list[int]
        ] = {}  # of each limit: when messages start, the last ones
        self._waiting_for: dict[str, int] = {}  # of each message over a rate: its moment
        self._lock = threading.RLock()
        super().__init__(middleware, fail_fast_default=fail_fast_default)
        self.actor_options |= ACTOR_OPTIONS
        if middleware is None:
            self.add_middleware(Periodic())
            self.add_middleware(Progress())

    # Sending

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        limit_of(actor)  # raises what is wrong with it
        with_asend(actor)
        super().declare_actor(actor)
        self._plan(actor)

    def _plan(self, actor: Actor[Any, Any]) -> None:
        """Note the first tick of a periodic actor."""
        if expression_of(actor) is not None:
            self._ticks[actor.actor_name] = self._tick_after(actor, self.now)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Put a message on its queue; one with a delay waits for `advance` or `run`.

        Raises:
          MessageNotUnique: When its option `unique_key` was used within its `unique_window`.
        """
        queue_name = q_name(message.queue_name)
        self.declare_queue(queue_name)
        with self._lock:
            self._take_unique_key(message)
            if delay is None or delay <= 0:
                return super().enqueue(message)
            delayed = message.copy(queue_name=queue_name, options={"eta": self.now + delay})
            self.emit_before("enqueue", delayed, delay)
            self._delayed.append(delayed)
            self.emit_after("enqueue", delayed, delay)
            return delayed

    async def aenqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """As `enqueue`.

        Examples:
          >>> from dramatiq_jetstream.testing import StubBroker
          >>> broker = StubBroker()
          >>> bill = dramatiq.actor(lambda customer: None, actor_name="bill", broker=broker)
          >>> message = asyncio.run(broker.aenqueue(bill.message("c-42")))
          >>> broker.status(message).state
          'waiting'
        """
        return self.enqueue(message, delay=delay)

    def enqueue_many(
        self, messages: Iterable[Message[Any]], *, atomic: bool = False, delay: int | None = None
    ) -> list[Message[Any]]:
        """Enqueue messages, one after the other."""
        return [self.enqueue(message, delay=delay) for message in messages]

    def cancel(self, message_id: str, queue_name: str | None = None) -> int:
        """Cancel the delays of a message, and free its unique key; return how many were waiting."""
        taken = self._take_delayed(message_id, queue_name)
        if taken:
            self._holders = {key: held for key, held in self._holders.items() if held[0] != message_id}
        return len(taken)

    def run_now(self, message_id: str, queue_name: str | None = None) -> int:
        """End the delay of a message, or of its retry; return how many were waiting."""
        taken = self._take_delayed(message_id, queue_name)
        for message in taken:
            self._put(message)
        return len(taken)

    def publish(
        self,
        subject: str,
        event: Any,
        *,
        event_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: int | None = None,
    ) -> PubAck:
        """Keep an event in `published`, and enqueue it for each actor that subscribes to its subject.

        Examples:
          >>> from dramatiq_jetstream.testing import StubBroker
          >>> broker = StubBroker()
          >>> stored = broker.publish("ORDER.created", b"17")
          >>> [event.subject for event in broker.published]
          ['ORDER.created']
        """
        data = event if isinstance(event, bytes) else event.SerializeToString()
        with self._lock:
            number = len(self.published) + 1
            names = {"Nats-Msg-Id": event_id or f"event-{number}", **(headers or {})}
            happened = Event(subject, data, names, "STUB", number, self.now)
            self.published.append(happened)
        for actor in self.actors.values():
            wanted = actor.options.get("subscribe")
            if isinstance(wanted, Subscription) and covers(wanted.subject, subject):
                self._put(to_message(happened, queue=actor.queue_name, actor=actor.actor_name))
        return PubAck(happened.stream, number)

    def setup(self, *, update: bool = False) -> dict[str, str]:
        """Nothing has to be created.

        Examples:
          >>> from dramatiq_jetstream.testing import StubBroker
          >>> StubBroker().setup()
          {}
        """
        return {}

    def _put(self, message: Message[Any]) -> None:
        """Put a message on its queue, as the server does: no middleware is told."""
        message.options.pop("eta", None)
        self.declare_queue(message.queue_name)
        self.queues[message.queue_name].put(message.encode())

    def _take_delayed(self, message_id: str, queue_name: str | None) -> list[Message[Any]]:
        with self._lock:
            taken = [
                message
                for message in self._delayed
                if message.message_id == message_id and queue_name in (None, message.queue_name)
            ]
            self._delayed = [message for message in self._delayed if message not in taken]
        return taken

    def _take_unique_key(self, message: Message[Any]) -> None:
        if "unique_key" not in message.options:
            return
        key = q_name(message.queue_name), str(message.options["unique_key"])
        holder, until = self._holders.get(key, ("", 0))
        if holder not in ("", message.message_id) and self.now < until:
            raise MessageNotUnique(
                f"A message with the unique key {key[1]!r} was enqueued on {key[0]!r} within its window; this one was "
                "not."
            )
        self._holders[key] = message.message_id, self.now + message.options.get("unique_window", 60_000)

    # Time

    def advance(self, duration: int | timedelta) -> None:
        """Let time pass: put what becomes due within `duration` on its queue, in order, and run nothing.

        Parameters:
          duration: Milliseconds, or a timedelta.

        Examples:
          >>> from dramatiq_jetstream.testing import StubBroker
          >>> broker = StubBroker()
          >>> hourly = dramatiq.actor(lambda: None, actor_name="hourly", broker=broker, every=3_600_000)
          >>> broker.advance(2 * 3_600_000)
          >>> len(broker.enqueued(hourly))
          2
          >>> broker.flush_all()
        """
        until = self._until(duration)
        while self._put_next_due(until):
            pass
        self.now = until

    def _until(self, duration: int | timedelta) -> int:
        if isinstance(duration, timedelta):
            duration = int(duration.total_seconds() * 1000)
        if duration < 0:
            raise InvalidOption(f"{duration} ms cannot pass: time goes forward only.")
        return self.now + duration

    def _put_next_due(self, until: int) -> bool:
        """Advance to what is due next, no later than `until`, and put it on its queue; False when nothing is."""
        with self._lock:
            due = [(message.options["eta"], message) for message in self._delayed]
            message = min(due, key=lambda one: one[0], default=(until + 1, None))
            tick = min(self._ticks.items(), key=lambda one: one[1], default=("", until + 1))
            if min(message[0], tick[1]) > until:
                return False
            if message[1] is not None and message[0] <= tick[1]:
                self.now = max(self.now, message[0])
                self._delayed = [one for one in self._delayed if one is not message[1]]
                self._put(message[1])
                return True
            self.now = max(self.now, tick[1])
            actor = self.actors[tick[0]]
            self._ticks[tick[0]] = self._tick_after(actor, tick[1])
            self._ticked += 1
            self._put(
                Message(
                    actor.queue_name,
                    tick[0],
                    (),
                    {},
                    {},
                    f"{tick[0]}:{self._ticked}",
                    message_timestamp=self.now,
                )
            )
            return True

    @staticmethod
    def _tick_after(actor: Actor[Any, Any], time: int) -> int:
        expression = expression_of(actor)
        following = None if expression is None else expression.next(time)
        return time + int(actor.options["every"]) if following is None else following

    # Running

    def run(self, within: int | timedelta = 0, *, fail_fast: bool | None = None) -> int:
        """Run what waits, and what becomes due within a time, each at its time, in the calling thread.

        Retries, callbacks and next steps of what runs are run too, when they are due within that time. Do not use it
        while a worker runs; there `join` waits for the worker.

        Parameters:
          within: How much time passes, in milliseconds or as a timedelta.
          fail_fast: Raise what an actor raised whose message became a dead letter; None takes `fail_fast_default`.

        Returns:
          How many messages were run, each attempt counted.
        """
        until, ran = self._until(within), 0
        before = {name: len(letters) for name, letters in self.dead_letters_by_queue.items()}
        worker = Worker(self, worker_threads=1, worker_timeout=1)
        self.emit_before("worker_boot", worker)
        self.emit_after("worker_boot", worker)
        try:
            while True:
                ran += self._run_waiting(RUN_LIMIT - ran)
                if not self._put_next_due(until):
                    break
            self.now = until
        finally:
            self.emit_before("worker_shutdown", worker)
            self.emit_after("worker_shutdown", worker)
        if self.fail_fast_default if fail_fast is None else fail_fast:
            for name, letters in self.dead_letters_by_queue.items():
                for letter in letters[before.get(name, 0) :]:
                    error = letter._exception or Exception(f"{letter} is a dead letter")
                    raise (error.__cause__ or error) if isinstance(error, SkipMessage) else error
        return ran

    def _run_waiting(self, limit: int) -> int:
        ran = 0
        while True:
            found = 0
            for queue_name in sorted(set(self.queues) - self.delay_queues):
                if self._run_one(queue_name):
                    found += 1
            ran += found
            if not found:
                return ran
            if ran >= limit:
                raise RuntimeError(
                    f"run() ran {RUN_LIMIT} messages and more wait: an actor seems to send to itself for ever."
                )

    def _run_one(self, queue_name: str) -> bool:
        """Run the oldest message of a queue as a worker does; False when there is none."""
        work_queue: PriorityQueue[Any] = PriorityQueue()
        consumer = ConsumerThread(
            broker=self, queue_name=queue_name, prefetch=1, work_queue=work_queue, worker_timeout=1
        )
        consumer.consumer = self.consume(queue_name, timeout=0)
        message = next(consumer.consumer)
        if message is None:
            return False
        consumer.handle_message(message)
        if not work_queue.empty():  # else its actor is not known
            thread = WorkerThread(
                broker=self, consumers={queue_name: consumer}, work_queue=work_queue, worker_timeout=1
            )
            thread.process_message(work_queue.get_nowait().message)
            error = message._exception
            if error is not None and not isinstance(error, (Exception, Interrupt)):
                raise error  # Ctrl-C, or a test that failed inside of an actor
        return True

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "process_message":
            self._begin(args[0])
        super().emit_before(signal, *args, **kwargs)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        error = kwargs.get("exception")
        if signal == "process_message" and isinstance(error, Snooze):
            self._put_off(args[0], error)
        else:
            super().emit_after(signal, *args, **kwargs)
        if signal in ("process_message", "skip_message"):
            current_message.set(None)
        elif signal in ("ack", "nack"):
            self._note(args[0], failed=signal == "nack")

    def _begin(self, message: MessageProxy) -> None:
        """Make a message the current one, and decode the event that it carries."""
        current_message.set(message)
        self._attempts[message.message_id] += 1
        self._states[message.message_id] = self._state(message, "running")
        event = event_of(message)
        if event is not None:
            wanted = self.get_actor(message.actor_name).options["subscribe"]
            try:
                vars(message)["args"] = (wanted.decode(event),)
            except Exception as error:
                message.fail()
                raise SkipMessage(f"the event on {event.subject} cannot be decoded") from error
        self._keep_rate(message)

    def _keep_rate(self, message: MessageProxy) -> None:
        """Have a message that is over the rate of its actor wait for its moment, which it is given once."""
        limit = limit_of(self.get_actor(message.actor_name))
        if limit is None or limit.rate is None:
            return
        with self._lock:
            moment = self._waiting_for.pop(message.message_id, None)
            if moment is None:
                key = message.actor_name, limit.value_of(message.args, message.kwargs)
                given = self._moments.setdefault(key, [])
                full = len(given) == limit.rate.count
                moment = max(self.now, given.pop(0) + limit.rate.period) if full else self.now
                given.append(moment)
            if moment > self.now:
                self._waiting_for[message.message_id] = moment
                raise _OverRate(moment - self.now)

    def _put_off(self, message: MessageProxy, snooze: Snooze) -> None:
        """Have a snoozed message run again later; middleware is told as of one that was skipped, results are not."""
        self._attempts[message.message_id] -= 1
        with self._lock:
            self._delayed.append(message._message.copy(options={"eta": self.now + snooze.delay}))
        if isinstance(snooze, _OverRate):
            return  # no middleware was told that it began
        for middleware in reversed(self.middleware):
            if not isinstance(middleware, Results):
                middleware.after_skip_message(self, message)

    # Looking

    def enqueued(self, actor: Actor[..., Any] | str | None = None) -> list[Message[Any]]:
        """The messages that wait, in order: first those that are on their queues, then those that are not due yet.

        Those that are not due have the option `eta`, milliseconds since 1970, to compare with `now`.

        Parameters:
          actor: Only those for this actor, or the actor of this name.
        """
        with self._lock:
            queued = [
                Message.decode(data)
                for name, queue in self.queues.items()
                if name not in self.delay_queues
                for data in list(queue.queue)
            ]
            waiting = [*queued, *sorted(self._delayed, key=lambda message: message.options["eta"])]
        name = actor.actor_name if isinstance(actor, Actor) else actor
        return [message for message in waiting if name in (None, message.actor_name)]

    def assert_enqueued(
        self, expected: Message[Any] | Actor[..., Any], *, delay: int | timedelta | None = None
    ) -> Message[Any]:
        """Fail unless a message waits as expected; return the first such.

        Parameters:
          expected: A message as `actor.message(...)` makes it: its actor, queue, arguments and options are compared.
            Or an actor, for any message to it.
          delay: Milliseconds until it is due, or a timedelta; None for any.

        Raises:
          AssertionError: When none does; it lists what waits.
        """
        due = None if delay is None else self._until(delay)
        for message in self.enqueued():
            if _matches(message, expected) and due in (None, message.options.get("eta", self.now)):
                return message
        when = "" if due is None else f" in {due - self.now} ms"
        raise AssertionError(f"{_describe(expected)} is not enqueued{when}. {self._waiting()}")

    def assert_not_enqueued(self, unexpected: Message[Any] | Actor[..., Any]) -> None:
        """Fail if such a message waits; compared as by `assert_enqueued`.

        Raises:
          AssertionError: When one does; it lists what waits.
        """
        if any(_matches(message, unexpected) for message in self.enqueued()):
            raise AssertionError(f"{_describe(unexpected)} is enqueued. {self._waiting()}")

    def _waiting(self) -> str:
        lines = [
            f"  {_describe(message)}"
            + (f" in {message.options['eta'] - self.now} ms" if "eta" in message.options else "")
            for message in self.enqueued()
        ]
        return "\n".join(["Enqueued:", *lines]) if lines else "Nothing is enqueued."

    def status(self, message: str | Message[Any]) -> MessageStatus:
        """The state of a message: waiting, delayed, retrying, running, done, dead or unknown."""
        message_id = message if isinstance(message, str) else message.message_id
        for waiting in self.enqueued():
            if waiting.message_id == message_id:
                due = waiting.options.get("eta")
                retried = "retrying" if waiting.options.get("retries") else "delayed"
                return self._state(waiting, "waiting" if due is None else retried, due=due)
        return self._states.get(message_id) or MessageStatus(message_id, "unknown")

    def _note(self, message: MessageProxy, *, failed: bool) -> None:
        error = message._exception
        said = None if error is None else f"{type(error).__name__}: {error}"
        self._states[message.message_id] = self._state(message, "dead" if failed else "done", error=said)

    def _state(self, message: Any, state: Any, **known: Any) -> MessageStatus:
        return MessageStatus(
            message.message_id,
            state,
            queue=message.queue_name,
            actor=message.actor_name,
            attempt=self._attempts[message.message_id] + (state in ("waiting", "delayed", "retrying")),
            **known,
        )

    def flush_all(self) -> None:
        """Drop all messages, delayed ones too."""
        super().flush_all()
        self._delayed.clear()
        self._holders.clear()
        self._moments.clear()
        self._waiting_for.clear()


@contextmanager
def stub(program: Broker | None = None) -> Iterator[StubBroker]:
    """Put a `StubBroker` in the place of a program's broker, with its actors and middleware, for a while.

    The stub is Dramatiq's global broker meanwhile. This library's backends (results, limits, aborts) that belong to the
    program's broker keep everything in memory. Nothing is contacted, so the program needs no setting for tests.

    Parameters:
      program: None takes Dramatiq's global broker. Import the actors before; without a broker the stub is empty.

    Examples:
      >>> from dramatiq_jetstream.testing import stub
      >>> with stub() as shop:
      ...     sent = charge.send("c-42", 20)
      ...     ran = shop.run()
      ...     sent.get_result()
      20
    """
    before = dramatiq.broker.global_broker
    program = program or before
    standing_in = StubBroker() if program is None else StubBroker([])
    with ExitStack() as stack:
        stack.callback(setattr, dramatiq.broker, "global_broker", before)
        if program is not None:
            _adopt(standing_in, program, stack)
        dramatiq.set_broker(standing_in)
        yield standing_in


def _adopt(standing_in: StubBroker, program: Broker, stack: ExitStack) -> None:
    for queue_name in program.get_declared_queues():
        standing_in.declare_queue(queue_name)
    standing_in.middleware = list(program.middleware)
    standing_in.actor_options |= program.actor_options
    for name, actor in program.actors.items():
        standing_in.actors[name] = actor
        standing_in._plan(actor)
        stack.callback(setattr, actor, "broker", actor.broker)
        actor.broker = standing_in
    found = set(program.backends) if isinstance(program, JetStreamBroker) else set()
    found |= {getattr(middleware, "backend", None) for middleware in program.middleware}
    for backend in found:
        if isinstance(backend, backends.InMemory):
            stack.enter_context(backends.in_memory(backend))


def _matches(message: Message[Any], expected: Message[Any] | Actor[..., Any]) -> bool:
    if isinstance(expected, Actor):
        return message.actor_name == expected.actor_name
    wanted = Message.decode(expected.encode())  # as it is after a journey: tuples are lists
    return (
        (message.queue_name, message.actor_name) == (wanted.queue_name, wanted.actor_name)
        and Message.decode(message.encode()).args == wanted.args
        and Message.decode(message.encode()).kwargs == wanted.kwargs
        and wanted.options.items() <= message.options.items()
    )


def _describe(message: Message[Any] | Actor[..., Any]) -> str:
    return f"A message to {message.actor_name}" if isinstance(message, Actor) else str(message)
