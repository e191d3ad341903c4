"""Exports spans over OTLP/HTTP with an encoder that is several times quicker than the exporter's own.

The exporter builds an object for every attribute of every span, which costs a worker more time than running
the message did. The attributes of our spans are mostly the same few, so here each is encoded once. Protobuf
allows an encoded message to be put together from encoded fields. Whatever is less usual than a name, times
and attributes is left to OpenTelemetry's encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from struct import Struct
from typing import Protocol

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, SpanFlags, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanProto
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanKind, StatusCode

from . import conventions as c
from .attempt_spans import Abridged, AttemptSpan, Template
from .known import Known
from .quick_spans import QuickSpan


def _tag(field: int) -> bytes:
    return bytes([field << 3 | 2])


_ATTRIBUTE = _tag(SpanProto.ATTRIBUTES_FIELD_NUMBER)
_PARENT = _tag(SpanProto.PARENT_SPAN_ID_FIELD_NUMBER) + b"\x08"
_SPAN = _tag(ScopeSpans.SPANS_FIELD_NUMBER)
_SCOPE_SPANS = _tag(ResourceSpans.SCOPE_SPANS_FIELD_NUMBER)
_RESOURCE_SPANS = _tag(ExportTraceServiceRequest.RESOURCE_SPANS_FIELD_NUMBER)
_MESSAGE_ID = KeyValue(key=c.MESSAGE_ID).SerializeToString()

_FIXED = Struct("<2s16s2s8scQcQ2sI")
_fromhex = bytes.fromhex

#: How many kinds of attempts are remembered for each actor, by number, outcome and length of the message id.
MAX_TEMPLATES = 256

_IS_LOCAL = int(SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK)
_IS_REMOTE = _IS_LOCAL | int(SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK)


_Group = tuple[Resource, InstrumentationScope | None, list[bytes]]


class Origin(Protocol):
    """What abridged spans come from."""

    resource: Resource
    scope: InstrumentationScope


class QuickSpanExporter(OTLPSpanExporter):
    """OpenTelemetry's exporter, with its endpoint, headers, retries and all, and the encoder of this module.

    Among the spans that it exports may be abridged ones, from one origin (see `abridge`).
    """

    origin: Origin | None = None

    def abridger(self, origin: Origin) -> Callable[[AttemptSpan], Abridged | AttemptSpan] | None:
        """`abridge`, if this exporter can export what it makes of spans from there."""
        if self._send is None or self.origin not in (None, origin):
            return None
        self.origin = origin
        return abridge

    @property
    def _send(self) -> Callable[[bytes], object] | None:
        # Sending bytes is not part of the exporter's public interface. Should it change, so does the speed.
        return getattr(getattr(self, "_client", None), "export", None)

    def export(self, spans: Sequence[ReadableSpan | Abridged]) -> SpanExportResult:
        send = self._send
        if send is None or getattr(self, "_shutdown", True):
            return super().export([span for span in spans if not isinstance(span, tuple)])
        sent = getattr(send(encode(spans, self.origin)), "success", True)
        return SpanExportResult.SUCCESS if sent else SpanExportResult.FAILURE


def abridge(span: AttemptSpan) -> Abridged | AttemptSpan:
    """What has to be kept of an untouched span until it is exported; any other is kept as it is.

    Encoding many one after the other takes a third of the time that it takes at the end of each, when the processor
    has something else in its caches.
    """
    return span.abridged() if span.is_untouched else span


def encode(spans: Iterable[ReadableSpan | Abridged], origin: Origin | None = None) -> bytes:
    """An ExportTraceServiceRequest with the spans, encoded; those that are abridged come from `origin`."""
    # Resources and scopes are few objects that all spans share; comparing their contents takes long.
    groups: dict[tuple[int, int], _Group] = {}
    group: list[bytes] | None = None
    resource: Resource | None = None
    scope: InstrumentationScope | None = None
    abridged: list[bytes] = []
    for span in spans:
        if isinstance(span, tuple):
            abridged.append(_encode_abridged(span))
            continue
        # A span's properties are slower; so is looking for the group again, as neighbours mostly share theirs.
        if group is None or span._resource is not resource or span._instrumentation_scope is not scope:
            resource, scope = span._resource, span._instrumentation_scope
            group = groups.setdefault((id(resource), id(scope)), (resource, scope, []))[-1]
        group.append(_encode_field(span))
    if abridged:
        assert origin is not None, "an exporter knows where what it abridges comes from"
        own: _Group = origin.resource, origin.scope, []
        groups.setdefault((id(origin.resource), id(origin.scope)), own)[-1].extend(abridged)
    request = []
    for resource, scope, encoded in groups.values():
        # The library's encoder makes what surrounds the spans.
        (resource_spans,) = encode_spans([_bare(resource, scope)]).resource_spans
        (scope_spans,) = resource_spans.scope_spans
        del scope_spans.spans[:]
        del resource_spans.scope_spans[:]
        encoded.insert(0, scope_spans.SerializeToString())
        body = resource_spans.SerializeToString() + _field(_SCOPE_SPANS, b"".join(encoded))
        request.append(_field(_RESOURCE_SPANS, body))
    return b"".join(request)


def _bare(resource: Resource, scope: InstrumentationScope | None) -> ReadableSpan:
    return ReadableSpan("", INVALID_SPAN_CONTEXT, resource=resource, instrumentation_scope=scope)


def _encode_field(span: ReadableSpan) -> bytes:
    if not isinstance(span, AttemptSpan) or not span.is_untouched:
        return _field(_SPAN, _encode(span))
    return _encode_abridged(span.abridged())


def _encode_abridged(span: Abridged) -> bytes:
    known, text, attempt, outcome, sent_by, span_id, start, end = span
    message_id = text.encode()
    key = attempt, outcome, len(message_id)
    template = known.templates.get(key)
    if template is None:
        if len(known.templates) >= MAX_TEMPLATES:
            known.templates.clear()
        template = known.templates[key] = _template(known, *key)
    pack, before_ids, before_parent, rest = template
    return pack(
        before_ids,
        _fromhex(sent_by[3:35]),
        b"\x12\x08",
        span_id.to_bytes(8, "big"),
        b"\x39",
        start,
        b"\x41",
        end,
        before_parent,
        _fromhex(sent_by[36:52]),
        rest,
        message_id,
    )


def _template(known: Known, attempt: int, outcome: str | None, length: int) -> Template:
    """What the untouched spans of attempts have in common."""
    before_parent = b"\x85\x01" + _IS_REMOTE.to_bytes(4, "little") + _PARENT
    ended = b"" if outcome is None else _encode_attribute(c.OUTCOME, outcome) or b""
    begun = _encode_attribute(c.ATTEMPT, attempt) or b""
    rest = (
        _begins_with(known, known.span_name, SpanKind.CONSUMER) + begun + ended + _before_message_id(length)
    )
    # The same fields as in `_encode`; the ids have 16 and 8 bytes, the parent's 8.
    content = b"\x0a\x10" + bytes(16 + 10 + 9 + 9) + before_parent + bytes(8) + rest + bytes(length)
    before_ids = _field(_SPAN, content)[: -len(content)] + b"\x0a\x10"
    layout = f"<{len(before_ids)}s16s2s8scQcQ{len(before_parent)}s8s{len(rest)}s{length}s"
    return Template(Struct(layout).pack, before_ids, before_parent, rest)


def _encode(span: ReadableSpan) -> bytes:
    # A span's properties copy what they give; of our own spans we read what is behind them.
    context, parent = span._context, span._parent
    if context is None or context.trace_state or not _is_plain(span):
        return _encode_unusual(span)
    parts = [
        _FIXED.pack(  # fields 1 and 2, both bytes; 7 and 8, both fixed64; 16, fixed32
            b"\x0a\x10",
            context.trace_id.to_bytes(16, "big"),
            b"\x12\x08",
            context.span_id.to_bytes(8, "big"),
            b"\x39",
            span._start_time or 0,
            b"\x41",
            span._end_time or 0,
            b"\x85\x01",
            _IS_REMOTE if parent is not None and parent.is_remote else _IS_LOCAL,
        )
    ]
    if parent is not None:
        parts.append(_PARENT + parent.span_id.to_bytes(8, "big"))
    attributes: Iterable[tuple[str, object]] = (span._attributes or {}).items()
    known = span.known if isinstance(span, QuickSpan) else None
    if known is None:
        parts.append(_name_and_kind(span._name, span._kind))
    else:
        parts.append(_begins_with(known, span._name, span._kind))
        attributes = islice(attributes, len(known.attributes), None)
    for name, value in attributes:
        encoded = _encode_attribute(name, value)
        if encoded is None:
            return _encode_unusual(span)
        parts.append(encoded)
    return b"".join(parts)


def _begins_with(known: Known, name: str, kind: SpanKind) -> bytes:
    """The name, the kind and the known attributes of a span."""
    if known.encoded is None:
        common = [_encode_attribute(*item) or b"" for item in known.attributes.items()]
        known.encoded = b"".join([_name_and_kind(name, kind), *common])
    return known.encoded


def _is_plain(span: ReadableSpan) -> bool:
    if isinstance(span, QuickSpan):
        return span.is_plain
    return not (
        span.events
        or span.links
        or span.dropped_attributes
        or span.status.status_code is not StatusCode.UNSET
    )


def _encode_unusual(span: ReadableSpan) -> bytes:
    return encode_spans([span]).resource_spans[0].scope_spans[0].spans[0].SerializeToString()


@lru_cache(maxsize=1024)
def _name_and_kind(name: str, kind: SpanKind) -> bytes:
    # An empty status says that the span has ended without one.
    value = SpanProto.SpanKind.Value(f"SPAN_KIND_{kind.name}")
    return SpanProto(name=name, kind=value, status=Status()).SerializeToString()


def _encode_attribute(name: str, value: object) -> bytes | None:
    """An attribute as a field of a span; None for a value that is left to the library."""
    if name == c.MESSAGE_ID and type(value) is str:
        # Not worth remembering: it occurs once or twice.
        text = value.encode()
        return _before_message_id(len(text)) + text
    if isinstance(value, (str, bool, int)):
        # To a cache 1 and True are the same, and they are not the same attribute: hence the type.
        return _attribute(name, type(value).__name__, value)
    return None


@lru_cache(maxsize=4096)
def _attribute(name: str, kind: str, value: str | bool | int) -> bytes:
    if kind == "str":
        encoded = AnyValue(string_value=str(value))
    elif kind == "bool":
        encoded = AnyValue(bool_value=bool(value))
    else:
        encoded = AnyValue(int_value=int(value))
    return _field(_ATTRIBUTE, KeyValue(key=name, value=encoded).SerializeToString())


@lru_cache(maxsize=256)
def _before_message_id(length: int) -> bytes:
    """What stands before a message id of so many bytes: it is the last thing in the field."""
    placeholder = bytes(length)
    field = _field(_ATTRIBUTE, _MESSAGE_ID + _field(b"\x12", _field(b"\x0a", placeholder)))
    return field[: len(field) - length]


def _field(tag: bytes, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return tag + bytes((length,)) + content
    if length < 0x4000:
        return tag + bytes((length & 0x7F | 0x80, length >> 7)) + content
    size = bytearray()
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    return tag + bytes(size) + content
