"""Events for actors: an actor subscribes to subjects of a stream and receives what is published there.

Every subscribed actor has its own durable consumer, so that several actors see the same event independently
of each other. An event needs no header: any client in any language can publish it. The consumer hands it to
the actor as a message on the actor's queue, so that retries, time limits, priorities and dead letters work as
for any message; a body that does not decode becomes a dead letter, bytes and reason included.

If a worker dies while an actor runs, the event is delivered again after `ack_wait`. Once a retry is stored
the event itself is acked, and the retry carries it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dramatiq.actor import Actor
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ActorNotFound
from dramatiq.message import Message
from dramatiq.middleware import Middleware, MiddlewareError

from .broker import ACTOR_OPTIONS, JetStreamBroker
from .config import Storage
from .errors import InvalidName, InvalidOption
from .jetstream import ensuring, topology
from .jetstream.names import check_subject, covers
from .sending.envelope import Event, event_of, to_message
from .worker.current import current_message
from .worker.delivery import Delivery, Source, event_in

__all__ = [
    "DeadLetterEvents",
    "Event",
    "Events",
    "Subscription",
    "current_event",
    "event_of",
    "subscription",
]

#: What an actor receives: an instance of a protobuf class, by subject if there are several, or what a
#: function makes of the event.
Decoder = Callable[[Event], Any]


@dataclass(frozen=True)
class Subscription:
    """What an actor subscribes to; made by `subscription`.

    Examples:
      >>> from dramatiq_jetstream.events import subscription
      >>> subscription("ORDER.*").subject
      'ORDER.*'
    """

    subject: str
    decode: Decoder
    name: str | None = None


def subscription(
    subject: str,
    type: Any = bytes,  # noqa: A002 - the plainest word
    *,
    name: str | None = None,
) -> Subscription:
    """Describe the events that an actor wants: `@actor(subscribe=subscription("ORDER.created", OrderCreated))`.

    Parameters:
      subject: The subject to subscribe to; `*` and `>` as in NATS.
      type: A protobuf class; a mapping of subjects to protobuf classes; `bytes` for the body as it is; or a
        function that gets the `Event` and returns what the actor receives. It raises for a body that it cannot read.
      name: What its consumer on the server is named after; None takes the actor's name. Give the old name when
        you rename an actor, so that old and new workers share the events.

    Raises:
      InvalidName: For a subject that NATS cannot carry.

    Examples:
      >>> import json
      >>> from dramatiq_jetstream.events import subscription
      >>> created = subscription("ORDER.created", lambda event: json.loads(event.data))
      >>> with stub() as shop:
      ...     @dramatiq.actor(subscribe=created)
      ...     def greet(order):
      ...         print("order", order["id"])
      ...     event = shop.publish("ORDER.created", b'{"id": 17}')
      ...     ran = shop.run()
      order 17
    """
    check_subject(subject, wildcards=True)
    return Subscription(subject, _decoder(type), name)


def _decoder(type_: Any) -> Decoder:
    if type_ is bytes:
        return lambda event: event.data
    if isinstance(type_, Mapping):
        return _ByType({subject: _decoder(one) for subject, one in type_.items()})
    if hasattr(type_, "FromString"):
        return _Protobuf(type_)
    if callable(type_):
        return type_  # type: ignore[no-any-return]
    raise InvalidOption(
        f"subscription type {type_!r} cannot be used: give a protobuf class, a mapping of subjects to "
        "protobuf classes, bytes, or a function of the event."
    )


@dataclass(frozen=True)
class _Protobuf:
    """Decodes one protobuf class.

    Protobuf accepts almost any bytes as a message of unknown fields. A body in which the class knows no field at all is
    another message, and is refused.
    """

    type: Any

    def __call__(self, event: Event) -> Any:
        decoded = self.type.FromString(event.data)
        if event.data and not decoded.ListFields():
            raise ValueError(
                f"the body is not a {self.type.DESCRIPTOR.full_name}: none of its fields is in it"
            )
        return decoded


@dataclass(frozen=True)
class _ByType:
    decoders: Mapping[str, Decoder]

    def __call__(self, event: Event) -> Any:
        decode = self.decoders.get(event.subject)
        if decode is None:
            raise ValueError(f"no type is declared for events on {event.subject}")
        return decode(event)


def current_event() -> Event | None:
    """The event that the running actor was called for, with its headers and place in the stream.

    None outside of actors and for ordinary messages.

    Examples:
      ```python
      @dramatiq.actor(subscribe=subscription("ORDER.*"))
      def notify(order):
          print(current_event().subject, order)
      ```
    """
    message = current_message.get()
    return None if message is None else event_of(message)


class InvalidSubscription(InvalidOption, MiddlewareError):
    """An actor's subscription can never work. (Dramatiq lets only middleware errors stop a declaration.)"""


class Events(Middleware):
    """Middleware that gives actors the option `subscribe` for the events of one stream.

    A broker may have several, one for each stream; a subscription belongs to the first that keeps its subject.
    Dramatiq's `StubBroker` takes subscriptions and no event arrives; `testing.StubBroker` hands on what it publishes.

    Parameters:
      stream: The stream's name.
      subjects: What the stream keeps; it is made with them if it does not exist and the broker declares.
      max_age: Milliseconds that events are kept; None for ever.
      append_only: Have the server refuse to delete or purge events, for good: only `max_age` removes them then.
      duplicate_window: Milliseconds in which the same event id is stored once; None takes the broker's.
      replicas: None takes the broker's.

    Examples:
      >>> from dramatiq_jetstream.events import Events, subscription
      >>> shop = JetStreamBroker(namespace="shop")
      >>> orders = Events("ORDERS", ["ORDER.>"], max_age=7 * 86_400_000)
      >>> shop.add_middleware(orders)
      >>> @dramatiq.actor(broker=shop, subscribe=subscription("ORDER.created"))
      ... def greet(order): ...
    """

    def __init__(
        self,
        stream: str,
        subjects: list[str],
        *,
        max_age: int | None = None,
        append_only: bool = False,
        duplicate_window: int | None = None,
        replicas: int | None = None,
    ) -> None:
        for subject in subjects:
            check_subject(subject, wildcards=True)
        self.stream = stream
        self.subjects = subjects
        self.max_age = max_age
        self.append_only = append_only
        self.duplicate_window = duplicate_window
        self.replicas = replicas
        self._subscriptions: dict[str, tuple[Actor[Any, Any], Subscription]] = {}
        self._ensured = False

    @property
    def actor_options(self) -> set[str]:
        return {"subscribe", *ACTOR_OPTIONS}

    def config(self, broker: JetStreamBroker) -> topology.StreamConfig:
        """Return the configuration that the stream is made with.

        Examples:
          >>> from dramatiq_jetstream.events import Events
          >>> Events("ORDERS", ["ORDER.>"]).config(broker).name
          'ORDERS'
        """
        return topology.events(
            self.stream,
            self.subjects,
            max_age=self.max_age,
            append_only=self.append_only,
            storage=Storage(
                self.replicas or broker.config.replicas,
                self.duplicate_window or broker.config.duplicate_window,
                broker.config.max_stream_bytes,
            ),
        )

    def ensure(self, broker: JetStreamBroker) -> None:
        """Make the stream if it is missing; for programs that publish and have no worker.

        Examples:
          ```python
          orders.ensure(broker)  # a program without workers publishes
          broker.publish("ORDER.created", b"17")
          ```
        """
        if not self._ensured and broker.config.declare:
            ensuring.ensure_stream(broker.connection, self.config(broker))
        self._ensured = True

    def setup_topology(self, broker: JetStreamBroker, *, update: bool = False) -> dict[str, str]:
        """Create the stream and the durable of every subscription; called by `broker.setup`."""

        def stream() -> dict[str, str]:
            outcome = ensuring.ensure_stream(broker.connection, self.config(broker), update=update)
            return {f"stream {self.stream}": outcome}

        def consumer(config: topology.ConsumerConfig) -> dict[str, str]:
            outcome = self._ensure_durable(broker, config, update=update)
            return {f"consumer {config.name} of {config.stream}": outcome}

        wanted = [self._durable(broker, name, wanted) for name, (_, wanted) in self._subscriptions.items()]
        return ensuring.all_of([stream, *(functools.partial(consumer, config) for config in wanted)])

    def _ensure_durable(
        self, broker: JetStreamBroker, config: topology.ConsumerConfig, *, update: bool = False
    ) -> str:
        mine = [self._durable(broker, name, wanted).name for name, (_, wanted) in self._subscriptions.items()]
        return ensuring.ensure_subscription(broker.connection, config, declared=mine, update=update)

    def _durable(
        self, broker: JetStreamBroker, actor_name: str, wanted: Subscription
    ) -> topology.ConsumerConfig:
        return topology.subscription(
            broker.names,
            self.stream,
            wanted.name or actor_name,
            self._subscriptions[actor_name][0].queue_name,
            wanted.subject,
            ack_wait=broker.config.ack_wait,
            replicas=self.replicas or broker.config.replicas,
        )

    def before_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        wanted = actor.options.get("subscribe")
        if wanted is None:
            return
        if not isinstance(broker, (JetStreamBroker, StubBroker)):
            raise InvalidSubscription(
                f"Actor {actor.actor_name!r} subscribes to events, which needs a JetStreamBroker."
            )
        if not isinstance(wanted, Subscription):
            raise InvalidSubscription(
                f"subscribe={wanted!r} of actor {actor.actor_name!r} cannot be used: "
                'give subscription("SUBJECT", Type).'
            )
        if _events_for(broker, wanted.subject) is None:
            kept = [subject for events in _all_events(broker) for subject in events.subjects]
            raise InvalidSubscription(
                f"Actor {actor.actor_name!r} subscribes to {wanted.subject!r}, which no stream of events keeps: "
                f"there are {', '.join(kept)}."
            )
        if isinstance(broker, StubBroker):
            return
        if actor.queue_name in broker.config.max_in_flight:
            raise InvalidSubscription(
                f"Actor {actor.actor_name!r} subscribes to events on queue {actor.queue_name!r}, which has a "
                "max_in_flight: JetStream counts the events apart, so the limit would not hold. Give the actor "
                "a queue of its own, and have it send messages to the queue with the limit."
            )
        name = wanted.name or actor.actor_name
        for events in _all_events(broker):
            for other, (_, theirs) in events._subscriptions.items():
                if (theirs.name or other) == name:
                    raise InvalidSubscription(
                        f"Actors {other!r} and {actor.actor_name!r} both subscribe as {name!r}, so each would get some "
                        "of the events only: give one of them another name."
                    )
        try:
            broker.names.subscription_durable(name)
        except InvalidName as error:
            raise InvalidSubscription(str(error)) from error

    def after_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        wanted = actor.options.get("subscribe")
        if not isinstance(wanted, Subscription) or not isinstance(broker, JetStreamBroker):
            return
        if _events_for(broker, wanted.subject) is not self:
            return
        self._subscriptions[actor.actor_name] = (actor, wanted)
        broker.sources.subscribe(
            actor.queue_name,
            actor.actor_name,
            lambda: self._source(broker, actor.actor_name),
            functools.partial(_decode, actor.actor_name, wanted),
        )

    def _source(self, broker: JetStreamBroker, actor_name: str) -> Source:
        actor, wanted = self._subscriptions[actor_name]
        config = self._durable(broker, actor_name, wanted)

        def declare() -> None:
            ensuring.ensure_stream(broker.connection, self.config(broker))
            self._ensure_durable(broker, config)

        def decode(delivery: Delivery) -> tuple[Message[Any], tuple[Any, ...] | None]:
            event = event_in(delivery)
            message = to_message(event, queue=actor.queue_name, actor=actor_name)
            return message, (broker.sources.decode_event(actor_name, event),)

        return Source(
            queue=actor.queue_name,
            durable=broker.sources.durable(self.stream, config.name),
            rank=broker.config.max_priority or 0,
            declare=declare,
            decode=decode,
            actor=actor_name,
            takes=functools.partial(covers, wanted.subject),
        )


class DeadLetterEvents(Events):
    """Middleware that lets actors subscribe to a broker's own dead letters as to any event.

    Every dead letter is stored, whatever its reason, and the subscription survives every crash.

    Parameters:
      broker: The broker whose dead letters they are.

    Examples:
      >>> from dramatiq_jetstream.events import DeadLetterEvents, subscription
      >>> shop = JetStreamBroker(namespace="shop")
      >>> shop.add_middleware(DeadLetterEvents(shop))
      >>> @dramatiq.actor(broker=shop, subscribe=subscription(shop.names.all_dead_with_bodies))
      ... def alert(body): ...
    """

    def __init__(self, broker: JetStreamBroker) -> None:
        super().__init__(broker.names.dead_stream, [broker.names.all_dead_with_bodies])

    def config(self, broker: JetStreamBroker) -> topology.StreamConfig:
        """The stream as the broker itself declares it."""
        config = broker.config
        return topology.dead_letters(config.names, ttl=config.dead_message_ttl, storage=config.storage)


def _decode(actor_name: str, wanted: Subscription, event: Event) -> Any:
    """Decode an event; subjects of another version of the program are left to its workers."""
    try:
        return wanted.decode(event)
    except Exception as error:
        if covers(wanted.subject, event.subject):
            raise
        raise ActorNotFound(f"Actor {actor_name!r} does not subscribe to {event.subject} here.") from error


def _all_events(broker: Broker) -> list[Events]:
    return [middleware for middleware in broker.middleware if isinstance(middleware, Events)]


def _events_for(broker: Broker, subject: str) -> Events | None:
    """The first stream of events of a broker that keeps everything on a subject."""
    for events in _all_events(broker):
        if any(covers(kept, subject) for kept in events.subjects):
            return events
    return None
