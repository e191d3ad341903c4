"""The border between threads and asyncio: one event loop thread and one NATS connection per process.

Everything else in the library is called from Dramatiq's threads and calls in here. The thread is started on first use.

What is sent goes one way. A thread leaves a *call* in the mailbox and wakes the loop, at most once for many calls. The
loop runs the calls, which put messages into the outbox, and writes the outbox while the socket takes what is written.
A message with a deadline that passes in the outbox is dropped (see `calls`). Others are dropped when the connection is
lost: what must survive that is kept by its sender, and sent again from `on_reconnect`. If the outbox outgrows
`OUTBOX_BYTES`, the connection is cut, because then its server takes nothing any more.

**The connection is kept by facts.** One task opens it, waits until it is lost, and opens the next, with a pause that
grows. Nothing ends that task but `close`: what goes wrong in one attempt is one failed attempt. A second task looks
ten times a second. Once a second it sends a *fence*, a message to ourselves, so the server has something to say; when
nothing at all arrives for `SILENT_FENCES` of them, it cuts the connection. Any received bytes are a sign of life.

A server handles one client's messages in order, so when a fence comes back, everything sent before it has arrived;
what the server has done with it is another matter (see `settlements`).

**Interrupts.** A thread that is interrupted in here leaves nothing taken: there is no lock, each waiting thread has a
signal of its own, and the loop's thread is not one into which Dramatiq throws. A signal handler may call anything here,
whatever it interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import (
    InvalidOption,
    MessageTooLarge,
    NotSent,
    PermissionDenied,
    ServerUnsupported,
)

from .answers import check_subject, permission_denied, read_permission_error
from .calls import Call, Calls
from .client import Client
from .headers import Headers, Msg
from .ids import new_id
from .lanes import Lanes
from .login import LoginUnreadable, preload
from .opening import Servers, open_client
from .protocol import (
    Event,
    Outgoing,
    ServerError,
    ServerInfo,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
)
from .tls import Refused
from .waiting import Signal, Waiters

__all__ = ["ConnectionState", "Link", "Listeners", "Subscription"]

#: How often a fence is sent, and after how many without a received byte the connection is cut.
FENCE_SECONDS: Final = 1.0
SILENT_FENCES: Final = 6

#: The pause before the next attempt to connect, at first and at most; a third of it is random.
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0

#: A connection that lasted less than this was none: the pause goes on growing.
LASTING_SECONDS: Final = 5.0

#: How often a reason that stays the same is logged again, and how many reasons are remembered for that.
REMIND_SECONDS: Final = 60.0
MOST_REASONS: Final = 20

#: How many bytes are given to the socket at once.
CHUNK_BYTES: Final = 65_536

#: How many bytes of messages without a deadline may wait in the outbox.
OUTBOX_BYTES: Final = 16_777_216

#: Once the loop finds BUSY calls at once, calls that are not urgent wait for others for up to BATCH_SECONDS: a turn of
#: the loop costs as much as a dozen calls.
BUSY: Final = 4
BATCH_SECONDS: Final = 0.002

#: How many calls are run in one turn of the loop.
CALLS_AT_ONCE: Final = 1_000

#: With this many calls in the mailbox, messages that may be lost are.
MAILBOX_FULL: Final = 100_000

#: How often callbacks of `on_tick` are called.
TICK_SECONDS: Final = 0.1

#: How long `close` waits for what is still to be written, and for the thread.
CLOSE_SECONDS: Final = 5.0

# What the server refuses without ending the connection, beside permissions.
_HARMLESS: Final = re.compile(r"maximum subscriptions|invalid (publish )?subject", re.IGNORECASE)

#: The subscription to `inbox`.
_INBOX_SID: Final = 1


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
    sid: int
    _link: Callable[[], Link] = field(repr=False)
    denied: PermissionDenied | None = None

    def close(self) -> None:
        """End the interest; what is still on its way is dropped."""
        self._link().unsubscribe(self)

    def withdraw(self) -> None:
        """Tell the server to send no more; what is still on its way is delivered until `close`."""
        link = self._link()
        link.post(link.enqueue, encode_unsubscribe(self.sid))


@dataclass
class Listeners:
    """What is called on the loop thread as things happen; `fork` in the child of a fork. It outlives a link."""

    lost: list[Callable[[], None]] = field(default_factory=list)
    reconnect: list[Callable[[], None]] = field(default_factory=list)
    fence: list[Callable[[int], None]] = field(default_factory=list)
    tick: list[Callable[[], None]] = field(default_factory=list)
    fork: list[Callable[[], None]] = field(default_factory=list)

    def forget(self, callback: Callable[..., None]) -> None:
        everything: tuple[list[Any], ...] = (self.lost, self.reconnect, self.fence, self.tick, self.fork)
        for callbacks in everything:
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)


class Link:
    """The loop thread, its connection, and what is sent and received over it. One for each life of a process.

    Attributes:
      inbox: The subject under which answers to us arrive.
      state: What is known of the connection.
      calls: What waits for an answer.
      lanes: The short way, while there is a connection.
      max_payload: The largest message that the server takes, in bytes.
    """

    def __init__(
        self, options: ConnectOptions, listeners: Listeners, subscriptions: dict[int, Subscription]
    ) -> None:
        preload(options)
        self.options = options
        self.logger = logging.getLogger(__name__)
        self.inbox = f"{options.inbox_prefix}.{new_id()}"
        self.state = ConnectionState()
        self.calls = Calls(self)
        self.lanes: Lanes | None = None
        self.lane_failures = 0
        self.max_payload = 1_048_576
        self.thread: threading.Thread | None = None
        self._listeners = listeners
        self._subscriptions = subscriptions
        self._servers = Servers(options)
        self._client: Client | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = Signal()
        self._was_open = False
        self._waiters = Waiters()
        self._attempts = 0
        self._failure: BrokerError | None = None
        self._complaints: dict[str, float] = {}
        self._mailbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._outbox: deque[tuple[Outgoing | bytes, Call | None]] = deque()
        self._outbox_bytes = 0
        self._woken = False
        self._coming = False
        self._draining = False
        self._fence_sent = 0
        self._fence_seen = 0
        self._silent_fences = 0

    # From any thread

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_open(self) -> bool:
        """Whether messages can be written now."""
        client = self._client
        return client is not None and client.open

    @property
    def is_connected(self) -> bool:
        """Whether the server is there now, as far as this process can know."""
        client = self._client
        return client is not None and client.open and self._silent_fences < 2

    @property
    def is_full(self) -> bool:
        """Whether so many calls wait in the mailbox that messages which may be lost should be."""
        return len(self._mailbox) >= MAILBOX_FULL

    @property
    def next_fence(self) -> int:
        """The fence behind everything that is sent now."""
        return self._fence_sent + 1

    def wait_open(self, deadline: float, *, attempts: int | None = None) -> None:
        """Wait until there has been a connection; returns at once when there was one, even if it is lost.

        Parameters:
          deadline: By `time.monotonic`.
          attempts: Wait for so many failed attempts at most.

        Raises:
          NotSent: When none could be made before `deadline`, or the link was closed.
          ConnectionFailed, ServerUnsupported: When a server answered and refused us.
        """
        if self._was_open and not self._closed:
            return
        self._refuse_here()
        before = self._attempts
        while True:
            if self._closed:
                raise NotSent("The connection to NATS was closed; make a new broker to go on.")
            self._run()
            signal = self._waiters.add()
            try:
                if self._was_open:
                    return
                failure, failed = self._failure, self._attempts - before
                final = isinstance(failure, (Refused, ServerUnsupported, LoginUnreadable))
                if failure is not None and failed and (final or failed == attempts):
                    raise type(failure)(*failure.args)
                if not signal.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    reason = str(
                        failure or f"Could not connect to NATS at {self.options.display}: no answer."
                    )
                    raise NotSent(f"{reason} Nothing was sent.")
            finally:
                self._waiters.discard(signal)

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop thread soon, in the order posted. It must neither block nor raise.

        Nothing runs that is posted after `close`.
        """
        if self._closed:
            return
        self._mailbox.append((call, args))
        if not self._woken:
            self._wake()

    def post_lazily(self, call: Callable[..., None], *args: Any) -> None:
        """As `post`, but in busy times a moment later, together with others (see `BATCH_SECONDS`)."""
        if self._closed:
            return
        self._mailbox.append((call, args))
        if not (self._woken or self._coming):
            self._wake()

    def ask(
        self, subject: str, payload: bytes, headers: Headers | bytes | None, seconds: float
    ) -> Msg | bool:
        """Ask by a lane: the answer, or whether the request may have been sent although none came."""
        self._refuse_here()
        lanes = self.lanes
        if lanes is None or not self.is_connected:
            return False
        answer = lanes.ask(subject, payload, headers, seconds)
        self.lane_failures += answer is True
        return answer

    def unsubscribe(self, subscription: Subscription) -> None:
        known = self._subscriptions.pop(subscription.sid, None) is not None
        if known and self._loop is not None and not self._closed:
            self.post(self.enqueue, encode_unsubscribe(subscription.sid))

    def close(self) -> None:
        """Write what waits, close the connection, and end the thread. Calls that wait get an error."""
        self._closed = True
        self._waiters.wake()
        loop = self._loop
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # it was closed before
            loop.call_soon_threadsafe(self._begin_shut)
        if threading.current_thread() is not self.thread and not self._ended.wait(CLOSE_SECONDS):
            self.logger.warning(
                "The connection to NATS did not close within %d s; leaving it.", CLOSE_SECONDS
            )
        self._ended.set()  # for another thread that closes

    def _refuse_here(self) -> None:
        if threading.current_thread() is self.thread:
            raise RuntimeError("A blocking call was made on the connection's own thread.")

    def _wake(self) -> None:
        self._woken = True
        if self._loop is None:
            self._run()
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._drain)

    def _run(self) -> None:
        """Start the loop's thread unless it runs. The first one that is started does; others end at once."""
        if self._loop is None:
            _refuse_gevent()
            threading.Thread(target=self._run_loop, name="dramatiq-jetstream", daemon=True).start()

    # On the loop thread

    def _run_loop(self) -> None:
        # One atomic step decides which thread it is.
        if self.__dict__.setdefault("_runner", threading.current_thread()) is not threading.current_thread():
            return
        loop = _new_event_loop()
        self.thread = threading.current_thread()
        self._tasks = [loop.create_task(self._keep_connected()), loop.create_task(self._look())]
        self._loop = loop
        loop.call_soon(self._drain)
        if self._closed:
            loop.call_soon(self._begin_shut)
        try:
            loop.run_forever()
            loop.close()
            self._mailbox.clear()
        finally:
            self._ended.set()

    def write(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | bytes | None = None
    ) -> None:
        """Write a message soon. Without a connection it is dropped."""
        self.enqueue((subject, payload, reply, headers))

    def enqueue(self, message: Outgoing | bytes, call: Call | None = None) -> None:
        """Put a message, or a command as it goes over the wire, into the outbox; `call` gives it a deadline."""
        client = self._client
        if client is None or not client.open:
            return
        self._outbox.append((message, call))
        if call is None:
            self._outbox_bytes += _size(message)
            if self._outbox_bytes > OUTBOX_BYTES:
                client.abort(f"more than {OUTBOX_BYTES >> 20} MiB waited to be written")
                return
        if not self._draining and not self._woken:
            self._woken = True
            cast(asyncio.AbstractEventLoop, self._loop).call_soon(self._drain)

    def soon(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run `call` after this turn of the loop, or after `delay` seconds."""
        loop = cast(asyncio.AbstractEventLoop, self._loop)
        if delay:
            loop.call_later(delay, call)
        else:
            loop.call_soon(call)

    def send_fence(self) -> None:
        """Send the next fence now, unless one is under way."""
        if self._fence_seen >= self._fence_sent:
            self._fence_sent += 1
            self.write(f"{self.inbox}.fence", str(self._fence_sent).encode())

    def describe(self) -> tuple[str, str]:
        """Where the servers are, and what was heard of them last, for an error."""
        return self.options.display, self.state.last_error or "no answer yet"

    def _drain(self) -> None:
        """Run what threads posted and write what that produced."""
        self._woken = False
        if self._draining:
            return
        self._draining = True
        try:
            calls = self._empty_mailbox()
        finally:
            self._draining = False
        if self._mailbox and not self._woken:
            self._woken = True
            self.soon(self._drain)
        elif calls >= BUSY and not self._coming:
            self._coming = True
            self.soon(self._come, BATCH_SECONDS)

    def _come(self) -> None:
        self._coming = False  # before looking: a call that is left after the look wakes us
        self._drain()

    def _empty_mailbox(self) -> int:
        """Run the calls that are in the mailbox, and write what they produced; returns how many they were.

        What is posted meanwhile has to wait for the next turn, or those who post could keep the loop from all else.
        """
        mailbox = self._mailbox
        calls = 0
        while mailbox and calls < CALLS_AT_ONCE:
            call, args = mailbox.popleft()
            calls += 1
            try:
                call(*args)
            except Exception:
                self.logger.exception("A call on the connection's thread failed.")
        self._flush()
        return calls

    def _flush(self) -> None:
        """Write the outbox, as far as the socket takes it."""
        client, outbox = self._client, self._outbox
        while outbox and client is not None and client.open and not client.paused:
            now = time.monotonic()
            chunk: list[bytes] = []
            size = 0
            while outbox and size < CHUNK_BYTES:
                message, call = outbox.popleft()
                if call is None:
                    self._outbox_bytes -= _size(message)
                elif not call.may_leave(now, client, client.handed + size, part=not message[2]):
                    continue
                try:
                    data = message if isinstance(message, bytes) else self._encode(message)
                except (BrokerError, ValueError) as error:
                    if call is None:
                        self.logger.error("A message could not be sent: %s", error)
                    else:
                        call.sent = None
                        self.calls.fail(call, error)
                    continue
                chunk.append(data)
                size += len(data)
            client.write(b"".join(chunk))

    def _encode(self, message: Outgoing) -> bytes:
        subject, payload, _, headers = message
        if type(headers) is bytes:  # a publication, which was checked before it was posted
            return encode_publish(message)
        check_subject(subject)
        if len(payload) > self.max_payload:
            raise MessageTooLarge(
                f"A message of {len(payload)} bytes for {subject} is over the server's max_payload of "
                f"{self.max_payload} bytes."
            )
        try:
            return encode_publish(message)
        except ValueError as error:
            raise InvalidOption(
                f"the headers {headers!r} of a message for {subject} cannot be sent ({error})."
            ) from None

    def _receive(self, event: Event) -> None:
        if type(event) is Msg:
            if event.sid == _INBOX_SID:
                self._receive_answer(event)
                return
            subscription = self._subscriptions.get(event.sid)
            if subscription is not None:
                try:
                    subscription.callback(event)
                except Exception:
                    self.logger.exception("A callback for a message on %s failed.", event.subject)
        elif isinstance(event, ServerError):
            self._receive_error(event.text)
        elif isinstance(event, ServerInfo) and self._client is not None:
            self._client.info |= event.fields
            self._servers.learn(self._client.address, event.fields)

    def _receive_answer(self, message: Msg) -> None:
        token = message.subject[len(self.inbox) + 1 :]
        if token == "fence":
            self._fence_seen = max(self._fence_seen, int(message.data))
            self._call_all(self._listeners.fence, self._fence_seen)
            return
        try:
            self.calls.answered(token, message)
        except Exception:
            self.logger.exception("An answer on %s could not be read.", message.subject)

    def _receive_error(self, text: str) -> None:
        self.state.last_error = text
        denied = read_permission_error(text)
        if denied is None and _HARMLESS.search(text):
            self.logger.error(
                "NATS at %s refused something (%s). It has not ended the connection.", self.state.server, text
            )
            return
        if denied is None:
            if self._client is not None:
                self._client.abort(text)  # as the server is about to do
            return
        verb, subject = denied
        error = permission_denied(verb, subject)
        known = False
        if verb == "publish":
            known = self.calls.refused(subject)
        else:
            for subscription in list(self._subscriptions.values()):
                if subscription.subject == subject:
                    subscription.denied = error
                    known = True
        if not known:
            self.logger.error("%s", error)

    def _call_all(self, callbacks: list[Any], *args: Any) -> None:
        for callback in list(callbacks):
            try:
                callback(*args)
            except Exception:
                self.logger.exception("A callback on the connection's thread failed.")

    # Keeping the connection

    async def _keep_connected(self) -> None:
        """Open a connection, wait until it is lost, and open the next."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                client = await open_client(self.options, self._servers)
            except BrokerError as error:
                self._note_failure(error)
            except Exception as error:
                self.logger.exception("Connecting to NATS failed in a way that was not foreseen.")
                self._note_failure(
                    NotSent(f"Could not connect to NATS at {self.options.display}: {error!r}.")
                )
            else:
                opened = time.monotonic()
                self._note_open(client)
                await asyncio.wait({client.lost})
                if time.monotonic() - opened >= LASTING_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                    self._complaints.clear()
                self._note_lost(client)
            await asyncio.sleep(pause * random.uniform(0.67, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _note_open(self, client: Client) -> None:
        self._client = client
        self._outbox.clear()
        self._outbox_bytes = 0
        self._silent_fences = 0
        self._fence_seen = self._fence_sent
        client.heard = True
        self.max_payload = int(client.info.get("max_payload") or 1_048_576)
        self.lanes = Lanes(self.options, client.address, client.peer, client.identity)
        state = self.state
        state.connected = True
        state.server = client.address.netloc
        state.server_version = str(client.info.get("version"))
        commands = [encode_subscribe(f"{self.inbox}.*", _INBOX_SID)]
        commands += [encode_subscribe(each.subject, each.sid) for each in list(self._subscriptions.values())]
        client.write(b"".join(commands))
        client.ready(self._receive, self._flush)
        if self._was_open:
            state.reconnects += 1
            self.logger.info(
                "Reconnected to NATS at %s%s.",
                state.server,
                f" after {self._attempts} failed attempts" if self._attempts else "",
            )
        self._attempts, self._failure = 0, None
        self.calls.resend()
        if self._was_open:
            self._call_all(self._listeners.reconnect)
        self._was_open = True
        self._waiters.wake()
        self._drain()

    def _note_lost(self, client: Client) -> None:
        self.state.connected = False
        self.state.last_error = client.reason
        self._outbox.clear()
        self._outbox_bytes = 0
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None
        self._call_all(self._listeners.lost)
        self.calls.lost()
        if not self._closed:
            self._complain(
                f"NATS at {self.state.server} ended the connection ({client.reason}); reconnecting."
            )

    def _note_failure(self, error: BrokerError) -> None:
        self._attempts += 1
        self._failure = error
        self.state.last_error = str(error)
        if self._was_open:
            self._complain(str(error))
        else:
            self.logger.debug("%s", error)  # those who wait for it are told
        self._waiters.wake()

    def _complain(self, reason: str) -> None:
        """Log a reason once, and now and then again, until a connection has lasted."""
        now = time.monotonic()
        said = self._complaints.get(reason)
        if said is None:
            self.logger.warning("%s", reason)
        elif now - said >= REMIND_SECONDS:
            self.logger.warning("%s (%d failed attempts so far)", reason, self._attempts)
        else:
            return
        if len(self._complaints) >= MOST_REASONS:
            self._complaints.clear()
        self._complaints[reason] = now

    async def _look(self) -> None:
        """Call the ticks, send the fences, and cut a connection on which nothing arrives."""
        next_fence = 0.0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                if self._mailbox:  # a thread that was interrupted as it left a call may not have woken us
                    self._drain()
                self.calls.sweep()
                self._call_all(self._listeners.tick)
                if self.lanes is not None:
                    self.lanes.look()
                client, now = self._client, time.monotonic()
                if client is None or not client.open:
                    next_fence = 0.0
                elif now >= next_fence:
                    next_fence = now + FENCE_SECONDS
                    self._look_for_life(client)
            except Exception:
                self.logger.exception("A look at the connection failed.")

    def _look_for_life(self, client: Client) -> None:
        self._silent_fences = 0 if client.heard else self._silent_fences + 1
        client.heard = False
        if self._silent_fences >= SILENT_FENCES:
            client.abort(f"it was silent for {SILENT_FENCES * FENCE_SECONDS:.0f} s")
            return
        self._fence_sent += 1
        self.write(f"{self.inbox}.fence", str(self._fence_sent).encode())

    def _begin_shut(self) -> None:
        if self._tasks:
            tasks, self._tasks = self._tasks, []
            cast(asyncio.AbstractEventLoop, self._loop).create_task(self._shut(tasks))

    async def _shut(self, tasks: list[asyncio.Task[None]]) -> None:
        loop = cast(asyncio.AbstractEventLoop, self._loop)
        try:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
            client = self._client
            while self._mailbox:
                self._drain()
            self._flush()
            if client is not None and client.open:
                client.close()
                await asyncio.wait({client.lost}, timeout=1.0)
            if client is not None:
                client.abort("it was closed")
            if self.lanes is not None:
                self.lanes.close()
                self.lanes = None
            self.calls.close()
            self.state.connected = False
            await asyncio.sleep(0)
        finally:
            loop.stop()


def _size(message: Outgoing | bytes) -> int:
    return len(message) if isinstance(message, bytes) else len(message[1]) + 200


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
