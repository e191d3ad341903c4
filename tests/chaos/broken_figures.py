"""A broken build: the figures do not know of chargebacks. Workers import this beside `tasks`."""

from __future__ import annotations

from orders.v1.events_pb2 import OrderChargedBack
from tasks import figures

figures._COUNTED = tuple(kind for kind in figures._COUNTED if kind is not OrderChargedBack)  # type: ignore[misc]
