"""What is remembered between the beginning and the end of a span: a send, or an attempt.

All of it lives on the thread that works: Dramatiq emits the two ends of an operation on one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping
from contextvars import Token
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dramatiq.errors import RateLimitExceeded, Retry
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import Span, Status, StatusCode

from . import conventions as c
from .carrier import CARRIER_OPTION

if TYPE_CHECKING:
    from .attempt_spans import AttemptSpan
    from .known import Known
    from .metrics import AttemptTally

#: The key of a span in a context.
(SPAN_KEY,) = trace.set_span_in_context(trace.INVALID_SPAN, Context())

#: Makes a context the current one of this thread; `detach` takes what it returns.
attach: Callable[[Context], Token[Context]] = otel_context.attach
_reset: Callable[[Token[Context]], None] = otel_context.detach
_runtime = otel_context._RUNTIME_CONTEXT
if type(_runtime) is ContextVarsRuntimeContext:
    # What they come down to, without the calls in between.
    attach, _reset = _runtime._current_context.set, _runtime._current_context.reset


def detach(token: Token[Context]) -> None:
    """Make the context of before `attach` the current one again; nothing happens when that was done before."""
    try:
        _reset(token)
    except RuntimeError:
        pass  # an asynchronous exception struck after the first time, before anybody could note that
    except ValueError:
        otel_context.detach(token)  # which says what is wrong with it


class Send:
    """A message, or an event, on its way to the broker."""

    __slots__ = ("destination", "message", "message_id", "previous", "span", "started")

    def __init__(
        self, message: Any, message_id: str | None, destination: str, span: Span, previous: Any
    ) -> None:
        self.message = message
        self.message_id = message_id
        self.destination = destination
        self.span = span
        #: The carrier that the message had before; put back afterwards, because a program may send the same
        #: message object again and must not find itself in the trace of the first time.
        self.previous = previous
        self.started = perf_counter()

    def finish(self, error: BaseException | None) -> float:
        """End the span; returns the seconds that it took."""
        if error is not None:
            record_error(self.span, error)
        self.span.end()
        return perf_counter() - self.started

    def restore(self) -> None:
        """Leave the message's options as they were found."""
        options: MutableMapping[str, Any] = self.message.options
        if self.previous is None:
            options.pop(CARRIER_OPTION, None)
        else:
            options[CARRIER_OPTION] = self.previous


class Attempt:
    """One run of a message by an actor, or the decision not to run it."""

    __slots__ = ("actor", "message", "message_id", "queue", "retry_stored", "span", "started", "token")

    def __init__(self, message: Any, message_id: str, queue: str, actor: str, span: Span) -> None:
        # What a message proxy is asked for it has to look up, each time.
        self.message = message
        self.message_id = message_id
        self.queue = queue
        self.actor = actor
        self.span: Span | None = span
        self.token: Token[Context] | None = None
        self.retry_stored = False
        self.started = perf_counter()

    @property
    def failed(self) -> bool:
        """Whether something has rejected the message."""
        return bool(self.message.failed)

    def finish(self, outcome: str, error: BaseException | None, attributes: dict[str, Any]) -> float | None:
        """End the span and detach the context; returns the seconds, or None when that was done before.

        An asynchronous exception (time limit, shutdown, abort) may strike between any two lines here.
        Dramatiq then reports the end of the message once more, so every step can be taken up again.
        """
        seconds: float | None = None
        try:
            span = self.span
            if span is not None:
                seconds = perf_counter() - self.started
                conclude = getattr(span, "conclude", None) if error is None and not attributes else None
                if conclude is not None:
                    conclude(outcome)
                else:
                    end_span(span, outcome, error, attributes)
                self.span = None
        finally:
            if self.token is not None:
                detach(self.token)
                self.token = None
        return seconds


class ThreadState:
    """What a thread is in the middle of.

    Attributes:
      attempt: The attempt that it works on.
      sends: The sends between before_enqueue and after_enqueue by the id of the message object; replaced for the
        duration of each call of enqueue, so that a call knows which of them are its own.
      actors: What its usual attempts are made of and counted with, by queue and actor.
    """

    __slots__ = ("actors", "attempt", "sends")

    def __init__(self) -> None:
        self.attempt: Attempt | AttemptSpan | None = None
        self.sends: dict[int, Send] | None = None
        self.actors: dict[tuple[str, str], tuple[Known, AttemptTally]] = {}


class CurrentThread(threading.local):
    """Where a thread finds its own state; what is found in a `threading.local` takes long."""

    def __init__(self) -> None:
        self.state = ThreadState()


def outcome_of(attempt: Attempt | AttemptSpan, error: BaseException | None) -> str:
    """How an attempt ended that was not skipped."""
    if error is None:
        # The actor did its work, yet something rejected the message all the same.
        return c.Outcome.FAILED if attempt.failed else c.Outcome.DONE
    if is_abort(error):
        return c.Outcome.ABORTED
    if attempt.failed:
        return c.Outcome.FAILED
    if attempt.retry_stored:
        return c.Outcome.RETRIED
    return c.Outcome.UNRESOLVED


def is_abort(error: BaseException) -> bool:
    """Whether the exception is dramatiq-abort's, which need not be installed."""
    return any(cls.__name__ == "Abort" and "abort" in cls.__module__ for cls in type(error).__mro__)


def skipped_by_abort(error: BaseException | None) -> bool:
    """Whether a message was skipped because it had been aborted before it ran.

    The abort middleware raises a bare SkipMessage; only where it was raised tells it from other reasons.
    """
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        if trace.tb_next is None:
            return str(trace.tb_frame.f_globals.get("__name__", "")).startswith("dramatiq_abort")
        trace = trace.tb_next
    return False


def is_expected(error: BaseException, outcome: str) -> bool:
    """Whether the actor asked to be run again, which Dramatiq does not log as an error either."""
    return outcome == c.Outcome.RETRIED and isinstance(error, (Retry, RateLimitExceeded))


def end_span(span: Span, outcome: str, error: BaseException | None, attributes: dict[str, Any]) -> None:
    """End the span of an attempt of which there is more to say than that it is over."""
    if span.is_recording():
        note = getattr(span, "note", span.set_attributes)
        note({c.OUTCOME: outcome, **attributes})
        if error is not None:
            record_error(span, error)
    span.end()


def record_error(span: Span, error: BaseException) -> None:
    """Put an exception on a span as the conventions ask."""
    if not span.is_recording():
        return
    span.record_exception(error)
    span.set_attribute(c.ERROR_TYPE, c.error_type(error))
    span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
