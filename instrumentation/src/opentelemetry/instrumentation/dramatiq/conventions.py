"""The names on spans and metrics: OpenTelemetry's messaging conventions, and what Dramatiq adds.

The messaging conventions are still in development. OpenTelemetry's Python package keeps such names in a private module
that changes from release to release, and asks instrumentations to write them out.
"""

from __future__ import annotations

from typing import Final

from dramatiq import Broker

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

SYSTEM: Final = "messaging.system"
DESTINATION: Final = "messaging.destination.name"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGE_ID: Final = "messaging.message.id"
BATCH_SIZE: Final = "messaging.batch.message_count"
ERROR_TYPE: Final = "error.type"

ACTOR: Final = "dramatiq.actor"
#: 1 for the first run of a message, 2 for its first retry.
ATTEMPT: Final = "dramatiq.attempt"
#: The delay that the sender asked for, in milliseconds.
DELAY: Final = "dramatiq.delay"
#: How an attempt ended; see `Outcome`.
OUTCOME: Final = "dramatiq.outcome"
SKIP_REASON: Final = "dramatiq.skip_reason"
#: Deliveries of the message, this one included. Absent for the first: an earlier worker did not settle it.
DELIVERY_COUNT: Final = "dramatiq.delivery_count"
#: True on the send that puts a dead letter back on its queue.
REPLAY: Final = "dramatiq.replay"
DEAD_LETTER_REASON: Final = "dramatiq.dead_letter.reason"

SENT_MESSAGES: Final = "messaging.client.sent.messages"
OPERATION_DURATION: Final = "messaging.client.operation.duration"
CONSUMED_MESSAGES: Final = "messaging.client.consumed.messages"
PROCESS_DURATION: Final = "messaging.process.duration"
REDELIVERED_MESSAGES: Final = "dramatiq.messages.redelivered"
DEAD_LETTERED_MESSAGES: Final = "dramatiq.messages.dead_lettered"

#: The bucket boundaries that the conventions ask for, in seconds.
DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class Outcome:
    """The values of `dramatiq.outcome`."""

    DONE: Final = "done"
    #: Failed, and a further attempt was enqueued.
    RETRIED: Final = "retried"
    #: Failed for good: Dramatiq rejects the message, which makes it a dead letter.
    FAILED: Final = "failed"
    #: A middleware decided that the message does not run.
    SKIPPED: Final = "skipped"
    #: Stopped by dramatiq-abort, before or while it ran.
    ABORTED: Final = "aborted"
    #: Raised, and Dramatiq neither enqueued a further attempt nor rejected the message.
    UNRESOLVED: Final = "unresolved"


_SYSTEMS: Final = {
    "RabbitmqBroker": "rabbitmq",
    "RedisBroker": "redis",
    "SQSBroker": "aws_sqs",
    "StubBroker": "stub",
    "JetStreamBroker": "nats",
}


def messaging_system(broker: Broker) -> str:
    """The value of `messaging.system`: that of the broker's class, or of the known class that it extends."""
    for cls in type(broker).__mro__:
        if cls.__name__ in _SYSTEMS:
            return _SYSTEMS[cls.__name__]
    return type(broker).__name__.removesuffix("Broker").lower() or "dramatiq"


def error_type(error: BaseException) -> str:
    """The value of `error.type`: the exception's class with its module; builtins without."""
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
