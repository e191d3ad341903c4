"""Lets interrupts into actors, and nowhere else.

Dramatiq interrupts a thread by raising an exception in it, at any instruction: a time limit, a shutdown, an abort. None
of them is an `Exception`. One that strikes after the actor, while its retry is stored, would cost the message or the
thread; one that strikes between taking a lock and its `try` would leave the lock taken.

So each worker thread has a `Gate`: a lock that its thread holds whenever it must not be interrupted, and lets go of
while an actor runs. All of Dramatiq's interrupts, and those of `dramatiq_abort`, go through one function of Dramatiq's,
which this module replaces. It raises an exception in a thread that has a gate only while it holds that gate itself.
What comes before the actor has begun waits for it; what comes after it has ended is dropped.

Why nothing gets past it: an exception that was set strikes at the thread's next check, and CPython checks after a call,
at the beginning of a function and at the end of a loop's turn. Between the end of the actor and the end of
`lock.acquire()` there is no check outside the `try`, and when `acquire` has returned, nothing can be set any more.

An actor may do something that must be whole, such as taking a turn at a limiter: if it is interrupted in between, the
server has done it and the thread does not know. `uninterrupted` keeps interrupts waiting for as long. Its thread takes
no lock for that, which it could fail to give back: it says that nothing may strike, and waits for a thread that was
about to. What was set by then strikes here, before anything is done.

What is interrupted elsewhere (threads of the program's own, Ctrl-C in the main thread) has no gate. Code that such
threads run takes nothing that it can fail to give back (see `rate_limits`).
"""

from __future__ import annotations

import threading
import time
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from weakref import ref

from dramatiq import threading as dramatiq_threading

__all__ = ["Gate", "interrupt", "uninterrupted"]

Result = TypeVar("Result")

#: The pause between two checks whether another thread is raising something in this one, in seconds.
LOOK_AGAIN_SECONDS: Final = 0.0001


class Gate:
    """The gate of the calling thread: closed, other than during `call`."""

    __slots__ = ("_expected", "_is_open", "_kept_out", "_lock", "_thread", "_wanted")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()
        self._expected = False
        self._is_open = False
        self._kept_out = False
        self._wanted: deque[tuple[type[BaseException], Callable[[], bool] | None]] = deque()
        thread = threading.current_thread()
        self._thread = ref(thread)
        _gates[threading.get_ident()] = self

    def expect(self) -> None:
        """A message starts: hold interrupts back until its actor runs."""
        self._wanted.clear()
        self._expected = True

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call `function`, which interrupts may strike. When this returns or raises, none can come any more."""
        self._is_open = True
        try:
            self._lock.release()
            if self._wanted:
                self._raise_wanted()
            return function(*args, **kwargs)
        finally:
            # Before the lock is taken: what was set while this thread waited for it strikes when it has it.
            self._expected = self._is_open = False
            self._lock.acquire()

    def keep_out(self, function: Callable[[], Result]) -> Result:
        """Call `function` in an actor; what is to interrupt it meanwhile does so afterwards."""
        if not self._is_open or self._kept_out:  # closed, as in a hook of middleware: nothing can strike
            return function()
        self._kept_out = True
        try:
            while self._lock.locked():
                time.sleep(LOOK_AGAIN_SECONDS)
            return function()
        finally:
            self._kept_out = False
            if self._wanted:
                self._raise_wanted()

    def interrupt(self, exception: type[BaseException], still_due: Callable[[], bool] | None) -> None:
        """Raise `exception` in the thread of this gate, at once or when its actor begins; any thread may call it."""
        if not self._expected:
            return
        # Appended before trying, so that the thread sees it when it opens the gate after the try.
        self._wanted.append((exception, still_due))
        while self._wanted and not self._kept_out and self._lock.acquire(blocking=False):
            try:
                if not self._kept_out:
                    self._raise_wanted()
            finally:
                self._lock.release()

    def _raise_wanted(self) -> None:
        try:
            exception, still_due = self._wanted.popleft()
        except IndexError:
            return
        thread = self._thread()
        if thread is not None and thread.ident is not None and (still_due is None or still_due()):
            _raise_now(thread.ident, exception)

    @property
    def is_of_a_living_thread(self) -> bool:
        thread = self._thread()
        return thread is not None and thread.is_alive()


_gates: dict[int, Gate] = {}


def interrupt(
    thread_id: int, exception: type[BaseException], still_due: Callable[[], bool] | None = None
) -> None:
    """Raise an exception in a thread, if that may be interrupted now.

    Parameters:
      still_due: Asked at the last moment, when the thread can no longer go on to its next message.
    """
    gate = _gates.get(thread_id)
    if gate is not None and gate.is_of_a_living_thread:
        gate.interrupt(exception, still_due)
    elif still_due is None or still_due():
        _raise_now(thread_id, exception)


def uninterrupted(function: Callable[[], Result]) -> Result:
    """Call a function that must be whole. In an actor, interrupts strike after it; elsewhere it is just called."""
    gate = _gates.get(threading.get_ident())
    return function() if gate is None else gate.keep_out(function)


_raise_now: Callable[[int, type[BaseException]], None] = dramatiq_threading._raise_thread_exception_cpython
dramatiq_threading._raise_thread_exception_cpython = interrupt
