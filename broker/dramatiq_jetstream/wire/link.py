"""The border between threads and asyncio: one event loop thread and one NATS connection per process.

Everything else in the library is called from Dramatiq's threads and calls in here. The connection is made
on first use and made anew after a fork, because nats-py is neither thread-safe nor fork-safe.

What is sent goes one way: a thread leaves a *call* in the mailbox and wakes the loop, at most once for many
calls; the loop runs the calls and writes what they produced, in order and at once. nats-py's own buffer for a
lost connection is switched off, because it would send what the caller was already told had failed; what must
survive a reconnect is kept by whoever sent it, and sent again from `on_reconnect`.

A *fence* is a message to ourselves, once a second. A server handles one client's messages in order, so when
a fence comes back, everything sent before it has arrived; what the server has done with it is another matter (see
`deliveries`). When fences stop coming back the connection is dead, whatever nats-py believes (its reader can die
silently), and is replaced.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, cast

import nats.errors
from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionClosed, ConnectionFailed

from .answers import read_permission_error
from .client import DirectClient, Headers, Msg, Outgoing
from .lanes import Lanes
from .opening import Listener, open_client

__all__ = ["ConnectionState", "Link", "Subscription"]

#: How often a fence is sent, in seconds, and after how many that did not come back the connection is replaced.
FENCE_INTERVAL: Final = 1.0
FENCES_MISSED: Final = 6

#: After a connection that could not be opened anew, in seconds.
REOPEN_PAUSE: Final = 1.0

#: After so many bytes the socket is waited for before more is written.
BACKLOG: Final = 1_048_576

#: When the loop finds so many calls at once, those after them that are not urgent may wait for others, for so many
#: seconds: a turn of the loop costs as much as a dozen of them.
BUSY: Final = 4
COMPANY: Final = 0.002

#: How often callbacks of `on_tick` are called, in seconds.
TICK: Final = 0.1


@dataclass
class ConnectionState:
    """What is known of the connection, for health checks and metrics."""

    connected: bool = False
    reconnects: int = 0
    server: str | None = None
    server_version: str | None = None
    last_error: str | None = None


@dataclass(eq=False)
class Subscription:
    """Interest in a subject that lives until `close`, through every reconnect."""

    subject: str
    callback: Callable[[Msg], None]
    _link: Link = field(repr=False)
    _nats: Any = field(default=None, repr=False)

    def close(self) -> None:
        """End the interest; what is still on its way is dropped."""
        self._link._unsubscribe(self)

    def withdraw(self) -> None:
        """Tell the server to send no more; what is still on its way is delivered until `close`."""
        self._link.post(self._link._withdraw, self)


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link._forget()
        for callback in link._on_fork:
            callback()


def _close_all() -> None:
    """End the loops of a program that does not close its brokers; taken down while they run, one in C may crash."""
    for link in list(_links):
        link.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)


class Link:
    """The loop thread, its NATS connection, and what is sent and received over it.

    Attributes:
      inbox: The subject under which answers to us arrive.
      state: What is known of the connection.
    """

    def __init__(self, options: ConnectOptions) -> None:
        self.options = options
        self.logger = logging.getLogger(__name__)
        self._closed = False
        self._on_lost: list[Callable[[], None]] = []
        self._on_reconnect: list[Callable[[], None]] = []
        self._on_fence: list[Callable[[int], None]] = []
        self._on_tick: list[Callable[[], None]] = []
        self._on_fork: list[Callable[[], None]] = []
        self._listener = Listener(self._failed, self._lost, self._reconnected, self._ended)
        self._subscriptions: list[Subscription] = []
        self._forget()
        _links.add(self)

    def _forget(self) -> None:
        """Start from nothing: at creation, and in the child of a fork, where the parent's loop is not ours.

        The parent's objects stay referenced, so that collecting them does not touch its socket.
        """
        self._inherited = self.__dict__.get("_thread"), self.__dict__.get("_nc"), self.__dict__.get("_loop")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nc: DirectClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._opening: asyncio.Task[None] | None = None
        self._max_payload = 1_048_576
        self._mailbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._outgoing: list[Outgoing] = []
        self._woken = False
        self._coming = False
        self._draining = False
        self._backlog = 0
        self._relieving: asyncio.Task[None] | None = None
        self._lanes = Lanes()
        self.inbox = ""
        self._fence_sent = 0
        self._fence_seen = 0
        self._fences_missed = 0
        self.state = ConnectionState()
        for subscription in self._subscriptions:
            subscription._nats = None

    # Connecting

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_open(self) -> bool:
        """Whether nats-py takes messages now."""
        nc = self._nc
        return nc is not None and nc.is_connected

    @property
    def is_connected(self) -> bool:
        """Whether the server is there now, as far as this process can know."""
        nc = self._nc
        return nc is not None and nc.is_connected and self._fences_missed < 2

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes, headers included."""
        self.connect()
        return self._max_payload

    def connect(self) -> None:
        """Connect if that has not been done; returns at once when it has, even while reconnecting.

        Raises:
          ConnectionFailed: When no server answered in time, or none accepted us.
          ServerUnsupported: When the server is too old or has no JetStream.
          ConnectionClosed: When this connection was closed.
        """
        if self._tasks and not self._closed:
            return
        with self._lock:
            if self._closed:
                raise ConnectionClosed("The connection to NATS was closed; make a new broker to go on.")
            if self._tasks:
                return
            _refuse_gevent()
            loop = self._start_loop()
            opening = asyncio.run_coroutine_threadsafe(self._open(), loop)
            try:
                opening.result(self.options.connect_timeout / 1000 + 5)
            except concurrent.futures.TimeoutError:
                opening.cancel()
                raise ConnectionFailed(f"No NATS server answered at {self.options.display}.") from None

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = _new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="dramatiq-jetstream", daemon=True
            )
            self._thread.start()
        return self._loop

    async def _open(self) -> DirectClient:
        """Open a connection. Nothing is left behind when it fails: the next call starts again."""
        nc = await open_client(self.options, self._listener)
        self.inbox = nc.new_inbox()
        await nc.listen(f"{self.inbox}.*", self._receive)
        self._fences_missed = 0
        self._fence_seen = self._fence_sent
        for subscription in self._subscriptions:
            await self._attach(nc, subscription)
        self._nc = nc
        self._note_server(nc)
        if not self._tasks:
            self._tasks = [asyncio.ensure_future(self._watch())]
        self._drain()
        return nc

    def _failed(self, nc: DirectClient, error: Exception) -> None:
        self.state.last_error = str(error) or type(error).__name__
        denied = read_permission_error(str(error))
        if denied is not None and self._nc is nc:
            self.refused(*denied)

    def _lost(self, nc: DirectClient) -> None:
        self.state.connected = False
        self._lanes.clear()
        self._outgoing.clear()
        self._call_all(self._on_lost)
        if not self._closed and self._nc is nc:  # not while it is opened: that raises
            self.logger.warning("The connection to NATS was lost; reconnecting to %s.", self.options.display)

    def _ended(self, nc: DirectClient) -> None:
        self.state.connected = False
        self._call_all(self._on_lost)
        if not self._closed and self._nc is nc:
            self.logger.error("NATS ended the connection (%s); connecting anew.", self.state.last_error)
            self._nc = None  # `_watch` does the rest

    def _note_server(self, nc: DirectClient) -> None:
        self.state.connected = True
        self.state.server = nc.connected_url.netloc.rpartition("@")[2] if nc.connected_url else None
        self.state.server_version = str(nc._server_info.get("version"))
        self._max_payload = nc.max_payload

    def close(self) -> None:
        """Close the connection; whoever still waits for an answer gets `ConnectionClosed`."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = None
        if loop is None or thread is None:
            return
        closing = asyncio.run_coroutine_threadsafe(self._shut(), loop)
        try:
            closing.result(5)
        except concurrent.futures.TimeoutError:
            self.logger.warning("The connection to NATS did not close within 5 s; leaving it.")
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(5)
        self._nc = None

    async def _shut(self) -> None:
        nc = self._nc
        for task in (*self._tasks, self._opening, self._relieving):
            if task is not None:
                task.cancel()
        if nc is not None:
            self._backlog = 0
            self._drain()
            # A broken connection has nothing left to save; closing it may also end the task that reconnects.
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await nc.close()
        self._lanes.clear()
        self.closing()
        self.state.connected = False

    # Calls from threads

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop thread soon, in the order posted. It must neither block nor raise."""
        self._mailbox.append((call, args))
        if not self._woken:
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to hear
                loop.call_soon_threadsafe(self._drain)

    def post_lazily(self, call: Callable[..., None], *args: Any) -> None:
        """As `post`, but in busy times a moment later, together with others (see `COMPANY`)."""
        self._mailbox.append((call, args))
        if not (self._woken or self._coming):
            self._wake()

    def send(
        self, subject: str, payload: bytes = b"", headers: Headers | bytes | None = None, reply: str = ""
    ) -> None:
        """Publish without JetStream: lost when nobody listens or the connection is down."""
        self.connect()
        self.post(self.write, subject, payload, reply, headers)

    def write(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | bytes | None = None
    ) -> None:
        """Write a message soon; only on the loop thread. Without a connection it is dropped."""
        if self.is_open:
            self._outgoing.append((subject, payload, reply, headers))
            if not self._draining and not self._woken:
                self._woken = True
                cast(asyncio.AbstractEventLoop, self._loop).call_soon(self._drain)

    def new_inbox(self) -> str:
        """Return a fresh subject for answers; add tokens to it as needed."""
        self.connect()
        return cast(DirectClient, self._nc).new_inbox()

    def subscribe(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """Call `callback` on the loop thread for each message on `subject`; it must neither block nor raise."""
        self.connect()
        subscription = Subscription(subject, callback, self)
        self._subscriptions.append(subscription)
        self.run(self._attach_for_sure(cast(DirectClient, self._nc), subscription))
        return subscription

    def run(self, coroutine: Coroutine[Any, Any, None], timeout: int | None = None) -> None:
        """Run a short coroutine on the loop thread and wait for it."""
        if self._loop is None or threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("A blocking call was made on the connection's own thread.")
        milliseconds = 10_000 if timeout is None else timeout
        try:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(milliseconds / 1000)
        except concurrent.futures.TimeoutError:
            raise ConnectionClosed(f"NATS did not answer within {milliseconds} ms.") from None
        except nats.errors.Error as error:
            raise ConnectionClosed(f"NATS refused: {error}.") from error

    def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        if subscription._nats is not None and self._loop is not None and not self._closed:
            asyncio.run_coroutine_threadsafe(self._detach(subscription._nats), self._loop)
            subscription._nats = None

    def _withdraw(self, subscription: Subscription) -> None:
        nc, native = self._nc, subscription._nats
        if nc is not None and native is not None and nc.is_connected:
            with contextlib.suppress(nats.errors.ConnectionClosedError):
                nc.withdraw(native)

    async def _attach_for_sure(self, nc: DirectClient, subscription: Subscription) -> None:
        await self._attach(nc, subscription)
        if nc.is_connected:
            # What is asked next may take another way to the server, and must not get there first.
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                await nc.flush(2)

    async def _attach(self, nc: DirectClient, subscription: Subscription) -> None:
        subscription._nats = await nc.listen(subscription.subject, subscription.callback)

    async def _detach(self, native: Any) -> None:
        if self._nc is not None:
            with contextlib.suppress(nats.errors.Error):  # a closed connection has no subscriptions left
                await self._nc.unlisten(native)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread when a connection is lost, before anything is sent over another one."""
        self._on_lost.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread after each reconnect, once unanswered publishes were sent again."""
        self._on_reconnect.append(callback)

    def on_fence(self, callback: Callable[[int], None]) -> None:
        """Call `callback(n)` on the loop thread when everything sent before fence `n` has arrived."""
        self._on_fence.append(callback)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread ten times a second, connected or not."""
        self._on_tick.append(callback)

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the child of a fork, where nothing is connected yet."""
        self._on_fork.append(callback)

    def forget(self, callback: Callable[..., None]) -> None:
        """Undo every `on_…` for a callback."""
        for callbacks in (self._on_lost, self._on_reconnect, self._on_fence, self._on_tick, self._on_fork):
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)

    def ask(
        self, subject: str, payload: bytes, headers: Headers | bytes | None, seconds: float
    ) -> Msg | None:
        """Send a request that may be sent twice by a lane; None when it has to be sent by the loop after all."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("A blocking call was made on the connection's own thread.")
        nc = self._nc
        if nc is None or not self.is_connected:
            return None
        return self._lanes.ask(nc, subject, payload, headers, seconds)

    def soon(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run `call` on the loop thread after this turn, or after `delay` seconds; only on the loop thread."""
        loop = cast(asyncio.AbstractEventLoop, self._loop)

        if delay:
            loop.call_later(delay, call)
        else:
            loop.call_soon(call)

    def hurry_fence(self) -> None:
        """Send the next fence now instead of within a second; from any thread."""
        self.post(self._send_fence)

    def _send_fence(self) -> None:
        if self._fence_seen == self._fence_sent:
            self._fence_sent += 1
            self.write(f"{self.inbox}.fence", str(self._fence_sent).encode())

    @property
    def next_fence(self) -> int:
        """The fence behind everything that is sent now."""
        return self._fence_sent + 1

    # On the loop thread

    def answered(self, token: str, message: Msg) -> None:
        """Called for each message under `inbox`."""

    def refused(self, verb: str, subject: str) -> None:
        """Called when the server denied us a subject; it is in lower case."""

    def closing(self) -> None:
        """Called when the connection was closed."""

    def _receive(self, message: Msg) -> None:
        token = message.subject[len(self.inbox) + 1 :]
        if token == "fence":
            self._fence_seen = max(self._fence_seen, int(message.data))
            self._call_all(self._on_fence, self._fence_seen)
        else:
            self.answered(token, message)

    def _call_all(self, callbacks: list[Any], *args: Any) -> None:
        # An exception must reach neither nats-py, whose reader would end, nor our own tasks.
        for callback in list(callbacks):
            try:
                callback(*args)
            except Exception:
                self.logger.exception("A callback on the connection's thread failed.")

    def _reconnected(self, nc: DirectClient) -> None:
        if self._nc is not nc:
            return
        self.state.reconnects += 1
        self._lanes.clear()
        self._note_server(nc)
        self._fences_missed = 0
        self._fence_seen = self._fence_sent
        self.logger.info("Reconnected to NATS at %s.", self.state.server)
        self._call_all(self._on_reconnect)
        self._drain()

    def _drain(self) -> None:
        """Run what threads posted and write what that produced."""
        self._woken = False
        nc = self._nc
        if nc is None or self._draining or self._backlog > BACKLOG:
            return  # whoever ends that comes here again
        self._draining = True
        try:
            busy = self._empty_mailbox(nc) >= BUSY
        finally:
            self._draining = False
        if busy and not self._coming:
            self._coming = True
            self.soon(self._come, COMPANY)

    def _come(self) -> None:
        self._coming = False  # before looking, so that whoever leaves something after the look wakes us
        self._drain()

    def _empty_mailbox(self, nc: DirectClient) -> int:
        """Returns how many calls were in it."""
        mailbox = self._mailbox
        calls = 0
        while mailbox or self._outgoing:
            while mailbox:
                call, args = mailbox.popleft()
                calls += 1
                try:
                    call(*args)
                except Exception:
                    self.logger.exception("A call on the connection's thread failed.")
            outgoing, self._outgoing = self._outgoing, []
            if not outgoing:
                continue
            try:
                self._backlog += nc.write_all(outgoing)
            except nats.errors.ConnectionClosedError:
                continue  # publishes are sent again on reconnect, acks by their consumer
            if self._backlog > BACKLOG:
                self._relieving = asyncio.ensure_future(self._relieve(nc))
                break
        return calls

    async def _relieve(self, nc: DirectClient) -> None:
        try:
            await nc.written()
        finally:
            self._backlog = 0
            self._drain()

    async def _watch(self) -> None:
        """Call the ticks, send the fences, and replace a connection from which none comes back."""
        next_fence = 0.0
        while True:
            await asyncio.sleep(TICK)
            self._call_all(self._on_tick)
            self._lanes.close_unused()
            nc = self._nc
            now = time.monotonic()
            if nc is None:
                if self._opening is None or self._opening.done():
                    self._opening = asyncio.ensure_future(self._open_anew())
            elif not nc.is_connected:
                next_fence = 0.0
            elif now >= next_fence:
                next_fence = now + FENCE_INTERVAL
                self._fences_missed = self._fences_missed + 1 if self._fence_seen < self._fence_sent else 0
                if self._fences_missed < FENCES_MISSED:
                    self._fence_sent += 1
                    self.write(f"{self.inbox}.fence", str(self._fence_sent).encode())
                else:
                    self._fences_missed = 0
                    self.logger.warning("NATS was silent for %d s; reconnecting.", FENCES_MISSED)
                    await self._replace(nc)

    async def _open_anew(self) -> None:
        """Connect again after nats-py gave up, as it does at any error but a lost connection."""
        try:
            nc = await self._open()
        except BrokerError as error:
            self.logger.error("%s", error)
            await asyncio.sleep(REOPEN_PAUSE)
        else:
            self._reconnected(nc)

    async def _replace(self, nc: DirectClient) -> None:
        nc.abort()  # closing in good order would wait for a peer that may never take what is buffered
        await nc.force_reconnect()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


def _refuse_gevent() -> None:
    monkey = sys.modules.get("gevent.monkey")  # nobody has patched anything without importing it
    if monkey is not None and monkey.is_module_patched("threading"):
        raise BrokerError(
            "dramatiq-jetstream does not run under gevent, which replaces the threads it needs: "
            "start workers with `dramatiq` instead of `dramatiq-gevent`."
        )
