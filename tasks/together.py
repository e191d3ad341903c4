"""Threads that want the same kind of thing at the same time, served by one of them in one go.

The thread whose turn it is does it for all that wait meanwhile, perhaps for itself among them. An interrupt may lose
what a thread took from the line; each of those does its own again when its turn comes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

W = TypeVar("W")

#: How much is done in one go, which bounds the size of what is written.
MOST: Final = 100


class _Job(Generic[W]):
    __slots__ = ("done", "error", "wanted")

    def __init__(self, wanted: W) -> None:
        self.wanted = wanted
        self.done = False
        self.error: BaseException | None = None


class Together(Generic[W]):
    """Does what the threads of a process want.

    Parameters:
      do: Does it for several, and leaves each one's result with it.
      failed: Returns what the others raise when the thread that does it for them meets an error. An interrupt is meant
        for that thread only.

    Attributes:
      turn: Held while anything is done.
    """

    def __init__(self, do: Callable[[list[W]], None], failed: Callable[[BaseException], Exception]) -> None:
        self.turn = threading.Lock()
        self._do = do
        self._failed = failed
        self._waiting: deque[_Job[W]] = deque()

    def __call__(self, wanted: W) -> None:
        """Have something done, and wait until it is."""
        job = _Job(wanted)
        self._waiting.append(job)
        with self.turn:
            while not job.done:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))] or [job]
                try:
                    self._do([one.wanted for one in batch])
                except BaseException as error:
                    for other in batch:
                        other.error = error if other is job else self._failed(error)
                        other.done = True
                    if job not in batch or not isinstance(error, Exception):
                        raise
                else:
                    for other in batch:
                        other.done = True
        if job.error is not None:
            raise job.error
