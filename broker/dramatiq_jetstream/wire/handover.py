"""A queue between threads, made of parts that Python cannot interrupt, whose waits end when they are to end.

`queue.Queue` holds a lock while Python code runs; a thread that has to yield the interpreter in there keeps the
lock, and all others run into it one after the other. `queue.SimpleQueue` has no such lock, but (in Python 3.11, at
least) a `get` whose time is over at the moment at which another thread takes the item it was woken for computes a
negative rest and waits for ever.

Here every step is one call of C, which is done before another thread can run. Who finds nothing puts a lock of its
own on a list, looks again, and waits for that lock; who puts an item takes a lock from the list and opens it. So an
item is either seen by the second look, or its lock is opened.

Only one thread is woken at a time, and it wakes the next when it has taken its item and sees another. Only one can
run in the interpreter anyway; the rest would come to find that there is nothing left. An item that was put while a
thread was on its way is seen by that thread, which looks after it has said that it is there. Should a thread be
interrupted in between, the next one whose time is over puts that right.
"""

from __future__ import annotations

import time
from _thread import LockType, allocate_lock
from collections import deque
from queue import Empty
from typing import Final, Generic, TypeVar

__all__ = ["Handover"]

T = TypeVar("T")

#: How often a thread that waits without an end looks by itself: one that put an item may have been interrupted.
LOOK_AGAIN_SECONDS: Final = 1.0


class Handover(Generic[T]):
    """First in, first out, for any number of threads."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiting: deque[LockType] = deque()
        self._coming = False  # whether a thread was woken that has not looked yet

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
            lock = self._waiting.pop()  # who waits the shortest is the quickest to start
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
                    self._came()  # we were woken for another item, which somebody else may be waiting for
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
        """Wait no longer; False when somebody has woken us already."""
        try:
            self._waiting.remove(lock)
        except ValueError:
            return False
        return True
