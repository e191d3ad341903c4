"""A broken build: the read model believes every program's events. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.announcements import Testimony

Testimony.attested = lambda self, happened, catalogue: happened  # type: ignore[method-assign]
