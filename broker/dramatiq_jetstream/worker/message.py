"""A message on its way through a worker: Dramatiq's proxy of it, with its delivery and what is noted of its attempt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dramatiq.broker import MessageProxy
from dramatiq.message import Message
from dramatiq.middleware import SkipMessage

from dramatiq_jetstream.errors import HardTimeLimitExceeded
from dramatiq_jetstream.jetstream.names import HEADER_TICK

from .current import is_abort
from .delivery import Delivery
from .limit_state import Start

__all__ = ["Ended", "JetStreamMessage"]


class Ended(NamedTuple):
    """How an attempt ended, until it is recorded: when it began and ended, in seconds, and what became of it."""

    began: float
    ended: float
    skipped: bool
    retried: bool


class JetStreamMessage(MessageProxy):
    """A message on its way through a worker.

    Attributes:
      follow_up_calls: How often what follows it was enqueued, by message id; None if nothing was.
      follow_up_error: Why a retry, pipeline step or callback of it could not be enqueued, if so.
      once_followed_up: What to call when its actor has succeeded and all that follows is stored.
      turns: The keys of the limiters at which its actor has a turn, each with what gives that back.
      to_record: How its attempt ended, if the history is to have a record of it.
      is_cancelled: Whether it was skipped because it was aborted before it began.
      put_off: For how many milliseconds its actor has put it off, if it has (see `limits.Snooze`).
      moment: The moment that the rate of its actor gave it, in milliseconds since 1970, if it was given one.
      start: When it may start, if its actor has a rate, and until it does.
      killed: Why its process was killed, for an attempt that another process settles.
    """

    follow_up_calls: Counter[str] | None = None
    follow_up_error: BaseException | None = None
    once_followed_up: tuple[Callable[[], None], ...] = ()
    turns: tuple[tuple[str, Callable[[], object]], ...] = ()
    to_record: Ended | None = None
    is_cancelled = False
    put_off: int | None = None
    moment: float | None = None
    start: Start | None = None
    killed: HardTimeLimitExceeded | None = None

    def __init__(
        self, message: Message[Any], delivery: Delivery, arguments: tuple[Any, ...] | None = None
    ) -> None:
        super().__init__(message)
        self._delivery = delivery
        # Dramatiq and its middleware read these twenty times for a message that does nothing; the proxy would first
        # fail to find them, each time, which would cost a worker half as much CPU again.
        self.queue_name = message.queue_name
        self.actor_name = message.actor_name
        self.kwargs = message.kwargs
        self.options = message.options
        self.message_id = message.message_id
        self.message_timestamp = message.message_timestamp
        # For an event the decoded event, which is not part of the message.
        self.args = message.args if arguments is None else arguments

    @property
    def headers(self) -> Mapping[str, str]:
        """The NATS headers that it was delivered with, in which another program may have put a trace context."""
        return self._delivery.headers

    @property
    def is_unwanted(self) -> bool:
        """Whether what ended it is no failure: it was aborted, or is a tick that came too late."""
        error = self._exception
        return is_abort(error) or (isinstance(error, SkipMessage) and HEADER_TICK in self._delivery.headers)

    @property
    def delivery_count(self) -> int:
        """How often the server has delivered it, this time included; 1 is the first."""
        return self._delivery.deliveries

    @property
    def redelivered(self) -> bool:
        return self.delivery_count > 1
