"""A result backend for Dramatiq's `Results` middleware on a key-value bucket.

A result is one key that the server drops when its time is over. A result that does not fit into one message is stored
in parts, followed by a head that names them. It exists once the head does; if the process dies in between, the parts
expire unseen. The server wakes every program that waits.

On a `JetStreamBroker` a result, or how the actor failed, is stored before its message is settled. If it cannot be
stored within `enqueue_timeout`, or the process dies before it is, the message stays on its queue and runs again, as
with every follow-up. A crash after that stores the same key again. A result that can never be stored, because it
cannot be encoded or is too large, would fail in every run: a failure that says so is stored in its place, and the
message is done.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.encoder import Encoder
from dramatiq.message import Message
from dramatiq.results import ResultBackend, ResultMissing, ResultTimeout
from dramatiq.results.backend import DEFAULT_TIMEOUT, Missing
from dramatiq.results.backends.stub import StubBackend
from dramatiq.results.result import wrap_exception, wrap_result

from .aio import in_thread
from .backends import answer_for, broker_for
from .errors import BrokerConnectionError, MessageTooLarge
from .jetstream.names import HEADER_PARTS, short_key
from .jetstream.wakeups import LOOK_AGAIN_SECONDS, Waiter, Wakeups
from .kv import Entry

__all__ = ["JetStreamBackend", "ResultNotStored"]

logger = logging.getLogger(__name__)

#: Bytes that a message needs besides the value, for subject and headers.
ENVELOPE_BYTES = 1_024

#: The largest result, in bytes; it is in memory as a whole wherever it is stored or read.
MAX_RESULT_BYTES = 64 * 1024 * 1024

#: How much longer than their head the parts live, in milliseconds.
PARTS_OUTLIVE_MS = 60_000


class ResultNotStored(Exception):
    """What a `ResultFailure` names when the result of an actor can never be stored.

    Examples:
      >>> from dramatiq.results import ResultFailure
      >>> try:
      ...     charge.send("c-42", "set").get_result(block=True, timeout=30_000)
      ... except ResultFailure as failure:
      ...     print(failure.orig_exc_type)
      ResultNotStored
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(
            f"the actor has ended, but its result cannot be stored: {type(reason).__name__}: {reason}"
        )


class _LoopEvent:
    """An event for one coroutine that any thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self.clear = self._event.clear

    def set(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: no coroutine waits any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)


class JetStreamBackend(ResultBackend):
    """Stores results in JetStream.

    A blocking `get_result` returns within milliseconds of the result being stored, however many threads of
    the process wait. If the connection is lost meanwhile, it goes on waiting until its timeout.

    Parameters:
      broker: The broker whose connection, namespace and replicas are used; None makes one of its own. On Dramatiq's
        `StubBroker` everything is kept in memory.
      url: Where to connect without a broker; None takes `NATS_URL`, then localhost.
      namespace, encoder, use_namespace_prefix_keys: As for every Dramatiq result backend.
      max_result_bytes: Encoded results above this size are not stored; `get_result` raises `ResultFailure`.

    Lifetimes (`result_ttl`) are rounded up to whole seconds, in which the server counts them.

    Examples:
      >>> from dramatiq.results import Results
      >>> from dramatiq_jetstream.results import JetStreamBackend
      >>> broker = JetStreamBroker(namespace="shop")
      >>> broker.add_middleware(Results(backend=JetStreamBackend(broker)))
    """

    def __init__(
        self,
        broker: Broker | None = None,
        *,
        url: str | Iterable[str] | None = None,
        namespace: str = "dramatiq-results",
        encoder: Encoder | None = None,
        use_namespace_prefix_keys: bool = False,
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        super().__init__(
            namespace=namespace, encoder=encoder, use_namespace_prefix_keys=use_namespace_prefix_keys
        )
        if isinstance(broker, StubBroker):
            self._own = False
            answer_for(self, self.stub())
            return
        self.broker, self._own = broker_for(broker, url)
        self.broker.backends.add(self)
        self.max_result_bytes = max_result_bytes
        self.bucket = self.broker.declarations.announcing_bucket("results")
        self._wakeups = Wakeups(self.bucket)

    def stub(self) -> ResultBackend:
        """A backend in memory, for tests."""
        stub = StubBackend(
            namespace=self.namespace,
            encoder=self.encoder,
            use_namespace_prefix_keys=self.use_namespace_prefix_keys,
        )
        stub.results = {}  # Dramatiq's are shared by all
        return stub

    def get_result(self, message: Message[Any], *, block: bool = False, timeout: int | None = None) -> Any:
        """Get a message's result.

        Parameters:
          block: Wait until there is one.
          timeout: Milliseconds to wait at most; 10 seconds by default.

        Raises:
          ResultMissing: When there is none and `block` is False.
          ResultTimeout: When there was none in time.
          ResultFailure: When the actor failed, or its result can never be stored; the error says why.
          BrokerConnectionError: When the server did not answer and `block` is False.
        """
        key = self.build_message_key(message)
        if not block:
            result = self._get(key)
            if result is Missing:
                raise ResultMissing(message)
            return self.unwrap_result(result)  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + (DEFAULT_TIMEOUT if timeout is None else timeout) / 1000
        stored = threading.Event()
        with self._wakeups.waiting([key], stored) as waiter:
            while True:
                stored.clear()
                left = deadline - time.monotonic()
                result, cause = self._try_look(key, waiter, left)
                if result is not Missing:
                    return self.unwrap_result(result)  # type: ignore[no-untyped-call]
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ResultTimeout(message) from cause
                self._wakeups.wait(stored, left)

    async def aget_result(
        self,
        message: Message[Any],
        *,
        timeout: int | None = None,  # noqa: ASYNC109 - as `get_result`
    ) -> Any:
        """Wait for a message's result without blocking the event loop, and without holding a thread.

        Parameters:
          timeout: Milliseconds to wait at most; 10 seconds by default.

        Raises:
          As `get_result` with `block`.
        """
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        if "get_result" in vars(self):  # one in memory answers
            return await in_thread(partial(self.get_result, message, block=True, timeout=limit))
        deadline = time.monotonic() + limit / 1000
        key, stored = self.build_message_key(message), _LoopEvent()
        with self._wakeups.waiting([key], stored) as waiter:
            while True:
                stored.clear()
                left = deadline - time.monotonic()
                look = partial(self._try_look, key, waiter, left)
                try:
                    result, cause = await in_thread(look, patience=max(0.5, left))
                except BrokerConnectionError as error:
                    result, cause = Missing, error
                if result is not Missing:
                    return self.unwrap_result(result)  # type: ignore[no-untyped-call]
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ResultTimeout(message) from cause
                await stored.wait(min(left, LOOK_AGAIN_SECONDS))

    def _try_look(self, key: str, waiter: Waiter, seconds: float) -> tuple[Any, BrokerConnectionError | None]:
        """Look for a result, and subscribe if there is none; what cannot be seen now is missing, with the reason."""
        timeout = max(
            500, int(seconds * 1000)
        )  # the least is enough for a round trip, so that timeout=0 is a look
        try:
            result = self._get(key, timeout=timeout)
            if result is Missing and seconds > 0 and waiter.subscribe(timeout=timeout):
                result = self._get(key, timeout=timeout)
        except BrokerConnectionError as error:
            return Missing, error
        return result, None

    def _get(self, message_key: str, *, timeout: int | None = None) -> Any:
        head = self.bucket.get(message_key, timeout=timeout)
        data = None if head is None else self._join(head)
        return Missing if data is None else self.encoder.decode(data)

    def _join(self, head: Entry) -> bytes | None:
        """The encoded result that `head` is, or begins; None when it is expiring just now."""
        if HEADER_PARTS not in head.headers:
            return head.value
        name, _, count = head.headers[HEADER_PARTS].partition(" ")
        parts = [self.bucket.get(f"parts.{name}.{number}") for number in range(int(count))]
        return b"".join(part.value for part in parts if part is not None) if all(parts) else None

    def build_message_key(self, message: Message[Any]) -> str:
        """The key of a message's result; a hash stands for a readable one that is too long."""
        return short_key(super().build_message_key(message))

    def store_result(self, message: Message[Any], result: Any, ttl: int) -> None:
        """Store a result for `ttl` milliseconds.

        Raises:
          MessageTooLarge, and what the encoder raises: When it can never be stored. In a worker, whose messages are
            `MessageProxy`s, nothing is raised for that; the programs that wait for the result are told instead.
          BrokerConnectionError: When it is not known to be stored.
        """
        self._store_for(message, wrap_result(result), ttl)

    def store_exception(self, message: Message[Any], exception: BaseException, ttl: int) -> None:
        """Store how an actor failed; as `store_result`."""
        self._store_for(message, wrap_exception(exception), ttl)

    def _store_for(self, message: Any, result: Any, ttl: int) -> None:
        try:
            data = self._encode(result)
        except Exception as error:
            if not isinstance(message, MessageProxy):
                raise
            logger.exception("The result of message %s cannot be stored.", message.message_id)
            data = self.encoder.encode(wrap_exception(ResultNotStored(error)))
        self._put(self.build_message_key(message), data, ttl)

    def _store(self, message_key: str, result: Any, ttl: int) -> None:
        self._put(message_key, self._encode(result), ttl)

    def _encode(self, result: Any) -> bytes:
        data = self.encoder.encode(result)
        if len(data) > self.max_result_bytes:
            raise MessageTooLarge(
                f"A result of {len(data)} bytes is over max_result_bytes={self.max_result_bytes}: "
                "store large data elsewhere and return a reference."
            )
        return data

    def _put(self, message_key: str, data: bytes, ttl: int) -> None:
        limit = self.bucket.connection.max_payload - ENVELOPE_BYTES
        ttl = max(1, ttl)
        if len(data) <= limit:
            self.bucket.put(message_key, data, ttl=ttl)
            return
        name = secrets.token_hex(8)
        parts = [data[start : start + limit] for start in range(0, len(data), limit)]
        for number, part in enumerate(parts):
            self.bucket.put(f"parts.{name}.{number}", part, ttl=ttl + PARTS_OUTLIVE_MS)
        self.bucket.put(message_key, b"", ttl=ttl, headers={HEADER_PARTS: f"{name} {len(parts)}"})

    def close(self) -> None:
        """Close the connection if it is this backend's own."""
        if self._own:
            self.broker.close()
