"""Waking threads when a key is stored: one subscription per bucket, for any number of waiters.

The server announces every entry of an announcing bucket, without its value, after it is stored (`republish`
in the stream's configuration). An announcement only says "look now": the bucket's content decides. A lost one costs
time, never a result, because waiters also look after every reconnect and every few seconds.

While no thread waits, a process does not stay subscribed for long.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.wire.connection import CoreSubscription, Msg

from .names import decode_key

__all__ = ["LOOK_AGAIN_SECONDS", "Settable", "Wakeups", "announced_key", "announcements"]

#: Seconds after which a waiter looks without having been woken.
LOOK_AGAIN_SECONDS = 5.0

#: Seconds that a subscription stays when no thread waits any more.
LINGER_SECONDS = 30.0


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


class Wakeups:
    """Lets threads wait for keys of one announcing bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._connection = bucket.connection
        self._reset()

    def _reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork, where no thread waits yet."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiters: dict[str, set[Settable]] = {}
        self._subscription: CoreSubscription | None = None
        self._idle_since = 0.0

    def _reset_in_a_fork(self) -> None:
        if self._process != os.getpid():
            self._reset()

    @contextmanager
    def waiting(self, keys: Iterable[str]) -> Iterator[threading.Event]:
        """Yield an event that is set whenever one of the keys is stored, or should be looked at again.

        What is stored after entering is not missed, so look at the keys after entering. Clear the event
        before each look.
        """
        event = threading.Event()
        self.subscribe()
        with self.registered(keys, event):
            # Once more: the subscription may have been given up just before this waiter was known.
            self.subscribe()
            yield event

    @contextmanager
    def registered(self, keys: Iterable[str], event: Settable) -> Iterator[None]:
        """Have `event` set as `waiting` does, once `subscribe` has returned; entering and leaving asks no server."""
        self._reset_in_a_fork()
        wanted = list(keys)
        try:
            with self._lock:
                for key in wanted:
                    self._waiters.setdefault(key, set()).add(event)
            yield
        finally:
            with self._lock:
                for key in wanted:
                    waiters = self._waiters.get(key)
                    if waiters is not None:
                        waiters.discard(event)
                        if not waiters:
                            del self._waiters[key]
                if not self._waiters:
                    self._idle_since = time.monotonic()

    @staticmethod
    def wait(event: threading.Event, seconds: float) -> None:
        """Wait until the event is set, or until the next regular look is due."""
        event.wait(min(seconds, LOOK_AGAIN_SECONDS))

    def subscribe(self) -> None:
        """Subscribe unless that is done. A subscription is not given up while a waiter is registered."""
        self._reset_in_a_fork()
        if self._subscription is not None:
            return
        subscription = self._connection.subscribe(announcements(self._bucket), self._receive)
        with self._lock:
            if self._subscription is None:
                self._subscription = subscription
                self._connection.on_reconnect(self._wake_all)
                return
        subscription.close()  # another thread was first

    def _receive(self, message: Msg) -> None:
        key = announced_key(self._bucket, message)
        with self._lock:
            for event in self._waiters.get(key, ()):
                event.set()
            idle = not self._waiters and time.monotonic() - self._idle_since > LINGER_SECONDS
            subscription = self._subscription
            if idle:
                self._subscription = None
        if idle and subscription is not None:
            self._connection.remove_callback(self._wake_all)
            subscription.close()

    def _wake_all(self) -> None:
        with self._lock:
            events = {event for waiters in self._waiters.values() for event in waiters}
        for event in events:
            event.set()
