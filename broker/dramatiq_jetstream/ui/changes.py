"""The changes that an operator can make: what each would do, and doing it.

A change is made in two steps. A GET shows the plan, which is a dry run: what would be changed, and how much of it. Its
form has a token, which is bound to the browser, the person and exactly this change, and a POST with that token makes
it. The server refuses a person without the permission both times, and a request from another site.

The record of who did what (`dramatiq_jetstream.audit`) is stored before. A change of many messages stops after
`CHANGE_SECONDS`: the rest is a change of its own. If the process dies, what was done stays done, each message for
itself, and the record says that the change is unfinished.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from werkzeug.exceptions import Forbidden, NotFound
from werkzeug.wrappers import Request, Response

from dramatiq_jetstream import schedules
from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.dead_letters import DeadLetter
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.errors import NotFound as Missing
from dramatiq_jetstream.sending import delays

from .access import Person, fingerprint
from .reading import Reader

__all__ = ["ACTIONS", "Action", "Plan", "check_token", "give_token", "letter_filter", "refuse_cross_site"]

#: How long one request works on a change of many messages.
CHANGE_SECONDS: Final = 10.0

#: How many of what a plan would change it shows.
SHOWN: Final = 10

COOKIE: Final = "fleet_csrf"

Fields = Mapping[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """What a change would do.

    Attributes:
      title, detail: What is asked and what it means.
      button: What the button says.
      target: What the audit calls that which is changed.
      count: How much of it there is; with 0 there is nothing to do.
      make: Makes the change, and counts in `done`.
      shown: Some of what would be changed.
      is_final: Whether it cannot be taken back.
      back: The page that people come from, and its filters.
      fixed: Further fields, which keep the change to what this plan found.
    """

    title: str
    detail: str
    button: str
    target: str
    count: int
    make: Callable[[Change], None]
    back: tuple[str, Mapping[str, str]]
    shown: list[str] = field(default_factory=list)
    is_final: bool = False
    fixed: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """A kind of change: the permission that it needs, its fields, and what plans it."""

    permission: str
    fields: tuple[str, ...]
    plan: Callable[[Reader, Fields], Plan]


# Tokens


def refuse_cross_site(request: Request) -> None:
    """Raise when a browser says that a request comes from another site."""
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        foreign = origin is not None and urlsplit(origin).netloc != request.host
    if foreign:
        raise Forbidden("Nothing is changed by a request from another site: use this site's own form.")


def give_token(
    request: Request, person: Person, action: str, fields: Fields
) -> tuple[str, Callable[[Response], None]]:
    """Return the token for one change, and what keeps its secret in the person's browser."""
    known = request.cookies.get(COOKIE, "")
    secret = known if len(known) == 64 and known.isalnum() else secrets.token_hex(32)

    def keep(response: Response) -> None:
        response.set_cookie(
            COOKIE,
            secret,
            httponly=True,
            samesite="Strict",
            secure=request.is_secure,
            path=request.script_root or "/",
        )

    return _token(secret, person, action, fields), keep


def check_token(request: Request, person: Person, action: str, fields: Fields) -> None:
    """Raise unless the form has the token that was given for exactly this change."""
    secret, token = request.cookies.get(COOKIE, ""), request.form.get("token", "")
    if not secret or not hmac.compare_digest(_token(secret, person, action, fields).encode(), token.encode()):
        raise Forbidden("This form is out of date, or was never shown to you: open the page and try again.")


def _token(secret: str, person: Person, action: str, fields: Fields) -> str:
    said = [action, fingerprint(person), *(repr((name, fields[name])) for name in sorted(fields))]
    return hmac.new(secret.encode(), "\0".join(said).encode("utf-8", "surrogatepass"), "sha256").hexdigest()


# What the fields say


def _one(fields: Fields, name: str) -> str:
    values = fields.get(name) or [""]
    return values[0].strip()


def _existing_queue(reader: Reader, fields: Fields) -> str:
    queue = _one(fields, "queue")
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
    message_id = _one(fields, "message")

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
    queue, message_id = _existing_queue(reader, fields), _one(fields, "message")

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
    queue, message_id = _existing_queue(reader, fields), _one(fields, "message")

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
    queue, actor = _existing_queue(reader, fields), _one(fields, "actor")
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


# Dead letters


def letter_filter(fields: Fields) -> tuple[str | None, Callable[[DeadLetter], bool]]:
    """Return the queue, and what tells whether a letter has the actor, the reason and the text in its error."""
    queue, actor, reason, text = (_one(fields, name) for name in ("queue", "actor", "reason", "text"))

    def matches(letter: DeadLetter) -> bool:
        return (
            (not actor or letter.actor == actor)
            and (not reason or letter.reason == reason)
            and (not text or text.lower() in letter.error.lower() or text == letter.message_id)
        )

    return queue or None, matches


_LETTERS: Final = ("id", "queue", "actor", "reason", "text", "upto", "all")


@dataclass(frozen=True)
class _Letters:
    """The dead letters that a change means: how many, some of them, what they are called, and their ids."""

    count: int
    shown: list[str]
    called: str
    ids: Callable[[], Iterable[str]]
    fixed: Mapping[str, list[str]] = field(default_factory=dict)


def _chosen(reader: Reader, ids: list[str]) -> _Letters:
    letters = reader.broker.dead_letters
    known = [letter for each in ids if each.isdecimal() and (letter := letters.get(each)) is not None]
    called = f"dead letters {', '.join(letter.id for letter in known)}"
    return _Letters(len(known), list(map(_shown, known[:SHOWN])), called, lambda: [each.id for each in known])


def _all_that_match(reader: Reader, fields: Fields) -> _Letters:
    queue, matches = letter_filter(fields)
    # Letters that come after the dry run are not part of it.
    newest = _one(fields, "upto") or next((each.id for each in reader.broker.dead_letters.newest()), "0")
    if not newest.isdecimal():
        raise NotFound(f"{newest!r} is no dead letter.")
    before = str(int(newest) + 1)
    count, shown = 0, list[str]()
    for letter in reader.all_dead(matches, queue=queue, before=before):
        count += 1
        if len(shown) < SHOWN:
            shown.append(_shown(letter))
    names = ("queue", "actor", "reason", "text")
    filters = ", ".join(f"{name} {_one(fields, name)!r}" for name in names if _one(fields, name))
    return _Letters(
        count,
        shown,
        f"all dead letters with {filters}" if filters else "all dead letters",
        lambda: (each.id for each in reader.all_dead(matches, queue=queue, before=before)),
        {"upto": [newest]},
    )


def _shown(letter: DeadLetter) -> str:
    return f"{letter.actor or '(unknown actor)'} on {letter.queue}: {letter.error}"[:160]


def _on_letters(reader: Reader, fields: Fields, each: Callable[[str], bool], **said: Any) -> Plan:
    ids = fields.get("id") or []
    letters = _all_that_match(reader, fields) if _one(fields, "all") else _chosen(reader, ids)

    def make(change: Change) -> None:
        deadline = time.monotonic() + CHANGE_SECONDS
        for letter_id in letters.ids():
            change.done += each(letter_id)
            if time.monotonic() > deadline:
                return

    count = letters.count
    noun = "dead letter" if count == 1 else "dead letters"
    return Plan(
        title=f"{said['verb']} {count:,} {noun}?",
        detail=said["detail"],
        button=f"{said['verb']} {count:,}",
        target=letters.called,
        count=count,
        make=make,
        back=("dead", {name: _one(fields, name) for name in ("queue", "actor", "reason", "text")}),
        shown=letters.shown,
        is_final=said.get("is_final", False),
        fixed=letters.fixed,
    )


def _replay(reader: Reader, fields: Fields) -> Plan:
    return _on_letters(
        reader,
        fields,
        reader.broker.dead_letters.replay,
        verb="Replay",
        detail="Each message goes back on its queue with a fresh set of retries, and its letter is removed.",
    )


def _drop(reader: Reader, fields: Fields) -> Plan:
    return _on_letters(
        reader,
        fields,
        reader.broker.dead_letters.drop,
        verb="Drop",
        detail="The messages are deleted for good and will never run.",
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
    "replay": Action("replay", _LETTERS, _replay),
    "drop": Action("drop", _LETTERS, _drop),
}
