"""Begins and ends the attempts that nearly all messages have, in as few steps as Python allows.

Usual is a message that is delivered for the first time, carries one sampled parent and nothing else, and whose actor
does its work. What is done for it is what the middleware does for any other: span, context, log fields, metrics. But
one object stands for all of them, the span itself, and each thread counts in places of its own that it has at hand.

Between any two lines an asynchronous exception may strike (time limit, shutdown, abort). Dramatiq then reports the
end of the message with it, and the general way takes up what is left: it finds the attempt, as a rule unfinished.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from dramatiq import MessageProxy
from opentelemetry.context import Context
from opentelemetry.propagate import get_global_textmap

from dramatiq_jetstream.worker.running import running_message

from . import conventions as c
from .attempt_spans import AttemptSpan
from .carrier import CARRIER_OPTION, is_sampled, reads_traceparent
from .known import Known
from .logs import enter, leave
from .metrics import AttemptTally, Instruments
from .spans import SPAN_KEY, CurrentThread, attach

if TYPE_CHECKING:
    from collections.abc import Callable

    from .quick_tracer import QuickTracer


_DONE = c.Outcome.DONE


class UsualAttempts:
    """The usual attempts of one broker's messages.

    Parameters:
      known: Gives what the spans of an operation, queue and actor have in common.
    """

    def __init__(
        self,
        system: str,
        tracer: QuickTracer,
        instruments: Instruments,
        current_thread: CurrentThread,
        known: Callable[[str, str, str], Known],
    ) -> None:
        self._system = system
        self._tracer = tracer
        self._instruments = instruments
        self._current_thread = current_thread
        self._known = known
        #: The program's propagator when it was last seen to be one that reads W3C's header.
        self._propagator: object = None

    def begin(self, message: Any) -> bool:
        """Begin the attempt of a message; False when it is not a usual one, and nothing was done."""
        options = message.options
        carrier = options.get(CARRIER_OPTION)
        if type(carrier) is not dict or len(carrier) != 1 or "event" in options:
            return False
        traceparent = carrier.get("traceparent")
        if type(traceparent) is not str or not is_sampled(traceparent):
            return False
        if getattr(message, "delivery_count", 1) != 1:
            return False
        propagator = get_global_textmap()
        if propagator is not self._propagator:
            if not reads_traceparent(propagator):
                return False
            self._propagator = propagator
        thread = self._current_thread.state
        if thread.attempt is not None or not self._tracer.starts_unasked():
            return False
        actor = message.queue_name, message.actor_name
        known, tally = thread.actors.get(actor) or self._find(thread.actors, actor)
        span = AttemptSpan()
        span.start(self._tracer, known, traceparent, message.message_id, (options.get("retries") or 0) + 1)
        span.message = message
        span.tally = tally
        # Remembered first and attached second: were it the other way round, an exception in between would
        # leave the context attached for good.
        thread.attempt = span
        span.token = attach(Context({SPAN_KEY: span}))
        if running_message.get() is not message:  # a JetStreamBroker has said so by itself
            enter(span)
        tally.consumed.number += 1
        return True

    def end(self, message: MessageProxy) -> bool:
        """End the attempt of a message whose actor did its work; False when it is to be ended in the general way."""
        thread = self._current_thread.state
        span = thread.attempt
        if type(span) is not AttemptSpan or span.message is not message or message.failed:
            return False
        nanoseconds = perf_counter_ns() - span.started
        span.conclude(_DONE, nanoseconds)
        span.finished = True
        span.detach()
        leave()
        thread.attempt = None
        span.message = None  # the span may wait for the exporter for seconds
        span.tally.done.record(nanoseconds * 1e-9)
        return True

    def _find(
        self, actors: dict[tuple[str, str], tuple[Known, AttemptTally]], actor: tuple[str, str]
    ) -> tuple[Known, AttemptTally]:
        known = self._known("process", *actor)
        tally = self._instruments.attempts(self._system, known.queue, actor[1])
        return actors.setdefault(actor, (known, tally))
