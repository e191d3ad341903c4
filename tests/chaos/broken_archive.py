"""A broken build: with what was archived, one event more leaves the stream. The operator's commands import this."""

from __future__ import annotations

from tasks.stream import EventStream

_trim = EventStream.trim

EventStream.trim = lambda self, before: _trim(self, before + 1)  # type: ignore[method-assign]
