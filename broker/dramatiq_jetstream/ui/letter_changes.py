"""The changes of dead letters: of chosen ones, or of all that match a filter and were there at the dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from werkzeug.exceptions import NotFound

from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.dead_letters import DeadLetter

from .plans import SHOWN, Fields, Plan, first
from .reading import Reader

__all__ = ["LETTERS", "drop", "letter_filter", "replay"]

#: How long one request works on a change of many messages.
CHANGE_SECONDS: Final = 10.0


def letter_filter(fields: Fields) -> tuple[str | None, Callable[[DeadLetter], bool]]:
    """Return the queue, and what tells whether a letter has the actor, the reason and the text in its error."""
    queue, actor, reason, text = (first(fields, name) for name in ("queue", "actor", "reason", "text"))

    def matches(letter: DeadLetter) -> bool:
        return (
            (not actor or letter.actor == actor)
            and (not reason or letter.reason == reason)
            and (not text or text.lower() in letter.error.lower() or text == letter.message_id)
        )

    return queue or None, matches


#: The fields of a change of dead letters: chosen ones, or all that match a filter.
LETTERS: Final = ("id", "queue", "actor", "reason", "text", "upto", "all")


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
    known = [letter for each in ids if _can_be(each) and (letter := letters.get(each)) is not None]
    called = f"dead letters {', '.join(letter.id for letter in known)}"
    return _Letters(len(known), list(map(_shown, known[:SHOWN])), called, lambda: [each.id for each in known])


def _all_that_match(reader: Reader, fields: Fields) -> _Letters:
    queue, matches = letter_filter(fields)
    # Letters that come after the dry run are not part of it.
    newest = first(fields, "upto") or next((each.id for each in reader.broker.dead_letters.newest()), "0")
    if not _can_be(newest):
        raise NotFound(f"{newest!r} is no dead letter.")
    before = str(int(newest) + 1)
    count, shown = 0, list[str]()
    for letter in reader.all_dead(matches, queue=queue, before=before):
        count += 1
        if len(shown) < SHOWN:
            shown.append(_shown(letter))
    names = ("queue", "actor", "reason", "text")
    filters = ", ".join(f"{name} {first(fields, name)!r}" for name in names if first(fields, name))
    return _Letters(
        count,
        shown,
        f"all dead letters with {filters}" if filters else "all dead letters",
        lambda: (each.id for each in reader.all_dead(matches, queue=queue, before=before)),
        {"upto": [newest]},
    )


def _can_be(letter_id: str) -> bool:
    """Whether a letter can have an id, and one before it."""
    return letter_id.isdecimal() and len(letter_id) < 19


def _shown(letter: DeadLetter) -> str:
    return f"{letter.actor or '(unknown actor)'} on {letter.queue}: {letter.error}"[:160]


def _on_letters(reader: Reader, fields: Fields, each: Callable[[str], bool], **said: Any) -> Plan:
    ids = fields.get("id") or []
    letters = _all_that_match(reader, fields) if first(fields, "all") else _chosen(reader, ids)

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
        back=("dead", {name: first(fields, name) for name in ("queue", "actor", "reason", "text")}),
        shown=letters.shown,
        is_final=said.get("is_final", False),
        fixed=letters.fixed,
    )


def replay(reader: Reader, fields: Fields) -> Plan:
    """Plan to put dead letters back on their queues."""
    return _on_letters(
        reader,
        fields,
        reader.broker.dead_letters.replay,
        verb="Replay",
        detail="Each message goes back on its queue with a fresh set of retries, and its letter is removed.",
    )


def drop(reader: Reader, fields: Fields) -> Plan:
    """Plan to delete dead letters."""
    return _on_letters(
        reader,
        fields,
        reader.broker.dead_letters.drop,
        verb="Drop",
        detail="The messages are deleted for good and will never run.",
        is_final=True,
    )
