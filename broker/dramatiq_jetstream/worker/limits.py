"""Keeps the limits of actors: a message runs, waits for its moment, or waits in line for a turn (see `limits`).

Each limit is one key of the bucket `limits`, for one actor and one value of its key, changed by compare-and-set on a
worker thread before the actor and its middleware. So what counts is the start, however long a message was prefetched.

A start is noted with the latest moment at which it may be made, and made when middleware is done: the last thing that
a thread does before it calls the actor is to look whether it is still in time. One that is not, however long it was
held up, and by whatever, notes another start, or puts its message off if none is free. So by the server's clock, as
these looks read it, no period has more starts than the rate. Between that look and the actor's first line, which are a
few microseconds of Python, a thread may be held up for `limit_state.GUARD_MS` without a period having more there. The
lines of an `async` actor run on another thread, which is not counted.

A message that is over the limit is an ordinary delayed message: it is stored with its delay first and acked
afterwards, as often as it likes, since it uses no retry and no delivery.

*Rate.* It gets a moment of its own, once, and is delayed until then. It carries its moment along. If the fleet falls
behind, it is delayed once more for that, and keeps its place (see `limit_state`). The server is up to 250 ms late; what
comes up to half a second early is held in this process, and in no thread.

*Concurrency.* It waits in line: delayed for an hour, under a subject that ends in a token of the limit. A message that
ends gives its turn to the first in line, which is stored on its queue in that moment, on the condition that it still
waits, and then removed from the line. Nothing polls.

If the process dies with a running message, that message comes again after `ack_wait`, and still has its turn: no turn
expires. If it dies while it hands on a turn, its message is not acked either, comes again, finds what was begun, and
ends it. A turn whose message is gone from its stream (dropped by an operator, or given up in an outage) is found by the
next message that comes, or by the first in line after its hour. Where the server cannot be asked now, messages go back
to it with a delay. A start that was noted by a process that dies before it is made counts for its period.

A message that waits costs four writes with a rate and eight with a concurrency, and as many more after an outage of the
fleet.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dramatiq.errors import ActorNotFound, BrokerConnectionError, BrokerError

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import RevisionConflict
from dramatiq_jetstream.jetstream.names import HEADER_MOMENT, HEADER_ORIGIN, encode, short_key
from dramatiq_jetstream.jetstream.reading import StoredMessage, first_message, message_at
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.limits import Limit, Rate, Snooze, limit_of
from dramatiq_jetstream.sending import delays
from dramatiq_jetstream.wire.connection import Connection

from .delivery import Delivery
from .later import Later
from .limit_state import LimitState, Start, Turn
from .message import JetStreamMessage
from .places import Place
from .rerouting import Rerouter
from .server_clock import ServerClock

__all__ = ["BUCKET", "Limits", "MissedStart"]

#: The bucket of the limits' states.
BUCKET = "limits"

#: The worker thread itself waits for a moment that is at most SOON_MS away. Until one that is at most HOLD_MS away the
#: message waits in the process, and in no thread; until a later one it waits on the server. Milliseconds.
SOON_MS = 20
HOLD_MS = 500

#: After this long in line, in milliseconds, a message comes by itself and looks.
LINE_MS = 3_600_000

#: A process checks at most once in this time, in milliseconds, whether the messages that have a limit's turns still
#: exist. It does not doubt a younger turn.
DOUBT_MS = 30_000

#: A message that was given a turn is called again when it has not come after CALL_AGAIN_MS, and loses the turn after
#: ON_ITS_WAY_MS. Milliseconds.
ON_ITS_WAY_MS = 300_000
CALL_AGAIN_MS = 2_000

#: The pause before a turn is given back again that could not be given back, and how long that is tried, in seconds.
RETRY_SECONDS = 1.0
GIVE_UP_SECONDS = 3_600.0

#: How long a thread gets at first, in milliseconds, from noting a start to its actor. While it is too late, each
#: further start of the message gets twice as long, up to MOST_DOUBLED times.
AHEAD_MS = 5
MOST_DOUBLED = 7

#: The delay, in milliseconds, of a message whose start cannot be noted now.
UNKNOWN_MS = 1_000

#: The longest pause, in seconds, before a change is tried again that another process was faster with.
LONGEST_PAUSE_SECONDS = 0.05

#: How many limits the threads of one process may change at the same time.
PLACES = 64

logger = logging.getLogger(__name__)


class MissedStart(Snooze):
    """Puts off a message that came to its actor too late for the start that was noted for it."""


class Limits:
    """The limits of the actors of one process.

    Parameters:
      bucket: Returns the bucket of the states, which is made when there is the first limit.
      actor: Returns the actor of that name.
      put_back: Takes a message that was held, to be begun once more.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        rerouter: Rerouter,
        *,
        bucket: Callable[[], Bucket],
        actor: Callable[[str], Any],
        put_back: Callable[[JetStreamMessage], None],
    ) -> None:
        self._config = config
        self._connection = connection
        self._rerouter = rerouter
        self._bucket = bucket
        self._actor = actor
        self._put_back = put_back
        rerouter.given_up = self._give_up
        self._later = Later()
        self._clock = ServerClock(connection, bucket)
        self.reset()

    def reset(self) -> None:
        """Start with nothing: at creation, and in the child of a fork."""
        self._later.reset()
        self._places = [Place() for _ in range(PLACES)]
        self._limits: dict[str, Limit | None] = {}
        self._ahead_ms = AHEAD_MS
        self._doubted: dict[str, float] = {}
        self._held: dict[int, JetStreamMessage] = {}

    # For the threads of the worker

    def of(self, message: JetStreamMessage) -> Limit | None:
        """Return the limit of a message's actor, None for one that has none."""
        name = message.actor_name
        try:
            return self._limits[name]
        except KeyError:
            pass
        try:
            limit = self._limits[name] = limit_of(self._actor(name))
        except ActorNotFound:
            return None
        return limit

    def enter(self, message: JetStreamMessage) -> bool:
        """Let a message run, or have it wait; returns whether it may run. Nothing is raised."""
        limit = self.of(message)
        if limit is None:
            return True
        delivery = message._delivery
        try:
            if delivery.source.actor is not None:  # an event has no place in a queue yet
                self._rerouter.make_message(message)
                return False
            name = _name(message, limit)
            with self._place(name).turn(delivery.sequence):
                return self._enter(message, limit, name)
        except BrokerError as error:
            logger.warning("The limits of message %s are not known now: %s", message.message_id, error)
            self._rerouter.requeue_later(delivery, error)
        return False

    def leave(self, message: JetStreamMessage) -> None:
        """Give back the turn of a message whose attempt has ended; again later, if that is not possible now."""
        limit = self.of(message)
        if limit is not None and limit.concurrency is not None:
            self._try_to_leave(_name(message, limit), limit, message, time.monotonic() + GIVE_UP_SECONDS)

    def _give_up(self, delivery: Delivery) -> None:
        """Give back the turn of a message whose workers died of it, one after the other."""
        with contextlib.suppress(BrokerError):
            message, arguments = delivery.source.decode(delivery)
            self.leave(JetStreamMessage(message, delivery, arguments))

    def requeue_held(self) -> None:
        """Return what is held to the server, because this worker stops."""
        for key in list(self._held):
            message = self._held.pop(key, None)
            if message is not None:
                self._rerouter.requeue(message._delivery)

    def _place(self, name: str) -> Place:
        return self._places[hash(name) % PLACES]

    def _states(self, name: str) -> Iterator[tuple[LimitState, Callable[[Limit], bool]]]:
        """The state of a limit, again and again, each with what stores it if no other process was faster."""
        bucket = self._bucket()
        deadline = time.monotonic() + self._connection.timeout / 1000
        for attempt in itertools.count():
            entry = bucket.get(name)
            state = LimitState() if entry is None else LimitState.decode(entry.value)
            yield state, partial(self._store, bucket, name, state, 0 if entry is None else entry.revision)
            if time.monotonic() >= deadline:
                raise BrokerConnectionError(
                    f"other processes changed it {attempt + 1} times while it was tried"
                )
            time.sleep(min(LONGEST_PAUSE_SECONDS, 0.001 * 2 ** min(attempt, 10)) * _share())

    def _store(self, bucket: Bucket, name: str, state: LimitState, revision: int, limit: Limit) -> bool:
        ttl = state.kept_ms(limit.rate, self._clock.now())
        try:
            bucket.update(name, state.encode(), revision=revision, ttl=ttl)
        except RevisionConflict:
            return False
        return True

    def _enter(self, message: JetStreamMessage, limit: Limit, name: str) -> bool:
        delivery = message._delivery
        if limit.concurrency is not None and delivery.deliveries > 1 and self._resume(message, limit, name):
            return False
        for state, store in self._states(name):
            now = self._clock.now()
            before = state.encode()
            if limit.concurrency is not None and not self._take_turn(state, limit, name, delivery, now):
                if state.encode() != before and not store(limit):
                    continue
                self._stand_in_line(message, limit, name)
                return False
            if limit.rate is None:
                if state.encode() == before or store(limit):
                    return True
                continue
            moment = _moment_of(message)
            if moment is None:
                moment = state.reserve(limit.rate, now, SOON_MS)
            due = state.may_start(limit.rate, now) if moment is None else state.due(limit.rate, moment, now)
            if due <= now + SOON_MS:
                start = state.start(limit.rate, moment, now, max(now, due), now + self._ahead_ms)
                if not store(limit):
                    continue
                message.moment, message.start = moment, start
                return True
            turn = state.turn_of(delivery.origin)
            if turn is not None and due > now + HOLD_MS:
                turn.sequence, turn.since = 0, due
            if state.encode() != before and not store(limit):
                continue
            message.moment = moment
            self._wait_until(message, due, now)
            return False
        return False

    def begin(self, message: JetStreamMessage) -> None:
        """Wait for the start of a message that may run: the last thing before its actor.

        Raises:
          MissedStart: When that is over, and there is no other in a moment.
        """
        limit, start, message.start = self.of(message), message.start, None
        assert limit is not None
        assert limit.rate is not None
        assert start is not None
        name = _name(message, limit)
        try:
            if self._is_in_time(start):
                return
            with self._place(name).turn(message._delivery.sequence):
                wait = self._begin_again(message, start, limit, limit.rate, name)
        except BrokerError as error:
            logger.warning("The limits of message %s are not known now: %s", message.message_id, error)
            wait = UNKNOWN_MS
        if wait is not None:
            raise MissedStart(wait)

    def _is_in_time(self, start: Start) -> bool:
        """Wait until a start may be made; returns whether it is not too late for it."""
        took = self._clock.latest() - start.noted
        self._ahead_ms = min(SOON_MS, max(2, took * 3 // 2, self._ahead_ms - 1))
        wait = start.earliest - self._clock.now()
        if wait > 0:
            time.sleep(wait / 1000)
        return self._clock.latest() <= start.latest

    def _begin_again(
        self, message: JetStreamMessage, missed: Start, limit: Limit, rate: Rate, name: str
    ) -> int | None:
        """Note another start in place of a missed one, and wait for it; or return in how many ms there is one."""
        for tries, (state, store) in enumerate(self._states(name)):
            now = self._clock.now()
            state.withdraw(rate, missed)
            due = state.may_start(rate, now)
            if due > now + SOON_MS:
                if not store(limit):
                    continue
                if message.moment is None:
                    message.moment = missed.earliest
                return due - now
            latest = now + (self._ahead_ms << min(tries, MOST_DOUBLED))
            start = state.start(rate, None, now, max(now, due), latest)
            if not store(limit):
                continue
            if self._is_in_time(start):
                return None
            missed = start
        return UNKNOWN_MS

    def _wait_until(self, message: JetStreamMessage, due: int, now: int) -> None:
        """Have a message come again at its moment."""
        if due <= now + HOLD_MS:
            self._held[id(message)] = message
            self._later.call((due - now) / 1000, partial(self._release, id(message)))
        else:
            self._rerouter.put_off(message, due - now)

    def _release(self, key: int) -> None:
        message = self._held.pop(key, None)
        if message is not None:
            self._put_back(message)

    # Turns

    def _take_turn(self, state: LimitState, limit: Limit, name: str, delivery: Delivery, now: int) -> bool:
        """Give a message a turn, if it has none and one is free; returns whether it has one."""
        turn = state.turn_of(delivery.origin)
        if turn is not None:
            if turn.sequence != delivery.sequence:
                turn.sequence, turn.since = delivery.sequence, now
            return True
        assert limit.concurrency is not None
        if len(state.turns) >= limit.concurrency:
            self._drop_lost(state, name, delivery.stream, now)
            self._call_again(state, name, delivery.source.queue, now)
        if len(state.turns) >= limit.concurrency:
            return False
        state.turns.append(Turn(delivery.origin, delivery.sequence, now))
        return True

    def _drop_lost(self, state: LimitState, name: str, stream: str, now: int) -> None:
        """Drop the turns of messages that are gone."""
        if time.monotonic() - self._doubted.get(name, -DOUBT_MS) < DOUBT_MS / 1000:
            return
        if len(self._doubted) > 10_000:
            self._doubted.clear()
        self._doubted[name] = time.monotonic()
        for turn in list(state.turns):
            if turn.sequence == 0:
                lost = now > turn.since + ON_ITS_WAY_MS
            else:
                lost = (
                    now > turn.since + DOUBT_MS
                    and message_at(self._connection, stream, turn.sequence) is None
                )
            if lost:
                logger.warning(
                    "A turn at the limit %s is free again: its message %s is gone.", name, turn.origin
                )
                state.turns.remove(turn)

    def _call_again(self, state: LimitState, name: str, queue: str, now: int) -> None:
        """Call those that have a turn and still stand in line: the process that called them died before it did."""
        called = {
            turn.origin for turn in state.turns if turn.sequence == 0 and now > turn.since + CALL_AGAIN_MS
        }
        if called and state.line:
            for stored in itertools.islice(self._line(queue, name, state.line), len(state.turns)):
                if stored.headers.get(HEADER_ORIGIN) in called:
                    self._call(stored)

    def _resume(self, message: JetStreamMessage, limit: Limit, name: str) -> bool:
        """End what was begun by a process that had a message and died; returns whether it stands in line."""
        queue = message._delivery.source.queue
        sequence = self._rerouter.place_in_line(message, _line_token(name))
        state, _ = next(self._states(name))
        for stored in self._line(queue, name, 1):
            if stored.sequence > state.called:
                break
            self._call(stored)
        if sequence is None:
            return False
        self._note_in_line(message, limit, name, sequence)
        return True

    def _stand_in_line(self, message: JetStreamMessage, limit: Limit, name: str) -> None:
        """Store a message in the line, and have those that end know of it."""
        sequence = self._rerouter.stand_in_line(message, LINE_MS, _line_token(name), _moment_of(message))
        if sequence is not None:
            self._note_in_line(message, limit, name, sequence)

    def _note_in_line(self, message: JetStreamMessage, limit: Limit, name: str, sequence: int) -> None:
        """Note that a message stands in line, give away the turns that have come free meanwhile, and ack it.

        The state is stored whether or not it is another one. A message that ends may have looked for the first in line
        before this one was there: it fails to store what it made of that, and looks again.
        """
        for state, store in self._states(name):
            if state.line == 0 or state.line > sequence:
                state.line = sequence
            called = self._next(state, limit, name, message._delivery.source.queue)
            if store(limit):
                for stored in called:
                    self._call(stored)
                self._rerouter.leave_in_line(message)
                return

    def _try_to_leave(self, name: str, limit: Limit, message: JetStreamMessage, until: float) -> None:
        try:
            with self._place(name).turn(0):
                self._leave(name, limit, message._delivery)
        except Exception as error:  # noqa: BLE001 - the turn must be given back, and the caller has a message to settle
            if time.monotonic() > until:
                logger.warning("The turn of message %s is not given back: %s", message.message_id, error)
                return
            self._later.call(RETRY_SECONDS, partial(self._try_to_leave, name, limit, message, until))

    def _leave(self, name: str, limit: Limit, delivery: Delivery) -> None:
        for state, store in self._states(name):
            turn = state.turn_of(delivery.origin)
            if turn is None or turn.sequence != delivery.sequence:
                return  # it was given back, or is another delivery's by now
            state.give_back(delivery.origin)
            called = self._next(state, limit, name, delivery.source.queue)
            if store(limit):
                for stored in called:
                    self._call(stored)
                return

    def _next(self, state: LimitState, limit: Limit, name: str, queue: str) -> list[StoredMessage]:
        """Give the turns that are free to the first in line; returns these, to be called once that is stored."""
        called: list[StoredMessage] = []
        assert limit.concurrency is not None
        if not state.line or len(state.turns) >= limit.concurrency:
            return called
        # The line begins with those that were called before, until they are here: their caller may have died.
        is_awaited = any(turn.sequence == 0 for turn in state.turns)
        # Not from the one that was noted first: another may be stored before it, and not be noted yet.
        for stored in self._line(queue, name, state.called + 1):
            state.called = stored.sequence
            if not called and not is_awaited:
                state.line = stored.sequence
            origin = stored.headers.get(HEADER_ORIGIN, "")
            if state.turn_of(origin) is None:
                state.turns.append(Turn(origin, 0, self._clock.now()))
            called.append(stored)
            if len(state.turns) >= limit.concurrency:
                return called
        if not called and not is_awaited:
            state.line = 0
        return called

    def _line(self, queue: str, name: str, start: int) -> Iterator[StoredMessage]:
        """The messages that stand in line, the first first."""
        names = self._config.names
        stream, subject = names.queue_stream(queue), names.in_line(queue, _line_token(name))
        while (stored := first_message(self._connection, stream, subject, start)) is not None:
            yield stored
            start = stored.sequence + 1

    def _call(self, stored: StoredMessage, until: float | None = None) -> None:
        """Move a message that has a turn from its line to its queue; again later, if that is not possible now."""
        until = time.monotonic() + GIVE_UP_SECONDS if until is None else until
        try:
            delays.end_now(self._connection, stored)
        except Exception as error:  # noqa: BLE001 - no other process would call it
            if time.monotonic() > until:
                logger.warning("A message that waits for its turn is not called: %s", error)
                return
            self._later.call(RETRY_SECONDS, partial(self._call, stored, until))


def _share() -> float:
    """A number from 0 to 1, so that processes do not meet again."""
    return (time.perf_counter_ns() % 1_000) / 1_000


def _name(message: JetStreamMessage, limit: Limit) -> str:
    value = limit.value_of(message.args, message.kwargs)
    return short_key(f"{encode(message.actor_name)}.{encode(value)}")


def _line_token(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _moment_of(message: JetStreamMessage) -> float | None:
    """The moment that a message was given, now or when it was here before."""
    if message.moment is not None:
        return message.moment
    text = message.headers.get(HEADER_MOMENT) if message._delivery.is_marked else None
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
