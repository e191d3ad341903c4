"""Waking threads when a key is stored: a subscription for each key that a thread waits for, while it does.

The server announces every entry of an announcing bucket, without its value, after it is stored (`republish`
in the stream's configuration). Each key has a subject of its own, so a process hears of the keys that it waits for and
of no others. An announcement only says "look now": the bucket's content decides. A lost one costs time, never a
result, because waiters also look after every reconnect and every few seconds.

Look first, and subscribe only when there is nothing: what is there already costs one question. What is stored between
that look and the subscription is not announced to us, so look once more then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.wire.connection import CoreSubscription, Msg

from .names import decode_key, encode_key

__all__ = ["LOOK_AGAIN_SECONDS", "Settable", "Waiter", "Wakeups", "announced_key", "announcements"]

#: Seconds after which a waiter looks without having been woken.
LOOK_AGAIN_SECONDS = 5.0


def announcements(bucket: Bucket) -> str:
    """The subject on which an announcing bucket announces all its keys."""
    return str(bucket.config.settings["republish"]["dest"])


def announced_key(bucket: Bucket, message: Msg) -> str:
    """The key that an announcement is about."""
    return decode_key(message.subject[len(announcements(bucket)) - 1 :])


class Settable(Protocol):
    """What can be told to look: a `threading.Event`, or something like it that never blocks and never raises."""

    def set(self) -> None:
        """Say that it is time to look."""


class Waiter:
    """One wait for some keys of an announcing bucket; `Wakeups` makes it.

    It shares nothing with other waiters, so an interrupt takes nothing from them.
    """

    def __init__(self, bucket: Bucket, keys: Iterable[str], event: Settable) -> None:
        self._connection = bucket.connection
        self._subjects = [f"{announcements(bucket)[:-1]}{encode_key(key)}" for key in keys]
        self._event = event
        self._subscriptions: list[CoreSubscription] = []
        self._told = False
        self._closed = False

    def subscribe(self, *, timeout: int | None = None) -> bool:
        """Have the event set whenever one of the keys is stored, from now on; returns whether that is new.

        Parameters:
          timeout: Milliseconds to wait at most; None takes the connection's own.

        Raises:
          BrokerConnectionError: When there has never been a connection, and none could be made in time.
        """
        if self._subscriptions or self._closed:
            return False
        if not self._told:
            self._told = True
            self._connection.on_reconnect(self._event.set)
        for number, subject in enumerate(self._subjects, start=1):
            last = number == len(self._subjects)
            self._subscriptions.append(
                self._connection.subscribe(subject, self._receive, timeout=timeout, wait=last)
            )
        if self._closed:  # by another thread meanwhile
            self.close()
        return True

    def close(self) -> None:
        """Hear of nothing more; asks no server."""
        self._closed = True
        self._connection.remove_callback(self._event.set)
        while self._subscriptions:
            self._subscriptions.pop().close()

    def _receive(self, _: Msg) -> None:
        self._event.set()


class Wakeups:
    """Lets threads wait for keys of one announcing bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @contextmanager
    def waiting(self, keys: Iterable[str], event: Settable) -> Iterator[Waiter]:
        """Yield a waiter for the keys, which sets `event` once it has subscribed; entering and leaving asks no server.

        Clear the event before each look.
        """
        waiter = Waiter(self._bucket, keys, event)
        try:
            yield waiter
        finally:
            waiter.close()

    @staticmethod
    def wait(event: threading.Event, seconds: float) -> None:
        """Wait until the event is set, or until the next regular look is due."""
        event.wait(min(seconds, LOOK_AGAIN_SECONDS))
