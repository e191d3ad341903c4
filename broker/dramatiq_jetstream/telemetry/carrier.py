"""Carries the trace context and the baggage with a message, and finds them again.

Every broker moves a message's options, so that is where the context travels: under one option, a flat
dictionary of the W3C headers, which any encoder can write. An event has real headers; its first attempt has
them in the option `event`, and from its first retry on it is a message like any other. JetStreamBroker stores
the dictionary as headers too, for programs in other languages, and takes theirs where a message has no option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any, Final

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from dramatiq_jetstream.jetstream.names import OPTION_TRACE_CONTEXT, TRACE_HEADERS

#: The message option that holds the W3C headers (`traceparent`, `tracestate`, `baggage`).
CARRIER_OPTION: Final = OPTION_TRACE_CONTEXT

_USUAL: Final = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})").fullmatch
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_SAMPLED_FLAGS: Final = {"1": _SAMPLED, "3": TraceFlags(3)}  # 3: the trace id is random, too


def inject(carrier: MutableMapping[str, str], context: Context) -> None:
    """Write a context into headers, or into what is to become CARRIER_OPTION."""
    propagate.inject(carrier, context)


def extract(message: Any, options: Mapping[str, Any]) -> Context:
    """The context in which a message with these options was created; empty when it came without one.

    Never the current context: what runs on this thread has nothing to do with who sent the message.
    """
    carrier = options.get(CARRIER_OPTION)
    if carrier is None:
        event = options.get("event")
        # Another program may have put a message on a queue of NATS by itself, with real headers.
        delivery = getattr(message, "_delivery", None)
        carrier = event.get("headers") if isinstance(event, Mapping) else getattr(delivery, "headers", None)
    return extract_headers(carrier)


def replace(headers: MutableMapping[str, str], carrier: Mapping[str, str]) -> None:
    """Have headers carry another context than they do, however theirs is spelt."""
    for name in [name for name in headers if name.lower() in TRACE_HEADERS]:
        del headers[name]
    headers.update(carrier)


def extract_headers(headers: object) -> Context:
    """The context that W3C headers describe; unusable headers count as none."""
    remote = _usual(headers)
    if remote is not None:
        return set_span_in_context(NonRecordingSpan(remote), Context())
    if not isinstance(headers, Mapping) or not headers:
        return Context()
    # Publishers in other languages may have written `Traceparent`, and NATS does not fold cases. Whatever
    # is not text came from a stranger and must not break the attempt.
    usable = {k.lower(): v for k, v in headers.items() if isinstance(k, str) and isinstance(v, str)}
    return propagate.extract(usable, Context())


@lru_cache(maxsize=8)
def reads_traceparent(propagator: TextMapPropagator) -> bool:
    """Whether a propagator is one that reads W3C's header."""
    return "traceparent" in propagator.fields


#: Whether a header names a span that is sampled, in the form of version 00 and no other. A match, or None.
is_sampled: Final = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[13]").fullmatch


def read_sampled(traceparent: str) -> SpanContext:
    """The span that such a header names."""
    return SpanContext(
        int(traceparent[3:35], 16), int(traceparent[36:52], 16), True, _SAMPLED_FLAGS[traceparent[-1]]
    )


def remote_parent(options: Mapping[str, Any]) -> SpanContext | None:
    """The span that created a message, if that is all that its options carry and in its usual form.

    That is what nearly every message has, and the general way takes several times as long.
    """
    return _usual(options.get(CARRIER_OPTION))


def _usual(headers: object) -> SpanContext | None:
    if type(headers) is not dict or len(headers) != 1:
        return None
    traceparent = headers.get("traceparent")
    found = _USUAL(traceparent) if isinstance(traceparent, str) else None
    if found is None or not reads_traceparent(propagate.get_global_textmap()):
        return None
    trace_id, span_id, flags = found.groups()
    sampled = _SAMPLED if flags == "01" else TraceFlags(int(flags, 16))
    context = SpanContext(int(trace_id, 16), int(span_id, 16), True, sampled)
    return context if context.is_valid else None
