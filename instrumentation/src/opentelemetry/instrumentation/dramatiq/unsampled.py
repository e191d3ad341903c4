"""Recognises messages whose trace is not recorded, for which no span need be made.

Where traces are sampled, most are not recorded, and asking the SDK for a span that records nothing takes several times
as long as this. It applies when the message carries a W3C `traceparent` and nothing else, the header says "not
sampled", and the sampler always follows such a parent, as the SDK's default does. The sender's span takes the place of
one of ours, so that what the actor sends is not recorded either.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from opentelemetry import propagate
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags

# Flag 2 says that the trace id is random.
_UNSAMPLED = re.compile("00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-0([02])").fullmatch
_FLAGS = {"0": TraceFlags(0), "2": TraceFlags(2)}


def unsampled_sender(carrier: Any) -> Span | None:
    """The sender's span, if `carrier` says no more than that it is not sampled."""
    if type(carrier) is not dict or len(carrier) != 1:
        return None
    header = carrier.get("traceparent")
    found = _UNSAMPLED(header) if type(header) is str else None
    if found is None or not _reads_traceparent(propagate.get_global_textmap()):
        return None
    trace_id, span_id, flags = found.groups()
    return NonRecordingSpan(SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[flags]))


def follows_unsampled_parents(provider: object) -> bool:
    """Whether a provider's sampler records no child of a remote span that is not sampled."""
    sampler = getattr(provider, "sampler", None)
    if type(sampler).__name__ != "ParentBased":
        return False
    return "remoteParentNotSampled:AlwaysOffSampler," in sampler.get_description()  # type: ignore[union-attr]


@lru_cache(maxsize=4)
def _reads_traceparent(propagator: TextMapPropagator) -> bool:
    return "traceparent" in propagator.fields
