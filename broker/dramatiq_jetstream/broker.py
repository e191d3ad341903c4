"""The Dramatiq broker on NATS JetStream: Dramatiq's contract, put together from the library's rooms.

Each call of `enqueue` has one `Nats-Msg-Id`: a repeated publish is stored once, and a retry, which Dramatiq enqueues
under the same message id, is no duplicate. If the process dies during `enqueue`, the message is stored or it is not,
and its caller was not told. If it dies between an actor's end and the ack, the actor runs again elsewhere.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

from dramatiq.actor import Actor
from dramatiq.broker import MessageProxy
from dramatiq.errors import QueueNotFound
from dramatiq.message import Message
from dramatiq.middleware import Middleware

from .aio import in_thread, with_asend
from .config import DUPLICATE_WINDOW_MS, MAX_CONNECTIONS, BrokerConfig, ConnectOptions
from .dead_letters import DeadLetters
from .history import History
from .jetstream.declaring import Declarations
from .jetstream.ensuring import all_of
from .jetstream.inventory import queue_names
from .jetstream.names import Names
from .jetstream.topology import WORKERS
from .kv import Bucket
from .limits import OPTIONS
from .queues import QueueOperations, Queues
from .sending.sender import Sender
from .status import MessageStatus, StatusReader, result_of
from .streams import Stream
from .wire.connection import Connection, PubAck
from .worker.arguments import describe_arguments
from .worker.consumer import JetStreamConsumer
from .worker.hard_limits import HARD_TIME_LIMIT
from .worker.hooks import HookedBroker
from .worker.limits import BUCKET as LIMITS
from .worker.roster import read_workers
from .worker.shutdown_notices import give_notice_for
from .worker.suspects import BUCKET as STARTS
from .worker.time_limits import keep_time_of
from .worker.workplace import Workplace

__all__ = ["ACTOR_OPTIONS", "JetStreamBroker"]

#: The options that actors have on this broker without any middleware. The library's middleware knows them too, so that
#: Dramatiq's StubBroker takes them.
ACTOR_OPTIONS = frozenset({HARD_TIME_LIMIT, "log_history", *OPTIONS})


class JetStreamBroker(QueueOperations, HookedBroker):
    """A Dramatiq broker on NATS JetStream. All times are milliseconds.

    Parameters:
      url: One address, several (a list, or separated by commas), or None for `NATS_URL`, then localhost.
      namespace: Programs with the same namespace share queues, dead letters and buckets.
      middleware: As for every Dramatiq broker.
      credentials: Path or content of a `.creds` file; None takes `NATS_CREDS`.
      user, password, token, nkey, tls: Other ways to authenticate, and the context for `tls://`.
      replicas: How many servers of a cluster keep each stream (1, 3 or 5).
      declare: Create missing streams and consumers. With False only what exists is used, so that a worker
        needs few permissions; prepare the server with `fleet setup`.
      ack_wait: A message is delivered again after this long without a sign of life from its worker.
      max_deliveries: A message delivered more often than this without being settled is a dead letter.
      unknown_actor_grace: How long a message with an unknown actor is left to other workers before it is a dead letter
        (5 minutes).
      dead_message_ttl: How long dead letters are kept (7 days).
      enqueue_timeout: How long `enqueue` waits for JetStream, over reconnects, before it raises.
      max_priority: Levels above 0 for the option `broker_priority`, 1 to 32; None for no priorities.
        All programs of a namespace use the same.
      max_in_flight: For each queue named, how many messages the whole fleet may hold at once.
      duplicate_window: How long a repeated publish is recognised; shorter for a server that allows no more.
      max_stream_bytes: The room that each stream and bucket reserves, for accounts that demand a limit; None for
        none. A queue that is full loses its oldest messages, so make it larger than any backlog.
      history: Which attempts leave a record (see `history`): "failures" (failures, retries and aborts), "all", a share
        of the successes beside these (0 to 1), or None for no history.
      history_ttl: How long a record is kept (7 days).
      history_bytes: The most room that all records may take; beyond it the oldest go. Nothing is reserved.
      inbox_prefix: First tokens of the subjects on which replies arrive, for accounts that restrict them.
      tls_handshake_first: Begin with TLS, for servers with `handshake_first`. Without it a `tls://` address is tried
        the usual way first, which costs a second.
      domain: The JetStream domain to use, for instance the hub's from a leaf node.
      api_prefix: First tokens of the JetStream API in place of `$JS.API`, for accounts that import it.
      max_connections: The most connections at a time: one, and one for each thread that waits for an answer.

    Attributes:
      history: What became of messages (see `history`).
      describe_arguments: Makes the text of a message's arguments for `workers` and the history, which keep 200
        characters of it; assign a function of the message that leaves out secrets.
      program_version: What `workers` shows as the version of the program; assign a text.

    Raises:
      InvalidName, InvalidOption: When a setting can never work; nothing is contacted before first use.

    Examples:
      >>> import dramatiq
      >>> from dramatiq_jetstream import JetStreamBroker
      >>> broker = JetStreamBroker("nats://localhost:4222", namespace="shop", max_in_flight={"scans": 4})
      >>> dramatiq.set_broker(broker)  # before the first actor
      >>> broker.close()
    """

    def __init__(
        self,
        url: str | Iterable[str] | None = None,
        *,
        namespace: str = "dramatiq",
        middleware: list[Middleware] | None = None,
        credentials: str | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        nkey: str | None = None,
        tls: ssl.SSLContext | None = None,
        replicas: int = 1,
        declare: bool = True,
        ack_wait: int = 30_000,
        max_deliveries: int = 10,
        unknown_actor_grace: int = 300_000,
        dead_message_ttl: int = 7 * 86_400_000,
        enqueue_timeout: int = 10_000,
        max_priority: int | None = None,
        max_in_flight: Mapping[str, int] | None = None,
        duplicate_window: int = DUPLICATE_WINDOW_MS,
        max_stream_bytes: int | None = None,
        history: str | float | None = "failures",
        history_ttl: int = 7 * 86_400_000,
        history_bytes: int = 1_000_000_000,
        inbox_prefix: str = "_INBOX",
        tls_handshake_first: bool = False,
        domain: str | None = None,
        api_prefix: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        connect = ConnectOptions.of(
            url,
            credentials=credentials,
            user=user,
            password=password,
            token=token,
            nkey=nkey,
            tls=tls,
            inbox_prefix=inbox_prefix,
            tls_handshake_first=tls_handshake_first,
            domain=domain,
            api_prefix=api_prefix,
            max_connections=max_connections,
        )
        self.config = BrokerConfig(
            connect=connect,
            namespace=namespace,
            replicas=replicas,
            declare=declare,
            ack_wait=ack_wait,
            max_deliveries=max_deliveries,
            unknown_actor_grace=unknown_actor_grace,
            dead_message_ttl=dead_message_ttl,
            enqueue_timeout=enqueue_timeout,
            max_priority=max_priority,
            max_in_flight=max_in_flight or {},
            duplicate_window=duplicate_window,
            max_stream_bytes=max_stream_bytes,
            history=history,
            history_ttl=history_ttl,
            history_bytes=history_bytes,
        )
        self.connection = Connection(connect, timeout=enqueue_timeout)
        self.declarations = Declarations(self.config, self.connection)
        self.history = History(self.connection, self.names)
        self.dead_letters = DeadLetters(
            self.connection,
            self.names,
            self.declarations.ensure_dead_letters,
            self.emit_own,
            lambda message_id: [record.as_dict() for record in self.history.of(message_id)],
        )
        self.stored_queues = Queues(
            self.config, self.connection, self.declarations, self.dead_letters, self._event_streams
        )
        self._status = StatusReader(
            self.connection,
            self.names,
            self.history,
            self.dead_letters,
            queues=lambda: self.queues or queue_names(self.connection, self.names),
            workers=lambda: read_workers(self.declarations.memory_bucket(WORKERS)),
            result=lambda message: result_of(self.middleware, message),
            actors=lambda: [(actor.queue_name, actor.actor_name) for actor in self.actors.values()],
        )
        self.describe_arguments: Callable[[MessageProxy], str] = describe_arguments
        self.program_version = ""
        self._workplace = Workplace(
            self.config,
            self.connection,
            self.declarations,
            self.dead_letters,
            actor=self.get_actor,
            actor_options=lambda name: self.get_actor(name).options,
            emit=self.emit_own,
            limits=lambda: self.bucket(LIMITS),
            starts=lambda: self.bucket(STARTS),
            workers=lambda: self.declarations.memory_bucket(WORKERS),
            describe=lambda message: self.describe_arguments(message),
            program_version=lambda: self.program_version,
        )
        self.in_flight = self._workplace.in_flight
        self.keeper = self._workplace.keeper
        self.sources = self._workplace.sources
        self.attachment = self._workplace.attachment
        self.killed_attempts = self._workplace.killed_attempts
        follow_ups, unique_keys = self._workplace.follow_ups, lambda: self.bucket("unique")
        self._sender = Sender(self.config, self.connection, self.declarations, self, follow_ups, unique_keys)
        super().__init__(middleware=middleware)
        self.actor_options |= ACTOR_OPTIONS
        self.backends: WeakSet[Any] = WeakSet()
        self.first, self.last = self._workplace.first(), self._workplace.last()
        self.queues: set[str] = set()

    @property
    def names(self) -> Names:
        """Every name on the wire."""
        return self.config.names

    # Declaring

    def get_declared_queues(self) -> set[str]:
        return self.queues.copy()

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue; it is created on the server when it is first used.

        Raises:
          InvalidName: When JetStream cannot carry the name.

        Examples:
          >>> broker.declare_queue("mail")
          >>> "mail" in broker.get_declared_queues()
          True
        """
        if queue_name not in self.queues:
            self.names.queue_stream(queue_name)
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        """Declare an actor, and give one of Dramatiq's own class `asend` (see `aio`)."""
        with_asend(actor)
        super().declare_actor(actor)

    def setup(self, *, update: bool = False) -> dict[str, str]:
        """Create what is declared and missing, whatever `declare` says; with `update`, change what differs.

        Returns:
          What became of each stream and consumer: "created", "unchanged", "updated" or "differs".

        Raises:
          InvalidOption: When `max_in_flight` names a queue that neither this program nor the server has.
          TopologyMismatch: When something exists that would lose or hold up messages, and is not to be, or cannot
            be, changed. Everything else is done.

        Examples:
          >>> [name for name, became in broker.setup().items() if became == "differs"]
          []
        """
        self.declarations.check_max_in_flight(self.queues)
        self.bucket("unique")
        self.bucket(STARTS)
        self.bucket(LIMITS)
        self.declarations.memory_bucket(WORKERS)
        setups = [getattr(middleware, "setup_topology", None) for middleware in self.middleware]
        return all_of(
            [
                partial(self.declarations.setup_queues, self.queues, update=update),
                *(partial(setup, self, update=update) for setup in setups if setup is not None),
                partial(self.declarations.setup_buckets, update=update),
            ]
        )

    def bucket(
        self, name: str, *, history: int = 1, ttl: int | None = None, max_value_bytes: int | None = None
    ) -> Bucket:
        """A key-value bucket of this namespace, made on first use.

        Parameters:
          ttl: Milliseconds that every key lives; None for ever, or as long as each write says.

        Examples:
          >>> carts = broker.bucket("carts", ttl=3_600_000)
          >>> revision = carts.put("c-42", b"2 mugs")
          >>> carts.get("c-42").value
          b'2 mugs'
        """
        return self.declarations.bucket(name, history=history, ttl=ttl, max_value_bytes=max_value_bytes)

    def status(self, message: str | Message[Any]) -> MessageStatus:
        """The state of a message: waiting, delayed, running, retrying, done, failed, dead, aborted (see `status`).

        Parameters:
          message: Its id, or the message itself, with which one that waits in a long queue is found too.

        Raises:
          BrokerConnectionError: When the server does not answer in time.

        Examples:
          >>> broker.status(message.message_id).state
          'done'
        """
        return self._status.read(message)

    def stream(self, name: str) -> Stream:
        """A stream of the account, to read from.

        Examples:
          >>> for event in broker.stream("ORDERS").read("ORDER.created"):
          ...     print(event.subject, event.data)
          ORDER.created b'17'
        """
        return Stream(self.connection, name)

    # Enqueueing

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Store a message, to run now or after `delay` milliseconds.

        Returns:
          The message; with a delay, a copy of it whose option `eta` says when it is due.

        Raises:
          BrokerConnectionError: When it is not known to be stored within `enqueue_timeout`.
          InvalidOption: For a delay or priority that cannot be used, and for an option of another library, such as
            `countdown`.
          MessageTooLarge: When it is over the server's `max_payload`.
          MessageNotUnique: When its option `unique_key` was used within its `unique_window`.

        Examples:
          >>> reminder = broker.enqueue(charge.message("c-42", 20), delay=60_000)
          >>> broker.status(reminder).state
          'delayed'
        """
        self.connection.reopen()
        return self._sender.enqueue(message, delay)

    async def aenqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Store a message as `enqueue` does, without blocking the event loop of the caller (see `aio`).

        Raises:
          As `enqueue`; `NotSent` when too many calls wait for the server.

        Examples:
          >>> async def order() -> None:
          ...     await broker.aenqueue(charge.message("c-42", 20))
          >>> asyncio.run(order())
        """
        enqueue = partial(self.enqueue, message, delay=delay)
        return await in_thread(enqueue, patience=self.config.enqueue_timeout / 1000)

    def enqueue_many(
        self, messages: Iterable[Message[Any]], *, atomic: bool = False, delay: int | None = None
    ) -> list[Message[Any]]:
        """Store many messages without waiting for one before sending the next.

        It gives up one `enqueue_timeout` after its last progress, however many messages there are.

        Parameters:
          atomic: Store all or none; then at most 1,000 messages, all for the same queue.

        Raises:
          As `enqueue`. Without `atomic` each message succeeds or fails alone: the error is that of the first that
            failed, and its `__cause__`, a `NotAllStored`, says which messages are stored, which are not, and why.

        Examples:
          >>> stored = broker.enqueue_many([charge.message("c-42", amount) for amount in range(10)], atomic=True)
          >>> len(stored)
          10
        """
        self.connection.reopen()
        return self._sender.enqueue_many(list(messages), atomic=atomic, delay=delay)

    def publish(
        self,
        subject: str,
        event: Any,
        *,
        event_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: int | None = None,
    ) -> PubAck:
        """Store an event for the subscribers of its subject.

        Parameters:
          event: Bytes, or a protobuf message.
          event_id: The same id within the stream's duplicate window is stored once; None makes a new one.
          headers: Further NATS headers.

        Raises:
          As `enqueue`; TopologyMissing when no stream takes the subject.

        Examples:
          >>> stored = broker.publish("ORDER.paid", b"17", event_id="17.paid")
          >>> stored.stream
          'ORDERS'
        """
        self.connection.reopen()
        return self._sender.publish(subject, event, event_id=event_id, headers=headers, timeout=timeout)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30_000) -> JetStreamConsumer:
        """Make a consumer of a queue.

        Raises:
          QueueNotFound: When the queue was never declared.
          BrokerConnectionError: When the server cannot be reached.

        Examples:
          >>> broker.declare_queue("parcels")
          >>> consumer = broker.consume("parcels", timeout=100)
          >>> next(consumer) is None  # nothing came within 100 ms
          True
          >>> consumer.close()
        """
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        self.connection.reopen()
        self.keeper.do(self.names.dead_stream, "dead letters", self.declarations.ensure_dead_letters)
        return self._workplace.consumers.open(queue_name, prefetch=prefetch, timeout=timeout)

    # Dramatiq's middleware and signals

    def add_middleware(
        self,
        middleware: Middleware,
        *,
        before: type[Middleware] | None = None,
        after: type[Middleware] | None = None,
    ) -> None:
        keep_time_of(middleware)
        give_notice_for(middleware)
        super().add_middleware(middleware, before=before, after=after)

    def _failed_in(self, hook: str, middleware: Middleware, error: BaseException) -> None:
        """Note that a middleware failed at a hook: what it would have stored may be missing."""
        self._workplace.follow_ups.middleware_failed(middleware, error)

    def _event_streams(self) -> set[str]:
        streams = (getattr(middleware, "stream", None) for middleware in self.middleware)
        return {stream for stream in streams if stream}

    def close(self) -> None:
        """Close the connection; what was enqueued is stored, what was acked is sent.

        As with Dramatiq's own brokers, the next message that is sent or consumed opens it again.
        """
        self._workplace.consumers.close()
        self.connection.close()
