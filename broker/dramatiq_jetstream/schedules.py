"""Steering periodic tasks from outside of the program: run one now, pause its schedule, resume it.

    for schedule in list_schedules(broker):
        run_now(broker, schedule.queue, schedule.actor)

A paused schedule is taken off the server and noted, with what it sends, beside what the programs declare. Neither a
worker that boots nor `fleet setup` puts it back; a new declaration takes effect when it is resumed.

Pausing notes first and removes then; resuming does it the other way round. A process that dies in between leaves a
schedule that still ticks, and is paused by the next `pause`, or one that the next worker that boots puts back.
"""

from __future__ import annotations

from .broker import JetStreamBroker
from .jetstream import cron
from .jetstream.declared import Changes, Declared
from .jetstream.names import (
    HEADER_MSG_ID,
    HEADER_SCHEDULE,
    HEADER_SCHEDULE_ZONE,
    HEADER_TICK,
    encode,
)
from .jetstream.reading import last_message
from .periodic import (
    Schedule,
    list_schedules,
    purge_schedule,
    remove_schedule,
    store_schedule,
    ticks_of,
)
from .wire.ids import new_id

__all__ = ["Schedule", "list_schedules", "pause", "remove_schedule", "resume", "run_now"]


def run_now(broker: JetStreamBroker, queue: str, actor: str) -> str | None:
    """Store one tick of a schedule on its queue now, paused or not; the schedule goes on as it was.

    Returns:
      The message id of the tick; None when there is no such schedule.

    Raises:
      BrokerConnectionError: When it is not known to be stored.

    Examples:
      >>> from dramatiq_jetstream.schedules import run_now
      >>> tick = run_now(broker, "default", "nightly")
      >>> tick is not None
      True
    """
    stored = last_message(
        broker.connection, broker.names.queue_stream(queue), broker.names.periodic(queue, actor)
    )
    body = Declared(ticks_of(broker), queue).paused_body(actor) if stored is None else stored.data
    if body is None:
        return None
    headers = {HEADER_TICK: encode(actor), HEADER_MSG_ID: new_id()}
    ack = broker.connection.publish(broker.names.task(queue), body, headers)
    return f"{actor}:{ack.seq}"


def pause(broker: JetStreamBroker, queue: str, actor: str) -> bool:
    """Have a schedule send nothing until `resume`; False when there is no such schedule, or it is paused.

    Raises:
      BrokerConnectionError: When it is not known to be paused.

    Examples:
      >>> from dramatiq_jetstream.schedules import pause, resume
      >>> pause(broker, "default", "nightly"), resume(broker, "default", "nightly")
      (True, True)
    """
    stored = last_message(
        broker.connection, broker.names.queue_stream(queue), broker.names.periodic(queue, actor)
    )
    if stored is None:
        return False
    expression = cron.Expression(
        "", stored.headers.get(HEADER_SCHEDULE, ""), stored.headers.get(HEADER_SCHEDULE_ZONE)
    )
    Declared(ticks_of(broker), queue).pause(actor, expression.as_text(), stored.data)
    purge_schedule(broker, queue, actor)
    return True


def resume(broker: JetStreamBroker, queue: str, actor: str) -> bool:
    """Put a paused schedule back as it is declared now; its interval starts over. False when it is not paused.

    Raises:
      BrokerConnectionError: When it is not known to be back.

    Examples:
      >>> from dramatiq_jetstream.schedules import resume
      >>> resume(broker, "default", "nightly")  # it is not paused
      False
    """
    paused = Declared(ticks_of(broker), queue).resume(actor)
    if paused is None:
        return False
    declared, body = paused
    store_schedule(broker, queue, actor, cron.from_text(declared), body, Changes.ALL)
    return True
