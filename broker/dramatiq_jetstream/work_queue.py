"""The queue between a worker's consumer threads and its worker threads, made of parts that Python cannot interrupt.

Dramatiq uses `queue.PriorityQueue`, whose lock is held while Python compares messages. A thread that has to yield the
interpreter in there keeps the lock; all others run into it one after the other, and from then on every message costs
several switches between threads.

Here every step is one call of C, which is done before another thread can run: a deque for each priority holds the
items, and a `SimpleQueue` holds a token for each of them. A token is put after its item, and whoever has got a token
takes one item, so there is always one to be found.

A process that dies loses nothing with it: what is in here is held, not settled (see `deliveries`).
"""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from typing import Protocol

__all__ = ["WorkQueue"]


class Item(Protocol):
    @property
    def priority(self) -> int: ...


class WorkQueue:
    """What a Dramatiq worker needs of `queue.PriorityQueue`: lowest priority first, and then first in, first out."""

    def __init__(self) -> None:
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._by_priority: dict[int, deque[Item]] = {}
        self._in_order: list[deque[Item]] = []  # replaced as a whole, so that it can be read without a lock
        self._adding = threading.Lock()
        self._unfinished: deque[None] = deque()
        self._finished = threading.Condition()
        self._joining = 0

    def put(self, item: Item) -> None:
        items = self._by_priority.get(item.priority)
        if items is None:
            items = self._add_priority(item.priority)
        self._unfinished.append(None)
        items.append(item)
        self._tokens.put(None)

    def _add_priority(self, priority: int) -> deque[Item]:
        with self._adding:
            items = self._by_priority.setdefault(priority, deque())
            self._in_order = [self._by_priority[known] for known in sorted(self._by_priority)]
        return items

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        """Take an item, waiting for one up to `timeout` seconds. Raises queue.Empty."""
        self._tokens.get(block, timeout)
        while True:
            for items in self._in_order:
                try:
                    return items.popleft()
                except IndexError:
                    continue

    def get_nowait(self) -> Item:
        return self.get(block=False)

    def task_done(self) -> None:
        """Say that an item that was taken has been worked off."""
        try:
            self._unfinished.pop()
        except IndexError:
            raise ValueError("task_done() was called more often than there were items.") from None
        if self._joining and not self._unfinished:
            with self._finished:
                self._finished.notify_all()

    def join(self) -> None:
        """Wait until all items have been worked off."""
        with self._finished:
            # Said before looking, so that whoever finishes the last one after the look wakes us.
            self._joining += 1
            try:
                while self._unfinished:
                    self._finished.wait()
            finally:
                self._joining -= 1

    @property
    def unfinished_tasks(self) -> int:
        return len(self._unfinished)

    def qsize(self) -> int:
        return self._tokens.qsize()

    def empty(self) -> bool:
        return self._tokens.empty()
