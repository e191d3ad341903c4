"""The program of the fleet that the dashboard's tests look at: actors that do everything a dashboard shows."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import dramatiq
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.abort import JetStreamBackend as Aborts
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.progress import Progress, progress
from dramatiq_jetstream.rate_limits import JetStreamBackend as Limits

GATES = Path(os.environ["SHOP_GATES"])

broker = JetStreamBroker(**json.loads(os.environ["SHOP_BROKER"]))
broker.add_middleware(Abortable(backend=Aborts(broker)))
broker.add_middleware(Periodic())
broker.add_middleware(Progress())
dramatiq.set_broker(broker)

encoders = ConcurrentRateLimiter(Limits(broker), "encoders", limit=4, ttl=600_000)


@dramatiq.actor(queue_name="mail")
def send_receipt(order: int, email: str) -> None:
    """Done at once."""


@dramatiq.actor(queue_name="video")
def transcode(video: str, *, preset: str) -> None:
    """Says how far it is, and goes on until the test opens its gate."""
    with encoders.acquire():
        frames = 0
        while not (GATES / video).exists():
            frames = min(870, frames + 29)
            progress(frames, 1_200, f"frame {frames}")
            time.sleep(0.05)


@dramatiq.actor(queue_name="payments", max_retries=0)
def capture(order: int, amount: str) -> None:
    """Fails for good, unless the test opened the gate of its order."""
    if not (GATES / f"order-{order}").exists():
        raise ConnectionError(f"the payment gateway refused order {order}: 503 Service Unavailable")


@dramatiq.actor(queue_name="reports", min_backoff=3_600_000, max_backoff=3_600_000, max_retries=5)
def monthly_report(customer: str) -> None:
    """Fails and is tried again in an hour."""
    raise TimeoutError(f"the warehouse did not answer for {customer} within 30 s")


@dramatiq.actor(queue_name="reports", cron="*/5 * * * *", max_age=60_000)
def refresh_prices() -> None:
    """Periodic."""


@dramatiq.actor(queue_name="mail", cron="0 7 * * 1", timezone="Europe/Berlin")
def newsletter() -> None:
    """Periodic, in a zone."""
