"""What threads ask of JetStream and wait for: publishes and API requests, over a connection to NATS.

A publish may be repeated: its headers are the same, so the same `Nats-Msg-Id` stores once within the stream's duplicate
window. So may requests that change nothing, or change nothing further the second time. Those whose reply tells what
they changed (`ONCE`) are sent once: repeated, they would report that there was nothing to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import (
    NotSent,
    ServerUnsupported,
    StoreTimeout,
    StreamLost,
    TopologyMissing,
)

from .asking import ask, publish_window
from .core_connection import CoreConnection
from .error_numbers import TRANSIENT
from .headers import Headers, Msg
from .link import ConnectionState
from .listeners import CoreSubscription
from .replies import PubAck, Publication, check, is_no_responders, read_puback, translate

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

#: API requests whose reply says what they changed, so that a repetition would say something else.
ONCE: Final = ("STREAM.PURGE.", "STREAM.DELETE.", "STREAM.MSG.DELETE.", "CONSUMER.DELETE.")


class Connection(CoreConnection):
    """A connection to JetStream that any thread may use."""

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
          StreamLost: No stream takes it now; it may have been stored before.
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
        if isinstance(outcome, (TopologyMissing, StreamLost)) and self._has_stream(subject, deadline):
            if isinstance(outcome, StreamLost):
                raise StoreTimeout(
                    f"The stream of {subject} has no leader now; whether it stored the message before is not known."
                )
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

    # The JetStream API

    def api(
        self, verb: str, body: Mapping[str, Any] | None = None, *, timeout: int | None = None
    ) -> dict[str, Any]:
        """Ask the JetStream API, for instance `api("STREAM.INFO.orders")`.

        Raises:
          NotFound, ApiError: JetStream's refusal.
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
            found = cast(dict[str, Any], json.loads(reply.data))
            error = found.get("error")
            if error is None:
                return found
            translated = translate(error)
            if error.get("err_code") not in TRANSIENT or time.monotonic() + NOT_NOW_SECONDS > deadline:
                raise translated
            time.sleep(NOT_NOW_SECONDS)

    def api_subject(self, verb: str) -> str:
        """The subject of a request to the JetStream API, in the domain or under the prefix that was chosen."""
        return f"{self.options.api}.{verb}"
