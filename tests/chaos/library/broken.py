"""Broken builds, one for each promise: what `CHAOS_BROKEN` names is broken in the processes of the program.

Each is the kind of mistake that could be made, in one place. The checker has to find it.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
from dramatiq import Message
from dramatiq.middleware import Retries
from dramatiq.results import Results

from dramatiq_jetstream import periodic, rate_limits
from dramatiq_jetstream.errors import NotSent
from dramatiq_jetstream.sending import unique
from dramatiq_jetstream.wire.connection import Connection, PubAck
from dramatiq_jetstream.worker.attempts import Attempts
from dramatiq_jetstream.worker.message import JetStreamMessage

#: How often something that is broken goes wrong.
SHARE = 0.2


def _wrong(share: float = SHARE) -> bool:
    return random.random() < share


def _lose() -> None:
    """A message is acked without having run."""
    run = Attempts._run

    def forgetful(self: Attempts, message: Any) -> None:
        if not _wrong():
            run(self, message)

    Attempts._run = forgetful  # type: ignore[method-assign]


def _haunt() -> None:
    """A call that raised `NotSent` sends later all the same."""
    publish = Connection.publish

    def haunted(self: Connection, *arguments: Any, **options: Any) -> PubAck:
        try:
            return publish(self, *arguments, **options)
        except NotSent:
            threading.Thread(target=_send_until_stored, args=(self, arguments), daemon=True).start()
            raise

    def _send_until_stored(connection: Connection, arguments: Any) -> None:
        while True:
            try:
                publish(connection, *arguments, timeout=5_000)
                return
            except NotSent:
                time.sleep(0.5)

    Connection.publish = haunted  # type: ignore[method-assign]


def _repeat() -> None:
    """A message is published again under another `Nats-Msg-Id`."""
    publish = Connection.publish

    def twice(
        self: Connection, subject: str, payload: bytes, headers: Any = None, *, timeout: int | None = None
    ) -> PubAck:
        ack = publish(self, subject, payload, headers, timeout=timeout)
        if ".task" in subject and _wrong():
            publish(self, subject, payload, {**headers, "Nats-Msg-Id": os.urandom(8).hex()}, timeout=timeout)
        return ack

    Connection.publish = twice  # type: ignore[method-assign]


def _complete_early() -> None:
    """Every member of a group is told that it is the last."""

    def last(*_: object) -> bool:
        return True

    rate_limits.JetStreamBackend._is_last = last  # type: ignore[method-assign]


def _forget_keys() -> None:
    """A unique key is taken by every call."""

    def take(self: unique.Claim, publish_id: str) -> str:
        return publish_id

    unique.Claim._take = take  # type: ignore[method-assign]


def _drop_results() -> None:
    """Results are not stored now and then."""
    after = Results.after_process_message

    def dropping(self: Results, *arguments: Any, **outcome: Any) -> None:
        if not _wrong(0.7):
            after(self, *arguments, **outcome)

    Results.after_process_message = dropping  # type: ignore[method-assign]


def _give_up() -> None:
    """A message that failed is not retried."""

    def no_retry(self: Retries, broker: dramatiq.Broker, message: Any, **outcome: Any) -> None:
        if outcome.get("exception") is not None:
            message.fail()

    Retries.after_process_message = no_retry  # type: ignore[method-assign]


def _never_tick() -> None:
    """Schedules are not stored."""

    def nothing(*_: object, **__: object) -> dict[str, str]:
        return {}

    periodic._reconcile_queue = nothing  # type: ignore[assignment]


def _dawdle() -> None:
    """A call takes much longer than its time."""
    enqueue = dramatiq.get_broker().enqueue

    def slow(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        if random.random() < SHARE / 10:
            time.sleep(20)
        return enqueue(message, delay=delay)

    if "producer" in sys.argv[0]:
        dramatiq.get_broker().enqueue = slow  # type: ignore[method-assign]


def _hang() -> None:
    """A thread that runs a message never comes back."""
    run = Attempts._run

    def hanging(self: Attempts, message: Any) -> None:
        if isinstance(message, JetStreamMessage) and message.actor_name == "flaky" and _wrong():
            threading.Event().wait()
        run(self, message)

    Attempts._run = hanging  # type: ignore[method-assign]


def _kill_threads() -> None:
    """A worker thread ends after a message, and the process goes on."""
    process = Attempts.process_message

    def ending(self: Attempts, message: Any) -> None:
        process(self, message)
        if random.random() < SHARE / 10:
            raise SystemExit

    Attempts.process_message = ending  # type: ignore[method-assign]


def _leak() -> None:
    """Every run leaves open files and a megabyte behind."""
    run = Attempts._run
    kept: list[Any] = []

    def leaking(self: Attempts, message: Any) -> None:
        kept.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(5))
        kept.append(bytearray(os.urandom(1 << 20)))
        run(self, message)

    Attempts._run = leaking  # type: ignore[method-assign]


def _crowd() -> None:
    """A limiter gives every caller a turn."""

    def incr(*_: object, **__: object) -> bool:
        return True

    rate_limits.JetStreamBackend.incr = incr  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "lose": _lose,
    "haunt": _haunt,
    "repeat": _repeat,
    "complete-early": _complete_early,
    "forget-keys": _forget_keys,
    "drop-results": _drop_results,
    "give-up": _give_up,
    "never-tick": _never_tick,
    "dawdle": _dawdle,
    "hang": _hang,
    "kill-threads": _kill_threads,
    "leak": _leak,
    "crowd": _crowd,
}

#: The promise that each of them breaks.
BREAKS_PROMISE = {
    "lose": "what is stored is done, or a dead letter",
    "haunt": "what is not stored never appears",
    "repeat": "a run is repeated only where that is said",
    "complete-early": "a group's callback comes once, after all members",
    "forget-keys": "a unique key stands for one message",
    "drop-results": "what is done has its result",
    "give-up": "only what fails is a dead letter",
    "never-tick": "ticks come as scheduled",
    "dawdle": "every call ends in time, with a known error",
    "hang": "nothing is stuck",
    "kill-threads": "every process and thread is alive",
    "leak": "nothing grows",
    "crowd": "a limiter gives no more turns than it has",
}

for _name in filter(None, os.environ.get("CHAOS_BROKEN", "").split(",")):
    BREAKS[_name]()
