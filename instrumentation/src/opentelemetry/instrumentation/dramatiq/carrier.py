"""Carries the trace context with a message.

Every broker moves a message's options, so the context travels there: under one key, as a flat dictionary of headers,
which any message encoder can write. A broker whose messages have headers of their own may give them as the attribute
`headers` of its message proxies; they are read when the option is absent, so that programs in other languages can take
part.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from dramatiq import Message, MessageProxy
from opentelemetry import propagate
from opentelemetry.context import Context

#: The message option with the headers of the trace context, such as `{"traceparent": "00-…"}`.
CARRIER_OPTION: Final = "trace_context"

_EMPTY = Context()


def inject(context: Context) -> dict[str, str]:
    """The headers that describe a context."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return carrier


def extract(message: Message[Any] | MessageProxy) -> Context:
    """The context in which a message was created; empty when it carries none.

    Never the current context: what runs on this thread has nothing to do with the program that sent the message.
    """
    carrier = message.options.get(CARRIER_OPTION)
    return extract_headers(getattr(message, "headers", None) if carrier is None else carrier)


def extract_headers(headers: object) -> Context:
    """The context that headers describe; anything unusable counts as none.

    Another program may have written them. So names match in any case, and values that are not text are left out.
    """
    if not headers or not isinstance(headers, Mapping):
        return _EMPTY
    usable = {k.lower(): v for k, v in headers.items() if isinstance(k, str) and isinstance(v, str)}
    return propagate.extract(usable, _EMPTY)


def replace(headers: MutableMapping[str, str], carrier: Mapping[str, str]) -> None:
    """Make headers carry this context instead of the one they have, in whatever case its names are written."""
    fields = {field.lower() for field in propagate.get_global_textmap().fields}
    for name in [name for name in headers if name.lower() in fields]:
        del headers[name]
    headers.update(carrier)
