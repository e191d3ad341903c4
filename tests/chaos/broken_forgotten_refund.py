"""A broken build: a cancel decides no refund. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.ledger import Record, Refund
from tasks.refunds import CANCEL

_owing = Record.owing


def _forgetful(self: Record, refund: Refund) -> Record:
    return self if refund.key == CANCEL else _owing(self, refund)


Record.owing = _forgetful  # type: ignore[method-assign]
