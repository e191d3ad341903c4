"""Requests that wait for a reply, each sent before its deadline or never.

A call carries its deadline wherever it waits: in the mailbox, in the outbox, in this table while there is no
connection. `may_leave` is asked at the last moment, when its bytes go to the socket; from the deadline on it says no.
So a call whose `sent` is None at its deadline was not sent and will not be, and its error says so (`NotSent`). The
outcome is unknown only for a call that left this process.

Bytes that the transport still holds at the deadline have not left either. The connection is then cut, because nothing
else keeps them from leaving later; a socket that took nothing for as long as the call may last is of no use anyway.

A call that may be repeated is sent again after a reconnect, and when no reply came for a while. One that may not
fails as soon as the connection on which it was sent is lost. `connection` says which calls may be repeated.

The table belongs to the loop thread. If the process dies while a publish waits here, the message is stored or it is
not, and no caller was told that it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import BrokerConnectionError, ConnectionClosed, NotSent, StoreTimeout

from .ack_subjects import is_ack_subject
from .client import Client
from .headers import Headers, Msg
from .protocol import Outgoing
from .replies import permission_denied

__all__ = ["Call", "Calls"]

#: The first wait, in seconds, before an unanswered call is sent again; it doubles each time.
RESEND_SECONDS: Final = 1.0

#: The wait, in seconds, after the reply "not now".
NOT_NOW_SECONDS: Final = 0.1

#: The longest wait, in seconds, before an unanswered call is sent again.
LONGEST_RESEND_SECONDS: Final = 8.0


class Call:
    """A request that waits for its reply.

    Attributes:
      subject: Where it goes; "" for a message to ourselves, which is answered once the server has handled everything
        that was sent before.
      on_reply: Called on the loop thread with the reply or an error; returns True for "not now, try again".
      deadline: By `time.monotonic`; nothing is sent from then on.
      repeat: Whether it may be sent again.
      parts: What has to be written before it, on the same connection: the other messages of an atomic batch.
      maybe_sent: Whether it was sent another way before.
      sent: When it was last sent, by `time.monotonic`; None if it was not.
      unanswered: How often it was sent without a reply to that.
    """

    __slots__ = (
        "begun",
        "client",
        "deadline",
        "headers",
        "maybe_sent",
        "offset",
        "on_reply",
        "parts",
        "payload",
        "queued",
        "repeat",
        "sent",
        "started",
        "subject",
        "times",
        "unanswered",
        "wait",
    )

    def __init__(
        self,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        on_reply: Callable[[Msg | BaseException], bool],
        deadline: float,
        *,
        repeat: bool,
        parts: Iterable[Outgoing] = (),
        maybe_sent: bool = False,
    ) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.on_reply = on_reply
        self.deadline = deadline
        self.repeat = repeat
        self.parts = parts
        self.maybe_sent = maybe_sent
        self.started = time.monotonic()
        self.sent: float | None = None
        self.times = 0  # how often it was sent
        self.unanswered = 0
        self.begun = False  # whether a part of it was sent
        self.queued = False  # whether it waits in the outbox
        self.wait = RESEND_SECONDS
        self.client: Client | None = None
        self.offset = 0

    @property
    def known_unsent(self) -> bool:
        """Whether nothing of it has left this process. Final once the deadline is over."""
        return self.sent is None and not self.maybe_sent

    @property
    def is_in_doubt(self) -> bool:
        """Whether a reply leaves open what became of the message: it was sent before, and no reply to that came."""
        return self.maybe_sent or self.unanswered > 1

    @property
    def target(self) -> str:
        return self.subject or "it"

    def give_up(self) -> None:
        """The caller is gone: send nothing of it any more. From any thread."""
        self.deadline = 0.0

    def may_leave(self, now: float, client: Client, offset: int, *, part: bool) -> bool:
        """Whether it may be written now, behind `offset` bytes of this connection; notes that it is."""
        self.queued = self.queued and part
        if now >= self.deadline:
            return False
        self.begun = True
        if not part:
            self.client, self.offset = client, offset
            self.sent = now
            self.times += 1
            self.unanswered += 1
        return True

    def stuck(self) -> bool:
        """Whether no byte of what was sent last has reached the socket."""
        return self.client is not None and self.client.taken <= self.offset

    def error(self, where: str, reason: str) -> BrokerConnectionError:
        """The error for a call whose time is up."""
        waited = int((time.monotonic() - self.started) * 1000)
        if self.known_unsent:
            return NotSent(
                f"NATS at {where} took nothing for {waited} ms ({reason}); nothing was sent to {self.target}."
            )
        if self.subject.startswith("$JS.") and not is_ack_subject(self.subject):
            return BrokerConnectionError(
                f"JetStream at {where} did not answer {self.subject} within {waited} ms; "
                "whether it did what was asked is not known."
            )
        return StoreTimeout(
            f"NATS at {where} did not answer on {self.target} within {waited} ms; "
            "whether it stored the message is not known."
        )


class Sender(Protocol):
    """What the table needs of the link."""

    inbox: str

    @property
    def is_open(self) -> bool: ...

    def enqueue_for(self, call: Call, message: Outgoing) -> None: ...

    def describe(self) -> tuple[str, str]: ...


class Calls:
    """The calls of one link that have no reply yet."""

    def __init__(self, link: Sender) -> None:
        self._link = link
        self._waiting: dict[str, Call] = {}
        self._count = 0
        self.resent = 0

    def start(self, call: Call) -> None:
        """Send a call, now or once there is a connection, and wait for its reply."""
        self._count += 1
        token = format(self._count, "x")
        self._waiting[token] = call
        self._transmit(token, call)

    def receive(self, token: str, message: Msg) -> None:
        call = self._waiting.get(token)
        if call is None:
            return  # a second reply, or one that came too late
        if call.on_reply(message):
            call.unanswered -= 1
            call.wait = NOT_NOW_SECONDS
        else:
            del self._waiting[token]

    def refused(self, subject: str) -> bool:
        """The server denied us a subject; returns whether a call was about it."""
        tokens = [token for token, call in self._waiting.items() if call.subject == subject]
        for token in tokens:
            self._waiting.pop(token).on_reply(permission_denied("publish", subject))
        return bool(tokens)

    def fail(self, call: Call, error: BrokerError | ValueError) -> None:
        """A call cannot be sent as it is."""
        for token, waiting in list(self._waiting.items()):
            if waiting is call:
                del self._waiting[token]
                call.on_reply(error)

    def lost(self) -> None:
        """The connection is gone: fail what was sent on it and may not be repeated."""
        where, reason = self._link.describe()
        for token, call in list(self._waiting.items()):
            call.queued = False
            if call.begun and not call.repeat:
                del self._waiting[token]
                call.on_reply(
                    NotSent(
                        f"The connection to NATS at {where} was lost ({reason}) before a batch was complete; "
                        "nothing was stored."
                    )
                    if call.known_unsent
                    else StoreTimeout(
                        f"The connection to NATS at {where} was lost ({reason}) before {call.target} was "
                        "answered; what became of it is not known."
                    )
                )

    def resend(self) -> None:
        """There is a connection again: send what waits."""
        for token, call in list(self._waiting.items()):
            self._transmit(token, call)

    def sweep(self) -> None:
        """Give up what was not answered in time, and send again what may be."""
        now = time.monotonic()
        for token, call in list(self._waiting.items()):
            if now >= call.deadline:
                del self._waiting[token]
                self._expire(call)
            elif call.sent is None:
                self._transmit(token, call)
            elif (call.repeat or call.wait < RESEND_SECONDS) and now - call.sent >= call.wait:
                repeated = call.wait >= RESEND_SECONDS
                call.wait = min(call.wait * 2, LONGEST_RESEND_SECONDS) if repeated else RESEND_SECONDS
                self._transmit(token, call)

    def close(self) -> None:
        """The connection is closed for good."""
        for call in list(self._waiting.values()):
            if call.known_unsent:
                call.on_reply(
                    NotSent(f"The connection to NATS was closed; nothing was sent to {call.target}.")
                )
            else:
                call.on_reply(ConnectionClosed("The connection to NATS was closed before an answer came."))
        self._waiting.clear()

    def _transmit(self, token: str, call: Call) -> None:
        if not self._link.is_open or call.queued:
            return
        self.resent += call.sent is not None
        call.queued = True
        for part in call.parts:
            self._link.enqueue_for(call, part)
        reply = f"{self._link.inbox}.{token}"
        self._link.enqueue_for(call, (call.subject or reply, call.payload, reply, call.headers))

    def _expire(self, call: Call) -> None:
        if call.sent is not None and call.stuck():
            client: Any = call.client
            client.abort("the socket takes nothing any more")
            if call.times == 1:
                call.sent = None
        call.on_reply(call.error(*self._link.describe()))
