"""One-time signals between threads that an interrupt cannot leave taken.

`threading.Event` holds a lock while Python code runs. A signal handler that waits for the same event, in the thread
that it interrupted there, would wait for ever. Here each waiting thread has a lock of its own, and every step on what
is shared is one call of C.
"""

from __future__ import annotations

import contextlib
from _thread import LockType, allocate_lock
from collections import deque

__all__ = ["Signal", "Waiters"]


class Signal:
    """Set once by any thread, waited for by one."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock: LockType = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was set before
            self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Wait at most this many seconds, by the monotonic clock; returns whether it was set."""
        return self._lock.acquire(timeout=max(0.0, seconds))


class Waiters:
    """Any number of threads that wait for the next time something happens."""

    def __init__(self) -> None:
        self._signals: deque[Signal] = deque()

    def add(self) -> Signal:
        """A signal that the next `wake` sets. Look at what is waited for after this, then wait."""
        signal = Signal()
        self._signals.append(signal)
        return signal

    def discard(self, signal: Signal) -> None:
        with contextlib.suppress(ValueError):
            self._signals.remove(signal)

    def wake(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._signals.popleft().set()
