"""The program of the library's chaos: `fleet work tests.chaos.library.program`, and what producers send to.

Every run of an actor is written down, from the middleware, when it begins and when it ends. A message is known by
its *label*, its first argument, which the producer's log has too. Settings come from the environment.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import CurrentMessage, GroupCallbacks
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.results import Results
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker, rate_limits, results
from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.periodic import Periodic
from tests.chaos.library.clock import follow, true_time
from tests.chaos.library.settings import EVENTS, EVERY, HOUR, MADE, OLD, TURNS, TURNS_TTL

follow(Path(os.environ["CHAOS_CLOCK"]))
_journal = os.open(os.environ["CHAOS_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


class Journal(dramatiq.Middleware):
    """Appends a line when a message begins, ends, fails or is skipped, each in one write."""

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        self._write("began", message)

    def after_process_message(
        self,
        broker: dramatiq.Broker,
        message: dramatiq.MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        if exception is None:
            self._write("ended", message)
        else:
            self._write("failed", message, type(exception).__name__)

    def after_skip_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        self._write("skipped", message)

    def note(self, what: str) -> None:
        """Append a line about the message that runs."""
        message = CurrentMessage.get_current_message()
        assert message is not None
        self._write(what, message)

    def _write(self, what: str, message: dramatiq.MessageProxy, error: str = "") -> None:
        label = message.args[0] if message.args else message.message_id
        line = {
            "at": true_time(),
            "pid": os.getpid(),
            "what": what,
            "actor": message.actor_name,
            "label": label.decode() if isinstance(label, bytes) else str(label),
            "id": message.message_id,
            "retries": message.options.get("retries", 0),
            # When the server stored what is run: a tick's time is the schedule's.
            "stored": getattr(getattr(message, "_delivery", None), "timestamp", 0),
            "error": error,
        }
        os.write(_journal, json.dumps(line).encode() + b"\n")


broker = JetStreamBroker(
    os.environ["CHAOS_URL"], nkey=os.environ["CHAOS_NKEY"], **json.loads(os.environ["CHAOS_OPTIONS"])
)
limiter_backend = rate_limits.JetStreamBackend(broker)
result_backend = results.JetStreamBackend(broker)
broker.add_middleware(GroupCallbacks(limiter_backend))
broker.add_middleware(Results(backend=result_backend))
broker.add_middleware(Abortable(backend=AbortBackend(broker)))
broker.add_middleware(Events(stream=EVENTS, subjects=[f"{EVENTS}.>"]))
broker.add_middleware(Periodic())
broker.add_middleware(CurrentMessage())
journal = Journal()
broker.add_middleware(journal)
dramatiq.set_broker(broker)

_RETRIED: dict[str, Any] = {"max_retries": 100, "min_backoff": 50, "max_backoff": 1_000}

# A killed process keeps its turn for as long as TURNS_TTL; then others have it.
_limiter = ConcurrentRateLimiter(limiter_backend, "turns", limit=TURNS, ttl=TURNS_TTL)


def _first_time() -> bool:
    message = CurrentMessage.get_current_message()
    return message is not None and not message.options.get("retries")


def _spend(seconds: float) -> None:
    """Take time in small steps, so that a time limit or an abort can strike."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)


@dramatiq.actor(queue_name="first", **_RETRIED)
def work(label: str) -> None:
    """Plain work."""


@dramatiq.actor(queue_name="second", **_RETRIED)
def flaky(label: str) -> None:
    """Fails the first time, so that a retry has to be stored."""
    if _first_time():
        raise RuntimeError("as always the first time")


@dramatiq.actor(queue_name="second", max_retries=1, min_backoff=50, max_backoff=200)
def doomed(label: str) -> None:
    """Always fails, so that a dead letter has to be stored."""
    raise RuntimeError("as always")


@dramatiq.actor(queue_name="first", time_limit=300, **_RETRIED)
def late(label: str) -> None:
    """Is interrupted by its time limit the first time."""
    if _first_time():
        _spend(20)


@dramatiq.actor(queue_name="first", time_limit=2_000, **_RETRIED)
def narrow(label: str) -> None:
    """Fails just before its time limit, which expires while the retry is stored if that takes a moment."""
    if _first_time():
        _spend(1.0)
        raise RuntimeError("as always the first time")


@dramatiq.actor(queue_name="second", **_RETRIED)
def long(label: str) -> None:
    """Takes a while; is aborted now and then, and met by whatever happens meanwhile."""
    _spend(3.0)


@dramatiq.actor(queue_name="second", **_RETRIED)
def limited(label: str) -> None:
    """Needs one of two turns."""
    with _limiter.acquire():
        journal.note("took")
        _spend(0.05)
        journal.note("gave")


@dramatiq.actor(queue_name="first", store_results=True, result_ttl=HOUR, **_RETRIED)
def answer(label: str) -> str:
    """Has a result."""
    return label


@dramatiq.actor(queue_name="first", **_RETRIED)
def member(label: str) -> None:
    """Of a group."""


@dramatiq.actor(queue_name="second", **_RETRIED)
def complete(label: str) -> None:
    """The callback of a group."""


@dramatiq.actor(queue_name="first", **_RETRIED)
def step(label: str, *_: Any) -> None:
    """Of a pipeline."""


@dramatiq.actor(queue_name="first", subscribe=subscription(MADE), **_RETRIED)
def on_made(label: bytes) -> None:
    """Sees every event."""


@dramatiq.actor(queue_name="second", subscribe=subscription(MADE), **_RETRIED)
def on_made_too(label: bytes) -> None:
    """Sees every event, independently."""


@dramatiq.actor(queue_name="ticks", every=EVERY, **_RETRIED)
def tick() -> None:
    """The periodic task."""


if os.environ["CHAOS_VERSION"] != OLD:

    @dramatiq.actor(queue_name="second", **_RETRIED)
    def novel(label: str) -> None:
        """What the older version of the program does not have."""


if os.environ.get("CHAOS_BROKEN"):
    importlib.import_module("tests.chaos.library.broken")
