"""The event loop's thread, and how other threads leave calls for it.

A thread leaves a *call* in the mailbox and wakes the loop, at most once for many calls. In busy times, calls that are
not urgent wait a moment for others, because a turn of the loop costs as much as a dozen calls. For a message that does
nothing, that saved 2 % of a worker's CPU in one measurement and 12 % in another.

The thread starts on first use. No call takes a lock, so an interrupt leaves none taken, and a signal handler may call
anything here. If a thread is interrupted between leaving a call and waking the loop, `look` runs the call; it comes ten
times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from .waiting import Signal

__all__ = ["LoopThread"]

#: Once the loop finds BUSY calls at once, calls that are not urgent wait for others for up to BATCH_SECONDS.
BUSY: Final = 4
BATCH_SECONDS: Final = 0.002

#: How many calls are run in one turn of the loop.
CALLS_AT_ONCE: Final = 1_000

#: With this many calls in the mailbox, messages that may be lost are dropped.
MAILBOX_FULL: Final = 100_000

#: How long `close` waits for the thread.
CLOSE_SECONDS: Final = 5.0

Work = Callable[[], Coroutine[Any, Any, None]]

logger = logging.getLogger(__name__)


class LoopThread:
    """An event loop on a thread of its own.

    Parameters:
      tasks: What runs there from the start until `close`.
      after_calls: Called on the loop's thread whenever calls have run.
      shut: Runs when all else has ended.
    """

    def __init__(self, tasks: list[Work], after_calls: Callable[[], None], shut: Work) -> None:
        self.thread: threading.Thread | None = None
        self.closed = False
        self._work = tasks
        self._after_calls = after_calls
        self._shut = shut
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = Signal()
        self._mailbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False
        self._coming = False
        self._draining = False

    # From any thread

    @property
    def started(self) -> bool:
        return self._loop is not None

    @property
    def is_full(self) -> bool:
        """Whether MAILBOX_FULL calls wait: messages that may be lost are then dropped."""
        return len(self._mailbox) >= MAILBOX_FULL

    def start(self) -> None:
        """Start the thread unless it runs. If several start, the first does the work and the others end at once."""
        if self._loop is None:
            _refuse_gevent()
            threading.Thread(target=self._run, name="dramatiq-jetstream", daemon=True).start()

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop's thread soon, in the order posted. It must neither block nor raise.

        Nothing runs that is posted after `close`.
        """
        if self.closed:
            return
        self._mailbox.append((call, args))
        if not self._woken:
            self._wake()

    def post_lazily(self, call: Callable[..., None], *args: Any) -> None:
        """As `post`, but in busy times a moment later, together with others (see `BATCH_SECONDS`)."""
        if self.closed:
            return
        self._mailbox.append((call, args))
        if not (self._woken or self._coming):
            self._wake()

    def refuse_here(self) -> None:
        """Raise RuntimeError on the loop's own thread, where a call that blocks would stop everything."""
        if threading.current_thread() is self.thread:
            raise RuntimeError("A blocking call was made on the connection's own thread.")

    def close(self) -> None:
        """Run what was posted, end the tasks, and then the thread."""
        self.closed = True
        loop = self._loop
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # it was closed before
            loop.call_soon_threadsafe(self._begin_to_end)
        if threading.current_thread() is self.thread:
            return
        if not self._ended.wait(CLOSE_SECONDS):
            logger.warning("The connection to NATS did not close within %d s; leaving it.", CLOSE_SECONDS)
        self._ended.set()  # for another thread that closes

    def _wake(self) -> None:
        self._woken = True
        if self._loop is None:
            self.start()
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._drain)

    # On the loop's thread

    def soon(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run `call` after this turn of the loop, or after `delay` seconds."""
        loop = cast(asyncio.AbstractEventLoop, self._loop)
        if delay:
            loop.call_later(delay, call)
        else:
            loop.call_soon(call)

    def call_after(self) -> None:
        """Have `after_calls` called in this turn of the loop, or in the next."""
        if not self._draining and not self._woken:
            self._woken = True
            self.soon(self._drain)

    def look(self) -> None:
        """Run calls whose thread was interrupted before it woke the loop."""
        if self._mailbox:
            self._drain()

    def _run(self) -> None:
        # One atomic step decides which thread it is.
        if self.__dict__.setdefault("_runner", threading.current_thread()) is not threading.current_thread():
            return
        loop = _new_event_loop()
        self.thread = threading.current_thread()
        self._tasks = [loop.create_task(work()) for work in self._work]
        self._loop = loop
        loop.call_soon(self._drain)
        if self.closed:
            loop.call_soon(self._begin_to_end)
        try:
            loop.run_forever()
            loop.close()
            self._mailbox.clear()
        finally:
            self._ended.set()

    def _drain(self) -> None:
        """Run what is in the mailbox.

        Calls posted meanwhile may wait for the next turn, or posting threads could starve the loop.
        """
        self._woken = False
        if self._draining:
            return
        self._draining = True
        mailbox = self._mailbox
        calls = 0
        try:
            while mailbox and calls < CALLS_AT_ONCE:
                call, args = mailbox.popleft()
                calls += 1
                try:
                    call(*args)
                except Exception:
                    logger.exception("A call on the connection's thread failed.")
            self._after_calls()
        finally:
            self._draining = False
        if mailbox and not self._woken:
            self._woken = True
            self.soon(self._drain)
        elif calls >= BUSY and not self._coming:
            self._coming = True
            self.soon(self._come, BATCH_SECONDS)

    def _come(self) -> None:
        self._coming = False  # set before looking: a call left after the look wakes us
        self._drain()

    def _begin_to_end(self) -> None:
        if self._tasks:
            tasks, self._tasks = self._tasks, []
            cast(asyncio.AbstractEventLoop, self._loop).create_task(self._end(tasks))

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        try:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
            while self._mailbox:
                self._drain()
            await self._shut()
            await asyncio.sleep(0)
        finally:
            cast(asyncio.AbstractEventLoop, self._loop).stop()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


def _refuse_gevent() -> None:
    monkey = sys.modules.get("gevent.monkey")  # nothing is patched without importing it
    if monkey is not None and monkey.is_module_patched("threading"):
        raise BrokerError(
            "dramatiq-jetstream does not run under gevent, which replaces the threads it needs: "
            "start workers with `dramatiq` instead of `dramatiq-gevent`."
        )
