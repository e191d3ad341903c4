"""The border between threads and asyncio: one event loop thread and one NATS connection per process.

Everything else in the library is called from Dramatiq's threads and calls in here. What is sent goes one way: a thread
leaves a call for the loop (see `loop`), which puts messages into the outbox, and the outbox is written while the socket
takes what is written. When the connection is lost, what waits there is dropped: calls are sent again from their table
(see `calls`), and senders keep whatever else must survive and send it again from `on_reconnect`.

**Keeping the connection.** One task opens it, waits until it is lost, and opens the next, with a growing pause. Only
`close` ends that task: an error in one attempt is one failed attempt. A second task looks at the connection ten times a
second. Once a second it sends a *fence*, a PING, so the server has something to say; when nothing at all arrives for
`SILENT_FENCES` of them, it cuts the connection. Any received bytes are a sign of life. A PING is no message: the server
answers it without looking for subscriptions, so a thousand idle processes cost it next to nothing.

A server handles one client's commands in order, so when a fence is answered, everything sent before it has arrived;
what the server has done with it is another matter (see `settlements`).

**Interrupts.** A thread that is interrupted in here leaves nothing taken: there is no lock, and each waiting thread has
a signal of its own. Dramatiq throws nothing into the loop's thread. A signal handler may call anything here, whatever
it interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from dataclasses import dataclass
from typing import Any, Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import NotSent, ServerUnsupported

from .calls import Call, Calls
from .client import Client, NoRoom
from .headers import Headers, Msg
from .ids import new_id
from .lanes import Lanes
from .listeners import CoreSubscription, Listeners
from .login import LoginUnreadable, preload
from .loop import LoopThread
from .opening import Servers, open_client
from .outbox import Outbox
from .protocol import (
    PING,
    Event,
    Outgoing,
    Pong,
    ServerError,
    ServerInfo,
    encode_subscribe,
    encode_unsubscribe,
)
from .replies import permission_denied, read_permission_error
from .tls import Refused
from .waiting import Waiters

__all__ = ["ConnectionState", "Link"]

#: How often a fence is sent, and after how many without a received byte the connection is cut.
FENCE_SECONDS: Final = 1.0
SILENT_FENCES: Final = 6

#: The pause before the next attempt to connect, at first and at most; a third of it is random.
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0

#: A connection that lasted less than this counts as a failed attempt: the pause keeps growing.
LASTING_SECONDS: Final = 5.0

#: How often a reason that stays the same is logged again, and how many reasons are remembered for that.
REMIND_SECONDS: Final = 60.0
MOST_REASONS: Final = 20

#: How often callbacks of `on_tick` are called.
TICK_SECONDS: Final = 0.1

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


class Link:
    """The loop thread, its connection, and what is sent and received over it. One for each life of a process.

    Attributes:
      inbox: The subject under which replies to us arrive.
      state: What is known of the connection.
      calls: The requests that wait for a reply.
      lanes: The short way, while there is a connection.
      max_payload: The largest message that the server takes, in bytes.
    """

    def __init__(
        self, options: ConnectOptions, listeners: Listeners, subscriptions: dict[int, CoreSubscription]
    ) -> None:
        preload(options)
        self.options = options
        self.logger = logging.getLogger(__name__)
        self.inbox = f"{options.inbox_prefix}.{new_id()}"
        self.state = ConnectionState()
        self.calls = Calls(self)
        self.lanes: Lanes | None = None
        self.lane_failures = 0
        self.loop = LoopThread([self._keep_connected, self._look], self._flush, self._shut)
        self.post, self.post_lazily, self.soon = self.loop.post, self.loop.post_lazily, self.loop.soon
        self._outbox = Outbox(self.calls)
        self._listeners = listeners
        self._subscriptions = subscriptions
        self._servers = Servers(options)
        self._client: Client | None = None
        self._was_open = False
        self._waiters = Waiters()
        self._attempts = 0
        self._failure: BrokerError | None = None
        self._complaints: dict[str, float] = {}
        self._fence_sent = 0
        self._fence_seen = 0
        self._silent_fences = 0
        self._said_full = False

    # From any thread

    @property
    def is_closed(self) -> bool:
        return self.loop.closed

    @property
    def is_open(self) -> bool:
        """Whether messages can be written now."""
        client = self._client
        return client is not None and client.open

    @property
    def is_writable(self) -> bool:
        """Whether the socket has taken what was written."""
        client = self._client
        return client is not None and client.open and not client.paused and not len(self._outbox)

    @property
    def is_connected(self) -> bool:
        """Whether the server is there now, as far as this process can know."""
        client = self._client
        return client is not None and client.open and self._silent_fences < 2

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes, headers included."""
        return self._outbox.max_payload

    @property
    def next_fence(self) -> int:
        """The fence behind everything that is sent now."""
        return self._fence_sent + 1

    def wait_open(self, deadline: float, *, attempts: int | None = None) -> None:
        """Wait until there has been a connection; returns at once when there was one, even if it is lost.

        Parameters:
          deadline: By `time.monotonic`.
          attempts: Give up after this many failed attempts.

        Raises:
          NotSent: When none could be made before `deadline`, or the link was closed.
          ConnectionFailed, ServerUnsupported: When a server answered and refused us.
        """
        if self._was_open and not self.loop.closed:
            return
        self.loop.refuse_here()
        before = self._attempts
        while True:
            if self.loop.closed:
                raise NotSent("The connection to NATS was closed.")
            self.loop.start()
            signal = self._waiters.add()
            try:
                if self._was_open:
                    return
                failure, failed = self._failure, self._attempts - before
                final = isinstance(failure, (Refused, ServerUnsupported, LoginUnreadable))
                last = failed == attempts and not isinstance(failure, NoRoom)  # others may give way
                if failure is not None and failed and (final or last):
                    raise type(failure)(*failure.args)
                if not signal.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    reason = str(
                        failure or f"Could not connect to NATS at {self.options.display}: no answer."
                    )
                    raise NotSent(f"{reason} Nothing was sent.")
            finally:
                self._waiters.discard(signal)

    def ask(
        self, subject: str, payload: bytes, headers: Headers | bytes | None, seconds: float
    ) -> Msg | bool:
        """Ask over a lane: the reply, or whether the request may have been sent although none came."""
        self.loop.refuse_here()
        lanes = self.lanes
        if lanes is None or not self.is_connected:
            return False
        reply = lanes.ask(subject, payload, headers, seconds)
        self.lane_failures += reply is True
        return reply

    def unsubscribe(self, subscription: CoreSubscription) -> None:
        """End a subscription."""
        known = self._subscriptions.pop(subscription.sid, None) is not None
        if known and self.loop.started:
            self.post(self.enqueue, encode_unsubscribe(subscription.sid))

    def withdraw(self, subscription: CoreSubscription) -> None:
        """Have the server send no more of a subject."""
        self.post(self.enqueue, encode_unsubscribe(subscription.sid))

    def close(self) -> None:
        """Write what waits, close the connection, and end the thread. Calls that wait get an error."""
        self.loop.closed = True
        self._waiters.wake()
        self.loop.close()

    # On the loop thread

    def write(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | bytes | None = None
    ) -> None:
        """Write a message soon. Without a connection it is dropped."""
        self.enqueue((subject, payload, reply, headers))

    def enqueue(self, message: Outgoing | bytes) -> None:
        """Put a message, or a command as it goes over the wire, into the outbox."""
        client = self._client
        if client is not None and client.open:
            self._outbox.add(client, message)
            self.loop.call_after()

    def enqueue_for(self, call: Call, message: Outgoing) -> None:
        """Put a message into the outbox that goes no further when the deadline of `call` is over."""
        client = self._client
        if client is not None and client.open:
            self._outbox.add_for(call, message)
            self.loop.call_after()

    def send_fence(self) -> None:
        """Send the next fence now, unless one is under way."""
        if self._fence_seen >= self._fence_sent:
            self._fence_sent += 1
            self.enqueue(PING)

    def describe(self) -> tuple[str, str]:
        """Where the servers are and what they last said, for an error message."""
        client = self._client
        stuck = client is not None and client.open and client.paused
        reason = "its socket takes no more" if stuck else self.state.last_error
        return self.options.display, reason or "no answer yet"

    def _flush(self) -> None:
        """Write the outbox, as far as the socket takes it."""
        if self._client is not None:
            self._outbox.flush(self._client)

    def _receive(self, event: Event) -> None:
        if type(event) is Msg:
            if event.sid == _INBOX_SID:
                self._receive_reply(event)
                return
            subscription = self._subscriptions.get(event.sid)
            if subscription is not None:
                try:
                    subscription.callback(event)
                except Exception:
                    self.logger.exception("A callback for a message on %s failed.", event.subject)
        elif isinstance(event, ServerError):
            self._receive_error(event.text)
        elif type(event) is Pong:
            self._fence_seen = min(self._fence_seen + 1, self._fence_sent)
            self._call_all(self._listeners.fence, self._fence_seen)
        elif isinstance(event, ServerInfo) and self._client is not None:
            known = set(self._client.info.get("connect_urls") or ())
            self._client.info |= event.fields
            if known - set(self._client.info.get("connect_urls") or ()):
                self._call_all(self._listeners.node_lost)
            self._outbox.max_payload = int(event.fields.get("max_payload") or self._outbox.max_payload)
            self._servers.learn(self._client.address, event.fields)

    def _receive_reply(self, message: Msg) -> None:
        try:
            self.calls.receive(message.subject[len(self.inbox) + 1 :], message)
        except Exception:
            self.logger.exception("A reply on %s could not be read.", message.subject)

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
                opened = time.monotonic()
                self._begin_to_use(client)
                await asyncio.wait({client.lost})
                if time.monotonic() - opened >= LASTING_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                    self._complaints.clear()
                self._note_lost(client)
            except BrokerError as error:
                self._note_failure(error)
            except Exception as error:
                self.logger.exception("Connecting to NATS failed in a way that was not foreseen.")
                self._note_failure(
                    NotSent(f"Could not connect to NATS at {self.options.display}: {error!r}.")
                )
            await asyncio.sleep(pause * random.uniform(0.67, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _begin_to_use(self, client: Client) -> None:
        """Send and receive over a new connection from now on; one that cannot be used is a failed attempt."""
        try:
            self._note_open(client)
        except Exception as error:
            client.abort(f"it could not be used: {error!r}")
            self._note_lost(client)
            raise

    def _note_open(self, client: Client) -> None:
        self._client = client
        self._outbox.clear()
        self._silent_fences = 0
        self._fence_seen = self._fence_sent
        client.heard = True
        self._outbox.max_payload = int(client.info.get("max_payload") or 1_048_576)
        self.lanes = Lanes(self.options, client.address, client.peer, client.identity, self._note_full)
        state = self.state
        state.connected = True
        state.server = client.address.netloc
        state.server_version = str(client.info.get("version"))
        self._call_all(self._listeners.opened, client)  # before anything can be delivered
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
        self._flush()

    def _note_lost(self, client: Client) -> None:
        self.state.connected = False
        self.state.last_error = client.reason
        self._outbox.clear()
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None
        self._call_all(self._listeners.lost)
        self.calls.lost()
        if not self.loop.closed:
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

    def _note_full(self, reason: str) -> None:
        """Say once that the server takes no further connection; from any thread."""
        if not self._said_full:
            self._said_full = True
            self.logger.warning(
                "NATS at %s takes no further connection (%s): this process goes on with fewer than its %d, and gives "
                "some back so that others get in. Raise the limit there, or lower max_connections here.",
                self.state.server,
                reason,
                self.options.max_connections,
            )

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
                self.loop.look()
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
        self.enqueue(PING)

    async def _shut(self) -> None:
        client = self._client
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
