"""What threads ask of a NATS server and wait for: requests, subscriptions, and work on the loop thread.

Every call has a deadline. It is sent before that, or never; `calls` tells how, and what its errors say. A caller waits
until its deadline, and a thread that is interrupted takes its calls back (see `asking`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import BrokerConnectionError, NotSent

from .asking import ask
from .calls import Call
from .client import Client
from .headers import Headers, Msg, encode_headers
from .ids import new_id
from .link import ConnectionState, Link
from .listeners import CoreSubscription, Listeners
from .protocol import encode_publish, encode_subscribe
from .replies import check_subject, is_no_responders

__all__ = ["CoreConnection"]

_connections: weakref.WeakSet[CoreConnection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_connections):
        connection._start_again()


def _close_all() -> None:
    """End the loops of a program that does not close its brokers; a loop in C may crash if the interpreter ends
    first."""
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)


class CoreConnection:
    """A connection to NATS that any thread may use.

    It is made on first use, and again in the child of a fork, where the parent's is not touched.

    Parameters:
      options: Where to connect and as whom.
      timeout: Milliseconds that a call waits unless told otherwise.
    """

    def __init__(self, options: ConnectOptions | None = None, *, timeout: int = 10_000) -> None:
        self.options = options or ConnectOptions.of()
        self.timeout = timeout
        self._closed = False
        self._listeners = Listeners()
        self._by_sid: dict[int, CoreSubscription] = {}
        self._sids = count(2)
        self._inherited: list[Link] = []  # kept, so that collecting them does not touch the parent's sockets
        self._link = Link(self.options, self._listeners, self._by_sid)
        _connections.add(self)

    def _start_again(self) -> None:
        self._inherited.append(self._link)
        self._link = Link(self.options, self._listeners, self._by_sid)
        if self._closed:
            self._link.close()
        for callback in list(self._listeners.fork):
            callback()

    # What is known of it

    @property
    def state(self) -> ConnectionState:
        return self._link.state

    @property
    def _subscriptions(self) -> list[CoreSubscription]:
        return list(self._by_sid.values())

    @property
    def inbox(self) -> str:
        """The subject under which replies to us arrive."""
        return self._link.inbox

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_open(self) -> bool:
        """Whether messages can be written now."""
        return self._link.is_open

    @property
    def is_writable(self) -> bool:
        """Whether the socket has taken what was written."""
        return self._link.is_writable

    @property
    def is_connected(self) -> bool:
        """Whether the server is there now, as far as this process can know."""
        return self._link.is_connected

    @property
    def repeats(self) -> int:
        """How many requests of this process were sent again so far."""
        return self._link.calls.resent + self._link.lane_failures

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes, headers included."""
        self._link.wait_open(self._deadline(None))
        return self._link.max_payload

    def room_beside(self, headers: Headers) -> int:
        """Bytes that headers leave for a body, by what is known of the server without waiting."""
        return self._link.max_payload - len(encode_headers(headers))

    def connect(self) -> None:
        """Connect if that has not been done; returns at once when it has, even while reconnecting.

        Raises:
          ConnectionFailed: When no server answered in time, or none accepted us.
          ServerUnsupported: When the server is too old or has no JetStream.
          ConnectionClosed: When this connection was closed.
        """
        self._link.wait_open(time.monotonic() + self.options.connect_timeout / 1000 + 1, attempts=2)

    def confirm(self, *, timeout: int | None = None) -> None:
        """Wait until the server has handled everything that was sent before.

        Parameters:
          timeout: Milliseconds to wait; None takes the connection's own.

        Raises:
          BrokerConnectionError: When it does not in time.
        """
        deadline = self._deadline(timeout)
        self._link.wait_open(deadline)
        ask(self._link, "", b"", None, deadline, repeat=True)

    def close(self) -> None:
        """Close the connection; calls that wait for a reply get an error."""
        self._closed = True
        self._link.close()
        self._listeners.note_closed()

    def reopen(self) -> None:
        """After `close`, connect again at the next use; does nothing before."""
        closed = self._link
        if self._closed and closed.is_closed:
            # One atomic step decides which link it is, without a lock that an interrupt or a fork could leave taken.
            successor = Link(self.options, self._listeners, self._by_sid)
            self._link = closed.__dict__.setdefault("successor", successor)
            self._closed = False

    # Asking

    def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Headers | bytes | None = None,
        *,
        timeout: int | None = None,
        resend: bool = False,
        patient: bool = True,
    ) -> Msg:
        """Send a request and wait for its first reply.

        Parameters:
          resend: Send it again after a reconnect; only for requests that may be repeated.
          patient: Take "no responders" for a stream that is starting, and ask again for a while.

        Raises:
          NotSent: When nothing was sent in time.
          BrokerConnectionError: When no reply came in time.
          PermissionDenied: When the server refused the subject.
          InvalidName: For a subject that cannot be sent.
        """
        check_subject(subject)
        deadline = self._deadline(timeout)
        self._link.wait_open(deadline)
        maybe_sent = False
        if resend:
            reply = self._link.ask(subject, payload, headers, deadline - time.monotonic())
            if isinstance(reply, Msg) and not (patient and is_no_responders(reply)):
                return reply
            maybe_sent = reply is True
        return ask(
            self._link,
            subject,
            payload,
            headers,
            deadline,
            repeat=resend,
            maybe_sent=maybe_sent,
            patient=patient,
        )

    def tell(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        told: Callable[[Msg | BaseException], None],
        *,
        timeout: int | None = None,
    ) -> None:
        """Send a request without waiting; `told` gets the reply, or the error, on the loop thread.

        Without a connection nothing is sent.
        """
        link = self._link
        deadline = self._deadline(timeout)
        link.wait_open(deadline)

        def receive(reply: Msg | BaseException) -> bool:
            told(reply)
            return False

        def start() -> None:
            if link.is_open:
                link.calls.start(Call(subject, payload, headers, receive, deadline, repeat=False))
            else:
                told(
                    NotSent(
                        f"NATS at {self.options.display} is not connected; nothing was sent to {subject}."
                    )
                )

        link.post(start)

    def query(
        self, subject: str, payload: bytes, over: Callable[[Msg | BaseException], None], seconds: float
    ) -> None:
        """Send a request from the loop thread; `over` is called there with the reply or an error.

        It is not sent again when the connection was lost.
        """
        deadline = time.monotonic() + seconds

        def receive(reply: Msg | BaseException) -> bool:
            if isinstance(reply, Msg) and is_no_responders(reply):
                return True  # no leader now: again, soon
            over(reply)
            return False

        self._link.calls.start(Call(subject, payload, None, receive, deadline, repeat=False))

    def _deadline(self, timeout: int | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout) / 1000

    # Messages without JetStream

    def send(
        self, subject: str, payload: bytes = b"", headers: Headers | bytes | None = None, reply: str = ""
    ) -> None:
        """Publish without JetStream: the message is lost without a listener, without a connection, or behind too many
        others."""
        self._link.wait_open(self._deadline(None))
        if not self._link.loop.is_full:
            self._link.post(self._link.write, subject, payload, reply, headers)

    def new_inbox(self) -> str:
        """Return a fresh subject for replies; add tokens to it as needed."""
        return f"{self.options.inbox_prefix}.{new_id()}"

    def subscribe(
        self,
        subject: str,
        callback: Callable[[Msg], None],
        *,
        timeout: int | None = None,
        confirmed: bool = False,
        wait: bool = True,
    ) -> CoreSubscription:
        """Call `callback` on the loop thread for each message on `subject`; it must neither block nor raise.

        It returns once the server knows of the subscription. While the connection is lost it returns at once, and the
        server learns of it after the reconnect.

        Parameters:
          timeout: Milliseconds to wait at most; None takes the connection's own.
          confirmed: Raise, and leave no subscription behind, unless the server confirms it in time.
          wait: False to return at once, for all but the last of several.

        Raises:
          NotSent: When there has never been a connection, and none could be made in time.
          BrokerConnectionError: With `confirmed`, when the server did not confirm it in time.
          PermissionDenied: When the server refused the subject.
        """
        deadline = self._deadline(timeout)
        link = self._link
        link.wait_open(deadline)
        subscription = CoreSubscription(
            subject,
            callback,
            next(self._sids),
            lambda ended: self._link.unsubscribe(ended),
            lambda ended: self._link.withdraw(ended),
        )
        self._by_sid[subscription.sid] = subscription
        try:
            link.post(link.enqueue, encode_subscribe(subject, subscription.sid))
            # A message to ourselves, which the server handles after what was sent before.
            if confirmed:
                ask(self._link, "", b"", None, deadline, repeat=True)
            elif wait and link.is_open:
                with contextlib.suppress(BrokerConnectionError):
                    ask(self._link, "", b"", None, deadline, repeat=False)
            if subscription.denied is not None:
                raise subscription.denied
        except BaseException:
            subscription.close()
            raise
        return subscription

    # What runs on the loop thread

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop thread soon, in the order posted. It must neither block nor raise."""
        self._link.post(call, *args)

    def post_lazily(self, call: Callable[..., None], *args: Any) -> None:
        """As `post`, but in busy times a moment later, together with others."""
        self._link.post_lazily(call, *args)

    def write(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | bytes | None = None
    ) -> None:
        """Write a message soon; only on the loop thread. Without a connection it is dropped."""
        self._link.enqueue((subject, payload, reply, headers))

    def respond(self, subject: str, payload: bytes) -> None:
        """Write soon to the reply subject of a message that arrived; otherwise as `write`."""
        self._link.enqueue(encode_publish((subject, payload, "", None)))

    def soon(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run `call` on the loop thread after this turn, or after `delay` seconds; only on the loop thread."""
        self._link.soon(call, delay)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread when a connection is lost, before anything is sent over another one."""
        self._listeners.lost.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread after each reconnect, once unanswered publishes were sent again."""
        self._listeners.reconnect.append(callback)

    def on_fence(self, callback: Callable[[int], None]) -> None:
        """Call `callback(n)` on the loop thread when everything sent before fence `n` has arrived."""
        self._listeners.fence.append(callback)

    def on_node_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread when the server says that it lost another node of its cluster."""
        self._listeners.node_lost.append(callback)

    def on_opened(self, callback: Callable[[Client], None]) -> None:
        """Call `callback` on the loop thread with each new connection, before anything is delivered over it."""
        self._listeners.opened.append(callback)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop thread ten times a second, connected or not."""
        self._listeners.tick.append(callback)

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the child of a fork, where nothing is connected yet."""
        self._listeners.fork.append(callback)

    def remove_callback(self, callback: Callable[..., None]) -> None:
        """Undo every `on_…` for a callback."""
        self._listeners.remove(callback)

    def hurry_fence(self) -> None:
        """Send the next fence now instead of within a second; from any thread."""
        self._link.post(self._link.send_fence)

    @property
    def next_fence(self) -> int:
        """The fence behind everything that is sent now."""
        return self._link.next_fence
