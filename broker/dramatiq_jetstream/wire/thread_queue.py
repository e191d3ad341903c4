"""A queue between threads whose every step is one call of C, so that no thread holds a lock while Python code runs.

`queue.Queue` holds a lock in Python code. If its holder loses the GIL there, every other thread queues behind that
lock. `queue.SimpleQueue` has no such lock, but in Python 3.11 a `get` whose time runs out just as another thread takes
the item that it was woken for computes a negative rest and waits for ever.

Here a thread that finds nothing queues a lock of its own, looks again, and waits for that lock. A thread that puts an
item releases one of the queued locks. So an item is either seen by the second look, or a lock is released for it.

Only one thread is woken at a time; it wakes the next once it has taken its item and sees another. Only one thread can
run in the interpreter anyway, and the others would find nothing left. An item that is put while a woken thread is on
its way is seen by that thread, because it looks once more after it has reported its arrival.

If an exception strikes the thread that puts an item before it has woken another, the next thread whose wait ends takes
the item. A wait without a timeout looks again every `LOOK_AGAIN_SECONDS` for that reason.
"""

from __future__ import annotations

import time
from _thread import LockType, allocate_lock
from collections import deque
from queue import Empty
from typing import Final, Generic, TypeVar

__all__ = ["ThreadQueue"]

T = TypeVar("T")

#: How often a wait without a timeout looks by itself: the thread that put an item may have been interrupted.
LOOK_AGAIN_SECONDS: Final = 1.0


class ThreadQueue(Generic[T]):
    """First in, first out, for any number of threads."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiting: deque[LockType] = deque()
        self._coming = False  # whether a woken thread has not looked yet

    def put(self, item: T) -> None:
        self._add(item)
        if not self._coming:
            self._wake()

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take an item, waiting for one up to `timeout` seconds, or for ever. Raises queue.Empty."""
        try:
            return self._take()
        except IndexError:
            if not block:
                raise Empty from None
        return self._wait(None if timeout is None else time.monotonic() + timeout)

    def get_nowait(self) -> T:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def _add(self, item: T) -> None:
        self._items.append(item)

    def _take(self) -> T:
        """Take an item; raises IndexError when there is none."""
        return self._items.popleft()

    def _wake(self) -> None:
        self._coming = True  # before it can come
        try:
            lock = self._waiting.pop()  # the thread that has waited the shortest starts the quickest
        except IndexError:
            self._coming = False
        else:
            lock.release()

    def _wait(self, deadline: float | None) -> T:
        lock = allocate_lock()
        lock.acquire()
        while True:
            self._waiting.append(lock)
            try:
                item = self._take()
            except IndexError:
                pass
            else:
                if not self._withdraw(lock):
                    self._came()  # we were woken for another item, for which another thread may wait
                return item
            rest = LOOK_AGAIN_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                woken = lock.acquire(timeout=rest)
            finally:
                self._coming = False  # also when the thread is interrupted
            if not woken and self._withdraw(lock):
                if deadline is None:
                    continue
                raise Empty
            try:
                item = self._take()
            except IndexError:  # a thread that did not have to wait was faster
                self._coming = False
                if not woken:
                    raise Empty from None
            else:
                self._came()
                return item

    def _came(self) -> None:
        """A thread that was woken has what it came for: wake the next, if there is more."""
        self._coming = False
        if not self.empty():
            self._wake()

    def _withdraw(self, lock: LockType) -> bool:
        """Stop waiting; returns False when another thread has already woken this one."""
        try:
            self._waiting.remove(lock)
        except ValueError:
            return False
        return True
