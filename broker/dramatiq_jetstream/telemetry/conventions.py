"""The names that spans and metrics carry: OpenTelemetry's messaging conventions, and what Dramatiq adds.

Only strings, so that this module needs no OpenTelemetry. The conventions' own names are written out because
their Python package keeps them in a private module that changes from release to release.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any, Final

#: Who made a span or a metric: the instrumentation scope.
SCOPE: Final = "dramatiq_jetstream.telemetry"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

SYSTEM: Final = "messaging.system"
DESTINATION: Final = "messaging.destination.name"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGE_ID: Final = "messaging.message.id"
ERROR_TYPE: Final = "error.type"

ACTOR: Final = "dramatiq.actor"
#: 1 for the first run of a message, 2 for its first retry.
ATTEMPT: Final = "dramatiq.attempt"
#: For how many milliseconds the message was asked to be held back.
DELAY: Final = "dramatiq.delay"
OUTCOME: Final = "dramatiq.outcome"
SKIP_REASON: Final = "dramatiq.skip_reason"
#: Only there, and true, on the send that puts a dead letter back on its queue.
REPLAY: Final = "dramatiq.replay"
DEAD_LETTERED: Final = "dramatiq.dead_lettered"
DEAD_LETTER_REASON: Final = "dramatiq.dead_letter.reason"
#: How often the server has delivered the same message. Only there above 1: an earlier worker did not settle it.
DELIVERY_COUNT: Final = "dramatiq.delivery_count"
#: Two brokers of one process may have queues of the same name in different namespaces.
NAMESPACE: Final = "dramatiq.namespace"
EVENT_SUBJECT: Final = "dramatiq.event.subject"

SENT_MESSAGES: Final = "messaging.client.sent.messages"
CONSUMED_MESSAGES: Final = "messaging.client.consumed.messages"
OPERATION_DURATION: Final = "messaging.client.operation.duration"
PROCESS_DURATION: Final = "messaging.process.duration"
RETRIED_MESSAGES: Final = "dramatiq.messages.retried"
REDELIVERED_MESSAGES: Final = "dramatiq.messages.redelivered"
DEAD_LETTERED_MESSAGES: Final = "dramatiq.messages.dead_lettered"

#: The buckets that the conventions ask for, in seconds.
DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

_SYSTEMS: Final = {"jetstream": "nats", "sqs": "aws_sqs"}


class Outcome:
    """How an attempt ended, as `dramatiq.outcome` says it."""

    DONE: Final = "done"
    #: Failed, and a further attempt was stored.
    RETRIED: Final = "retried"
    #: Failed for good; the message is rejected, which makes it a dead letter.
    FAILED: Final = "failed"
    #: A middleware decided that the message is not to run.
    SKIPPED: Final = "skipped"
    #: Interrupted, or not started, because somebody aborted the message.
    ABORTED: Final = "aborted"
    #: Raised, and neither a further attempt was stored nor the message rejected.
    UNRESOLVED: Final = "unresolved"


@cache
def version() -> str:
    """The version of the instrumentation scope."""
    try:
        return version_of("dramatiq-jetstream")
    except PackageNotFoundError:
        return "0"


def messaging_system(broker: Any) -> str:
    """The value of `messaging.system` for a broker: what its class is called, as the conventions spell it.

    JetStream is no value of its own there; NATS in all its forms is "nats".
    """
    # A subclass that a program made of a known broker still talks to the same system.
    for cls in type(broker).__mro__:
        module, name = cls.__module__, cls.__name__
        if name.endswith("Broker") and module.startswith(("dramatiq.brokers.", "dramatiq_jetstream.")):
            return _system(name)
    return _system(type(broker).__name__)


def _system(class_name: str) -> str:
    kind = class_name.removesuffix("Broker").lower() or "dramatiq"
    return _SYSTEMS.get(kind, kind)


def error_type(error: BaseException) -> str:
    """The value of `error.type`: the exception's class with its module, builtins bare."""
    cls = type(error)
    if cls.__module__ in (None, "builtins"):
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
