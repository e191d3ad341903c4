"""The counters and histograms of sending and processing, by the messaging conventions.

What the fleet as a whole is doing (queue lengths, connection) is observed in `fleet`.
"""

from __future__ import annotations

from opentelemetry.metrics import Meter
from opentelemetry.util.types import AttributeValue

from . import conventions as c

Attributes = dict[str, AttributeValue]


class Instruments:
    """One set of instruments for one meter provider."""

    def __init__(self, meter: Meter) -> None:
        self._sent = meter.create_counter(
            c.SENT_MESSAGES, "{message}", "Number of messages producer attempted to send to the broker."
        )
        self._consumed = meter.create_counter(
            c.CONSUMED_MESSAGES, "{message}", "Number of messages that were delivered to the application."
        )
        self._operations = meter.create_histogram(
            c.OPERATION_DURATION,
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=c.DURATION_BUCKETS,
        )
        self._processing = meter.create_histogram(
            c.PROCESS_DURATION,
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=c.DURATION_BUCKETS,
        )
        self._retried = meter.create_counter(
            c.RETRIED_MESSAGES, "{message}", "Number of failed attempts that were followed by a further one."
        )
        self._redelivered = meter.create_counter(
            c.REDELIVERED_MESSAGES,
            "{message}",
            "Number of messages delivered again because an earlier delivery was not settled.",
        )
        self._dead = meter.create_counter(
            c.DEAD_LETTERED_MESSAGES, "{message}", "Number of messages moved to the dead letters."
        )
        # An attribute set is the same for thousands of messages; building it anew for each costs more than
        # recording the value.
        self._attributes: dict[tuple[str | None, ...], Attributes] = {}

    def sent(self, system: str, destination: str, seconds: float, error: str | None) -> None:
        """One message was handed to the broker, or could not be."""
        attributes = self._operation(system, destination, "send", error)
        self._sent.add(1, attributes)
        self._operations.record(seconds, attributes)

    def consumed(self, system: str, queue: str, actor: str, *, redelivered: bool) -> None:
        """One message reached a worker thread."""
        attributes = self._consumption(system, queue, actor)
        self._consumed.add(1, attributes)
        if redelivered:
            self._redelivered.add(1, attributes)

    def processed(
        self, system: str, queue: str, actor: str, seconds: float, outcome: str, error: str | None
    ) -> None:
        """One attempt has ended."""
        key = ("process", system, queue, actor, outcome, error)
        attributes = self._attributes.get(key)
        if attributes is None:
            attributes = {
                **self._operation(system, queue, "process", error),
                c.ACTOR: actor,
                c.OUTCOME: outcome,
            }
            self._attributes[key] = attributes
        self._processing.record(seconds, attributes)
        if outcome == c.Outcome.RETRIED:
            self._retried.add(1, self._consumption(system, queue, actor))

    def dead_lettered(self, system: str, queue: str, reason: str) -> None:
        """One message was moved to the dead letters."""
        self._dead.add(1, {c.SYSTEM: system, c.DESTINATION: queue, c.DEAD_LETTER_REASON: reason})

    def _operation(self, system: str, destination: str, operation: str, error: str | None) -> Attributes:
        key = (operation, system, destination, error)
        attributes = self._attributes.get(key)
        if attributes is None:
            attributes = {
                c.SYSTEM: system,
                c.DESTINATION: destination,
                c.OPERATION_NAME: operation,
                c.OPERATION_TYPE: operation,
            }
            if error is not None:
                attributes[c.ERROR_TYPE] = error
            self._attributes[key] = attributes
        return attributes

    def _consumption(self, system: str, queue: str, actor: str) -> Attributes:
        key = ("consume", system, queue, actor)
        attributes = self._attributes.get(key)
        if attributes is None:
            attributes = {**self._operation(system, queue, "process", None), c.ACTOR: actor}
            self._attributes[key] = attributes
        return attributes
