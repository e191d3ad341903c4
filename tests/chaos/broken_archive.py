"""A broken build: with what was archived, ten events more leave the stream. The operator's commands import this."""

from __future__ import annotations

from tasks.stream import EventStream

_trim = EventStream.trim

# The next event alone may be a stranger's, or erased already.
EventStream.trim = lambda self, before: _trim(self, before + 10)  # type: ignore[method-assign]
