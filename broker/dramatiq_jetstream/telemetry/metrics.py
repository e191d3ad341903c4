"""The counters and histograms of sending and processing, by the messaging conventions.

What the fleet as a whole is doing (queue lengths, connection) is observed in `gauges`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.util.types import AttributeValue

from . import conventions as c
from .tallies import Count, Durations, Key, Tallies

Attributes = dict[str, AttributeValue]


@dataclass(slots=True)
class AttemptTally:
    """Where one thread counts the attempts of one actor, and times those that did their work."""

    queue: str
    actor: str
    consumed: Count
    done: Durations


SEND = "send"
PROCESS = "process"
_CONSUMED = "consumed"
_RETRIED = "retried"
_REDELIVERED = "redelivered"
_DEAD = "dead"

#: The histogram that durations of a kind belong to: name and description.
HISTOGRAMS = {
    SEND: (
        c.OPERATION_DURATION,
        "Duration of messaging operation initiated by a producer or consumer client.",
    ),
    PROCESS: (c.PROCESS_DURATION, "Duration of processing operation."),
}


class Instruments:
    """One set of instruments for one meter provider.

    Histograms cannot be read from totals through OpenTelemetry's API. With `own_histograms` they are recorded
    one value at a time all the same; without, whoever made the instruments exports them (see `histograms`).
    """

    def __init__(self, meter: Meter, tallies: Tallies, *, own_histograms: bool) -> None:
        self.tallies = tallies
        for name, description, count in (
            (c.SENT_MESSAGES, "Number of messages producer attempted to send to the broker.", SEND),
            (c.CONSUMED_MESSAGES, "Number of messages that were delivered to the application.", _CONSUMED),
            (c.RETRIED_MESSAGES, "Number of failed attempts that were followed by a further one.", _RETRIED),
            (
                c.REDELIVERED_MESSAGES,
                "Number of messages delivered again because an earlier delivery was not settled.",
                _REDELIVERED,
            ),
            (c.DEAD_LETTERED_MESSAGES, "Number of messages moved to the dead letters.", _DEAD),
        ):
            meter.create_observable_counter(name, [self._observer(count)], "{message}", description)
        self._histograms: dict[str, Histogram] = {}
        if own_histograms:
            self._histograms = {
                kind: meter.create_histogram(
                    name, "s", description, explicit_bucket_boundaries_advisory=c.DURATION_BUCKETS
                )
                for kind, (name, description) in HISTOGRAMS.items()
            }

    def sent(self, system: str, destination: str, seconds: float, error: str | None) -> None:
        """One message was handed to the broker, or could not be."""
        self._record((SEND, system, destination, error), seconds)

    def consumed(self, system: str, queue: str, actor: str, *, redelivered: bool) -> None:
        """One message reached a worker thread."""
        self.tallies.count((_CONSUMED, system, queue, actor))
        if redelivered:
            self.tallies.count((_REDELIVERED, system, queue, actor))

    def processed(
        self, system: str, queue: str, actor: str, seconds: float, outcome: str, error: str | None
    ) -> None:
        """One attempt has ended."""
        self._record((PROCESS, system, queue, error, actor, outcome), seconds)
        if outcome == c.Outcome.RETRIED:
            self.tallies.count((_RETRIED, system, queue, actor))

    @property
    def are_tallied(self) -> bool:
        """Whether it is enough to tally attempts, because nobody wants each value."""
        return not self._histograms

    def attempts(self, system: str, queue: str, actor: str) -> AttemptTally:
        """What the calling thread may count an actor's attempts with, instead of `consumed` and `processed`."""
        done = (PROCESS, system, queue, None, actor, c.Outcome.DONE)
        consumed = self.tallies.counter((_CONSUMED, system, queue, actor))
        return AttemptTally(queue, actor, consumed, self.tallies.timer(done))

    def dead_lettered(self, system: str, queue: str, reason: str) -> None:
        """One message was moved to the dead letters."""
        self.tallies.count((_DEAD, system, queue, reason))

    def _record(self, key: Key, seconds: float) -> None:
        self.tallies.record(key, seconds)
        if self._histograms:
            self._histograms[str(key[0])].record(seconds, attributes_of(key))

    def _observer(self, kind: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            counts, durations = self.tallies.totals()
            if kind == SEND:
                # Every send was timed, so the histogram has counted them.
                counts = {key: timed.count for key, timed in durations.items()}
            for key, count in counts.items():
                if key[0] == kind:
                    yield Observation(count, attributes_of(key))

        return observe


def attributes_of(key: Key) -> Attributes:
    """The attributes that a key of the tallies stands for."""
    kind, system, destination, *rest = key
    attributes: Attributes = {c.SYSTEM: str(system), c.DESTINATION: str(destination)}
    if kind == _DEAD:
        attributes[c.DEAD_LETTER_REASON] = str(rest[0])
        return attributes
    operation = SEND if kind == SEND else PROCESS
    attributes |= {c.OPERATION_NAME: operation, c.OPERATION_TYPE: operation}
    if kind in HISTOGRAMS:
        error, *rest = rest
        if error is not None:
            attributes[c.ERROR_TYPE] = error
    for name, value in zip((c.ACTOR, c.OUTCOME), rest, strict=False):
        attributes[name] = str(value)
    return attributes
