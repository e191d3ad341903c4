"""Periodic tasks without a scheduler process: the schedules live in JetStream, which stores every tick.

An actor with the option `cron=` or `every=` has one schedule, on a subject of its own in its queue's stream.
The server stores a message for each tick on the queue; whoever works it off, works it off once. A worker
that boots stores the schedule only if it is missing or differs, with a compare-and-set on what it saw, so any
number of workers may boot at once: the schedule is there once, and its phase is not disturbed.

An option that was changed changes the schedule at the next boot, one that was removed removes it. Schedules of
actors that a program does not know are left alone; `fleet schedules` shows and removes them.

Ticks that were due while the server was down are not made up for one by one: when it is back it stores one,
if any was due, and goes on from there. Ticks that no worker takes wait in the queue as all messages do; give the
actor a `max_age` if a late tick is of no use.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import dramatiq
from dramatiq.actor import Actor
from dramatiq.broker import Broker, MessageProxy
from dramatiq.errors import BrokerConnectionError, BrokerError
from dramatiq.message import Message
from dramatiq.middleware import Middleware, MiddlewareError

from .broker import JetStreamBroker
from .errors import ApiError, InvalidOption, NotFound
from .jetstream import cron
from .jetstream.inventory import queue_names
from .jetstream.names import (
    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE,
    HEADER_MSG_ID,
    HEADER_SCHEDULE,
    HEADER_SCHEDULE_NEXT,
    HEADER_SCHEDULE_TARGET,
    HEADER_SCHEDULE_ZONE,
    HEADER_TICK,
    decode,
    encode,
    queue_key,
)
from .jetstream.reading import StoredMessage, last_message
from .kv import Bucket
from .sending import delays
from .wire.error_numbers import CONFLICT
from .worker.consumer import JetStreamMessage

__all__ = ["InvalidSchedule", "Periodic", "Schedule", "list_schedules", "remove_schedule"]

logger = logging.getLogger(__name__)

#: Where the last tick of each schedule is noted, for people.
BUCKET = "ticks"

#: Seconds between two tries to store the schedules when NATS cannot be reached at boot.
RETRY = 2.0


class InvalidSchedule(InvalidOption, MiddlewareError):
    """Options of a periodic actor that cannot be used; raised where the actor is declared."""


@dataclass(frozen=True)
class Schedule:
    """A schedule as the server has it. Times are milliseconds since 1970, None when not known.

    `orphan` says that the actor is not declared in the program that asks, or no longer periodic there.
    """

    actor: str
    queue: str
    schedule: str
    timezone: str | None
    last_tick: int | None
    next_tick: int | None
    orphan: bool


class Periodic(Middleware):
    """Middleware with the actor options `cron`, `every` (milliseconds) and `timezone` (an IANA name)."""

    @property
    def actor_options(self) -> set[str]:
        return {"cron", "every", "timezone"}

    def before_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        try:
            expression = expression_of(actor)
        except InvalidOption as error:
            raise InvalidSchedule(f"Actor {actor.actor_name!r}: {error}") from None
        if expression is not None and not isinstance(broker, JetStreamBroker):
            raise InvalidSchedule(f"Actor {actor.actor_name!r} is periodic, which needs a JetStreamBroker.")

    def setup_topology(self, broker: JetStreamBroker, *, update: bool = False) -> dict[str, str]:
        """Bring the schedules in line with the actors' options; called by `broker.setup`."""
        _ticks(broker).declare(update=update)
        return _reconcile(broker)

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        """Bring the schedules in line, now or as soon as NATS can be reached."""
        if not isinstance(broker, JetStreamBroker) or not broker.config.declare:
            return
        try:
            self.setup_topology(broker)
        except BrokerConnectionError as error:
            logger.warning("The schedules of periodic actors could not be stored yet: %s", error)
            threading.Thread(target=self._keep_trying, args=(broker,), daemon=True).start()

    def _keep_trying(self, broker: JetStreamBroker) -> None:
        pause = threading.Event()
        while not pause.wait(RETRY):
            try:
                self.setup_topology(broker)
                return
            except BrokerConnectionError:
                if broker.connection.is_closed:
                    return
            except BrokerError:
                logger.exception("The schedules of periodic actors could not be stored.")
                return

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if not isinstance(message, JetStreamMessage) or not isinstance(broker, JetStreamBroker):
            return
        delivery = message._delivery
        if not delivery.mentions(HEADER_TICK):
            return
        name = delivery.headers.get(HEADER_TICK)
        if name is None:
            return
        noted = {"last": delivery.timestamp, "next": delivery.headers.get(HEADER_SCHEDULE_NEXT)}
        try:
            _ticks(broker).note(queue_key(message.queue_name, decode(name)), json.dumps(noted).encode())
        except BrokerError as error:
            logger.warning("The tick of %s was not noted: %s", decode(name), error)


def expression_of(actor: Actor[Any, Any]) -> cron.Expression | None:
    """When an actor is due; None when it is not periodic. Raises InvalidOption."""
    options = actor.options
    return cron.read(options.get("cron"), options.get("every"), options.get("timezone"))


def _ticks(broker: JetStreamBroker) -> Bucket:
    return broker.bucket(BUCKET)


def _reconcile(broker: JetStreamBroker) -> dict[str, str]:
    outcome: dict[str, str] = {}
    for queue in sorted(broker.queues):
        broker.declarations.ensure_queue(queue)
        for name in _scheduled(broker, queue):
            actor = broker.actors.get(name)
            if actor is not None and (actor.queue_name != queue or expression_of(actor) is None):
                remove_schedule(broker, queue, name)
                outcome[f"schedule {name}"] = "removed"
    for name, actor in sorted(broker.actors.items()):
        expression = expression_of(actor)
        if expression is not None:
            outcome[f"schedule {name}"] = _store(broker, actor, expression)
    return outcome


def _scheduled(broker: JetStreamBroker, queue: str) -> list[str]:
    stream = broker.names.queue_stream(queue)
    try:
        subjects = list(delays.subjects(broker.connection, stream, broker.names.all_periodic(queue)))
    except NotFound:
        return []
    return sorted(decode(subject.rpartition(".")[2]) for subject in subjects)


def _store(broker: JetStreamBroker, actor: Actor[Any, Any], expression: cron.Expression) -> str:
    """Store a schedule unless it is there just so; whoever is first wins, and the others see that."""
    queue, name = actor.queue_name, actor.actor_name
    stream, subject = broker.names.queue_stream(queue), broker.names.periodic(queue, name)
    message: Message[Any] = Message(queue, name, (), {}, {}, message_id=name)
    wanted = {
        HEADER_SCHEDULE: expression.schedule,
        HEADER_SCHEDULE_TARGET: broker.names.task(queue),
        HEADER_TICK: encode(name),
    }
    if expression.zone is not None:
        wanted[HEADER_SCHEDULE_ZONE] = expression.zone
    while True:
        existing = last_message(broker.connection, stream, subject)
        if existing is not None and _same(existing, wanted):
            return "unchanged"
        headers = {
            **wanted,
            HEADER_MSG_ID: uuid.uuid4().hex,
            HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(0 if existing is None else existing.sequence),
        }
        try:
            broker.connection.publish(subject, message.encode(), headers)
        except ApiError as error:
            if error.err_code not in CONFLICT:
                raise
        else:
            return "created" if existing is None else "updated"


def _same(existing: StoredMessage, wanted: dict[str, str]) -> bool:
    names = (HEADER_SCHEDULE, HEADER_SCHEDULE_TARGET, HEADER_SCHEDULE_ZONE, HEADER_TICK)
    return all(existing.headers.get(name) == wanted.get(name) for name in names)


def list_schedules(broker: JetStreamBroker) -> list[Schedule]:
    """The schedules of all queues of the broker's namespace."""
    found: list[Schedule] = []
    for queue in queue_names(broker.connection, broker.names):
        for name in _scheduled(broker, queue):
            stored = last_message(
                broker.connection, broker.names.queue_stream(queue), broker.names.periodic(queue, name)
            )
            if stored is not None:
                found.append(_describe(broker, queue, name, stored))
    return found


def _describe(broker: JetStreamBroker, queue: str, name: str, stored: StoredMessage) -> Schedule:
    zone = stored.headers.get(HEADER_SCHEDULE_ZONE)
    expression = cron.Expression("", stored.headers.get(HEADER_SCHEDULE, ""), zone)
    try:
        entry = _ticks(broker).get(queue_key(queue, name))
    except BrokerError:
        entry = None
    noted = {} if entry is None else json.loads(entry.value)
    last = noted.get("last")
    next_tick = expression.next(delays.now())
    if next_tick is None and noted.get("next"):
        next_tick = int(datetime.fromisoformat(noted["next"]).timestamp() * 1000)
    actor = broker.actors.get(name)
    orphan = actor is None or actor.queue_name != queue or expression_of(actor) is None
    return Schedule(name, queue, expression.schedule, zone, last, next_tick, orphan)


def remove_schedule(broker: JetStreamBroker, queue: str, actor: str) -> bool:
    """Remove a schedule; False when there is none."""
    stream = broker.names.queue_stream(queue)
    try:
        answer = broker.connection.api(
            f"STREAM.PURGE.{stream}", {"filter": broker.names.periodic(queue, actor)}
        )
    except NotFound:
        return False
    return bool(answer.get("purged"))
