"""Puts into every log line what it is about: the trace, the message, the actor, and what the actor binds.

    from dramatiq_jetstream.telemetry import bind_log_fields

    @dramatiq.actor
    def capture_payment(order_id: str) -> None:
        bind_log_fields(order_id=order_id)
        logger.info("Capturing.")      # carries order_id, actor, message_id, trace_id, span_id

Works without OpenTelemetry; the trace is left out then. LOG_FORMAT is `text` (the default) or `json`,
LOG_LEVEL a level's name.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO, cast

from dramatiq import Broker, MessageProxy, Middleware

from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.worker.running import running_message


class Scope(Protocol):
    """What log lines are about right now. Shared with the coroutine of an async actor, so it is mutable."""

    message: MessageProxy | None
    fields: dict[str, Any] | None


@dataclass(slots=True)
class _Fields:
    """A scope outside of actors."""

    message: MessageProxy | None
    fields: dict[str, Any] | None = None


# A message is its own scope, because nothing has to be made for it: what is bound is kept on it.
_scope: ContextVar[Scope | MessageProxy | None] = ContextVar("dramatiq_jetstream_log_scope", default=None)
_BOUND = "_bound_log_fields"

#: Says what the log lines of this thread are about from here on; None: about nothing in particular.
enter: Callable[[Scope | MessageProxy | None], object] = _scope.set


def leave() -> None:
    """Say that the log lines of this thread are about nothing in particular from here on."""
    if _scope.get() is not None:
        enter(None)


def _current_scope() -> Scope | MessageProxy | None:
    scope, message = _scope.get(), running_message.get()
    # A scope of before the message does not cover it; one that was made while it runs knows it.
    return scope if message is None or (scope is not None and _message_of(scope) is message) else message


def _message_of(scope: Scope | MessageProxy) -> MessageProxy | None:
    return scope if isinstance(scope, MessageProxy) else scope.message


def _fields_in(scope: Scope | MessageProxy) -> dict[str, Any] | None:
    return vars(scope).get(_BOUND) if isinstance(scope, MessageProxy) else scope.fields


class LogContext(Middleware):
    """Notes which message a worker thread is working on, for its log lines.

    For brokers that are neither instrumented nor JetStreamBrokers, which do it by themselves.
    """

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        enter(message)

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any | None = None,
        exception: BaseException | None = None,
    ) -> None:
        enter(None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        enter(None)


def bind_log_fields(**fields: Any) -> None:
    """Put fields into all further log lines of this message, and on its span, so that both are found by them.

    In an actor they are forgotten when the message is done. Elsewhere use `log_fields`.
    """
    scope = _current_scope()
    if isinstance(scope, MessageProxy):
        vars(scope).setdefault(_BOUND, {}).update(fields)
    else:
        own: Scope = cast("Scope | None", scope) or _Fields(None)
        own.fields = {**(own.fields or {}), **fields}
        _scope.set(own)
    span = _current_span()
    if span is not None and span.is_recording():
        for name, value in fields.items():
            span.set_attribute(name, value if isinstance(value, (bool, int, float)) else str(value))


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Fields for the log lines inside a `with` block, such as one web request."""
    outer = _current_scope()
    inner = _Fields(None) if outer is None else _Fields(_message_of(outer), dict(_fields_in(outer) or {}))
    token = _scope.set(inner)
    try:
        bind_log_fields(**fields)
        yield
    finally:
        _scope.reset(token)


def current_log_fields() -> dict[str, Any]:
    """What a line logged at this point carries besides its text."""
    fields: dict[str, Any] = {}
    scope = _current_scope()
    if scope is not None:
        fields.update(_fields_in(scope) or {})
        message = _message_of(scope)
        if message is not None:
            fields["actor"] = message.actor_name
            fields["message_id"] = message.message_id
    span = _current_span()
    context = span.get_span_context() if span is not None else None
    if context is not None and context.is_valid:
        fields["trace_id"] = f"{context.trace_id:032x}"
        fields["span_id"] = f"{context.span_id:016x}"
    return fields


def _current_span() -> Any:
    # Whoever has a span has imported this; nobody needs to pay for the import who has none.
    trace = sys.modules.get("opentelemetry.trace")
    return trace.get_current_span() if trace is not None else None


class LogContextFilter(logging.Filter):
    """Adds the fields to each record: as `log_fields`, and as attributes for formats of one's own."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "log_fields" not in vars(record):
            fields = current_log_fields()
            record.log_fields = fields
            for name in ("trace_id", "span_id", "message_id", "actor"):
                setattr(record, name, fields.get(name, ""))
        return True


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime", "message", "taskName", "log_fields", "trace_id", "span_id", "message_id", "actor",
}  # fmt: skip


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    fields: dict[str, Any] = getattr(record, "log_fields", {})
    return {**extra, **fields}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            "thread": record.threadName,
        }
        # The line's own keys win: a field must not be able to forge them.
        line = {**_fields_of(record), **line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people, with the fields behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s [%(process)d %(threadName)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        fields = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        return f"{line}  {fields}" if fields else line


_FORMATTERS: dict[str, type[logging.Formatter]] = {"json": JsonFormatter, "text": TextFormatter}


def configure_logging(
    *,
    log_format: str | None = None,
    level: str | int | None = None,
    stream: TextIO | None = None,
) -> None:
    """Give the process's log handlers the format and the fields.

    Handlers that exist (the dramatiq command's, gunicorn's) are kept and get the new format; when there is
    none, one to `stream` (stderr) is made. Without arguments LOG_FORMAT and LOG_LEVEL decide; without
    LOG_LEVEL the level stays, or becomes INFO when nobody had set logging up.
    """
    name = log_format or os.environ.get("LOG_FORMAT", "").strip().lower() or "text"
    if name not in _FORMATTERS:
        raise InvalidOption(f"LOG_FORMAT is {name!r}; it must be one of {', '.join(sorted(_FORMATTERS))}.")
    level = level or os.environ.get("LOG_LEVEL", "").strip().upper() or None
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler(stream))
        level = level or "INFO"
    if level is not None:
        if isinstance(level, str) and level not in logging.getLevelNamesMapping():
            raise InvalidOption(f"LOG_LEVEL is {level!r}; it must be a level's name, such as INFO or DEBUG.")
        root.setLevel(level)
    formatter = _FORMATTERS[name]()
    for logger in (root, logging.getLogger("gunicorn.error"), logging.getLogger("gunicorn.access")):
        for handler in logger.handlers:
            handler.setFormatter(formatter)
            if not any(isinstance(f, LogContextFilter) for f in handler.filters):
                handler.addFilter(LogContextFilter())
