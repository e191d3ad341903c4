"""The metrics, by the messaging conventions; what Dramatiq adds is named `dramatiq.…`."""

from __future__ import annotations

from opentelemetry.metrics import Meter, NoOpMeter

from . import conventions as c


class Instruments:
    """The instruments of one meter.

    Attributes:
      are_real: False if nothing is measured, so that nothing need be told to them.
    """

    def __init__(self, meter: Meter) -> None:
        self.are_real = not isinstance(meter, NoOpMeter)
        self.sent = meter.create_counter(
            c.SENT_MESSAGES, "{message}", "Number of messages producer attempted to send to the broker."
        )
        self.send_duration = meter.create_histogram(
            c.OPERATION_DURATION,
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=c.DURATION_BUCKETS,
        )
        self.consumed = meter.create_counter(
            c.CONSUMED_MESSAGES, "{message}", "Number of messages that were delivered to the application."
        )
        self.process_duration = meter.create_histogram(
            c.PROCESS_DURATION,
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=c.DURATION_BUCKETS,
        )
        self.redelivered = meter.create_counter(
            c.REDELIVERED_MESSAGES,
            "{message}",
            "Number of messages delivered again because an earlier delivery was not settled.",
        )
        self.dead_lettered = meter.create_counter(
            c.DEAD_LETTERED_MESSAGES, "{message}", "Number of messages moved to the dead letters."
        )
