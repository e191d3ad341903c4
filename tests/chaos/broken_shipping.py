"""A broken build: another service is believed that it has shipped, whatever the order is. Workers import this."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tasks.shipping import Shipping
from tasks.stock import Found


def _believing(
    self: Shipping, order_id: str, carrier: str, tracking: str, **_: Any
) -> tuple[Found, int | None]:
    found = self._stock.find(order_id, linearizable=True)
    while found is not None and "shipped" not in found.record.at:
        at = {**found.record.at, "shipped": self._now()}
        found = self._stock.forward(order_id, found, replace(found.record, at=at))
    assert found is not None
    return found, None


Shipping._shipped = _believing  # type: ignore[method-assign]
