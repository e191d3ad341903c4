"""What follows a message that has just run: its result, its retry, its pipeline's next step, its group's callback.

Dramatiq acks a message even if what follows it could not be stored, because it swallows what middleware raises
after the actor ran. Here such a message is marked, and its consumer keeps it on the queue (see `consumer`).

When it then runs again, within JetStream's duplicate window, those of its follow-ups that carry a message id of their
own (a retry, a pipeline's next step, the callbacks of a group) and were stored the first time are not stored again:
their `Nats-Msg-Id` is made from the message they follow.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.message import Message
from dramatiq.middleware import Callbacks, GroupCallbacks, Middleware, Pipelines, Retries
from dramatiq.results import Results

from dramatiq_jetstream.errors import BrokerError, MessageNotUnique
from dramatiq_jetstream.wire.ids import new_id

from .message import JetStreamMessage

__all__ = ["FollowUps"]

logger = logging.getLogger(__name__)

#: Middleware that stores what follows a message. An error in one of these must not be forgotten.
_MIDDLEWARE = (Results, Retries, Pipelines, Callbacks, GroupCallbacks)


class FollowUps(threading.local):
    """For each thread, the message whose actor has just returned, until Dramatiq settles it."""

    def __init__(self) -> None:
        self._message: MessageProxy | None = None

    def begin(self, message: MessageProxy) -> None:
        """Take what this thread enqueues from now on for a follow-up of `message`."""
        self._message = message

    def end(self, message: MessageProxy) -> None:
        """Take what this thread enqueues from now on for messages of their own."""
        self._message = None
        if not isinstance(message, JetStreamMessage):
            return
        if message.turns:
            self._give_back(message)
        if not message.once_followed_up:
            return
        if message.follow_up_error is None and message._exception is None and message.put_off is None:
            for call in message.once_followed_up:
                call()

    @staticmethod
    def _give_back(message: JetStreamMessage) -> None:
        """Give back the turns that an actor has left, because it was interrupted or the server was away."""
        turns, message.turns = message.turns, ()
        for key, give_back in turns:
            try:
                give_back()
            except BrokerError as error:
                logger.warning(
                    "The turn of message %s at the limiter %s comes free with its time to live: %s",
                    message.message_id,
                    key,
                    error,
                )

    def unique_id(self, message: Message[Any]) -> str:
        """What tells one enqueue call from another; for a follow-up, the same at every run of its message."""
        current = self._message
        if not isinstance(current, JetStreamMessage):
            return new_id()
        if current.follow_up_calls is None:
            current.follow_up_calls = Counter()
        current.follow_up_calls[message.message_id] += 1
        number = current.follow_up_calls[message.message_id]
        call = f"{current._delivery.origin}:{message.message_id}:{number}"
        return hashlib.sha256(call.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def encloses(self, message: Message[Any]) -> bool:
        """Whether `message` is a callback that carries the message this thread has just run."""
        if self._message is None or not message.args or not isinstance(message.args[0], dict):
            return False
        return bool(message.args[0].get("message_id") == self._message.message_id)

    def is_retry(self, message: Message[Any]) -> bool:
        """Whether this thread has just run `message`, so that enqueueing it is a retry."""
        return self._message is not None and self._message.message_id == message.message_id

    def has_retried(self, message: MessageProxy) -> bool:
        """Whether `message` was enqueued again after it had run."""
        calls = message.follow_up_calls if isinstance(message, JetStreamMessage) else None
        return calls is not None and message.message_id in calls

    def middleware_failed(self, middleware: Middleware, error: BaseException) -> None:
        """Note that a middleware failed after the actor ran, or before its failure is settled."""
        if isinstance(middleware, _MIDDLEWARE):
            self.failed(error)

    def cut_off(self, message: MessageProxy, error: BaseException) -> None:
        """Mark a message after an error that came from no middleware."""
        self.begin(message)
        self.failed(error)
        self.end(message)

    def failed(self, error: BaseException) -> None:
        """Mark the message whose follow-up could not be enqueued, so that it is not acked."""
        if isinstance(error, MessageNotUnique):
            return  # the follow-up is there already, which is what its unique key is for
        message = self._message
        if isinstance(message, JetStreamMessage):
            message.follow_up_error = message.follow_up_error or error
