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

_EMPTY: Final[dict[str, str]] = {}


def inject(carrier: MutableMapping[str, str], context: Context) -> None:
    """Write a context into headers, or into what is to become CARRIER_OPTION."""
    propagate.inject(carrier, context)


def extract(options: Mapping[str, Any]) -> Context:
    """The context in which a message was created; empty when it came without one.

    Never the current context: what runs on this thread has nothing to do with who sent the message.
    """
    return extract_headers(_carrier(options))


def extract_headers(headers: Mapping[str, str]) -> Context:
    """The context that W3C headers describe; unusable headers count as none."""
    return propagate.extract(headers, Context()) if headers else Context()


def _carrier(options: Mapping[str, Any]) -> dict[str, str]:
    carrier = options.get(CARRIER_OPTION)
    if carrier is None:
        event = options.get("event")
        carrier = event.get("headers") if isinstance(event, Mapping) else None
    if not isinstance(carrier, Mapping):
        return _EMPTY
    # Publishers in other languages may have written `Traceparent`, and NATS does not fold cases. Whatever
    # is not text came from a stranger and must not break the attempt.
    return {k.lower(): v for k, v in carrier.items() if isinstance(k, str) and isinstance(v, str)}
