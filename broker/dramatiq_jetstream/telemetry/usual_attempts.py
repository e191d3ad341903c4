"""Begins and ends the attempts that nearly all messages have, in as few steps as Python allows.

Usual is a message that is delivered for the first time, carries one sampled parent and nothing else, and whose actor
does its work. What is done for it is what the middleware does for any other: span, context, log fields, metrics. But
one object stands for all of them, the span itself, and each thread counts in places of its own that it has at hand,
which saves a third of the time.

Between any two lines an asynchronous exception may strike (time limit, shutdown, abort). Dramatiq then reports the
end of the message with it, and the general way takes up what is left: it finds the attempt, as a rule unfinished.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeGuard

from dramatiq import MessageProxy
from opentelemetry.context import Context

from . import conventions as c
from .attempt_spans import AttemptSpan
from .carrier import CARRIER_OPTION, read_sampled, reads_traceparent
from .known import Known
from .logs import enter
from .metrics import AttemptTally, Instruments
from .spans import SPAN_KEY, ThreadState, attach

if TYPE_CHECKING:
    from collections.abc import Callable

    from .quick_tracer import QuickTracer


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
        thread: ThreadState,
        known: Callable[[str, str, str], Known],
    ) -> None:
        self._system = system
        self._tracer = tracer
        self._instruments = instruments
        self._thread = thread
        self._known = known

    def begin(self, message: Any) -> bool:
        """Begin the attempt of a message; False when it is not a usual one, and nothing was done."""
        sent = getattr(message, "_message", message)  # a proxy finds things in three steps
        options = sent.options
        carrier = options.get(CARRIER_OPTION)
        if type(carrier) is not dict or len(carrier) != 1 or "event" in options:
            return False
        traceparent = carrier.get("traceparent")
        if type(traceparent) is not str or getattr(message, "delivery_count", 1) != 1:
            return False
        parent = read_sampled(traceparent)
        if parent is None or not reads_traceparent():
            return False
        thread = self._thread
        actor = sent.queue_name, sent.actor_name
        found = thread.actors.get(actor)
        if found is None:
            found = thread.actors[actor] = self._find(*actor)
        known, tally = found
        span = self._tracer.start_attempt(known, parent, sent.message_id, (options.get("retries") or 0) + 1)
        if span is None:
            return False
        span.message = message
        span.tally = tally
        # Remembered first and attached second: were it the other way round, an exception in between would
        # leave the context attached for good.
        thread.attempt = span
        span.token = attach(Context({SPAN_KEY: span}))
        enter(span)
        tally.consumed.number += 1
        return True

    def end(self, attempt: AttemptSpan) -> None:
        """End an attempt whose actor did its work."""
        seconds = perf_counter() - attempt.started
        attempt.conclude(c.Outcome.DONE)
        attempt.finished = True
        attempt.detach()
        enter(None)
        self._thread.attempt = None
        attempt.message = None  # the span may wait for the exporter for seconds
        attempt.tally.done.record(seconds)

    def _find(self, queue_name: str, actor: str) -> tuple[Known, AttemptTally]:
        known = self._known("process", queue_name, actor)
        return known, self._instruments.attempts(self._system, known.queue, actor)


def is_usual(
    attempt: object, message: MessageProxy, exception: BaseException | None
) -> TypeGuard[AttemptSpan]:
    """Whether an attempt that is over was begun here, and ended well."""
    return exception is None and type(attempt) is AttemptSpan and not message.failed
