"""Log lines that say what they are about: the actor, the message, the order, and the trace if there is one.

bind(order_id=order_id)     # in an actor or a request: on all its further lines, and on its span

No text from outside can begin a line or change how one reads: control characters are escaped wherever they come
from, and the lines of a traceback are marked.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from dramatiq import Broker, MessageProxy, Middleware
from opentelemetry import trace

from .settings import Settings
from .text import escaped

__all__ = ["LogContext", "about", "bind", "bound", "configure"]

#: What the lines of the running message carry; shared with the coroutine of an async actor.
_about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


class LogContext(Middleware):
    """Notes which message a worker thread runs.

    It stands first, so that the lines of other middleware (that a message is retried, or given up) are covered too.
    """

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        _about.set({"actor": message.actor_name, "message_id": message.message_id})

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any | None = None,
        exception: BaseException | None = None,
    ) -> None:
        _about.set(None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        _about.set(None)


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Put fields on all log lines of a block, to which `bind` may add."""
    token = _about.set(dict(fields))
    try:
        yield
    finally:
        _about.reset(token)


def bound(field: str) -> str | None:
    """Return what the lines carry of a field."""
    return (_about.get() or {}).get(field)


def bind(**fields: str) -> None:
    """Put fields on all further log lines of the running message or request, and on its span."""
    about = _about.get()
    if about is not None:
        about.update(fields)
    trace.get_current_span().set_attributes(fields)


def configure(settings: Settings) -> None:
    """Give the handlers that exist (gunicorn's, the dramatiq command's) the format and the fields."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
        root.setLevel(logging.INFO)
    if settings.log_level is not None:
        root.setLevel(settings.log_level)
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter()
    for logger in (root, logging.getLogger("gunicorn.error"), logging.getLogger("gunicorn.access")):
        for handler in logger.handlers:
            handler.setFormatter(formatter)
            handler.addFilter(_add_fields)


def _add_fields(record: logging.LogRecord) -> bool:
    """Note on a record what it is about, while the thread that logs is still there to be asked."""
    fields = dict(_about.get() or {})
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        fields["trace_id"] = trace.format_trace_id(context.trace_id)
        fields["span_id"] = trace.format_span_id(context.span_id)
    record.about = fields
    return True


_NOT_ASCII = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


_STANDARD = {*vars(logging.makeLogRecord({})), "asctime", "message", "taskName", "about"}


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return extra | getattr(record, "about", {})


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            # The line's own keys win: a field must not be able to forge them.
            **_fields_of(record),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            "thread": record.threadName,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # JSON itself escapes the control characters of ASCII only.
        return _NOT_ASCII.sub(_escape, json.dumps(line, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """A line for people, with the fields behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s [%(process)d %(threadName)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        line = super().formatMessage(record)
        return escaped(f"{line}  {fields}" if fields else line)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _marked(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _marked(super().formatStack(stack_info))


def _marked(text: str) -> str:
    """Return lines that cannot be taken for lines of the log, whatever an exception says."""
    return "\n".join(f"  | {escaped(line)}" for line in text.split("\n"))
