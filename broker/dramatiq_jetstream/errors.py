"""The exceptions of the library, and what each one asks of the caller.

::

    dramatiq.errors.BrokerError
    ├── BrokerConnectionError           nothing is known to be stored: try again
    │   ├── ConnectionFailed            no server could be reached, or it refused us
    │   ├── ConnectionClosed            the connection was closed, or lost for too long
    │   │   └── NotSent                 nothing was sent in time, and nothing will be (also a ConnectionFailed)
    │   ├── StoreTimeout                no acknowledgement in time; it may yet be stored
    │   │   └── StreamLost              there is no stream now, but may have been
    │   └── StoreFull                   the server has no room
    ├── QueueNotFound
    │   └── TopologyMissing             a stream or consumer is not there: run `fleet setup`
    ├── ServerUnsupported               older than 2.14, or without JetStream
    ├── TopologyMismatch                a stream or consumer exists and differs
    ├── PermissionDenied                the account may not use a subject
    ├── MessageTooLarge                 over the server's `max_payload`
    ├── MessageNotUnique                a unique message is already waiting or running
    ├── NotAllStored                    the cause of what `enqueue_many` raises: which messages are stored
    ├── KeyExists, RevisionConflict     compare-and-set lost against another writer
    └── ApiError                        any other answer of the JetStream API
        └── NotFound

    dramatiq.middleware.MiddlewareError
    └── HardTimeLimitExceeded           how an attempt ended whose process was killed for it

    ValueError
    └── InvalidName, InvalidOption      a setting that can never work

`BrokerConnectionError`, `ConnectionFailed`, `ConnectionClosed` and `QueueNotFound` are Dramatiq's own,
so a program that handles them for another broker handles them for this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dramatiq.errors import (
    BrokerConnectionError,
    BrokerError,
    ConnectionClosed,
    ConnectionFailed,
    QueueNotFound,
)
from dramatiq.message import Message
from dramatiq.middleware import MiddlewareError

__all__ = [
    "ApiError",
    "BrokerConnectionError",
    "BrokerError",
    "ConnectionClosed",
    "ConnectionFailed",
    "HardTimeLimitExceeded",
    "InvalidName",
    "InvalidOption",
    "KeyExists",
    "MessageNotUnique",
    "MessageTooLarge",
    "NotAllStored",
    "NotFound",
    "NotSent",
    "PermissionDenied",
    "QueueNotFound",
    "RevisionConflict",
    "ServerUnsupported",
    "StoreFull",
    "StoreTimeout",
    "StreamLost",
    "TopologyMismatch",
    "TopologyMissing",
]


class NotSent(ConnectionClosed, ConnectionFailed):
    """Nothing was sent before the call's time was up, so nothing was stored or changed, and nothing will be.

    Examples:
      >>> from dramatiq_jetstream.errors import NotSent
      >>> away = JetStreamBroker("nats://localhost:1", enqueue_timeout=100)
      >>> try:
      ...     away.enqueue(charge.message("c-42", 20))
      ... except NotSent:
      ...     print("try again: it was not stored")
      try again: it was not stored
    """


class StoreTimeout(BrokerConnectionError):
    """JetStream did not acknowledge in time; whether it stored the message is not known.

    Examples:
      ```python
      try:
          charge.send("c-42", 20)
      except StoreTimeout:
          charge.send("c-42", 20)  # it may run twice: `charge` is idempotent
      ```
    """


class StreamLost(StoreTimeout):
    """No stream takes the message now; one may have stored it before, and been deleted since or lost its leader.

    A send that gets no answer is sent again. This is the answer to such a repetition.

    Examples:
      ```python
      try:
          charge.send("c-42", 20)
      except StreamLost:
          charge.send("c-42", 20)  # it may run twice: `charge` is idempotent
      ```
    """


class StoreFull(BrokerConnectionError):
    """The stream or the server has reached its storage limit; nothing was stored.

    Examples:
      ```python
      try:
          charge.send("c-42", 20)
      except StoreFull as error:
          return Response(str(error), status=503)
      ```
    """


class TopologyMissing(QueueNotFound):
    """A stream or consumer that is needed does not exist and may not be created here.

    Examples:
      >>> from dramatiq_jetstream.errors import TopologyMissing
      >>> try:
      ...     broker.stream("NOWHERE").last()
      ... except TopologyMissing:
      ...     print("run `fleet setup` first")
      run `fleet setup` first
    """


class ServerUnsupported(BrokerError):
    """The server is older than the library needs, or has JetStream switched off.

    Examples:
      ```python
      try:
          broker.setup()
      except ServerUnsupported as error:
          sys.exit(str(error))  # says what was found, and what is needed
      ```
    """


class TopologyMismatch(BrokerError):
    """A stream, consumer or bucket exists with a configuration that loses or holds up messages.

    `differences` maps each setting to the pair (what exists, what was declared), durations in milliseconds.

    Examples:
      ```python
      try:
          broker.setup()
      except TopologyMismatch as error:
          for setting, (exists, declared) in error.differences.items():
              print(f"{setting} is {exists}, and is declared as {declared}")
      ```
    """

    def __init__(self, text: str, differences: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(text)
        self.differences = dict(differences)


class PermissionDenied(BrokerError):
    """The server refused a subject to this account.

    Examples:
      ```python
      try:
          charge.send("c-42", 20)
      except PermissionDenied as error:
          logger.error("The account lacks a permission: %s", error)
      ```
    """


class MessageTooLarge(BrokerError):
    """The message is larger than the server's `max_payload`; nothing was stored.

    Examples:
      >>> from dramatiq_jetstream.errors import MessageTooLarge
      >>> try:
      ...     charge.send(os.urandom(2_000_000).hex(), 20)
      ... except MessageTooLarge:
      ...     print("keep it elsewhere, and send its name")
      keep it elsewhere, and send its name
    """


class MessageNotUnique(BrokerError):
    """A message with the same unique key was enqueued within the window; this one was not stored.

    Examples:
      >>> from dramatiq_jetstream.errors import MessageNotUnique
      >>> try:
      ...     for _ in range(2):
      ...         charge.send_with_options(args=("c-42", 20), unique_key="charge c-42", unique_window=60_000)
      ... except MessageNotUnique:
      ...     print("it is on its way already")
      Message(...)
      it is on its way already
    """


class NotAllStored(BrokerError):
    """Some messages of one `enqueue_many` failed; the `__cause__` of the error that it raises.

    Attributes:
      stored: The messages that are stored.
      not_stored: The messages that are not, each with its error.
      unknown: The messages that may be stored, each with its error.

    Examples:
      >>> from dramatiq_jetstream.errors import MessageTooLarge
      >>> large = os.urandom(2_000_000).hex()
      >>> try:
      ...     broker.enqueue_many([charge.message("c-42", 20), charge.message(large, 20)])
      ... except MessageTooLarge as error:
      ...     print(len(error.__cause__.stored), "stored,", len(error.__cause__.not_stored), "not")
      1 stored, 1 not
    """

    def __init__(
        self,
        *,
        stored: list[Message[Any]],
        not_stored: list[tuple[Message[Any], Exception]],
        unknown: list[tuple[Message[Any], Exception]],
    ) -> None:
        count = len(stored) + len(not_stored) + len(unknown)
        super().__init__(
            f"Of {count} messages {len(stored)} are stored, {len(not_stored)} are not, and of {len(unknown)} it is "
            "not known."
        )
        self.stored = stored
        self.not_stored = not_stored
        self.unknown = unknown


class KeyExists(BrokerError):
    """A key that was to be created exists already.

    Examples:
      >>> from dramatiq_jetstream.errors import KeyExists
      >>> locks = broker.bucket("locks")
      >>> try:
      ...     for owner in (b"first", b"second"):
      ...         revision = locks.create("nightly", owner, ttl=60_000)
      ... except KeyExists:
      ...     print(locks.get("nightly").value)
      b'first'
    """


class RevisionConflict(BrokerError):
    """A key was changed by another writer since its revision was read.

    Examples:
      >>> from dramatiq_jetstream.errors import RevisionConflict
      >>> visits = broker.bucket("visits")
      >>> seen = visits.put("home", b"1")
      >>> _ = visits.put("home", b"2")  # another writer
      >>> try:
      ...     visits.update("home", b"2", revision=seen)
      ... except RevisionConflict:
      ...     print("read it again, and decide again")
      read it again, and decide again
    """


class ApiError(BrokerError):
    """JetStream answered a request with an error; `err_code` is the server's own number for it.

    Examples:
      ```python
      try:
          broker.setup()
      except ApiError as error:
          logger.error("JetStream says %s: %s", error.err_code, error.description)
      ```
    """

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(f"JetStream refused the request: {description} (code {code}, error {err_code}).")
        self.code = code
        self.err_code = err_code
        self.description = description


class NotFound(ApiError):
    """The stream, consumer or message that was asked for does not exist.

    Examples:
      >>> from dramatiq_jetstream.errors import NotFound
      >>> try:
      ...     broker.connection.api("STREAM.INFO.NOWHERE")
      ... except NotFound as error:
      ...     print(error.code)
      404
    """


class HardTimeLimitExceeded(MiddlewareError):
    """An attempt outlived the `hard_time_limit` of its actor, and `fleet work` killed the process for it.

    Attributes:
      seconds: How long the attempt ran.
      stack: Where its thread was, the innermost call first; empty when that could not be read.

    Examples:
      ```python
      @dramatiq.actor
      def scan_failed(message, error):
          if error["type"] == "HardTimeLimitExceeded":
              print("killed:", error["message"])


      @dramatiq.actor(hard_time_limit=60_000, max_retries=0, on_failure=scan_failed)
      def scan(page): ...
      ```
    """

    def __init__(self, seconds: float, pid: int, stack: str) -> None:
        where = f"; its thread was in:\n{stack}" if stack else "."
        super().__init__(f"Worker PID {pid} was killed after {seconds:.1f} s in this attempt{where}")
        self.seconds = seconds
        self.stack = stack


class InvalidName(ValueError):
    """A namespace, queue or event subject that JetStream cannot carry.

    Examples:
      >>> from dramatiq_jetstream import JetStreamBroker
      >>> JetStreamBroker(namespace="my shop")
      Traceback (most recent call last):
          ...
      dramatiq_jetstream.errors.InvalidName: ...
    """


class InvalidOption(ValueError):
    """A setting whose value can never work; the message names the setting.

    Examples:
      >>> charge.send_with_options(args=("c-42", 20), countdown=5)
      Traceback (most recent call last):
          ...
      dramatiq_jetstream.errors.InvalidOption: ...
    """
