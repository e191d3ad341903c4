"""Folds: what is derived from a sequence of facts, stored with the position up to which it was derived.

Position and results are keys of one bucket and are stored in one atomic batch, so each fact counts once, whatever dies.
Two processes that do the same at once are decided by compare-and-set on the position; the slower one has done nothing.

Results belong to a generation. A rebuild makes the next one beside the one that is in use, and has it used when it is
as far. A process that dies in a rebuild leaves the generation in use as it is; the next rebuild clears the rest away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ports import BatchBucket, Bucket

#: Called with how much of a rebuild is done, and how much there is.
Progress = Callable[[int, int], None]


def unseen(done: int, of: int) -> None:
    """Stands for a progress at which no one looks."""


class RebuildConflict(Exception):
    """Two programs rebuild the same at once."""


@dataclass(frozen=True, slots=True)
class Position:
    """Up to which fact the results of a generation were derived; `key` and `revision` are those of its document."""

    key: str
    generation: int
    reached: int
    revision: int

    def at(self, reached: int) -> bytes:
        """Return what is stored of the position at another fact."""
        return json.dumps({"generation": self.generation, "reached": reached}).encode()


def read_position(bucket: Bucket, key: str) -> Position | None:
    """Return the position that is stored under a key."""
    entry = bucket.get(key)
    if entry is None:
        return None
    stored = json.loads(entry.value)
    return Position(key, stored["generation"], stored["reached"], entry.revision)


class Fold:
    """The positions of one fold.

    Parameters:
      name: The prefix of its keys: the results of a generation are under `{name}.{generation}.`.
    """

    def __init__(self, bucket: BatchBucket, name: str) -> None:
        self._bucket = bucket
        self._name = name
        self._used = f"{name}.position"
        self._building = f"{name}.building"

    def begin(self) -> Position | None:
        """Return the position in use, the first one if there is none; None when another process was faster."""
        return read_position(self._bucket, self._used) or self._create(self._used, 1)

    def move(
        self, position: Position, reached: int, updates: Mapping[str, tuple[bytes, int]]
    ) -> Position | None:
        """Store results with the position that they are right for; None when another process was faster."""
        value = position.at(reached), position.revision
        try:
            revisions = self._bucket.update_all({position.key: value, **updates})
        except RevisionConflict:
            return None
        return Position(position.key, position.generation, reached, revisions[position.key])

    def restart(self, position: Position) -> Position | None:
        """Begin the next generation in place of one; None when another process was faster."""
        return self._replace(position, position.generation + 1, 0)

    def rebuild(self, derive: Callable[[Position], Position | None]) -> None:
        """Make the results again, and have them used.

        Parameters:
          derive: Derives results from a position on, and returns the last one; None when another process was faster.

        Raises:
          RebuildConflict: When another process does the same.
        """
        current, left_over = self.begin(), read_position(self._bucket, self._building)
        generation = 1 + max((one.generation for one in (current, left_over) if one is not None), default=1)
        if left_over is None:
            built = self._create(self._building, generation)
        else:
            built = self._replace(left_over, generation, 0)
        while built is not None:
            built = derive(built)
            current = self.begin()
            # Whatever has happened since is what comes next.
            if built and current and self._replace(current, built.generation, built.reached):
                for older in range(1, built.generation):
                    self._bucket.clear(f"{self._name}.{older}.")
                return
        raise RebuildConflict("Another rebuild has begun: wait for that one.")

    def _create(self, key: str, generation: int) -> Position | None:
        position = Position(key, generation, 0, 0)
        try:
            return Position(key, generation, 0, self._bucket.create(key, position.at(0)))
        except KeyExists:
            return None

    def _replace(self, position: Position, generation: int, reached: int) -> Position | None:
        value = Position(position.key, generation, reached, 0).at(reached)
        try:
            revision = self._bucket.update(position.key, value, revision=position.revision)
        except RevisionConflict:
            return None
        return Position(position.key, generation, reached, revision)
