"""What the programs of a queue declared of their schedules, one after the other.

Old and new processes run side by side during a deployment, and an old one may boot last. When a process declares
something other than what is noted, the note becomes *past*. A process whose own declaration is past is older than
another process and changes nothing. Only `fleet setup --update` turns a past declaration into the current one.

One key for each queue, changed by compare-and-set. A declaration is noted before it is carried out, so a process that
dies in between leaves a note that the next process with the same declaration carries out.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from dramatiq_jetstream.errors import RevisionConflict
from dramatiq_jetstream.kv import Bucket

from .names import encode

__all__ = ["Changes", "Declared"]

#: How many past declarations of one actor are remembered.
REMEMBERED = 20


class Changes(Enum):
    """Which existing schedules may be changed."""

    NONE = "none"
    FORWARD = "forward"  # only by declarations that are not past
    ALL = "all"


class Declared:
    """The declarations of one queue's actors."""

    def __init__(self, bucket: Bucket, queue: str) -> None:
        self._bucket = bucket
        self._key = f"declared.{encode(queue)}"

    def declare(
        self, declared: Mapping[str, str], *, modules: Mapping[str, str], existing: set[str], changes: Changes
    ) -> set[str]:
        """Note declarations; return the names of those that must not be carried out.

        Parameters:
          declared: For each actor what it declares, as text.
          modules: For each actor the module that declares it.
          existing: The actors that have a schedule on the server.
        """
        while True:
            entry = self._bucket.get(self._key)
            before: dict[str, Any] = {} if entry is None else json.loads(entry.value)
            after = copy.deepcopy(before)
            barred = set()
            for name, text in declared.items():
                note = after.get(name)
                if note is None:
                    if changes is not Changes.NONE or name not in existing:
                        after[name] = {"now": text, "past": [], "module": modules[name]}
                elif text == note["now"]:
                    note["module"] = modules[name]
                elif changes is Changes.NONE or (changes is Changes.FORWARD and text in note["past"]):
                    barred.add(name)
                else:
                    past = [other for other in [*note["past"], note["now"]] if other != text]
                    after[name] = {**note, "now": text, "past": past[-REMEMBERED:], "module": modules[name]}
                    if not text:
                        after[name].pop("paused", None)
            if after == before or self._write(after, 0 if entry is None else entry.revision):
                return barred

    def remove(self, name: str) -> None:
        """Note that an actor no longer has a schedule."""
        while True:
            entry = self._bucket.get(self._key)
            notes = {} if entry is None else json.loads(entry.value)
            if entry is None or name not in notes or not notes[name]["now"]:
                return
            note = notes[name]
            note.pop("paused", None)
            notes[name] = {**note, "now": "", "past": [*note["past"], note["now"]][-REMEMBERED:]}
            if self._write(notes, entry.revision):
                return

    def pause(self, name: str, text: str, body: bytes) -> None:
        """Note that a schedule, as it is on the server, is to be there no more until `resume`."""
        while True:
            entry = self._bucket.get(self._key)
            notes = {} if entry is None else json.loads(entry.value)
            note = notes.setdefault(name, {"now": text, "past": [], "module": ""})
            note["paused"] = base64.b64encode(body).decode("ascii")
            if self._write(notes, 0 if entry is None else entry.revision):
                return

    def resume(self, name: str) -> tuple[str, bytes] | None:
        """Note that a schedule is paused no more; return what is declared and its body, None when it is not paused."""
        while True:
            entry = self._bucket.get(self._key)
            notes = {} if entry is None else json.loads(entry.value)
            if entry is None or "paused" not in notes.get(name, {}):
                return None
            body = base64.b64decode(notes[name].pop("paused"))
            if self._write(notes, entry.revision):
                return notes[name]["now"], body

    def paused_body(self, name: str) -> bytes | None:
        """What a paused schedule sends; None when it is not paused."""
        entry = self._bucket.get(self._key)
        note = {} if entry is None else json.loads(entry.value).get(name, {})
        return base64.b64decode(note["paused"]) if "paused" in note else None

    def paused(self) -> dict[str, str]:
        """What is declared of each schedule that is paused."""
        entry = self._bucket.get(self._key)
        notes = {} if entry is None else json.loads(entry.value)
        return {name: note["now"] for name, note in notes.items() if "paused" in note}

    def modules(self) -> dict[str, str]:
        """For each actor the module that declared it last."""
        entry = self._bucket.get(self._key)
        notes = {} if entry is None else json.loads(entry.value)
        return {name: note["module"] for name, note in notes.items()}

    def _write(self, notes: Mapping[str, Any], revision: int) -> bool:
        try:
            self._bucket.update(self._key, json.dumps(notes).encode(), revision=revision)
        except RevisionConflict:
            return False
        return True
