"""Places orders through the API and as bare events, and writes every answer into an append-only log.

An order is sent again, with the same key or the same id, until it is accepted. The log is what the checker
believes: a line is written when an answer has come, and never changed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nats
import requests
from nats.errors import Error as NatsError

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tests.chaos.merchant import Shelf

#: How long an order is tried before it is given up, in seconds.
PATIENCE_SECONDS = 90.0

#: Answers after which an order is not tried again: it breaks a rule, or it is in the archive already.
_REFUSED = frozenset({409, 410, 422})

_BAD_TOKENS = ("tok_declined", "tok_insufficient", "tok_expired")


class Log:
    """The log: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        #: When each accepted order was accepted.
        self.accepted: dict[str, float] = {}
        #: The orders of the API, whose ids were claimed before they were accepted.
        self.claimed: list[str] = []
        #: Order ids that clients are going to choose.
        self.chosen: list[str] = []
        #: Orders of which nothing is asked but by those who placed them.
        self.apart: set[str] = set()

    def write(self, **entry: Any) -> None:
        """Append an answer."""
        entry["at"] = time.time()
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        if entry["accepted"]:
            with self._lock:
                self.accepted.setdefault(entry["order_id"], entry["at"])
                if entry["kind"] == "api":
                    self.claimed.append(entry["order_id"])

    def accepted_before(self, moment: float) -> list[str]:
        """Return the orders that were accepted before a moment."""
        with self._lock:
            return [order_id for order_id, at in self.accepted.items() if at < moment]

    def accepted_after(self, moment: float) -> float | None:
        """Return when the first order was accepted after a moment."""
        with self._lock:
            return min((at for at in self.accepted.values() if at >= moment), default=None)

    def close(self) -> None:
        os.close(self._file)


class Load:
    """Keeps placing orders until it is closed.

    Parameters:
      url: The front end.
      key: An API key that may place orders.
      nats_url: Where the bare events go.
      shelf: What is sold.
      rate: Orders a second through the API; a fifth of that comes as bare events.
    """

    def __init__(
        self,
        url: str,
        key: str,
        nats_url: str,
        log: Log,
        shelf: Shelf,
        *,
        rate: float,
        seed: int,
        threads: int = 4,
    ) -> None:
        self._url = url
        self._key = key
        self._nats_url = nats_url
        self._log = log
        self._shelf = shelf
        self._pause = threads / rate
        self._event_pause = 5 / rate
        self._run = f"{seed:x}-{int(time.time())}"
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._post, args=(number, random.Random(f"{seed}.{number}")), daemon=True)
            for number in range(threads)
        ]
        self._threads.append(
            threading.Thread(
                target=lambda: asyncio.run(self._publish(random.Random(f"{seed}.events"))), daemon=True
            )
        )

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Place no further orders; those under way are tried until they are accepted or given up."""
        self._stop.set()
        deadline = time.monotonic() + PATIENCE_SECONDS + 20
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client did not come to an end"

    def _post(self, number: int, choice: random.Random) -> None:
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {self._key}"
        count = 0
        chosen = self._choose(number, count)
        while not self._stop.wait(choice.uniform(0.5, 1.5) * self._pause):
            count += 1
            if count % 4 == 0:
                self._place_rivals(session, chosen, choice)
                chosen = self._choose(number, count)
                continue
            customer = f"{self._run}-{number}-{count}"
            body: dict[str, Any] = {
                "customer_id": customer,
                "items": [{"sku": sku, "quantity": quantity} for sku, quantity in self._items(choice)],
            }
            if choice.random() < 0.1:
                body["payment_token"] = choice.choice(_BAD_TOKENS)
            self._place(session, f"key-{customer}", body)
        session.close()

    def _place(self, session: requests.Session, key: str, body: dict[str, Any]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.2
        while time.monotonic() < deadline:
            entry: dict[str, Any] = {
                "kind": "api",
                "key": key,
                "customer_id": body["customer_id"],
                "order_id": None,
                "quantities": {item["sku"]: item["quantity"] for item in body["items"]},
                "accepted": False,
            }
            try:
                answer = session.post(
                    f"{self._url}/api/orders", json=body, headers={"Idempotency-Key": key}, timeout=10
                )
            except requests.RequestException as error:
                self._log.write(**entry, answer=type(error).__name__)
            else:
                if answer.status_code == 202:
                    entry.update(accepted=True, order_id=answer.json()["order_id"])
                    self._log.write(**entry, answer=202)
                    return
                self._log.write(**entry, answer=answer.status_code, text=answer.text[:300])
                if answer.status_code in _REFUSED and "request-in-progress" not in answer.text:
                    return
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _choose(self, number: int, count: int) -> str:
        """Return an order id for later, so that strangers learn of it before it is used."""
        chosen = f"{self._run}-{number}-chosen-{count}"
        self._log.chosen.append(chosen)
        return chosen

    def _place_rivals(self, session: requests.Session, order_id: str, choice: random.Random) -> None:
        """Place two different orders under one id at once, with keys of their own: one may be accepted."""
        rivals = []
        for number in (1, 2):
            customer = f"{order_id}-rival-{number}"
            items = [OrderItem(sku=sku, quantity=quantity) for sku, quantity in self._items(choice)]
            rivals.append(OrderCreated(order_id=order_id, customer_id=customer, items=items))
        with ThreadPoolExecutor(2) as pool:
            for placing in [pool.submit(self._place_rival, session, rival) for rival in rivals]:
                placing.result()

    def _place_rival(self, session: requests.Session, rival: OrderCreated) -> None:
        key = f"key-{rival.customer_id}"
        headers = {
            "Authorization": str(session.headers["Authorization"]),
            "Idempotency-Key": key,
            "Content-Type": "application/x-protobuf",
        }
        entry: dict[str, Any] = {
            "kind": "api",
            "key": key,
            "customer_id": rival.customer_id,
            "order_id": rival.order_id,
            "quantities": {item.sku: item.quantity for item in rival.items},
        }
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = requests.post(
                    f"{self._url}/api/orders", data=rival.SerializeToString(), headers=headers, timeout=10
                )
            except requests.RequestException as error:
                self._log.write(**entry, accepted=False, answer=type(error).__name__)
            else:
                accepted = answer.status_code == 202
                self._log.write(**entry, accepted=accepted, answer=answer.status_code)
                refused = "order-id-taken" in answer.text or "order-archived" in answer.text
                if accepted or refused or answer.status_code == 422:
                    return
            time.sleep(0.5)

    async def _publish(self, choice: random.Random) -> None:
        client = await nats.connect(
            self._nats_url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=_ignore
        )
        js = client.jetstream()
        count = 0
        try:
            while not self._stop.is_set():
                await asyncio.sleep(choice.uniform(0.5, 1.5) * self._event_pause)
                count += 1
                items = self._items(choice)
                event = OrderCreated(
                    order_id=f"{self._run}-e{count}",
                    customer_id=f"{self._run}-e{count}",
                    items=[OrderItem(sku=sku, quantity=quantity) for sku, quantity in items],
                    total_amount=sum(self._shelf.price(sku) * quantity for sku, quantity in items) / 100,
                )
                deadline = time.monotonic() + PATIENCE_SECONDS
                while time.monotonic() < deadline:
                    entry: dict[str, Any] = {
                        "kind": "event",
                        "key": event.order_id,
                        "customer_id": event.customer_id,
                        "order_id": event.order_id,
                        "quantities": dict(items),
                    }
                    try:
                        ack = await js.publish("ORDER.created", event.SerializeToString(), timeout=3)
                    except (NatsError, TimeoutError) as error:
                        self._log.write(**entry, accepted=False, answer=repr(error)[:200])
                        await asyncio.sleep(0.3)
                    else:
                        self._log.write(**entry, accepted=True, answer=f"stored as {ack.seq}")
                        break
        finally:
            await client.close()

    def _items(self, choice: random.Random) -> list[tuple[str, int]]:
        skus = choice.sample(self._shelf.skus(), choice.choice((1, 1, 1, 2, 3)))
        return [(sku, 1 if sku == "PRINT-01" else choice.randint(1, 4)) for sku in skus]


async def _ignore(_error: Exception) -> None:
    """The answers tell; what nats-py says besides is of no use."""
