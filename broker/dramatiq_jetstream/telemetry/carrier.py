"""Carries the trace context and the baggage with a message, and finds them again.

Every broker moves a message's options, so that is where the context travels: under one option, a flat
dictionary of the W3C headers, which any encoder can write. An event has real headers; its first attempt has
them in the option `event`, and from its first retry on it is a message like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from opentelemetry import propagate
from opentelemetry.context import Context

#: The message option that holds the W3C headers (`traceparent`, `tracestate`, `baggage`).
CARRIER_OPTION: Final = "trace_context"


def inject(carrier: MutableMapping[str, str], context: Context) -> None:
    """Write a context into headers, or into what is to become CARRIER_OPTION."""
    propagate.inject(carrier, context)


def extract(message: Any) -> Context:
    """The context in which a message was created; empty when it came without one.

    Never the current context: what runs on this thread has nothing to do with who sent the message.
    """
    carrier = message.options.get(CARRIER_OPTION)
    if carrier is None:
        event = message.options.get("event")
        # Another program may have put a message on a queue of NATS by itself, with real headers.
        carrier = event.get("headers") if isinstance(event, Mapping) else getattr(message, "headers", None)
    return extract_headers(carrier)


def extract_headers(headers: object) -> Context:
    """The context that W3C headers describe; unusable headers count as none."""
    if not isinstance(headers, Mapping) or not headers:
        return Context()
    # Publishers in other languages may have written `Traceparent`, and NATS does not fold cases. Whatever
    # is not text came from a stranger and must not break the attempt.
    usable = {k.lower(): v for k, v in headers.items() if isinstance(k, str) and isinstance(v, str)}
    return propagate.extract(usable, Context())
