"""The changes that an operator can make: what each would do, and doing it.

A change is made in two steps. A GET shows the plan, which is a dry run: what would be changed, and how much of it. Its
form has a token, which is bound to the browser, the person and exactly this change, and a POST with that token makes
it. The server refuses a person without the permission both times, and a request from another site.

The record of who did what (`dramatiq_jetstream.audit`) is stored before. A change of many messages stops after
some seconds (see `letter_changes`): the rest is a change of its own. If the process dies, what was done stays done,
each message for itself, and the record says that the change is unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from werkzeug.exceptions import NotFound

from dramatiq_jetstream import schedules
from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.errors import NotFound as Missing
from dramatiq_jetstream.sending import delays

from .letter_changes import LETTERS, drop, replay
from .plans import Fields, Plan, first
from .reading import Reader

__all__ = ["ACTIONS", "Action"]


@dataclass(frozen=True)
class Action:
    """A kind of change: the permission that it needs, its fields, and what plans it."""

    permission: str
    fields: tuple[str, ...]
    plan: Callable[[Reader, Fields], Plan]


def _existing_queue(reader: Reader, fields: Fields) -> str:
    queue = first(fields, "queue")
    if queue not in reader.queue_names():
        raise NotFound(f"There is no queue {queue!r}.")
    return queue


# Queues


def _pause(reader: Reader, fields: Fields) -> Plan:
    queue = _existing_queue(reader, fields)

    def make(change: Change) -> None:
        reader.broker.pause(queue)
        change.done = 1

    return Plan(
        f"Pause the queue {queue}?",
        "Workers finish what they have and get nothing more of it, until it is resumed. Messages keep coming in.",
        "Pause",
        f"queue {queue}",
        0 if reader.broker.is_paused(queue) else 1,
        make,
        ("overview", {}),
    )


def _resume(reader: Reader, fields: Fields) -> Plan:
    queue = _existing_queue(reader, fields)

    def make(change: Change) -> None:
        reader.broker.resume(queue)
        change.done = 1

    return Plan(
        f"Resume the queue {queue}?",
        "Workers get its messages again at once.",
        "Resume",
        f"queue {queue}",
        1 if reader.broker.is_paused(queue) else 0,
        make,
        ("overview", {}),
    )


# Single messages


def _abort(reader: Reader, fields: Fields) -> Plan:
    message_id = first(fields, "message")

    def make(change: Change) -> None:
        try:
            from dramatiq_jetstream.abort import abort_message

            abort_message(message_id, reader.broker)
        except (ModuleNotFoundError, Missing):
            raise InvalidOption(
                "no program of this namespace can be told to abort: it needs the extra `abort` and the middleware "
                "Abortable with the backend of dramatiq_jetstream.abort."
            ) from None
        change.done = 1

    running = [here for here in reader.running() if here.message.message_id == message_id]
    return Plan(
        "Abort this message?",
        "What runs of it is stopped where it is, and it is not tried again. If it waits or is delayed, it never runs.",
        "Abort",
        f"message {message_id}",
        1 if message_id else 0,
        make,
        ("running", {}),
        [
            f"{here.message.actor}({here.message.arguments}) on {here.worker.host}:{here.worker.pid}"
            for here in running
        ],
        is_final=True,
    )


def _cancel(reader: Reader, fields: Fields) -> Plan:
    queue, message_id = _existing_queue(reader, fields), first(fields, "message")

    def make(change: Change) -> None:
        change.done = reader.broker.cancel(message_id, queue)

    return _delayed_plan(
        reader,
        queue,
        message_id,
        make,
        title="Cancel this delayed message?",
        detail="It is removed and will never run.",
        button="Cancel message",
        is_final=True,
    )


def _run(reader: Reader, fields: Fields) -> Plan:
    queue, message_id = _existing_queue(reader, fields), first(fields, "message")

    def make(change: Change) -> None:
        broker = reader.broker
        change.done = delays.run_now(broker.connection, broker.names, queue, message_id)

    return _delayed_plan(
        reader,
        queue,
        message_id,
        make,
        title="Run this delayed message now?",
        detail="Its delay ends now; the next free worker runs it.",
        button="Run now",
    )


def _delayed_plan(
    reader: Reader, queue: str, message_id: str, make: Callable[[Change], None], **said: Any
) -> Plan:
    broker = reader.broker
    due = delays.due(broker.connection, broker.names, queue, message_id) if message_id else None
    return Plan(
        target=f"message {message_id} of queue {queue}",
        count=0 if due is None else 1,
        make=make,
        back=("delayed", {"queue": queue}),
        shown=[message_id] if due else [],
        **said,
    )


# Schedules


def _on_schedule(
    reader: Reader, fields: Fields, do: Callable[[str, str], object], *, title: str, **said: Any
) -> Plan:
    queue, actor = _existing_queue(reader, fields), first(fields, "actor")
    is_paused = said.pop("is_paused", None)
    known = [
        each
        for each in reader.schedules()
        if (each.queue, each.actor) == (queue, actor) and is_paused in (None, each.paused)
    ]

    def make(change: Change) -> None:
        change.done = int(bool(do(queue, actor)))

    return Plan(
        title=title.format(actor),
        target=f"schedule of {actor} on queue {queue}",
        count=len(known),
        make=make,
        back=("schedules", {}),
        shown=[each.schedule for each in known],
        **said,
    )


def _run_schedule(reader: Reader, fields: Fields) -> Plan:
    return _on_schedule(
        reader,
        fields,
        lambda queue, actor: schedules.run_now(reader.broker, queue, actor),
        title="Run {} now?",
        detail="One tick of it is put on its queue; the schedule goes on as it was.",
        button="Run now",
    )


def _pause_schedule(reader: Reader, fields: Fields) -> Plan:
    return _on_schedule(
        reader,
        fields,
        lambda queue, actor: schedules.pause(reader.broker, queue, actor),
        title="Pause the schedule of {}?",
        detail="It sends nothing until it is resumed, whatever boots meanwhile.",
        button="Pause schedule",
        is_paused=False,
    )


def _resume_schedule(reader: Reader, fields: Fields) -> Plan:
    return _on_schedule(
        reader,
        fields,
        lambda queue, actor: schedules.resume(reader.broker, queue, actor),
        title="Resume the schedule of {}?",
        detail="It is put back as it is declared now; its interval starts over.",
        button="Resume schedule",
        is_paused=True,
    )


def _remove_schedule(reader: Reader, fields: Fields) -> Plan:
    return _on_schedule(
        reader,
        fields,
        lambda queue, actor: schedules.remove_schedule(reader.broker, queue, actor),
        title="Remove the schedule of {}?",
        detail="It is not run periodically any more, and no worker that boots puts the schedule back, until its "
        "program declares another one or runs `fleet setup --update`.",
        button="Remove schedule",
        is_final=True,
    )


ACTIONS: Final[Mapping[str, Action]] = {
    "pause": Action("pause", ("queue",), _pause),
    "resume": Action("pause", ("queue",), _resume),
    "abort": Action("abort", ("message",), _abort),
    "cancel": Action("cancel", ("queue", "message"), _cancel),
    "run": Action("run", ("queue", "message"), _run),
    "run-schedule": Action("schedule", ("queue", "actor"), _run_schedule),
    "pause-schedule": Action("schedule", ("queue", "actor"), _pause_schedule),
    "resume-schedule": Action("schedule", ("queue", "actor"), _resume_schedule),
    "remove-schedule": Action("schedule", ("queue", "actor"), _remove_schedule),
    "replay": Action("replay", LETTERS, replay),
    "drop": Action("drop", LETTERS, drop),
}
