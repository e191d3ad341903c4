"""An event backend for the `dramatiq-abort` package, on a key-value bucket.

    broker.add_middleware(Abortable(backend=JetStreamBackend(broker)))
    dramatiq_abort.abort(message.message_id)

A signal is one key; the process that deletes it has taken it. A worker waits for the signals of all messages that it
runs: it looks for each once, then again when the server announces the key, after a reconnect, and every few seconds.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable

from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import current_millis

try:
    from dramatiq_abort import Abortable, Event, EventBackend
    from dramatiq_abort.backends.stub import StubBackend
    from dramatiq_abort.middleware import AbortMode
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dramatiq_jetstream.abort needs the package dramatiq-abort: pip install 'dramatiq-jetstream[abort]'",
        name=error.name,
    ) from error

from .backends import answer_for, broker_for
from .errors import PermissionDenied, RevisionConflict
from .jetstream.inventory import queue_names
from .jetstream.names import short_key
from .jetstream.wakeups import announced_key, announcements
from .sending.delays import due
from .wire.connection import Msg

__all__ = ["JetStreamBackend", "abort_message"]

logger = logging.getLogger(__name__)

#: Seconds after which a waiting worker looks for all its signals again, announced or not.
LOOK_AGAIN_SECONDS = 5.0


class JetStreamBackend(EventBackend):
    """Sends and receives abort signals through JetStream.

    Parameters:
      broker: The broker whose connection, namespace and replicas are used; None makes one of its own. On Dramatiq's
        `StubBroker` everything is kept in memory.
      url: Where to connect without a broker; None takes `NATS_URL`, then localhost.

    A signal is kept for the `abort_ttl` of `Abortable`, rounded up to whole seconds. For a message that is
    delayed, that time begins when the message is due.

    Examples:
      >>> from dramatiq_abort import Abortable, abort
      >>> from dramatiq_jetstream.abort import JetStreamBackend
      >>> shop = JetStreamBroker(namespace="shop")
      >>> shop.add_middleware(Abortable(backend=JetStreamBackend(shop)))
      >>> abort(message.message_id, abort_timeout=0)  # one of the global broker's
    """

    def __init__(self, broker: Broker | None = None, *, url: str | Iterable[str] | None = None) -> None:
        if isinstance(broker, StubBroker):
            self._own = False
            answer_for(self, self.stub())
            return
        self.broker, self._own = broker_for(broker, url)
        self.broker.backends.add(self)
        self.bucket = self.broker.declarations.announcing_bucket("aborts")
        self._reset()

    def stub(self) -> EventBackend:
        """A backend in memory, for tests."""
        return StubBackend()

    def _reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._listening = False
        self._looked: set[str] = set()
        self._looked_since = 0.0
        self._wake = threading.Event()

    def notify(self, events: Iterable[Event], ttl: int) -> None:
        """Signal events; each is kept until a worker takes it, for at most `ttl` milliseconds from when one could take
        it."""
        events = list(events)
        delays = dict.fromkeys((Abortable.key_to_id(event.key) for event in events), 0)
        for message_id in delays:
            delays[message_id] = self._delay_of(message_id)
        for event in events:
            lifetime = delays[Abortable.key_to_id(event.key)] + max(1, ttl)
            self.bucket.put(short_key(event.key), json.dumps(event.params).encode(), ttl=lifetime)

    def poll(self, key: str) -> Event | None:
        """Take the signal for a key if there is one."""
        name = short_key(key)
        while True:
            entry = self.bucket.get(name)
            if entry is None:
                return None
            try:
                self.bucket.delete(name, revision=entry.revision)
            except RevisionConflict:
                continue  # another worker took it, or it was given again
            return Event(key, json.loads(entry.value))

    def wait_many(self, keys: Iterable[str], timeout: int) -> Event | None:
        """Wait for the first signal for one of the keys, and take it.

        Parameters:
          timeout: Milliseconds to wait at most.
        """
        wanted = {short_key(key): key for key in keys}
        deadline = time.monotonic() + timeout / 1000
        self._listen()
        while True:
            self._wake.clear()
            for name in self._to_look_for(list(wanted)):
                event = self.poll(wanted[name])
                if event is not None:
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._wake.wait(min(left, LOOK_AGAIN_SECONDS))

    def close(self) -> None:
        """Close the connection if it is this backend's own."""
        if self._own:
            self.broker.close()

    def _listen(self) -> None:
        if self._process != os.getpid():
            self._reset()
        try:
            with self._lock:
                if self._listening:
                    return
                self._listening = True
            self.bucket.connection.subscribe(announcements(self.bucket), self._receive)
            self.bucket.connection.on_reconnect(self._look_again)
        except BaseException:
            self._listening = False
            raise

    def _to_look_for(self, wanted: list[str]) -> list[str]:
        """The keys that may have a signal: not looked for yet, or announced since."""
        with self._lock:
            if time.monotonic() - self._looked_since > LOOK_AGAIN_SECONDS:
                self._looked.clear()
                self._looked_since = time.monotonic()
            self._looked.intersection_update(wanted)
            missing = [key for key in wanted if key not in self._looked]
            self._looked.update(missing)
            return missing

    def _receive(self, message: Msg) -> None:
        with self._lock:
            self._looked.discard(announced_key(self.bucket, message))
        self._wake.set()

    def _look_again(self) -> None:
        with self._lock:
            self._looked.clear()
        self._wake.set()

    def _delay_of(self, message_id: str) -> int:
        """Milliseconds until a delayed message is due; 0 when it is not delayed."""
        try:
            etas = [
                due(self.broker.connection, self.broker.names, queue, message_id)
                for queue in self.broker.queues or queue_names(self.broker.connection, self.broker.names)
            ]
        except PermissionDenied as error:
            logger.warning("Whether %s is delayed cannot be seen: %s", message_id, error)
            return 0
        return max(0, max((eta for eta in etas if eta is not None), default=0) - current_millis())


def abort_message(
    message_id: str,
    broker: Broker,
    *,
    mode: AbortMode = AbortMode.ABORT,
    abort_timeout: int = 0,
    abort_ttl: int = 90_000,
) -> None:
    """Abort a message from a program that needs no actors, such as a command.

    Parameters:
      mode: `AbortMode.CANCEL` leaves a message alone that is running.
      abort_timeout: Milliseconds that a running message gets to end by itself.
      abort_ttl: Milliseconds that the signal is kept for a message that waits in its queue.

    Examples:
      >>> from dramatiq_jetstream.abort import abort_message
      >>> waiting = charge.send_with_options(args=("c-42", 20), delay=60_000)
      >>> abort_message(waiting.message_id, broker)
    """
    Abortable(backend=JetStreamBackend(broker)).abort(message_id, abort_ttl, mode, abort_timeout)
