"""What this process counts for Prometheus: the steps of orders, how orders end, and whether payments are tried.

The clients' library keeps the numbers. Where several processes serve one address, PROMETHEUS_MULTIPROC_DIR names a
directory in which each has its files, and any of them answers for all: gunicorn's configuration sets it, and so does
`fleet work --http`. What the store knows (queues, unfinished orders) is read when it is asked for, see `web.metrics`.

Numbers are counted after what they count. A process that dies in between has not counted it.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Gauge, Histogram

#: Upper bounds in seconds; orders should be confirmed within 5.
STEP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ORDER_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3_600)

steps = Histogram(
    "order_step_duration_seconds",
    "Runs of a step of an order, by what came of them.",
    ["step", "outcome"],
    buckets=STEP_SECONDS,
)
finished = Histogram(
    "order_duration_seconds",
    "Orders that became final, from accepted to final.",
    ["outcome"],
    buckets=ORDER_SECONDS,
)
webhooks = Histogram(
    "webhook_request_duration_seconds",
    "Requests to receivers of webhooks, by what came of them: accepted, refused or unanswered.",
    ["outcome"],
    buckets=STEP_SECONDS,
)
breaker_open = Gauge(
    "payment_breaker_open",
    "1 while a worker process leaves the payment gateway alone, else 0.",
    multiprocess_mode="livemax",
)
