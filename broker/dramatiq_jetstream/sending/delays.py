"""Delayed messages as schedules that the server holds (ADR-51).

A delay is one message on a subject of its own, `{ns}.q.{queue}.at.{message id}.{unique}`, with the time and
the target in its headers. When the time comes the server stores its body on the target and removes it; no
worker is involved. Purging the subject cancels it. The server fires never early and up to 250 ms late.

The message that a schedule produces carries no `Nats-Msg-Id`: removing the duplicates of a delay that was
published twice happens when the schedule is stored.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from dramatiq_jetstream.errors import ApiError, InvalidOption, NotFound, TopologyMissing
from dramatiq_jetstream.jetstream.listing import Listing
from dramatiq_jetstream.jetstream.names import (
    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE,
    HEADER_EXPECTED_SUBJECT,
    HEADER_MSG_ID,
    HEADER_SCHEDULE,
    HEADER_SCHEDULE_TARGET,
    Names,
    decode,
)
from dramatiq_jetstream.jetstream.reading import StoredMessage, last_message, parse_time
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import CONFLICT
from dramatiq_jetstream.wire.headers import sendable
from dramatiq_jetstream.wire.ids import new_id

from .fitting import fields_of

__all__ = [
    "Delayed",
    "cancel",
    "counts",
    "delayed_messages",
    "due",
    "end_now",
    "eta_of",
    "run_now",
    "schedule",
    "waiting",
]

#: Ten years: anything later is a mistake in units.
MAX_DELAY_MS = 10 * 365 * 86_400_000

#: How many subjects the server lists in one answer.
PAGE = 100_000

#: A page that begins here is empty, and the server says all the same how many subjects there are.
BEYOND = 1 << 30


#: The headers that make a message a schedule.
SCHEDULE_HEADERS = (HEADER_SCHEDULE, HEADER_SCHEDULE_TARGET)


@dataclass(frozen=True)
class Delayed:
    """A message that waits for its time, `eta`, in milliseconds since 1970; `actor` is empty where it is not said."""

    message_id: str
    queue: str
    eta: int
    subject: str
    actor: str = ""


def check_delay(delay: object) -> int:
    """Return a delay in milliseconds; a negative one is over, as on other brokers.

    Raises:
      InvalidOption: When it is not a number, or longer than ten years.
    """
    if (
        isinstance(delay, bool)
        or not isinstance(delay, (int, float))
        or not -math.inf < delay <= MAX_DELAY_MS
    ):
        raise InvalidOption(
            f"delay={delay!r} cannot be used: give a number of milliseconds up to {MAX_DELAY_MS} (ten years)."
        )
    return max(0, int(delay))


def eta_after(delay: int) -> int:
    """Return when a delay that begins now is over, in milliseconds since 1970.

    It is rounded up, because a delay is a lower bound and the server fires within a millisecond of its time.
    """
    return -(-time.time_ns() // 1_000_000) + delay


def at(eta: int) -> str:
    """The schedule expression for a time in milliseconds since 1970."""
    moment = datetime.fromtimestamp(eta / 1000, tz=UTC)
    return f"@at {moment:%Y-%m-%dT%H:%M:%S}.{eta % 1000:03d}Z"


def schedule(eta: int, target: str) -> dict[str, str]:
    """The headers of a schedule that delivers its body on `target` at `eta` (milliseconds since 1970).

    Its other headers are delivered too, except for the `Nats-*` ones.
    """
    return {HEADER_SCHEDULE: at(eta), HEADER_SCHEDULE_TARGET: target}


def waiting(connection: Connection, names: Names, queue: str, message_id: str) -> StoredMessage | None:
    """A delayed message of a queue as it is stored; None when it is not delayed."""
    return last_message(connection, names.queue_stream(queue), names.delayed_message(queue, message_id))


def cancel(connection: Connection, names: Names, queue: str, message_id: str) -> int:
    """Cancel the delays of a message; return how many there were (a message that already fired is not one)."""
    try:
        reply = connection.api(
            f"STREAM.PURGE.{names.queue_stream(queue)}", {"filter": names.delayed_message(queue, message_id)}
        )
    except NotFound:
        return 0
    return int(reply.get("purged", 0))


def subjects(connection: Connection, stream: str, subject: str) -> Iterator[str]:
    """The subjects of a stream that match, each being one schedule."""
    offset = 0
    while True:
        state = connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": offset})
        page = state["state"].get("subjects") or {}
        yield from page
        offset += len(page)
        if len(page) < PAGE or offset >= int(state.get("total", 0)):
            return


def counts(connection: Connection, stream: str, subject: str) -> tuple[int, int]:
    """How many messages a stream has, and how many of its subjects match; each schedule has one of its own.

    The server lists none of them: it is asked for those beyond the last.
    """
    info = connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": BEYOND})
    return int(info["state"]["messages"]), int(info.get("total", 0))


def delayed_messages(connection: Connection, names: Names, queue: str, *, limit: int = 100) -> list[Delayed]:
    """The first `limit` delayed messages of a queue that were stored, the next due first."""
    listing = Listing(connection, names.queue_stream(queue))
    page = min(limit, 1_000)
    found: list[Delayed] = []
    with contextlib.suppress(NotFound, TopologyMissing):
        for stored in islice(listing.read(names.all_delayed(queue), page=page), limit):
            eta = eta_of(stored)
            if eta is not None:
                message_id = decode(stored.subject.split(".")[-2])
                actor = str((fields_of(stored.data, stored.headers) or {}).get("actor_name", ""))
                found.append(Delayed(message_id, queue, eta, stored.subject, actor))
    return sorted(found, key=lambda delayed: delayed.eta)


def run_now(connection: Connection, names: Names, queue: str, message_id: str) -> int:
    """Have the delays of a message end now; return how many there were.

    Each schedule is replaced by one that is due, in one step and only if it is still there: a message that has fired
    meanwhile is not run twice, and a crash leaves the old time or the new one.
    """
    stream, hurried = names.queue_stream(queue), 0
    listing = Listing(connection, stream)
    for stored in list(listing.read(names.delayed_message(queue, message_id), page=100)):
        headers = {
            name: value
            for name, value in sendable(stored.headers).items()
            if not name.startswith("Nats-") or name.startswith("Nats-Schedule")
        } | {
            HEADER_SCHEDULE: at(now()),
            HEADER_MSG_ID: new_id(),
            HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(stored.sequence),
        }
        try:
            connection.publish(stored.subject, stored.data, headers)
        except ApiError as error:
            if error.err_code not in CONFLICT:
                raise
        else:
            hurried += 1
    return hurried


def end_now(connection: Connection, stored: StoredMessage) -> None:
    """Have a delayed message that was read end its delay at once, up to 250 ms sooner than `run_now` does.

    It is stored on its queue if it still waits, and removed afterwards. If the process dies in between, the next call
    finds that it is stored already, within JetStream's duplicate window.
    """
    own = {name: value for name, value in sendable(stored.headers).items() if not name.startswith("Nats-")}
    headers = own | {
        HEADER_MSG_ID: f"now:{stored.stream}:{stored.sequence}",
        HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(stored.sequence),
        HEADER_EXPECTED_SUBJECT: stored.subject,
    }
    try:
        connection.publish(stored.headers[HEADER_SCHEDULE_TARGET], stored.data, headers)
    except ApiError as error:
        if error.err_code not in CONFLICT:
            raise
        return  # it ended, or was cancelled, or has another time by now
    connection.api(f"STREAM.PURGE.{stored.stream}", {"filter": stored.subject, "seq": stored.sequence + 1})


def due(connection: Connection, names: Names, queue: str, message_id: str) -> int | None:
    """When a delayed message of a queue is due, in milliseconds since 1970; None when it is not delayed."""
    stored = waiting(connection, names, queue, message_id)
    return None if stored is None else eta_of(stored)


def eta_of(stored: StoredMessage) -> int | None:
    """When a stored schedule is due, in milliseconds since 1970; None when it is not for one time."""
    expression = stored.headers.get(HEADER_SCHEDULE, "")
    if not expression.startswith("@at "):
        return None
    return parse_time(expression[4:])


def now() -> int:
    """The time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000
