"""A broken build: what is written off is sold again. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.ledger import Record

Record.comes_back = property(lambda self: self.lines)  # type: ignore[assignment, misc]
