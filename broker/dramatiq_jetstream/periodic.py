"""Periodic tasks without a scheduler process: the schedules live in JetStream, which stores every tick.

An actor with the option `cron=` or `every=` has one schedule, on a subject of its own in its queue's stream.
The server stores a message for each tick on the queue; one worker runs it, once. A worker
that boots stores the schedule only if it is missing or differs, with a compare-and-set on what it saw, so any
number of workers may boot at once: the schedule is there once, and its phase is not disturbed.

An option that was changed changes the schedule when a worker boots, one that was removed removes it. Earlier
declarations are remembered, so an older process that boots later restores nothing. `fleet setup` only adds what is
missing; `fleet setup --update` brings everything in line, also with an earlier declaration. Schedules of actors that a
program does not know are left alone; `fleet schedules` shows and removes them.

Ticks that were due while the server was down are not made up for: when it is back it stores one, if any was due, and
goes on from there. Ticks that no worker takes wait in the queue like all messages; give the actor a `max_age` if a
late tick is of no use.
"""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import dramatiq
from dramatiq.actor import Actor
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import BrokerConnectionError, BrokerError
from dramatiq.message import Message
from dramatiq.middleware import Middleware, MiddlewareError

from .broker import ACTOR_OPTIONS, JetStreamBroker
from .errors import ApiError, InvalidOption, NotFound
from .jetstream import cron
from .jetstream.declared import Changes, Declared
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
from .worker.message import JetStreamMessage

__all__ = ["InvalidSchedule", "Periodic", "Schedule", "list_schedules", "remove_schedule"]

logger = logging.getLogger(__name__)

#: Where the last tick of each schedule is noted, for people.
BUCKET = "ticks"


class InvalidSchedule(InvalidOption, MiddlewareError):
    """Options of a periodic actor that cannot be used; raised where the actor is declared.

    Examples:
      >>> from dramatiq_jetstream.periodic import InvalidSchedule
      >>> try:
      ...     dramatiq.actor(lambda: None, actor_name="often", every=10)
      ... except InvalidSchedule:
      ...     print("`every` is whole seconds, in milliseconds")
      `every` is whole seconds, in milliseconds
    """


@dataclass(frozen=True)
class Schedule:
    """A schedule as the server has it. Times are milliseconds since 1970, None when not known.

    `orphan` says that the actor is not declared in the program that asks, or no longer periodic there. It is not an
    orphan when `module`, which declared it, exists and was not imported. A `paused` one has no next tick.

    Examples:
      >>> from dramatiq_jetstream.periodic import list_schedules
      >>> schedule = list_schedules(broker)[0]
      >>> schedule.actor, schedule.schedule, schedule.paused
      ('nightly', '0 0 3 * * *', False)
    """

    actor: str
    queue: str
    schedule: str
    timezone: str | None
    last_tick: int | None
    next_tick: int | None
    orphan: bool
    module: str | None = None
    paused: bool = False


class Periodic(Middleware):
    """Middleware with the actor options `cron`, `every` (milliseconds) and `timezone` (an IANA name).

    On Dramatiq's `StubBroker` they are checked and nothing ticks; `testing.StubBroker` ticks when a test advances time.

    Examples:
      >>> from dramatiq_jetstream.periodic import Periodic
      >>> broker = JetStreamBroker(namespace="shop")
      >>> broker.add_middleware(Periodic())
      >>> @dramatiq.actor(broker=broker, cron="0 3 * * *", timezone="Europe/Berlin", max_age=3_600_000)
      ... def clean(): ...
    """

    @property
    def actor_options(self) -> set[str]:
        return {"cron", "every", "timezone", *ACTOR_OPTIONS}

    def before_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        try:
            expression = expression_of(actor)
        except InvalidOption as error:
            raise InvalidSchedule(f"Actor {actor.actor_name!r}: {error}") from None
        if expression is not None and not isinstance(broker, (JetStreamBroker, StubBroker)):
            raise InvalidSchedule(f"Actor {actor.actor_name!r} is periodic, which needs a JetStreamBroker.")

    def setup_topology(self, broker: JetStreamBroker, *, update: bool = False) -> dict[str, str]:
        """Create the schedules that are missing, with `update` change the others; called by `broker.setup`."""
        return _reconcile(broker, Changes.ALL if update else Changes.NONE)

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        """Bring the schedules of each queue in line, and again when its stream begins a new life."""
        if not isinstance(broker, JetStreamBroker) or not broker.config.declare:
            return
        for queue in sorted(broker.queues):
            stream = broker.names.queue_stream(queue)
            broker.keeper.do(stream, f"schedules of {stream}", partial(_keep_schedules, broker, queue))
        broker.keeper.on_renewed("schedules", partial(_restore_schedules, broker))

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if not isinstance(message, JetStreamMessage) or not isinstance(broker, JetStreamBroker):
            return
        delivery = message._delivery
        name = delivery.headers.get(HEADER_TICK) if delivery.is_marked else None
        if name is None:
            return
        noted = {"last": delivery.timestamp, "next": delivery.headers.get(HEADER_SCHEDULE_NEXT)}
        try:
            ticks_of(broker).note(queue_key(message.queue_name, decode(name)), json.dumps(noted).encode())
        except BrokerError as error:
            logger.warning("The tick of %s was not noted: %s", decode(name), error)


def expression_of(actor: Actor[Any, Any]) -> cron.Expression | None:
    """When an actor is due; None when it is not periodic. Raises InvalidOption."""
    options = actor.options
    return cron.read(options.get("cron"), options.get("every"), options.get("timezone"))


def ticks_of(broker: JetStreamBroker) -> Bucket:
    return broker.bucket(BUCKET)


def _reconcile(broker: JetStreamBroker, changes: Changes) -> dict[str, str]:
    """Bring the schedules of all queues in line; what fails for one queue does not stop the others."""
    ticks_of(broker).declare(update=changes is Changes.ALL)
    outcome: dict[str, str] = {}
    failures: list[BrokerError] = []
    barred: set[str] = set()
    for step in (_reconcile_queue, _remove_moved):
        for queue in sorted(broker.queues):
            try:
                outcome.update(step(broker, queue, changes, barred))
            except BrokerConnectionError:
                raise
            except BrokerError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return outcome


def _reconcile_queue(
    broker: JetStreamBroker, queue: str, changes: Changes, barred: set[str]
) -> dict[str, str]:
    """Bring the schedules of a queue's actors in line; adds those that must be left alone to `barred`."""
    broker.declarations.ensure_queue(queue)
    actors = {name: actor for name, actor in sorted(broker.actors.items()) if actor.queue_name == queue}
    if not actors:
        return {}
    existing = set(_scheduled(broker, queue))
    declared = Declared(ticks_of(broker), queue)
    left_alone = declared.declare(
        {name: _declared(actor) for name, actor in actors.items()},
        modules={name: getattr(actor.fn, "__module__", "") for name, actor in actors.items()},
        existing=existing,
        changes=changes,
    )
    barred |= left_alone
    paused = declared.paused()
    outcome: dict[str, str] = {}
    for name, actor in actors.items():
        expression = expression_of(actor)
        if name in left_alone:
            outcome[f"schedule {name}"] = "differs"
        elif name in paused:
            outcome[f"schedule {name}"] = "paused"
        elif expression is not None:
            outcome[f"schedule {name}"] = _store(broker, actor, expression, changes)
        elif name in existing:
            removed = changes is not Changes.NONE and purge_schedule(broker, queue, name)
            outcome[f"schedule {name}"] = "removed" if removed else "differs"
    for name in declared.paused().keys() - paused.keys():
        purge_schedule(broker, queue, name)  # paused meanwhile
    return outcome


def _moved(broker: JetStreamBroker, queue: str) -> dict[str, str]:
    """The schedules of a queue whose actors are on another queue now, each with that queue."""
    now = {
        name: broker.actors[name].queue_name for name in _scheduled(broker, queue) if name in broker.actors
    }
    return {name: other for name, other in now.items() if other != queue}


def _remove_moved(broker: JetStreamBroker, queue: str, changes: Changes, barred: set[str]) -> dict[str, str]:
    """Remove a queue's schedules of actors that are on another queue now, other than those in `barred`."""
    outcome: dict[str, str] = {}
    for name in sorted(_moved(broker, queue).keys() - barred):
        removed = changes is not Changes.NONE and remove_schedule(broker, queue, name)
        outcome[f"schedule {name} of {queue}"] = "removed" if removed else "differs"
    return outcome


def _declared(actor: Actor[Any, Any]) -> str:
    """When an actor is due, as text; empty when it is not periodic."""
    expression = expression_of(actor)
    return "" if expression is None else expression.as_text()


def _keep_schedules(broker: JetStreamBroker, queue: str) -> None:
    """Bring a queue's schedules in line, at boot or when its stream begins a new life.

    Each queue is asked for its own schedules alone, so many queues cost as many requests each as few. An actor that
    moved to another queue has its schedule there before it has none here.
    """
    barred: set[str] = set()
    _reconcile_queue(broker, queue, Changes.FORWARD, barred)
    for name in sorted(barred):
        logger.warning(
            "The schedule of %s stays as a newer process declared it, not as this one does. To have it as it was "
            "before, run `fleet setup --update`.",
            name,
        )
    moved = _moved(broker, queue)
    for other in sorted(set(moved.values())):
        _reconcile_queue(broker, other, Changes.FORWARD, barred)
    for name in sorted(moved.keys() - barred):
        remove_schedule(broker, queue, name)


def _restore_schedules(broker: JetStreamBroker, stream: str) -> None:
    queue = broker.names.queue_of_stream(stream)
    if queue in broker.queues:
        _keep_schedules(broker, queue)


def _scheduled(broker: JetStreamBroker, queue: str) -> list[str]:
    stream = broker.names.queue_stream(queue)
    try:
        subjects = list(delays.subjects(broker.connection, stream, broker.names.all_periodic(queue)))
    except NotFound:
        return []
    return sorted(decode(subject.rpartition(".")[2]) for subject in subjects)


def _store(
    broker: JetStreamBroker, actor: Actor[Any, Any], expression: cron.Expression, changes: Changes
) -> str:
    """Store a schedule unless it is there already; the first program wins, and the others see that."""
    queue, name = actor.queue_name, actor.actor_name
    message: Message[Any] = Message(queue, name, (), {}, {}, message_id=name)
    return store_schedule(broker, queue, name, expression, message.encode(), changes)


def store_schedule(
    broker: JetStreamBroker,
    queue: str,
    name: str,
    expression: cron.Expression,
    body: bytes,
    changes: Changes,
) -> str:
    """Store a schedule with the message that it sends; return what became of it."""
    stream, subject = broker.names.queue_stream(queue), broker.names.periodic(queue, name)
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
        if existing is not None and changes is Changes.NONE:
            return "differs"
        headers = {
            **wanted,
            HEADER_MSG_ID: uuid.uuid4().hex,
            HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(0 if existing is None else existing.sequence),
        }
        try:
            broker.connection.publish(subject, body, headers)
        except ApiError as error:
            if error.err_code not in CONFLICT:
                raise
        else:
            return "created" if existing is None else "updated"


def _same(existing: StoredMessage, wanted: dict[str, str]) -> bool:
    names = (HEADER_SCHEDULE, HEADER_SCHEDULE_TARGET, HEADER_SCHEDULE_ZONE, HEADER_TICK)
    return all(existing.headers.get(name) == wanted.get(name) for name in names)


def list_schedules(broker: JetStreamBroker) -> list[Schedule]:
    """The schedules of all queues of the broker's namespace, paused ones included.

    Examples:
      >>> from dramatiq_jetstream.periodic import list_schedules
      >>> [(schedule.queue, schedule.actor) for schedule in list_schedules(broker)]
      [('default', 'nightly')]
    """
    found: list[Schedule] = []
    for queue in queue_names(broker.connection, broker.names):
        scheduled = _scheduled(broker, queue)
        modules, paused = _notes(broker, queue)
        for name in sorted({*scheduled, *paused}):
            if name in paused:
                expression = cron.from_text(paused[name])
            else:
                stored = last_message(
                    broker.connection, broker.names.queue_stream(queue), broker.names.periodic(queue, name)
                )
                if stored is None:
                    continue
                schedule = stored.headers.get(HEADER_SCHEDULE, "")
                expression = cron.Expression("", schedule, stored.headers.get(HEADER_SCHEDULE_ZONE))
            found.append(_describe(broker, queue, name, expression, modules.get(name), name in paused))
    return found


def _notes(broker: JetStreamBroker, queue: str) -> tuple[dict[str, str], dict[str, str]]:
    """The module of each actor that was ever declared on a queue, and what is declared of those that are paused."""
    try:
        declared = Declared(ticks_of(broker), queue)
        return declared.modules(), declared.paused()
    except BrokerError:
        return {}, {}


def _is_elsewhere(module: str | None) -> bool:
    """Whether a module exists that this program did not import.

    Its parents are not imported either, as `importlib.util.find_spec` would do: listing schedules runs no code.
    """
    if not module or module in sys.modules:
        return False
    path: Sequence[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        path = spec.submodule_search_locations
        if path is None:
            return name == module
    return True


def _describe(
    broker: JetStreamBroker,
    queue: str,
    name: str,
    expression: cron.Expression,
    module: str | None,
    paused: bool,
) -> Schedule:
    try:
        entry = ticks_of(broker).get(queue_key(queue, name))
    except BrokerError:
        entry = None
    noted = {} if entry is None else json.loads(entry.value)
    last = noted.get("last")
    next_tick = None if paused else expression.next(delays.now())
    if next_tick is None and noted.get("next") and not paused:
        next_tick = int(datetime.fromisoformat(noted["next"]).timestamp() * 1000)
    actor = broker.actors.get(name)
    if actor is None:
        orphan = not _is_elsewhere(module)
    else:
        orphan = actor.queue_name != queue or expression_of(actor) is None
    return Schedule(
        name, queue, expression.schedule, expression.zone, last, next_tick, orphan, module, paused
    )


def remove_schedule(broker: JetStreamBroker, queue: str, actor: str) -> bool:
    """Remove a schedule; False when there is none. An older process that boots later does not restore it.

    Examples:
      >>> from dramatiq_jetstream.periodic import remove_schedule
      >>> remove_schedule(broker, "default", "gone")
      False
    """
    was_paused = actor in _notes(broker, queue)[1]
    Declared(ticks_of(broker), queue).remove(actor)
    return purge_schedule(broker, queue, actor) or was_paused


def purge_schedule(broker: JetStreamBroker, queue: str, actor: str) -> bool:
    stream = broker.names.queue_stream(queue)
    try:
        reply = broker.connection.api(
            f"STREAM.PURGE.{stream}", {"filter": broker.names.periodic(queue, actor)}
        )
    except NotFound:
        return False
    return bool(reply.get("purged"))
