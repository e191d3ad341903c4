"""Recognises messages whose trace is not recorded, for which no span need be made.

Where traces are sampled, most are not recorded, and asking the SDK for a span that records nothing takes several times
as long as this. It applies when the message carries a W3C `traceparent` and nothing else, the header says "not
sampled", and the sampler always follows such a parent, as the SDK's default does. The sender's span takes the place of
one of ours, so that what the actor sends is not recorded either.
"""

from __future__ import annotations

import re
from typing import Any

from opentelemetry import propagate
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags

# Flag 2 says that the trace id is random.
_UNSAMPLED = re.compile("00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-0([02])").fullmatch
_FLAGS = {"0": TraceFlags(0), "2": TraceFlags(2)}


class _SenderSpan(NonRecordingSpan):
    """A span that is not sampled, as its header tells it. It is read when something asks, which most actors do not."""

    def __init__(self, header: re.Match[str]) -> None:
        self._header = header

    def get_span_context(self) -> SpanContext:
        trace_id, span_id, flags = self._header.groups()
        return SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[flags])

    def __repr__(self) -> str:
        return f"NonRecordingSpan({self.get_span_context()!r})"


def unsampled_sender(carrier: Any) -> Span | None:
    """The sender's span, if `carrier` says no more than that it is not sampled."""
    if type(carrier) is not dict or len(carrier) != 1:
        return None
    header = carrier.get("traceparent")
    found = _UNSAMPLED(header) if type(header) is str else None
    return None if found is None else _SenderSpan(found)


def follows_unsampled_parents(provider: object) -> bool:
    """Whether no child of a remote span that is not sampled is recorded, if a `traceparent` says so."""
    if "traceparent" not in propagate.get_global_textmap().fields:
        return False
    sampler = getattr(provider, "sampler", None)
    # The SDK has a subclass for each sampler that OTEL_TRACES_SAMPLER names; they decide as ParentBased does.
    deciding = next((kind for kind in type(sampler).__mro__ if "should_sample" in vars(kind)), None)
    if deciding is None or deciding.__name__ != "ParentBased":
        return False
    return "remoteParentNotSampled:AlwaysOffSampler," in sampler.get_description()  # type: ignore[union-attr]
