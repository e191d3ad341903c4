"""Calls over the event loop that a thread waits for.

The thread waits until its deadline by the monotonic clock, whatever signals arrive meanwhile, and a moment longer for
the loop's verdict on what became of its calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from dramatiq.errors import BrokerError

from .calls import Call
from .headers import Headers, Msg
from .link import Link
from .replies import PubAck, Publication, in_doubt, is_no_responders, read_puback
from .waiting import Signal

__all__ = ["ask", "publish_window"]

#: How long "no responders" is taken for a stream that is still starting, in milliseconds.
NO_RESPONDERS_GRACE_MS: Final = 2_000

#: The seconds that a caller waits beyond its deadline for the loop's verdict, which comes within a tick.
VERDICT_SECONDS: Final = 0.3


def publish_window(
    link: Link, items: list[Publication], deadline: float, *, maybe_sent: bool = False
) -> list[PubAck | BrokerError]:
    """Publish checked messages, and wait until all have a reply or their time is up.

    Parameters:
      deadline: By `time.monotonic`, for all of them.
      maybe_sent: Whether they may have been sent another way before.
    """
    outcomes: list[PubAck | BrokerError | None] = [None] * len(items)
    remaining = len(items)
    done = Signal()

    def receiver(position: int) -> Callable[[Msg | BaseException], bool]:
        def receive(reply: Msg | BaseException) -> bool:
            nonlocal remaining
            outcome = read_puback(items[position].subject, reply, patient=time.monotonic() < grace)
            if outcome is None:
                return True
            if isinstance(outcome, BrokerError) and calls[position].is_in_doubt:
                outcome = in_doubt(outcome)
            outcomes[position] = outcome
            remaining -= 1
            if remaining == 0:
                done.set()
            return False

        return receive

    now = time.monotonic()
    grace = now + min(deadline - now - 0.5, NO_RESPONDERS_GRACE_MS / 1000)
    calls = [
        Call(
            item.subject,
            item.payload,
            item.block,
            receiver(position),
            deadline,
            repeat=True,
            maybe_sent=maybe_sent,
        )
        for position, item in enumerate(items)
    ]
    _wait(link, calls, done, deadline)
    where = link.describe()
    return [
        call.error(*where) if outcome is None else outcome
        for call, outcome in zip(calls, outcomes, strict=True)
    ]


def ask(
    link: Link,
    subject: str,
    payload: bytes,
    headers: Headers | bytes | None,
    deadline: float,
    *,
    repeat: bool,
    parts: Iterable[tuple[str, bytes, str, bytes | None]] = (),
    maybe_sent: bool = False,
    patient: bool = True,
) -> Msg:
    """Send a request over the loop and wait for its reply.

    Parameters:
      subject: Where it goes; "" for a message to ourselves, answered after everything that was sent before.
      deadline: By `time.monotonic`.
      repeat: Whether it may be sent again.
      parts: What has to be written before it, on the same connection.
      maybe_sent: Whether it may have been sent another way before.
      patient: Take "no responders" for a stream that is starting, and ask again for a while.

    Raises:
      NotSent: When nothing was sent in time.
      BrokerConnectionError: When no reply came in time.
      PermissionDenied: When the server refused the subject.
    """
    replies: list[Msg | BaseException] = []
    done = Signal()
    grace = min(deadline, time.monotonic() + NO_RESPONDERS_GRACE_MS / 1000) if patient else 0.0

    def receive(reply: Msg | BaseException) -> bool:
        if isinstance(reply, Msg) and is_no_responders(reply) and time.monotonic() < grace:
            return True
        replies.append(reply)
        done.set()
        return False

    call = Call(
        subject, payload, headers, receive, deadline, repeat=repeat, parts=parts, maybe_sent=maybe_sent
    )
    _wait(link, [call], done, deadline)
    reply = replies[0] if replies else call.error(*link.describe())
    if isinstance(reply, BaseException):
        raise reply
    return reply


def _wait(link: Link, calls: list[Call], done: Signal, deadline: float) -> None:
    """Start calls and wait until they are answered, or their time is up.

    A thread that is interrupted meanwhile withdraws its calls: what was not sent yet is never sent.
    """
    if link.is_closed:
        return
    try:
        for call in calls:
            link.post(link.calls.start, call)
        done.wait(deadline + VERDICT_SECONDS - time.monotonic())
    except BaseException:
        for call in calls:
            call.give_up()
        raise
