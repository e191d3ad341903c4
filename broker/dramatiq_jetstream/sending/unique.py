"""Unique messages: a second one with the same key is refused while the first one's window lasts.

A unique message takes a key in the bucket `unique`, first for a short while, and for its whole window once
it is stored. If the process dies in between, the key is free again after twice `enqueue_timeout`, so a
crash delays the next message with that key but never forbids it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.errors import InvalidOption, KeyExists, MessageNotUnique
from dramatiq_jetstream.jetstream.names import queue_key
from dramatiq_jetstream.kv import Bucket

__all__ = ["unique"]


@contextlib.contextmanager
def unique(bucket: Bucket, message: Message[Any], *, enqueue_timeout: int) -> Iterator[None]:
    """Take the message's unique key around storing it.

    Parameters:
      enqueue_timeout: How long storing may take, in milliseconds.

    Raises:
      MessageNotUnique: When another message has it.
    """
    key = message.options["unique_key"]
    window = message.options.get("unique_window", 60_000)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1_000:
        raise InvalidOption(f"unique_window={window!r} cannot be used: give milliseconds, 1000 or more.")
    name = queue_key(q_name(message.queue_name), str(key))
    mine = message.message_id.encode()
    revision = 0
    while not revision:
        try:
            revision = bucket.create(name, mine, ttl=min(window, 2 * enqueue_timeout))
        except KeyExists:
            holder = bucket.get(name)
            if holder is None:
                continue  # its window ended just now
            if holder.value == mine:
                break  # the same message again
            raise MessageNotUnique(
                f"A message with the unique key {key!r} was enqueued on {message.queue_name!r} within the last "
                f"{window} ms; this one was not."
            ) from None
    try:
        yield
    except BaseException:
        if revision:
            bucket.delete(name, revision=revision)
        raise
    if revision:
        bucket.put(name, mine, ttl=window)
