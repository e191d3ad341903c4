"""Cancels, refunds, ships, returns, charges back and restocks while everything burns, and writes the answers down.

Each is asked again, under the same key, until an answer decides it. A line is written when it was, and never changed.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats
import requests
from nats.errors import Error as NatsError

from orders.v1.events_pb2 import OrderShipped
from tests.chaos.client import Log

#: How long something is asked before it is given up, in seconds.
PATIENCE_SECONDS = 60.0

#: What is refunded and charged back at a time, in minor units; the cheapest order costs more than three of them.
AMOUNT = 250

#: Answers that decide: it is accepted, or it never will be.
_DECISIVE = frozenset({201, 202, 404, 409, 422})

_KINDS = ("cancel", "refund", "ship", "sent", "back", "written_off", "bank")

#: How many of each kind a run has at least, if they come about in the time allowed.
LEAST = 2


class Acts:
    """Acts on accepted orders until it is closed.

    Parameters:
      url: The front end.
      key: An operator's API key.
      nats_url: Where another service says that it has shipped.
      gateway_url: Where the bank takes money back.
      log: The load's, which knows the orders.
      acts: Where the answers go.
      restock: Runs the command that adds pieces of a product, given its arguments; returns whether that went well.
    """

    def __init__(
        self,
        url: str,
        key: str,
        nats_url: str,
        gateway_url: str,
        log: Log,
        acts: Path,
        restock: Callable[..., subprocess.CompletedProcess[str]],
        *,
        seed: int,
        pause: float = 0.3,
    ) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._nats_url = nats_url
        self._gateway_url = gateway_url
        self._log = log
        self._restock = restock
        self._seed = seed
        self._run = f"{seed:x}-{int(time.time())}"
        self._shipped: list[str] = []
        self._cancelled: list[str] = []
        self._accepted: Counter[str] = Counter()
        self._acts = acts.open("a", buffering=1)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=("orders", self._act_on_order, pause), daemon=True),
            threading.Thread(target=self._work, args=("stock", self._add_to_stock, 10 * pause), daemon=True),
        ]

    def __enter__(self) -> Acts:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing more; what was begun comes to its end."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(3 * PATIENCE_SECONDS)
            assert not thread.is_alive(), "what was asked did not come to an end"
        self._acts.close()

    def all_done(self) -> bool:
        """Whether enough of each kind was accepted."""
        return all(self._accepted[kind] >= LEAST for kind in (*_KINDS, "restock"))

    def _work(self, name: str, act: Callable[[random.Random, str], None], pause: float) -> None:
        choice = random.Random(f"{self._seed}.acts.{name}")
        count = 0
        while not self._stop.wait(choice.uniform(0.5, 1.5) * pause):
            count += 1
            act(choice, f"{self._run}-{name}-{count}")

    def _write(self, answer: int, **facts: Any) -> None:
        accepted = answer in (201, 202)
        self._accepted[facts["kind"]] += accepted
        line = {**facts, "answer": answer, "accepted": accepted, "at": time.time()}
        self._acts.write(json.dumps(line) + "\n")

    def _add_to_stock(self, choice: random.Random, key: str) -> None:
        sku, pieces = choice.choice(("MUG-01", "TEE-01", "NOTE-01")), 7
        # Twice, as an operator does who saw no answer: it counts once.
        answer = min(self._add(sku, pieces, key) for _ in range(2))
        self._write(answer, kind="restock", key=key, sku=sku, pieces=pieces)

    def _act_on_order(self, choice: random.Random, key: str) -> None:
        # Not the newest: most of what can be asked is refused before an order is confirmed.
        known = [one for one in list(self._log.accepted)[-60:-5] if one not in self._log.apart]
        if not known:
            return
        # What was asked less often comes first.
        kind = min(choice.sample(_KINDS, 3), key=lambda one: self._accepted[one])
        order_id = choice.choice(known)
        match kind:
            case "cancel":
                answer = self._ask(order_id, "cancel", key, {"reason": key})
            case "refund":
                answer = self._ask(order_id, "refunds", key, {"amount_minor": AMOUNT, "reason": key})
            case "ship":
                answer = self._ask(order_id, "shipments", key, {"carrier": "chaos", "tracking": key})
            case "sent":
                # Another service may say so of what was cancelled meanwhile.
                order_id = choice.choice([*self._cancelled[-3:], order_id])
                answer = self._say_sent(order_id)
            case "bank":
                answer = self._charge_back(order_id, key)
            case _:
                order_id = choice.choice([*self._shipped[-20:], order_id])
                answer = self._ask(order_id, "returns", key, {"stock": kind, "reason": key})
        if answer in (201, 202) and kind in ("cancel", "ship", "sent"):
            (self._cancelled if kind == "cancel" else self._shipped).append(order_id)
        self._write(answer, kind=kind, order_id=order_id, key=key)

    def _ask(self, order_id: str, what: str, key: str, body: dict[str, Any]) -> int:
        return self._until_decided(
            lambda: (
                requests.post(
                    f"{self._url}/api/orders/{order_id}/{what}",
                    json=body,
                    headers={**self._headers, "Idempotency-Key": key},
                    timeout=10,
                ).status_code
            )
        )

    def _charge_back(self, order_id: str, key: str) -> int:
        def take() -> int:
            charges = requests.get(f"{self._gateway_url}/charges", params={"order_id": order_id}, timeout=10)
            charge = next((one for one in charges.json()["charges"] if one["status"] == "captured"), None)
            if charge is None:
                return 404
            body = {"charge_id": charge["id"], "amount": AMOUNT, "currency": charge["currency"]}
            return requests.post(
                f"{self._gateway_url}/chargebacks", json=body, headers={"Idempotency-Key": key}, timeout=10
            ).status_code

        return self._until_decided(take)

    def _say_sent(self, order_id: str) -> int:
        async def publish() -> None:
            async def ignore(_error: Exception) -> None:
                pass

            client = await nats.connect(
                self._nats_url.split(","), connect_timeout=2, allow_reconnect=False, error_cb=ignore
            )
            try:
                event = OrderShipped(order_id=order_id, carrier="another service")
                await client.jetstream().publish("ORDER.shipped", event.SerializeToString(), timeout=3)
            finally:
                await client.close()

        def said() -> int:
            asyncio.run(publish())
            return 201

        return self._until_decided(said)

    def _add(self, sku: str, pieces: int, key: str) -> int:
        return self._until_decided(
            lambda: 201 if self._restock("add", sku, str(pieces), "--id", key).returncode == 0 else 503
        )

    def _until_decided(self, ask: Callable[[], int]) -> int:
        deadline = time.monotonic() + PATIENCE_SECONDS
        answer = 0
        while time.monotonic() < deadline:
            try:
                answer = ask()
            except (requests.RequestException, NatsError, OSError, TimeoutError):
                answer = 0
            if answer in _DECISIVE:
                break
            time.sleep(0.3)
        return answer
