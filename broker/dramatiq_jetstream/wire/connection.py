"""What threads ask of JetStream, and wait for: publishes, API requests, plain requests.

Every call has a deadline. It is sent before that, or never; `calls` tells how, and what its errors say. A caller waits
until its deadline, and a thread that is interrupted takes its calls back (see `asking`).

A publish may be repeated: its headers are the same, so the same `Nats-Msg-Id` stores once within the stream's duplicate
window. So may requests that change nothing, or change nothing further the second time. Those whose answer tells what
they changed (`ONCE`) are sent once: repeated, they would report that there was nothing to do.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    NotSent,
    ServerUnsupported,
    StoreTimeout,
    TopologyMissing,
)

from .asking import ask, publish_window
from .calls import Call
from .error_numbers import TRANSIENT
from .headers import encode_headers
from .ids import new_id
from .link import ConnectionState, Link
from .listeners import CoreSubscription, Listeners
from .protocol import encode_subscribe
from .replies import (
    Headers,
    Msg,
    PubAck,
    Publication,
    check,
    check_subject,
    is_no_responders,
    read_puback,
    translate,
)

__all__ = [
    "ConnectOptions",
    "Connection",
    "ConnectionState",
    "CoreSubscription",
    "Msg",
    "PubAck",
    "Publication",
]

#: How many publishes of one batch are under way at once.
BATCH_WINDOW: Final = 4_000

#: The pause, in seconds, before a request is repeated that JetStream could not answer now.
NOT_NOW_SECONDS: Final = 0.25

#: API requests whose answer tells what they changed, so that a repetition would tell something else.
ONCE: Final = ("STREAM.PURGE.", "STREAM.DELETE.", "STREAM.MSG.DELETE.", "CONSUMER.DELETE.")

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_connections):
        connection._start_again()


def _close_all() -> None:
    """End the loops of a program that does not close its brokers; taken down while they run, one in C may crash."""
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)


class Connection:
    """A connection to JetStream that any thread may use.

    It is made on first use, and again in the child of a fork, where the parent's is not touched.

    Parameters:
      options: Where to connect and as whom.
      timeout: Milliseconds that `publish`, `api` and `request` wait unless told otherwise.
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
        """Close the connection; calls that wait for an answer get an error."""
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

    # Storing

    def publish(
        self, subject: str, payload: bytes, headers: Headers | None = None, *, timeout: int | None = None
    ) -> PubAck:
        """Store a message in the stream that has `subject` and wait for the acknowledgement.

        It is sent again over a reconnect, so give it a `Nats-Msg-Id` to have it stored once.

        Parameters:
          timeout: Milliseconds to wait in all; None takes the connection's own.

        Raises:
          NotSent: No connection in time, so nothing was stored.
          StoreTimeout, ConnectionClosed: No acknowledgement in time; it may be stored.
          StoreFull, MessageTooLarge, TopologyMissing, PermissionDenied, ApiError: JetStream's refusal.
        """
        link = self._link
        deadline = self._deadline(timeout)
        link.wait_open(deadline)
        item = Publication(subject, payload, headers)
        check(item, link.max_payload)
        reply = link.ask(subject, payload, item.block, deadline - time.monotonic())
        maybe_sent = reply is True
        if isinstance(reply, Msg):
            outcome = read_puback(subject, reply, patient=True)
            if isinstance(outcome, PubAck):
                return outcome
            if outcome is not None:
                raise outcome
        (outcome,) = publish_window(self._link, [item], deadline, maybe_sent=maybe_sent)
        if isinstance(outcome, PubAck):
            return outcome
        if isinstance(outcome, TopologyMissing) and self._has_stream(subject, deadline):
            raise NotSent(f"The stream of {subject} has no leader now; nothing was stored.")
        raise outcome

    def _has_stream(self, subject: str, deadline: float) -> bool:
        """Whether a stream takes `subject`, as far as we may know."""
        left = int((deadline - time.monotonic()) * 1000)
        try:
            return left > 0 and bool(
                self.api("STREAM.NAMES", {"subject": subject}, timeout=min(left, 2_000)).get("streams")
            )
        except BrokerError:
            return False

    def publish_many(
        self, publications: Iterable[Publication], *, timeout: int | None = None
    ) -> list[PubAck]:
        """Store many messages, in order, without waiting for one before sending the next.

        Raises:
          As `publish`, for the first that failed, when all are settled; the others may be stored.
        """
        results: list[PubAck] = []
        failure: BaseException | None = None
        for outcome in self.try_publish_many(publications, timeout=timeout):
            if isinstance(outcome, PubAck):
                results.append(outcome)
            else:
                failure = failure or outcome
        if failure is not None:
            raise failure
        return results

    def try_publish_many(
        self, publications: Iterable[Publication], *, timeout: int | None = None
    ) -> list[PubAck | Exception]:
        """Store many messages as `publish_many` does, and return an outcome for each instead of raising.

        Parameters:
          timeout: Milliseconds for all of them together; None takes the connection's own.
        """
        deadline = self._deadline(timeout)
        self._link.wait_open(deadline)
        outcomes: list[PubAck | Exception | None] = []
        items = []
        for item in publications:
            try:
                check(item, self._link.max_payload)
            except (BrokerError, ValueError) as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
                items.append(item)
        replies: list[PubAck | BrokerError] = []
        for start in range(0, len(items), BATCH_WINDOW):
            replies += publish_window(self._link, items[start : start + BATCH_WINDOW], deadline)
        reply = iter(replies)
        return [next(reply) if outcome is None else outcome for outcome in outcomes]

    def publish_batch(self, publications: list[Publication], *, timeout: int | None = None) -> PubAck:
        """Send an atomic batch, numbered and with its commit last, and wait for the commit's acknowledgement.

        It is not sent again: after a failure the caller makes a new batch of it.
        """
        deadline = self._deadline(timeout)
        self._link.wait_open(deadline)
        for item in publications:
            check(item, self._link.max_payload)
        *parts, commit = publications
        reply = ask(
            self._link,
            commit.subject,
            commit.payload,
            commit.block,
            deadline,
            repeat=False,
            parts=[(part.subject, part.payload, "", part.block) for part in parts],
        )
        outcome = read_puback(commit.subject, reply, patient=False)
        if isinstance(outcome, PubAck):
            return outcome
        raise outcome or StoreTimeout(f"JetStream could not take a batch for {commit.subject} now.")

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
        """Send a request and wait for its first answer.

        Parameters:
          resend: Send it again after a reconnect; only for requests that may be repeated.
          patient: Take "no responders" for a stream that is starting, and ask again for a while.

        Raises:
          NotSent: When nothing was sent in time.
          BrokerConnectionError: When no answer came in time.
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
        """Send a request without waiting; `told` gets the answer, or why there is none, on the loop thread.

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
        """Send a request from the loop thread; `over` is called there with the answer, or an error without one.

        It is not sent again when the connection was lost.
        """
        deadline = time.monotonic() + seconds

        def receive(reply: Msg | BaseException) -> bool:
            if isinstance(reply, Msg) and is_no_responders(reply):
                return True  # no leader now: again, soon
            over(reply)
            return False

        self._link.calls.start(Call(subject, payload, None, receive, deadline, repeat=False))

    def api(
        self, verb: str, body: Mapping[str, Any] | None = None, *, timeout: int | None = None
    ) -> dict[str, Any]:
        """Ask the JetStream API, for instance `api("STREAM.INFO.orders")`.

        Raises:
          NotFound, ApiError: What JetStream answered.
          NotSent: When nothing was sent in time.
          BrokerConnectionError: When it did not answer in time.
        """
        payload = json.dumps(body).encode() if body is not None else b""
        deadline = self._deadline(timeout)
        repeat = not verb.startswith(ONCE)
        while True:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            reply = self.request(self.api_subject(verb), payload, timeout=left, resend=repeat)
            if is_no_responders(reply):
                raise ServerUnsupported(
                    f"JetStream does not answer at {self.options.display}: it is switched off for this "
                    "account, or has no leader now."
                )
            body = cast(dict[str, Any], json.loads(reply.data))
            error = body.get("error")
            if error is None:
                return body
            translated = translate(error)
            if error.get("err_code") not in TRANSIENT or time.monotonic() + NOT_NOW_SECONDS > deadline:
                raise translated
            time.sleep(NOT_NOW_SECONDS)

    def api_subject(self, verb: str) -> str:
        """The subject of a request to the JetStream API, in the domain or under the prefix that was chosen."""
        return f"{self.options.api}.{verb}"

    def _deadline(self, timeout: int | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout) / 1000

    # Messages without JetStream

    def send(
        self, subject: str, payload: bytes = b"", headers: Headers | bytes | None = None, reply: str = ""
    ) -> None:
        """Publish without JetStream: lost without a listener, without a connection, and behind too many others."""
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

        It returns once the server knows of the interest; while the connection is lost, at once, and the server learns
        of it as soon as it is back.

        Parameters:
          timeout: Milliseconds to wait at most; None takes the connection's own.
          confirmed: Raise, and leave no interest behind, unless the server knows of it in time.
          wait: False to return at once, for all but the last of several.

        Raises:
          NotSent: When there has never been a connection, and none could be made in time.
          BrokerConnectionError: With `confirmed`, when the server did not confirm the interest in time.
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
