"""A rate limiter backend for Dramatiq's limiters and barriers on a key-value bucket.

Every counter is one key, changed by compare-and-set only, so the server decides who was first. Keys carry their time to
live on the server: what a killed process held comes free when that is over. Threads of one process take turns for a
counter, so that only processes compete for it.

No interrupt can leave a turn taken, neither the one at the counter, which is a place in a line, nor the one that a
`ConcurrentRateLimiter` gives. An actor that is interrupted as it takes or gives back a turn is interrupted afterwards
(see `worker.interrupts`). A turn that it still has when it has ended, because it was interrupted before it could give
it back or because the server was away, is given back then.

A barrier that an actor reaches, as members of a group do, counts the message and not the call, because every message
may run twice. Its counter and a key for the member are changed together or not at all, and the key says whether this
member was the last. If the process dies before that, the member is not counted; afterwards it is, and its next run gets
the same answer as the first. Once the message has succeeded and its follow-ups are stored, no run is told any more that
it was the last: it would do again what waited for the barrier.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
from _thread import LockType, allocate_lock
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.rate_limits import ConcurrentRateLimiter, RateLimiterBackend
from dramatiq.rate_limits.backends.stub import StubBackend

from .backends import answer_for, broker_for
from .broker import JetStreamBroker
from .errors import (
    BrokerConnectionError,
    BrokerError,
    NotFound,
    RevisionConflict,
    StoreTimeout,
    TopologyMissing,
)
from .jetstream.wakeups import Wakeups
from .worker.current import current_message
from .worker.interrupts import uninterrupted
from .worker.message import JetStreamMessage

__all__ = ["JetStreamBackend", "Limit", "limits_in_use"]

logger = logging.getLogger(__name__)

#: How many counters may be changed at once in one process; others wait for their turn.
TURNS = 64

#: How often a waiting thread looks whether it has the turn, in case it was not told.
LOOK_AGAIN_SECONDS = 0.1

#: The longest pause, in seconds, after another process was first.
LONGEST_PAUSE_SECONDS = 0.05

# Levels of a bucket's keys are separated by dots. Limiters put what belongs together before an "@", as in
# "name@1700000000", and sum over it: that is their level.
_TO_LEVELS = str.maketrans("@.", ".@")

# The key of a barrier's member.
_MEMBER = re.compile(r"\.member\.[0-9a-f]{32}$")


class JetStreamBackend(RateLimiterBackend):
    """Counts in JetStream, exactly, for any number of threads, processes and machines.

    Parameters:
      broker: The broker whose connection, namespace and replicas are used; None makes one of its own. On Dramatiq's
        `StubBroker` everything is kept in memory.
      url: Where to connect without a broker; None takes `NATS_URL`, then localhost.

    Times to live are rounded up to whole seconds, in which the server counts them. Every method raises
    `BrokerConnectionError` when the server did not answer within the broker's `enqueue_timeout`; whether
    the counter was changed is then not known, and its time to live puts it right.

    Examples:
      >>> from dramatiq.rate_limits import ConcurrentRateLimiter
      >>> from dramatiq_jetstream.rate_limits import JetStreamBackend
      >>> limits = JetStreamBackend(broker)
      >>> scanner = ConcurrentRateLimiter(limits, "scanner", limit=1, ttl=60_000)
      >>> with scanner.acquire(), scanner.acquire(raise_on_failure=False) as second:
      ...     print(second)
      False
    """

    def __init__(self, broker: Broker | None = None, *, url: str | Iterable[str] | None = None) -> None:
        self._taking = _Taking()
        if isinstance(broker, StubBroker):
            self._own = False
            answer_for(self, self.stub())
            return
        self.broker, self._own = broker_for(broker, url)
        self.broker.backends.add(self)
        self.bucket = self.broker.declarations.announcing_bucket("rate-limits")
        self._wakeups = Wakeups(self.bucket)
        self._reset()

    def stub(self) -> RateLimiterBackend:
        """A backend in memory, for tests."""
        return StubBackend()

    def _reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork, where no thread would give back a turn."""
        self._process = os.getpid()
        self._turns = [_Turns() for _ in range(TURNS)]

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Store a counter if there is none; returns whether there was none."""
        name = _name(key)

        def change(_: float) -> bool:
            if self.bucket.get(name) is not None:
                return False
            try:
                self.bucket.update(name, b"%d" % value, revision=0, ttl=ttl)
            except RevisionConflict:
                return False
            return True

        return self._in_turn(name, change)

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Add `amount`, unless that exceeds `maximum`; returns whether it was added."""
        change = self._change(key, amount, ttl, lambda value: value <= maximum)
        return self._in_turn(_name(key), change)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Subtract `amount`, unless that goes below `minimum`; returns whether it was subtracted.

        Counting one down to one is what barriers do, and no limiter: an actor's message is counted once, however
        often it runs.
        """
        message = current_message.get()
        if amount == minimum == 1 and isinstance(message, JetStreamMessage):
            return not self._is_last(key, message, ttl)
        change = self._change(key, -amount, ttl, lambda value: value >= minimum)

        def give_back(deadline: float) -> bool:
            try:
                given = change(deadline)
            except StoreTimeout:  # if it was given back, doing so again would let one too many in
                self._forget_turn(key)
                raise
            self._forget_turn(key)
            return given

        return self._in_turn(_name(key), give_back)

    def _is_last(self, key: str, message: JetStreamMessage, ttl: int) -> bool:
        """Count a message among the members of a barrier; returns whether it is the last that was missing."""
        counter = _name(key)
        digest = hashlib.sha256(message.message_id.encode("utf-8", "surrogatepass")).hexdigest()
        member = f"{counter}.member.{digest[:32]}"

        def change(deadline: float) -> bool:
            for _ in self._attempts(key, deadline):
                entry = self.bucket.get(counter)
                if entry is not None:
                    value = b"%d" % max(0, int(entry.value) - 1)
                    try:
                        changes = {counter: (value, entry.revision), member: (value, 0)}
                        self.bucket.update_all(changes, ttl=ttl)
                        return self._told(value, member, message, ttl)
                    except RevisionConflict:
                        pass  # this member was counted before, or another one was faster
                    except BrokerConnectionError:
                        if time.monotonic() >= deadline:
                            raise
                counted = self.bucket.get(member)
                if counted is not None:
                    return self._told(counted.value, member, message, ttl)
                if entry is None:
                    logger.error("Barrier %r has expired or was never made: nothing waits for it.", key)
                    return False
            raise AssertionError("unreachable: attempts end with an error")

        return self._in_turn(counter, change)

    def _told(self, missing: bytes, member: str, message: JetStreamMessage, ttl: int) -> bool:
        """Whether a member is the last, by how many were missing after it; it is so until its work is done."""
        if missing != b"0":
            return False
        message.once_followed_up += (lambda: self._note_done(member, ttl),)
        return True

    def _note_done(self, member: str, ttl: int) -> None:
        with suppress(BrokerError):  # without it, a further run of the message repeats what it did
            self.bucket.note(member, b"done", ttl=ttl)

    def _change(
        self, key: str, amount: int, ttl: int, allowed: Callable[[int], bool]
    ) -> Callable[[float], bool]:
        """What adds `amount` to a counter if the sum is `allowed`."""
        name = _name(key)

        def change(deadline: float) -> bool:
            for _ in self._attempts(key, deadline):
                entry = self.bucket.get(name)
                value = amount + (0 if entry is None else int(entry.value))
                if not allowed(value):
                    return False
                revision = 0 if entry is None else entry.revision
                try:
                    self.bucket.update(name, b"%d" % value, revision=revision, ttl=ttl)
                    return True
                except RevisionConflict:
                    continue
            raise AssertionError("unreachable: attempts end with an error")

        return change

    def incr_and_sum(
        self, key: str, keys: Callable[[], Iterable[str]], amount: int, maximum: int, ttl: int
    ) -> bool:
        """Add `amount` to `key`, unless the sum over `keys()` exceeds `maximum`; returns whether it was added.

        Keys with the same text before their last "@" are compared and set as one.
        """
        name = _name(key)
        group = _group([name, *map(_name, keys())])

        def change(deadline: float) -> bool:
            for _ in self._attempts(key, deadline):
                seen = self.bucket.snapshot(group)
                counters = {other: int(entry.value) for other, entry in seen.entries.items()}
                value = counters.get(name, 0) + amount
                total = amount + sum(counters.get(_name(other), 0) for other in keys())
                if value > maximum or total > maximum:
                    return False
                try:
                    self.bucket.update(name, b"%d" % value, revision=seen.revision, ttl=ttl, within=group)
                    return True
                except RevisionConflict:
                    continue
            raise AssertionError("unreachable: attempts end with an error")

        return self._in_turn(group, change)

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait for `wait_notify`; returns whether it came, before or meanwhile.

        Parameters:
          timeout: Milliseconds to wait at most; None waits until it comes.
        """
        name = _name(key)
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        notified = threading.Event()
        with self._wakeups.waiting([name], notified) as waiter:
            while True:
                notified.clear()
                if self.bucket.get(name) is not None:
                    return True
                left = 3600.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return False
                if not waiter.subscribe():
                    self._wakeups.wait(notified, left)

    def wait_notify(self, key: str, ttl: int) -> None:
        """Wake all that wait for the key, and those that come within `ttl` milliseconds."""
        self.bucket.put(_name(key), b"", ttl=ttl)

    def close(self) -> None:
        """Close the connection if it is this backend's own."""
        if self._own:
            self.broker.close()

    def _in_turn(self, name: str, change: Callable[[float], bool]) -> bool:
        """Wait for this thread's turn to change a counter, and call `change` with the time until which it may try.

        No interrupt strikes in `change`: whether the server has done it would not be known.
        """
        if self._process != os.getpid():
            self._reset()

        def whole(deadline: float) -> bool:
            return uninterrupted(lambda: self._note_turn(change(deadline)))

        return self._turns[hash(name) % TURNS].serve(name, whole, self.bucket.connection.timeout / 1000)

    def _note_turn(self, changed: bool) -> bool:
        """Note that the running actor has taken a turn, so that it is given back however the actor ends."""
        limiter, message = self._taking.limiter, current_message.get()
        if changed and limiter is not None and isinstance(message, JetStreamMessage):
            message.turns += ((limiter.key, limiter._release),)
        return changed

    def _forget_turn(self, key: str) -> None:
        """Note that the running actor has given a turn back."""
        message = current_message.get()
        if isinstance(message, JetStreamMessage):
            kept = list(message.turns)
            position = next((n for n, (taken, _) in enumerate(kept) if taken == key), None)
            if position is not None:
                del kept[position]
                message.turns = tuple(kept)

    def _attempts(self, key: str, deadline: float) -> Iterator[int]:
        """Yield until the deadline, with pauses in which another process may get through.

        Raises:
          BrokerConnectionError: After the deadline.
        """
        attempt = 0
        while True:
            yield attempt
            if time.monotonic() >= deadline:
                raise BrokerConnectionError(
                    f"Other processes changed {key!r} {attempt + 1} times while it was tried; giving up."
                )
            time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.001 * 2 ** min(attempt, 10))))
            attempt += 1


@dataclass(frozen=True)
class Limit:
    """A counter of a limiter or a barrier that is not zero.

    Attributes:
      key: As the limiter names it.
      value: What is taken or, of a barrier, missing; of a limiter that counts by time, the sum of what it keeps.
      changed: When it was changed last, in milliseconds since 1970.

    Examples:
      >>> from dramatiq_jetstream.rate_limits import JetStreamBackend, limits_in_use
      >>> added = JetStreamBackend(broker).add("doors", 2, ttl=60_000)
      >>> [(limit.key, limit.value) for limit in limits_in_use(broker) if limit.key == "doors"]
      [('doors', 2)]
    """

    key: str
    value: int
    changed: int


def limits_in_use(broker: JetStreamBroker) -> list[Limit]:
    """The counters of a namespace that are not zero, by their keys.

    Raises:
      BrokerConnectionError: When the server does not answer in time.

    Examples:
      >>> from dramatiq.rate_limits import ConcurrentRateLimiter
      >>> from dramatiq_jetstream.rate_limits import JetStreamBackend, limits_in_use
      >>> with ConcurrentRateLimiter(JetStreamBackend(broker), "printer", limit=3).acquire():
      ...     [limit.value for limit in limits_in_use(broker) if limit.key == "printer"]
      [1]
    """
    found: dict[str, Limit] = {}
    with suppress(NotFound, TopologyMissing):  # there never was a limiter
        for entry in broker.declarations.announcing_bucket("rate-limits").items():
            if not entry.value.isdigit() or not int(entry.value) or _MEMBER.search(entry.key):
                continue
            key = entry.key.translate(_TO_LEVELS)
            name, _, moment = key.rpartition("@")
            key = name if name and moment.isdigit() and len(moment) >= 10 else key  # seconds since 1970
            known = found.get(key, Limit(key, 0, 0))
            found[key] = Limit(key, known.value + int(entry.value), max(known.changed, entry.created))
    return [found[name] for name in sorted(found)]


class _Turns:
    """Threads that wait for their turn, first come, first served.

    The first in the line has the turn: nothing is taken or given back. A thread stands in the line from the
    first instruction of its `try` to the first of its `finally`, so an interrupt ends its turn whenever it strikes. If
    that is before the next thread was told, that thread looks by itself after at most `LOOK_AGAIN_SECONDS`.
    """

    def __init__(self) -> None:
        self._bells: deque[LockType] = deque()

    def serve(self, name: str, change: Callable[[float], bool], seconds: float) -> bool:
        """Call `change` with a deadline in `seconds` from now when it is this thread's turn.

        Raises:
          BrokerConnectionError: When it was not by then.
        """
        deadline = time.monotonic() + seconds
        bell = allocate_lock()
        bell.acquire()
        try:
            self._bells.append(bell)
            while self._bells[0] is not bell:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BrokerConnectionError(
                        f"Other threads of this process did not finish with {name!r} within {seconds * 1000:.0f} ms."
                    )
                bell.acquire(timeout=min(left, LOOK_AGAIN_SECONDS))
            return change(deadline)
        finally:
            self._bells.remove(bell)
            with suppress(IndexError, RuntimeError):  # the line is empty, or the next was told already
                self._bells[0].release()


_take_turn: Callable[[ConcurrentRateLimiter], bool] = ConcurrentRateLimiter._acquire


def _acquire(limiter: ConcurrentRateLimiter) -> bool:
    """Take a turn as Dramatiq does; one that an actor takes is noted before it can be interrupted."""
    backend = limiter.backend
    if not isinstance(backend, JetStreamBackend):
        return _take_turn(limiter)
    backend._taking.limiter = limiter
    try:
        return _take_turn(limiter)
    finally:
        backend._taking.limiter = None


ConcurrentRateLimiter._acquire = _acquire  # type: ignore[method-assign]


class _Taking(threading.local):
    """The limiter at which the calling thread takes a turn just now."""

    limiter: ConcurrentRateLimiter | None = None


def _name(key: str) -> str:
    return key.translate(_TO_LEVELS)


def _group(names: list[str]) -> str:
    """The level that all names are on; the whole bucket if they are not on one."""
    levels = {name.rpartition(".")[0] for name in names}
    level = levels.pop()
    return f"{level}." if level and not levels else ""
