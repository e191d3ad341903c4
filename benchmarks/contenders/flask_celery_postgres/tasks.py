"""The steps of an order as Celery tasks: reserve → charge → confirm.

Each does its transaction first, sends the next task second (RabbitMQ confirms it), and is acked last. A worker that
dies in between leaves its task on the queue, and every step is safe to repeat.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import requests
from celery import Celery
from psycopg import OperationalError

from benchmarks.contenders.flask_celery_postgres.store import Row, Store

ORDERS, PAYMENTS = "orders", "payments"
PAYMENT_SECONDS = 5.0


class GatewayUnavailable(Exception):
    """The gateway gave no answer that says whether the order was charged; asking again is safe."""


app = Celery("orders", broker=os.environ["BROKER_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_pool_limit=int(os.environ["WORKER_THREADS"]),
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue=ORDERS,
    # Tasks take milliseconds: a thread should find the next one at hand.
    worker_prefetch_multiplier=4,
)

#: Until what is away is back: up to ten minutes between two tries.
AGAIN: dict[str, Any] = {
    "autoretry_for": (GatewayUnavailable, OperationalError),
    "retry_backoff": True,
    "max_retries": None,
}


_making = threading.Lock()


def store() -> Store:
    """The pool of this process; made when its first task runs, so after any fork."""
    with _making:
        return _store()


@cache
def _store() -> Store:
    return Store(int(os.environ["WORKER_THREADS"]))


@app.task(name="reserve", queue=ORDERS, **AGAIN)
def reserve(order_id: str) -> None:
    if store().reserve(order_id) == "reserved":
        charge.delay(order_id)


@app.task(name="charge", queue=PAYMENTS, **AGAIN)
def charge(order_id: str) -> None:
    order = store().find(order_id)
    assert order is not None, order_id
    if order["status"] == "reserved":
        charge_id, reason = _charge(order)
        if not charge_id:
            store().decline(order_id, reason)
            return
        store().pay(order_id, charge_id)
    if order["status"] in ("reserved", "paid"):
        confirm.delay(order_id)


@app.task(name="confirm", queue=ORDERS, **AGAIN)
def confirm(order_id: str) -> None:
    store().confirm(order_id)


_local = threading.local()


def _charge(order: Row) -> tuple[str, str]:
    """Charge an order once, however often it is asked; returns the charge's id, or why it was declined."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
        _local.session.trust_env = False  # the environment is not read again for every charge
    order_id = str(order["id"])
    body = {
        "order_id": order_id,
        "amount": order["total"],
        "currency": order["currency"],
        "token": order["payment_token"],
    }
    try:
        answer = _local.session.post(
            f"{os.environ['PAYMENT_URL']}/charges",
            json=body,
            headers={"Idempotency-Key": order_id},
            timeout=PAYMENT_SECONDS,
        )
        told = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise GatewayUnavailable(str(error)) from None
    if answer.status_code == 201 and told.get("status") == "captured":
        return str(told["id"]), ""
    if answer.status_code == 402:
        return "", str(told.get("message") or "declined")
    raise GatewayUnavailable(f"the gateway answered {answer.status_code}")
