"""What threads ask of JetStream, and wait for: publishes, API requests, plain requests.

Whatever waits for an answer stays in `_pending` until it is answered or its time is up, and is sent again
after a reconnect, or when no answer came for a while. Sending a publish again is safe: its headers are the
same, so the same `Nats-Msg-Id` stores once within the stream's duplicate window. When its time is up the
caller gets an error and it is not sent again.

If the process dies while a publish is pending, the message is stored or it is not, and nobody was told that
it was.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    ConnectionClosed,
    ServerUnsupported,
    StoreTimeout,
    TopologyMissing,
)

from .answers import (
    Headers,
    Msg,
    PubAck,
    Publication,
    check,
    is_no_responders,
    permission_denied,
    read_puback,
    translate,
)
from .error_numbers import TRANSIENT
from .link import ConnectionState, Link, Subscription

__all__ = ["ConnectOptions", "Connection", "ConnectionState", "Msg", "PubAck", "Publication", "Subscription"]

#: How long "no responders" is taken for a stream that is still starting, in milliseconds.
NO_RESPONDERS_GRACE: Final = 2_000

#: The first wait, in seconds, before an unanswered publish is sent again; it doubles each time.
RESEND_AFTER: Final = 1.0

#: The wait, in seconds, when the answer was "not now".
RESEND_SOON: Final = 0.1

#: How many publishes of one batch are under way at once.
BATCH_WINDOW: Final = 4_000


class _Pending:
    """A request whose answer is awaited, and how often and when it was sent."""

    __slots__ = ("answer", "deadline", "headers", "payload", "resend", "sent", "started", "subject", "wait")

    def __init__(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        answer: Callable[[Msg | BaseException], bool],
        deadline: float,
        resend: bool,
    ) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.answer = answer  # returns True when the answer says "try again"
        self.deadline = deadline
        self.resend = resend
        self.started = time.monotonic()
        self.sent: float | None = None
        self.wait = RESEND_AFTER


class Connection(Link):
    """A connection to JetStream that any thread may use.

    Parameters:
      options: Where to connect and as whom.
      timeout: Milliseconds that `publish`, `api` and `request` wait unless told otherwise.
    """

    def __init__(self, options: ConnectOptions | None = None, *, timeout: int = 10_000) -> None:
        self.timeout = timeout
        super().__init__(options or ConnectOptions.of())
        self.on_reconnect(self._resend)
        self.on_tick(self._sweep)

    def _forget(self) -> None:
        super()._forget()
        self._pending: dict[str, _Pending] = {}
        self._counter = 0
        self._resent = 0

    @property
    def repeats(self) -> int:
        """How many requests of this process were sent again so far."""
        return self._resent + self._lanes.failures

    def publish(
        self, subject: str, payload: bytes, headers: Headers | None = None, *, timeout: int | None = None
    ) -> PubAck:
        """Store a message in the stream that has `subject` and wait for the acknowledgement.

        It is sent again over a reconnect, so give it a `Nats-Msg-Id` to have it stored once.

        Parameters:
          timeout: Milliseconds to wait in all; None takes the connection's own.

        Raises:
          StoreTimeout, ConnectionClosed: No acknowledgement in time.
          StoreFull, MessageTooLarge, TopologyMissing, PermissionDenied, ApiError: JetStream's refusal.
        """
        self.connect()
        item = Publication(subject, payload, headers)
        check(item, self._max_payload)
        milliseconds = self.timeout if timeout is None else timeout
        started = time.monotonic()
        answer = self.ask(subject, payload, item.block, milliseconds / 1000)
        if answer is not None:
            outcome = read_puback(subject, answer, patient=True)
            if isinstance(outcome, PubAck):
                return outcome
            if outcome is not None:
                raise outcome
        left = milliseconds - int((time.monotonic() - started) * 1000)
        try:
            return self.publish_many([item], timeout=max(1, left))[0]
        except TopologyMissing:
            if not self._has_stream(subject):
                raise
        raise StoreTimeout(f"The stream of {subject} has no leader now; nothing was stored.")

    def _has_stream(self, subject: str) -> bool:
        """Whether a stream takes `subject`, as far as we may know."""
        try:
            return bool(self.api("STREAM.NAMES", {"subject": subject}, timeout=2_000).get("streams"))
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
    ) -> list[PubAck | BrokerError]:
        """Store many messages as `publish_many` does, and return an outcome for each instead of raising."""
        self.connect()
        items = list(publications)
        limit = self.max_payload
        for item in items:
            check(item, limit)
        outcomes: list[PubAck | BrokerError] = []
        for start in range(0, len(items), BATCH_WINDOW):
            outcomes += self._publish_window(items[start : start + BATCH_WINDOW], timeout)
        return outcomes

    def _publish_window(self, items: list[Publication], timeout: int | None) -> list[PubAck | BrokerError]:
        seconds = (self.timeout if timeout is None else timeout) / 1000
        outcomes: list[PubAck | BrokerError | None] = [None] * len(items)
        remaining = len(items)
        done = threading.Lock()  # a bare lock is the cheapest event there is
        done.acquire()

        def receiver(position: int) -> Callable[[Msg | BaseException], bool]:
            def receive(answer: Msg | BaseException) -> bool:
                nonlocal remaining
                outcome = read_puback(items[position].subject, answer, patient=time.monotonic() < grace)
                if outcome is None:
                    return True
                outcomes[position] = outcome
                remaining -= 1
                if remaining == 0:
                    done.release()
                return False

            return receive

        deadline = time.monotonic() + seconds
        grace = time.monotonic() + min(seconds - 0.5, NO_RESPONDERS_GRACE / 1000)
        for position, item in enumerate(items):
            self._ask(item.subject, item.payload, item.block, receiver(position), deadline, resend=True)
        if not done.acquire(timeout=seconds + 2):
            late = StoreTimeout(f"JetStream did not acknowledge within {seconds * 1000:.0f} ms.")
            return [outcome or late for outcome in outcomes]
        return cast("list[PubAck | BrokerError]", outcomes)

    def publish_batch(self, publications: list[Publication], *, timeout: int | None = None) -> PubAck:
        """Send an atomic batch, numbered and with its commit last, and wait for the commit's acknowledgement.

        It is not sent again: after a failure the caller makes a new batch of it.
        """
        limit = self.max_payload
        for item in publications:
            check(item, limit)
        *parts, commit = publications

        def send() -> None:
            for part in parts:
                self.write(part.subject, part.payload, "", part.block)

        self.post(send)
        answer = self.request(commit.subject, commit.payload, commit.block, timeout=timeout)
        outcome = read_puback(commit.subject, answer, patient=False)
        if isinstance(outcome, PubAck):
            return outcome
        raise outcome or StoreTimeout(f"JetStream could not take a batch for {commit.subject} now.")

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
          BrokerConnectionError: When no answer came in time.
          PermissionDenied: When the server refused the subject.
        """
        self.connect()
        seconds = (self.timeout if timeout is None else timeout) / 1000
        if resend:
            started = time.monotonic()
            answer = self.ask(subject, payload, headers, seconds)
            if answer is not None and not (patient and is_no_responders(answer)):
                return answer
            seconds = max(0.001, seconds - (time.monotonic() - started))
        future: concurrent.futures.Future[Msg] = concurrent.futures.Future()
        grace = time.monotonic() + (min(seconds, NO_RESPONDERS_GRACE / 1000) if patient else 0)

        def receive(answer: Msg | BaseException) -> bool:
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            elif is_no_responders(answer) and time.monotonic() < grace:
                return True
            else:
                future.set_result(answer)
            return False

        self._ask(subject, payload, headers, receive, time.monotonic() + seconds, resend)
        try:
            return future.result(seconds + 2)
        except concurrent.futures.TimeoutError:
            raise BrokerConnectionError(f"No answer on {subject} within {seconds * 1000:.0f} ms.") from None

    def tell(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        told: Callable[[Msg | BaseException], None],
        *,
        timeout: int | None = None,
    ) -> None:
        """Send a request without waiting; `told` gets the answer, or why there is none, on the loop thread."""
        self.connect()
        seconds = (self.timeout if timeout is None else timeout) / 1000

        def receive(answer: Msg | BaseException) -> bool:
            told(answer)
            return False

        self._ask(subject, payload, headers, receive, time.monotonic() + seconds, resend=False)

    def query(
        self, subject: str, payload: bytes, over: Callable[[Msg | BaseException], None], seconds: float
    ) -> None:
        """Send a request from the loop thread; `over` is called there with the answer, or an error without one.

        It is not sent again when the connection was lost.
        """

        def receive(answer: Msg | BaseException) -> bool:
            if isinstance(answer, Msg) and is_no_responders(answer):
                return True  # no leader now: again, soon
            over(answer)
            return False

        self._start(_Pending(subject, payload, None, receive, time.monotonic() + seconds, resend=False))

    def api(
        self, verb: str, body: Mapping[str, Any] | None = None, *, timeout: int | None = None
    ) -> dict[str, Any]:
        """Ask the JetStream API, for instance `api("STREAM.INFO.orders")`.

        Raises:
          NotFound, ApiError: What JetStream answered.
          BrokerConnectionError: When it did not answer in time.
        """
        payload = json.dumps(body).encode() if body is not None else b""
        seconds = (self.timeout if timeout is None else timeout) / 1000
        deadline = time.monotonic() + seconds
        while True:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            answer = self.request(f"$JS.API.{verb}", payload, timeout=left, resend=True)
            if is_no_responders(answer):
                raise ServerUnsupported(
                    f"JetStream does not answer at {self.options.display}: it is switched off for this "
                    "account, or has no leader now."
                )
            reply = cast(dict[str, Any], json.loads(answer.data))
            error = reply.get("error")
            if error is None:
                return reply
            translated = translate(error)
            if error.get("err_code") not in TRANSIENT or time.monotonic() + 0.25 > deadline:
                raise translated
            time.sleep(0.25)

    def _ask(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        answer: Callable[[Msg | BaseException], bool],
        deadline: float,
        resend: bool,
    ) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("A blocking call was made on the connection's own thread.")
        self.post(self._start, _Pending(subject, payload, headers, answer, deadline, resend))

    def _start(self, pending: _Pending) -> None:
        self._counter += 1
        token = format(self._counter, "x")
        self._pending[token] = pending
        self._transmit(token, pending)

    def _transmit(self, token: str, pending: _Pending) -> None:
        if self.is_open:
            self._resent += pending.sent is not None
            pending.sent = time.monotonic()
            self.write(pending.subject, pending.payload, f"{self.inbox}.{token}", pending.headers)

    def answered(self, token: str, message: Msg) -> None:
        pending = self._pending.get(token)
        if pending is None:
            return  # an answer to what was sent twice, or too late
        if pending.answer(message):
            pending.wait = RESEND_SOON
        else:
            del self._pending[token]

    def refused(self, verb: str, subject: str) -> None:
        waiting = [
            (token, pending.subject)
            for token, pending in self._pending.items()
            if verb == "publish" and pending.subject.lower() == subject
        ]
        if not waiting:
            self.logger.error("%s", permission_denied(verb, subject))
        for token, exact in waiting:
            self._pending.pop(token).answer(permission_denied(verb, exact))

    def closing(self) -> None:
        for pending in list(self._pending.values()):
            pending.answer(ConnectionClosed("The connection to NATS was closed before an answer came."))
        self._pending.clear()

    def _resend(self) -> None:
        for token, pending in list(self._pending.items()):
            if pending.resend or pending.sent is None:
                self._transmit(token, pending)

    def _sweep(self) -> None:
        """Give up on what was not answered in time, and send again what may be."""
        now = time.monotonic()
        for token, pending in list(self._pending.items()):
            if now >= pending.deadline:
                del self._pending[token]
                pending.answer(self._too_late(pending))
            elif pending.sent is None:
                self._transmit(token, pending)
            elif (pending.resend or pending.wait < RESEND_AFTER) and now - pending.sent >= pending.wait:
                pending.wait = min(pending.wait * 2, 8.0) if pending.wait >= RESEND_AFTER else RESEND_AFTER
                self._transmit(token, pending)

    def _too_late(self, pending: _Pending) -> BrokerConnectionError:
        waited = int((time.monotonic() - pending.started) * 1000)
        if pending.sent is None:
            return ConnectionClosed(
                f"NATS at {self.options.display} was not connected for {waited} ms "
                f"({self.state.last_error}); nothing was sent to {pending.subject}."
            )
        if pending.subject.startswith("$JS.API."):
            return BrokerConnectionError(
                f"JetStream at {self.options.display} did not answer {pending.subject} within {waited} ms."
            )
        return StoreTimeout(
            f"NATS at {self.options.display} did not answer on {pending.subject} within {waited} ms; "
            "whether it stored the message is not known."
        )
