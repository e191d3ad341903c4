"""What `/metrics` answers: what the processes of the front end count, and what the store says of orders and queues.

The counts of all processes of one gunicorn are in the files of PROMETHEUS_MULTIPROC_DIR, so any of them answers for
all. What the store says is the same in every process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from dramatiq.errors import BrokerError
from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dramatiq_jetstream.gauges import Gauges
from tasks import app, service

_gauges = Gauges(app.broker, connect=True)

#: The statuses from which orders still move, or wait for their customer or an operator.
STATUSES = ("accepted", "offered", "reserved", "paid", "failed")


class _Orders(Collector):
    """What the store says of orders that are not final; nothing while it does not answer."""

    def collect(self) -> Iterator[Metric]:
        if not service.nats_connected():
            return
        try:
            unfinished = app.unfinished_orders().all()
            away = app.gateway_outage().since() is not None
        except BrokerError:
            return
        now = app.now()
        counts = Counter(one.status for one in unfinished)
        late = (one for one in unfinished if one.moved_at < now - app.SETTINGS.stuck_after)
        stuck = Counter(one.status for one in late if not one.offered_until)
        oldest: dict[str, int] = {}
        for one in unfinished:
            oldest[one.status] = min(oldest.get(one.status, now), one.placed_at)
        number = GaugeMetricFamily("orders_unfinished", "Orders that are not final.", labels=["status"])
        standing = GaugeMetricFamily(
            "orders_stuck", "Orders that have not moved for STUCK_AFTER.", labels=["status"]
        )
        age = GaugeMetricFamily(
            "orders_oldest_unfinished_seconds",
            "For how long the oldest order that is not final has been there; 0 when there is none.",
            labels=["status"],
        )
        for status in sorted({*STATUSES, *counts}):
            number.add_metric([status], counts[status])
            standing.add_metric([status], stuck[status])
            age.add_metric([status], max(0, now - oldest.get(status, now)) / 1000)
        yield from (number, standing, age)
        yield GaugeMetricFamily(
            "payment_gateway_away", "1 while the payment gateway does not answer, else 0.", value=int(away)
        )


_store = CollectorRegistry()
_store.register(_Orders())


def text() -> str:
    """Return everything in Prometheus' text format."""
    counted = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        counted = CollectorRegistry()
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
    parts = [_gauges.prometheus_text(), generate_latest(_store).decode(), generate_latest(counted).decode()]
    return "".join(parts)
