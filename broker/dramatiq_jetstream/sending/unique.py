"""Unique messages: a second one with the same key is refused while the first one's window lasts.

A key in the bucket `unique` is *pending* from before its message is published, and *stored* once that is acknowledged.
Both last for the whole window. A refused message frees its key.

If the outcome of storing is unknown, the caller is interrupted, or its process dies, the key stays pending. The next
call with that key finds out: it publishes under the `Nats-Msg-Id` of the first call. If JetStream has that id already,
the first message was stored, and the call fails as for any stored key. If not, its own message is stored. It does so
once the first call has ended (for another process: when that call's time is up) and within the queue's duplicate
window. After the window the outcome can no longer be found out, and the key is free.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Mapping
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    BrokerError,
    InvalidOption,
    KeyExists,
    MessageNotUnique,
    RevisionConflict,
    StoreFull,
)
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID, encode, short_key
from dramatiq_jetstream.jetstream.reading import StoredMessage, message_at, parse_time
from dramatiq_jetstream.kv import Bucket, Entry
from dramatiq_jetstream.wire.connection import PubAck, Publication

from . import envelope
from .fitting import unfolded

__all__ = ["Claim", "free", "prefix"]


#: The `Nats-Msg-Id`s of calls of this process that ended without knowing whether their message is stored.
_given_up: deque[str] = deque(maxlen=1_000)


class Claim:
    """A message's hold on its unique key, from before it is published until it is known whether it is stored.

    Parameters:
      publication: What is published for the message. It gets the `Nats-Msg-Id` of an earlier call with the key of
        which nothing is known.

    Raises:
      MessageNotUnique: When another message has the key.
      InvalidOption: For a window that cannot be used.
      BrokerConnectionError: When the key is not known to be taken; the message must not be published then.
    """

    def __init__(
        self, config: BrokerConfig, bucket: Bucket, message: Message[Any], publication: Publication
    ) -> None:
        window = message.options.get("unique_window", 60_000)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1_000:
            raise InvalidOption(f"unique_window={window!r} cannot be used: give milliseconds, 1000 or more.")
        self._bucket = bucket
        self._message = message
        self._window = window
        self._config = config
        self._name = name_of(message)
        self._revision = 0
        self._publish_id = ""
        self._earlier: str | None = None  # the message of an earlier call whose outcome is unknown
        headers = dict(publication.headers or {})
        headers[HEADER_MSG_ID] = self._publish_id = self._take(headers[HEADER_MSG_ID])
        publication.headers = headers

    def _take(self, publish_id: str) -> str:
        """Take the key; return the id to publish under."""
        while True:
            try:
                self._revision = self._bucket.create(self._name, self._pending(publish_id), ttl=self._window)
                return publish_id
            except KeyExists:
                holder = self._bucket.get(self._name)
            if holder is None:
                continue  # its window ended just now
            record = json.loads(holder.value)
            mine = record["message"] == self._message.message_id
            earlier = record.get("publish_id")
            if earlier is None:
                if mine:
                    return publish_id  # it is known to be stored, and this is a deliberate second time
                raise self._not_unique()
            age = self._age(holder)
            if age < record["timeout"] and not mine and earlier not in _given_up:
                raise self._not_unique()
            if age >= self._config.duplicate_window:
                earlier = publish_id
            with contextlib.suppress(RevisionConflict):
                self._revision = self._bucket.update(
                    self._name, self._pending(earlier), revision=holder.revision, ttl=self._window
                )
                self._earlier = None if earlier == publish_id or mine else record["message"]
                return str(earlier)

    def _age(self, entry: Entry) -> int:
        """Milliseconds since an entry was stored, by the server's clock alone."""
        now = self._bucket.connection.api(f"STREAM.INFO.{self._bucket.stream}")["ts"]
        return parse_time(now) - entry.created

    def stored(self, ack: PubAck | None) -> None:
        """Keep the key for the rest of its window: JetStream has acknowledged the message.

        Raises:
          MessageNotUnique: When the acknowledgement is for the message of an earlier call.
        """
        holder = self._message.message_id
        if self._earlier is not None and ack is not None and ack.duplicate and not self._is_ours(ack):
            holder = self._earlier
        if self._revision:
            # While the key is pending, the next call finds out by itself what this would tell.
            with contextlib.suppress(BrokerError):
                value = json.dumps({"message": holder}).encode()
                self._bucket.update(self._name, value, revision=self._revision, ttl=self._window)
        if holder != self._message.message_id:
            raise self._not_unique()

    def _is_ours(self, ack: PubAck) -> bool:
        """Whether the stream already holds this message, from a call whose acknowledgement was lost."""
        stored = message_at(self._bucket.connection, ack.stream, ack.seq)
        return stored is not None and self._message.message_id.encode() in stored.data

    def failed(self, error: BaseException) -> None:
        """Free the key if the message was refused; otherwise it may be stored, and the key stays pending."""
        refused = isinstance(error, StoreFull) or not isinstance(error, BrokerConnectionError)
        if isinstance(error, Exception) and refused and self._revision and self._earlier is None:
            with contextlib.suppress(BrokerError):
                self._bucket.delete(self._name, revision=self._revision)
        else:
            _given_up.append(self._publish_id)

    def _pending(self, publish_id: str) -> bytes:
        record = {
            "message": self._message.message_id,
            "publish_id": publish_id,
            "timeout": self._config.enqueue_timeout,
        }
        return json.dumps(record).encode()

    def _not_unique(self) -> MessageNotUnique:
        return MessageNotUnique(
            f"A message with the unique key {self._message.options['unique_key']!r} was enqueued on "
            f"{self._message.queue_name!r} within the last {self._window} ms; this one was not."
        )


def name_of(message: Message[Any]) -> str:
    """The name under which a message's unique key is kept."""
    return prefix(q_name(message.queue_name)) + short_key(str(message.options["unique_key"]))


def prefix(queue: str) -> str:
    """What the keys of a queue begin with."""
    return f"{encode(queue)}/"


def free(bucket: Bucket, stored: StoredMessage) -> None:
    """Free the unique key of a stored message that was cancelled, if it has one and still holds it."""
    try:
        message = envelope.decode(unfolded(stored.data, stored.headers))
    except Exception:  # noqa: BLE001 - whatever it is, it is not a message of ours with a key
        return
    if not isinstance(message.options, Mapping) or "unique_key" not in message.options:
        return
    name = name_of(message)
    holder = bucket.get(name)
    if holder is not None and json.loads(holder.value)["message"] == message.message_id:
        with contextlib.suppress(RevisionConflict):
            bucket.delete(name, revision=holder.revision)
