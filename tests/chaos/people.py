"""People who order, cancel, and then want to be erased, while everything burns.

Each has a name that stands nowhere else: as their id, in what they write, in the token that they pay with and in the
name of their program. When their orders are over, an operator erases them. Some of those erasures are killed in the
middle and carried on.
"""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests.chaos.client import Log
from tests.chaos.hooks import Hooks
from tests.chaos.visitors import UNHEARD

#: How long each step is tried, in seconds.
PATIENCE_SECONDS = 90.0

#: Where an erasure is killed: after how many kinds of places.
_DEATHS = tuple(f"tasks.erasure:Erasure._take_away:{number}" for number in (1, 2, 3, 5))


class People:
    """One after the other, until it is closed.

    Parameters:
      key: Makes an API key for a customer; returns None when that does not work now.
      unheard_key: The API key of UNHEARD, who orders once.
      operate: Runs an operator's command: its words, and where it dies.
      erased: Where those who were erased are written down.
    """

    def __init__(
        self,
        url: str,
        key: Callable[[str], str | None],
        unheard_key: str,
        hooks: Hooks,
        operate: Callable[..., subprocess.CompletedProcess[str]],
        log: Log,
        erased: Path,
        *,
        seed: int,
        pause: float = 2.0,
    ) -> None:
        self._url = url
        self._key = key
        self._unheard_key = unheard_key
        self._hooks = hooks
        self._operate = operate
        self._log = log
        self._choice = random.Random(f"{seed}.people")
        self._pause = pause
        self._done = 0
        self._erased = erased.open("a", buffering=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="people", daemon=True)

    def __enter__(self) -> People:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing more; what was begun comes to its end."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(5 * PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "a person did not come to an end"
        self._erased.close()

    def all_done(self) -> bool:
        """Whether someone was erased."""
        return self._done > 0

    def _work(self) -> None:
        self._until(lambda: self._order(self._unheard_key, UNHEARD, UNHEARD, 1))
        while not self._stop.is_set():
            self._live()
            self._stop.wait(self._choice.uniform(0.5, 1.5) * self._pause)

    def _live(self) -> None:
        word = f"p{secrets.token_hex(8)}"
        customer_id = f"{word}@example.org"
        key = self._until(lambda: self._key(customer_id))
        if key is None:
            return
        self._hooks.make(word, key, (), customer_id)
        orders = [
            order_id
            for number in (1, 2, 3)
            if (order_id := self._until(lambda: self._order(key, customer_id, word, number))) is not None  # noqa: B023
        ]
        if not orders:
            return
        self._until(lambda: self._cancel(key, orders[-1], f"{word} moved to Rome"))
        # From here on nothing is asked of them any more.
        certificate = self._until(lambda: self._erase(customer_id))
        line = {"word": word, "customer_id": customer_id, "orders": orders, "certificate": certificate}
        self._erased.write(json.dumps(line) + "\n")
        self._done += certificate is not None

    def _order(self, key: str, customer_id: str, word: str, number: int) -> str | None:
        request_key = f"{word}-{number}"
        body: dict[str, Any] = {"customer_id": customer_id, "items": [{"sku": "BAG-01", "quantity": number}]}
        if number == 2:
            body["payment_token"] = f"tok_{word}"
        answer = self._post("/api/orders", key, body, request_key)
        entry = {
            "kind": "api",
            "key": request_key,
            "customer_id": customer_id,
            "quantities": {"BAG-01": number},
        }
        if answer is None or answer.status_code != 202:
            status = "lost" if answer is None else answer.status_code
            self._log.write(**entry, order_id=None, accepted=False, answer=status)
            return None
        order_id = str(answer.json()["order_id"])
        self._log.apart.add(order_id)
        self._log.write(**entry, order_id=order_id, accepted=True, answer=202)
        return order_id

    def _cancel(self, key: str, order_id: str, reason: str) -> bool | None:
        answer = self._post(f"/api/orders/{order_id}/cancel", key, {"reason": reason}, f"cancel-{order_id}")
        return True if answer is not None and answer.status_code in (202, 409) else None

    def _erase(self, customer_id: str) -> dict[str, Any] | None:
        """Erase a customer, or carry it on; returns the certificate, None while orders are under way."""
        dies = self._choice.choice(_DEATHS) if self._choice.random() < 0.5 else None
        # Asked again, it is the same erasure, as long as it is not done.
        for command in (("customer", customer_id, "--yes"), ("resume",)):
            done = self._operate("erase", *command, dies=dies)
            dies = None
            for line in done.stdout.splitlines():
                said: dict[str, Any] = json.loads(line)
                return said
            if done.returncode != -9:
                return None
        return None

    def _post(self, path: str, key: str, body: Any, request_key: str) -> requests.Response | None:
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": request_key}
        try:
            return requests.post(self._url + path, json=body, headers=headers, timeout=10)
        except requests.RequestException:
            return None

    def _until(self, ask: Callable[[], Any]) -> Any:
        """Ask until there is an answer, or the time allowed is over."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = ask()
            if answer is not None or time.monotonic() > deadline:
                return answer
            time.sleep(1.0)
