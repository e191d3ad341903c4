"""Broken builds of the broker: each has one of the faults that the machine is there to find.

Each is a patch, the shortest program of the machine that shows the fault, and what the machine says of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from dramatiq.errors import BrokerError
from dramatiq.results import Results

from dramatiq_jetstream import rate_limits
from dramatiq_jetstream.errors import InvalidOption, NotSent
from dramatiq_jetstream.jetstream import ensuring
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.sending import delays, fitting, many, publications, sender, unique
from dramatiq_jetstream.wire import connection, lanes, link
from dramatiq_jetstream.wire.replies import check
from dramatiq_jetstream.wire.tls import Refused
from dramatiq_jetstream.worker import durables, follow_ups, rerouting

__all__ = ["BUILDS", "Build"]

Program = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Build:
    """A fault.

    Attributes:
      patch: Puts it into the code.
      program: The rules that show it, and what they draw.
      verdict: A part of what the machine says.
    """

    patch: Callable[[pytest.MonkeyPatch], None]
    program: Program
    verdict: str


BUILDS: dict[str, Build] = {}


def broken(
    *program: tuple[str, dict[str, Any]], verdict: str
) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    def note(patch: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        BUILDS[patch.__name__] = Build(patch, program, verdict)
        return patch

    return note


def step(rule: str, **drawn: Any) -> tuple[str, dict[str, Any]]:
    return rule, drawn


def _repeats_when_connected(patch: pytest.MonkeyPatch, method: str, words: str) -> None:
    """Have calls that have raised `NotSent` take effect as soon as the connection is known to be back."""
    original, confirm = getattr(connection.Connection, method), connection.Connection.confirm
    waiting: list[Callable[[], object]] = []

    def call(self: Any, name: str, *args: Any, **options: Any) -> Any:
        try:
            return original(self, name, *args, **options)
        except NotSent:
            if words in name:
                waiting.append(lambda: original(self, name, *args, **{**options, "timeout": 20_000}))
            raise

    def confirm_and_repeat(self: Any, **options: Any) -> None:
        confirm(self, **options)
        while waiting:
            with contextlib.suppress(BrokerError):
                waiting.pop(0)()

    patch.setattr(connection.Connection, method, call)
    patch.setattr(connection.Connection, "confirm", confirm_and_repeat)


@broken(
    step("send"),
    step("break_link", fault="lose"),
    step("put", key="y"),
    step("send"),
    verdict="told not to be stored, and ran",
)
def sends_later(patch: pytest.MonkeyPatch) -> None:
    """A message whose call has raised `NotSent` is stored when the connection is back."""
    _repeats_when_connected(patch, "publish", ".task")


@broken(
    step("break_link", fault="lose"),
    step("put", key="y"),  # so that the loss is noticed
    step("put", key="x"),
    step("repair"),
    step("get", key="x"),
    verdict="which is none of",
)
def puts_later(patch: pytest.MonkeyPatch) -> None:
    """A `put` that has raised `NotSent` overwrites what is there when the connection is back."""
    _repeats_when_connected(patch, "publish", "$KV.")


@broken(
    step("send"),
    step("break_link", fault="lose"),
    step("put", key="y"),
    step("purge"),
    step("send_from_elsewhere", later=True),
    verdict="is delayed within",
)
def purges_later(patch: pytest.MonkeyPatch) -> None:
    """A purge that has raised `NotSent` deletes what others have stored since."""
    _repeats_when_connected(patch, "api", "STREAM.PURGE.")


@broken(
    step("work_through", fault="lose", actor="late"),
    verdict="what was stored ran",
)
def forgets_retries(patch: pytest.MonkeyPatch) -> None:
    """A message is acked although its retry could not be stored, as when its time limit expired in an outage."""
    original = follow_ups.FollowUps.failed

    def middleware_failed(self: Any, middleware: Any, error: BaseException) -> None:
        if isinstance(middleware, Results):
            original(self, error)

    patch.setattr(follow_ups.FollowUps, "failed", lambda self, error: None)
    patch.setattr(follow_ups.FollowUps, "middleware_failed", middleware_failed)


@broken(
    step("work_through", fault="lose", actor="resultful"),
    verdict="has no result",
)
def forgets_results(patch: pytest.MonkeyPatch) -> None:
    """A message is acked although its result could not be stored."""
    others = tuple(each for each in follow_ups._MIDDLEWARE if each is not Results)
    patch.setattr(follow_ups, "_MIDDLEWARE", others)


@broken(
    step("group_through", fault="lose"),
    verdict="the callback of a group ran before",
)
def counts_runs(patch: pytest.MonkeyPatch) -> None:
    """A member of a group that runs twice is counted twice, so that the group's callback comes early."""

    def decr(self: Any, key: str, amount: int, minimum: int, ttl: int) -> bool:
        change = self._change(key, -amount, ttl, lambda value: value >= minimum)
        return bool(self._in_turn(rate_limits._name(key), change))

    patch.setattr(rate_limits.JetStreamBackend, "decr", decr)


@broken(
    step("send_unique_until_known", key="a", fault="deaf"),
    verdict="ran with the one key",
)
def frees_keys_too_early(patch: pytest.MonkeyPatch) -> None:
    """A unique key is freed by a call whose outcome is not known, so that the repeated call stores a second message."""

    def failed(self: unique.Claim, error: BaseException) -> None:
        with contextlib.suppress(BrokerError):
            self._bucket.delete(self._name, revision=self._revision)

    patch.setattr(unique.Claim, "failed", failed)


@broken(
    step("send_unique", key="a"),
    step("purge"),
    step("send_unique", key="a"),
    verdict="nothing was enqueued with the key",
)
def keeps_keys_at_a_flush(patch: pytest.MonkeyPatch) -> None:
    """A unique key stays taken when its queue is flushed."""
    patch.setattr(Bucket, "clear", lambda self, prefix: None)


@broken(
    step("send_much_later"),
    step("cancel", which=0, fault="cut"),
    verdict="was waiting, and cancelled 0 times",
)
def repeats_cancels(patch: pytest.MonkeyPatch) -> None:
    """A cancel that the loss of the connection repeats reports 0 for the delay that it has cancelled."""
    patch.setattr(connection, "ONCE", ())


@broken(
    step("send_many", count=3, atomic=False, too_large=True),
    verdict="one of 3 messages stopped the others",
)
def stops_a_batch_at_one_refusal(patch: pytest.MonkeyPatch) -> None:
    """One message of `enqueue_many` that is refused stops the others."""
    original = connection.Connection.try_publish_many

    def make_ready(self: Any, prepare: Callable[[Any], Any]) -> None:
        self._ready = [(position, prepare(message)) for position, message in enumerate(self._messages)]

    def try_publish_many(self: Any, publications: Any, **options: Any) -> Any:
        items = list(publications)
        for item in items:
            check(item, self._link.max_payload)
        return original(self, items, **options)

    patch.setattr(many.Many, "make_ready", make_ready)
    patch.setattr(connection.Connection, "try_publish_many", try_publish_many)


@broken(
    step("send"),
    step("break_link", fault="deaf"),
    *itertools.repeat(step("send_and_interrupt", after=20), 3),
    verdict="does not end",
)
def keeps_a_slot(patch: pytest.MonkeyPatch) -> None:
    """A call that is interrupted leaves a slot taken, for which all later calls wait."""
    slot = threading.Semaphore(1)
    original = lanes.Lanes.ask

    def ask(self: Any, *args: Any) -> Any:
        slot.acquire()
        try:
            reply = original(self, *args)
        except Exception:
            slot.release()
            raise
        slot.release()
        return reply

    patch.setattr(lanes.Lanes, "ask", ask)


@broken(
    step("break_link", fault="refuse"),
    step("send"),
    verdict="the connection came back",
)
def stays_away_after_a_refusal(patch: pytest.MonkeyPatch) -> None:
    """After a login that was refused, the connection is not made again."""
    original = link.open_client

    async def open_client(*args: Any) -> Any:
        try:
            return await original(*args)
        except Refused:
            await asyncio.sleep(math.inf)

    patch.setattr(link, "open_client", open_client)


@broken(
    step("send_soon", delay=-1),
    verdict="cannot be used",
)
def refuses_negative_delays(patch: pytest.MonkeyPatch) -> None:
    """A negative delay is refused, so that a retry with one becomes a dead letter."""
    original = delays.check_delay

    def check_delay(delay: object) -> int:
        if isinstance(delay, int) and delay < 0:
            raise InvalidOption(f"delay={delay!r} cannot be used")
        return original(delay)

    patch.setattr(delays, "check_delay", check_delay)


@broken(
    step("send"),
    step("delete", what="stream"),
    step("send"),
    verdict="it was not made again",
)
def makes_no_stream_again(patch: pytest.MonkeyPatch) -> None:
    """A queue's stream that was deleted is not made again by the next call."""
    patch.setattr(sender.Sender, "_make_again", lambda self, queue: False)


@broken(
    step("work_over_a_loss", what="consumer", stop=False),
    verdict="sent after a loss, ran",
)
def makes_no_consumer_again(patch: pytest.MonkeyPatch) -> None:
    """A consumer that was deleted under a worker is not made again, so that the worker stands still."""
    patch.setattr(durables.Durables, "_note_missing", lambda self, durable: None)


@broken(
    step("send", actor="wordy"),
    verdict="what was stored ran",
)
def lets_retries_grow(patch: pytest.MonkeyPatch) -> None:
    """A retry with a long traceback is larger than the server takes, and becomes a dead letter."""

    def fit(message: Any, *others: Any) -> Any:
        return message.encode()

    for module in (fitting, publications, rerouting):
        patch.setattr(module, "fit", fit)


@broken(
    step("work_over_a_loss", what="stream", stop=True),
    verdict="what was stored ran",
)
def answers_for_a_former_life(patch: pytest.MonkeyPatch) -> None:
    """Acks of a stream's former life remove messages of the stream that took its name."""
    original = durables.Durables._api

    async def api(self: Any, verb: str, body: Any = None) -> Any:
        reply = await original(self, verb, body)
        return {**reply, "created": ""} if verb.startswith("CONSUMER.INFO.") else reply

    async def is_intact(self: Any, durable: Any) -> bool:
        return True

    def note_missing(self: Any, durable: Any) -> None:
        durable.certain, durable.missing, durable._silent = False, True, False
        self._call(self._on_missing, durable)

    patch.setattr(ensuring, "first_sequence", lambda: 1)
    patch.setattr(durables.Durables, "_api", api)
    patch.setattr(durables.Durables, "_is_intact", is_intact)
    patch.setattr(durables.Durables, "_note_missing", note_missing)
