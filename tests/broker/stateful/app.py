"""The program that the machine drives: actors that go wrong the first time, and a note of every run."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import dramatiq
from dramatiq import Message
from dramatiq.errors import BrokerError, Retry
from dramatiq.middleware import GroupCallbacks, Middleware, Pipelines, Retries, TimeLimit
from dramatiq.results import ResultMissing, Results

from dramatiq_jetstream import JetStreamBroker, rate_limits, results

#: Milliseconds; short, because every call in an outage takes as long.
ENQUEUE_TIMEOUT = 400
ACK_WAIT = 2_000

#: How long, in milliseconds, a first run with a time limit may take, and how long it takes if it is not to be over.
TIME_LIMIT = 80
NEARLY_TIME_LIMIT = 50

#: How long, in seconds, an actor waits to be let go at most.
GATE_SECONDS = 60.0

#: The actor that has a result.
RESULTFUL = "resultful"


def _fail() -> None:
    raise RuntimeError("as always the first time")


def _fail_late() -> None:
    time.sleep(NEARLY_TIME_LIMIT / 1000)
    raise RuntimeError("as always the first time, just before the time limit")


def _fail_at_length() -> None:
    raise RuntimeError("more than a message can carry" * 40_000)


def _retry_before_now() -> None:
    raise Retry("as always the first time", delay=-50)


def _overrun() -> None:
    deadline = time.monotonic() + GATE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.005)


#: What each of these actors does in its first run, and its options. In its second run it succeeds.
TROUBLES: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "failing": (_fail, {}),
    "narrow": (_fail_late, {"time_limit": TIME_LIMIT}),
    "late": (_overrun, {"time_limit": TIME_LIMIT}),
    "wordy": (_fail_at_length, {}),
    "hasty": (_retry_before_now, {}),
}


class FaultBehind(Middleware):
    """Breaks something once, when an actor that has a result has ended, and before that is stored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: Callable[[], None] | None = None

    @property
    def armed(self) -> bool:
        """Whether the fault is still to come."""
        return self._fault is not None

    def arm(self, fault: Callable[[], None]) -> None:
        with self._lock:
            self._fault = fault

    def disarm(self) -> None:
        """The fault has begun when this returns, or never will."""
        with self._lock:
            self._fault = None

    def after_process_message(self, broker: Any, message: Any, **outcome: Any) -> None:
        if message.actor_name == RESULTFUL:
            with self._lock:
                if self._fault is not None:
                    self._fault()
                    self._fault = None


class Program:
    """A broker with its actors, each of which takes a label.

    Attributes:
      elsewhere: A broker of another program, whose connection has no faults of its own.
      begun: When the runs of each label began, by `time.monotonic`.
      ran: The label of every run that has done its work.
      early: What the callback of a group found undone.
    """

    def __init__(self, url: str, server_url: str, namespace: str, time_limit: TimeLimit) -> None:
        self.broker = JetStreamBroker(
            url,
            namespace=namespace,
            enqueue_timeout=ENQUEUE_TIMEOUT,
            ack_wait=ACK_WAIT,
            middleware=[time_limit, Pipelines(), Retries()],
        )
        self.elsewhere = JetStreamBroker(server_url, namespace=namespace, ack_wait=ACK_WAIT, middleware=[])
        self.results = results.JetStreamBackend(self.broker)
        self.behind = FaultBehind()
        # What follows an actor happens in the opposite order: it is counted, then comes the fault, then its result.
        self.broker.add_middleware(Results(backend=self.results))
        self.broker.add_middleware(self.behind)
        self.broker.add_middleware(GroupCallbacks(rate_limits.JetStreamBackend(self.broker)))
        self.begun: defaultdict[str, list[float]] = defaultdict(list)
        self.ran: list[str] = []
        self.early: set[str] = set()
        self._gate = threading.Event()
        self._held: set[str] = set()
        self.actors = {
            **{
                name: self._actor(name, self._at_first(trouble), options)
                for name, (trouble, options) in TROUBLES.items()
            },
            "plain": self._actor("plain", self._run),
            RESULTFUL: self._actor(RESULTFUL, self._run, {"store_results": True}),
            "finished": self._actor("finished", self._finished),
        }

    def _actor(self, name: str, function: Callable[..., Any], options: dict[str, Any] | None = None) -> Any:
        def run(*args: Any) -> Any:
            return function(*args)

        return dramatiq.actor(
            run,
            actor_name=name,
            broker=self.broker,
            max_retries=200,
            min_backoff=10,
            max_backoff=100,
            **(options or {}),
        )

    def _run(self, label: str) -> str:
        self.begun[label].append(time.monotonic())
        if label in self._held:
            self._gate.wait(GATE_SECONDS)
        self.ran.append(label)
        return label

    def _at_first(self, trouble: Callable[[], None]) -> Callable[[str], None]:
        def run(label: str) -> None:
            self._run(label)
            if self.ran.count(label) == 1:
                trouble()

        return run

    def _finished(self, label: str, members: list[str]) -> None:
        self.early |= set(members) - set(self.ran)
        self._run(label)

    def message(self, actor: str, label: str, *args: Any, **options: Any) -> Message[Any]:
        message: Message[Any] = self.actors[actor].message_with_options(args=(label, *args), **options)
        return message

    def unfinished(self, labels: set[str]) -> set[str]:
        """Those of the labels whose actor has not run to its end."""
        counts = Counter(self.ran)
        return {label for label in labels if counts[label] < (2 if label.split("-")[0] in TROUBLES else 1)}

    def result(self, message: Message[Any]) -> Any:
        """The result of a message; an AssertionError while there is none."""
        try:
            return self.results.get_result(message)
        except (ResultMissing, BrokerError) as error:
            raise AssertionError(f"{message} has no result ({error})") from error

    def hold(self, *labels: str) -> None:
        """Have the runs of these labels wait until `let_go`."""
        self._gate.clear()
        self._held = set(labels)

    def let_go(self) -> None:
        self._gate.set()

    def close(self) -> None:
        self.let_go()
        self.broker.close()
        self.elsewhere.close()
