"""Puts an exception on a span as the conventions ask."""

from __future__ import annotations

from opentelemetry.trace import Span, Status, StatusCode

from . import conventions as c


def record_error(span: Span, error: BaseException) -> str:
    """Record an exception and the status ERROR; return the exception's `error.type`."""
    kind = c.error_type(error)
    if span.is_recording():
        span.record_exception(error)
        span.set_attribute(c.ERROR_TYPE, kind)
        span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
    return kind
