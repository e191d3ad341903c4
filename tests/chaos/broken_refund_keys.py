"""A broken build: every refund is asked for under two keys. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.gateway import HttpGateway

_refund = HttpGateway.refund


def _twice(self: HttpGateway, charge_id: str, amount: int, currency: str, key: str) -> str:
    _refund(self, charge_id, amount, currency, key)
    return _refund(self, charge_id, amount, currency, f"{key}.again")


HttpGateway.refund = _twice  # type: ignore[method-assign]
