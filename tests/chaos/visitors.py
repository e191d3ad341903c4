"""Who comes to the front end beside its customers: slow clients, probes, and people who ask for what is not theirs.

Every answer to a probe and to a look goes into a log of its own; the checker says what it is worth.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tests.chaos.client import Log
from tests.web.slow_clients import SlowClients

#: A customer who has orders of their own, and looks at others'.
PRYING = "c-prying"

#: A customer whose webhook accepts nothing.
UNHEARD = "c-unheard"

#: Connections that send a byte every four seconds: more than the front end has threads.
_SLOW = 40

#: After how many seconds PRYING orders again: the order before leaves for the archive.
_ORDERS_AGAIN_SECONDS = 8.0

#: For how long an answer is waited for, in seconds. A process that a fault has killed is back sooner.
PROBE_SECONDS = 20.0

_PAUSE_SECONDS = 0.5


class Visitors:
    """Come and go until they are closed.

    Parameters:
      url: The front end.
      key: An API key with which PRYING, and no one else, may be served.
      log: The load's, which knows the orders.
      visits: Where the answers go.
    """

    def __init__(self, url: str, key: str, log: Log, visits: Path, *, seed: int) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._url = url
        self._key = key
        self._log = log
        self._choice = random.Random(f"{seed}.visitors")
        self._own: list[str] = []
        self._ordered_at = 0.0
        self._visits = visits.open("a", buffering=1)
        self._stop = threading.Event()
        self._slow = SlowClients((address.hostname, address.port), _SLOW)
        self._threads = [
            threading.Thread(target=self._repeat, args=(act,), daemon=True)
            for act in (self._probe, self._pry)
        ]

    def __enter__(self) -> Visitors:
        self._slow.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(4 * PROBE_SECONDS)
            assert not thread.is_alive(), "a visitor did not come to an end"
        self._slow.__exit__()
        self._visits.close()

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._stop.wait(_PAUSE_SECONDS):
            act()

    def _probe(self) -> None:
        began = time.monotonic()
        answer = self._ask("GET", "/health/live", None)
        self._note(kind="probe", answer=_status(answer), seconds=time.monotonic() - began)

    def _pry(self) -> None:
        if time.monotonic() > self._ordered_at + _ORDERS_AGAIN_SECONDS and (own := self._place()):
            self._own.append(own)
            self._ordered_at = time.monotonic()
        known = list(self._log.accepted)[-50:]
        order_id = self._choice.choice([*known, *self._own[-3:], "none"])
        path = self._choice.choice([f"/api/orders/{order_id}", f"/orders/{order_id}", "/api/orders"])
        key = self._choice.choice([self._key, None])
        answer = self._ask("GET", path, key)
        self._note(
            kind="look",
            path=path,
            signed_in=key is not None,
            own=order_id in self._own,
            answer=_status(answer),
            customers=sorted(_customers(answer)),
        )

    def _place(self) -> str | None:
        """Place an order of PRYING, which is one like any other; returns its id once it is accepted."""
        body = {"customer_id": PRYING, "items": [{"sku": "NOTE-01", "quantity": 1}]}
        key = f"{PRYING}-{len(self._own)}"
        answer = self._ask("POST", "/api/orders", self._key, body, key)
        facts = {"kind": "api", "key": key, "customer_id": PRYING, "quantities": {"NOTE-01": 1}}
        if _status(answer) != 202 or isinstance(answer, str):
            self._log.write(**facts, order_id=None, accepted=False, answer=_status(answer))
            return None
        order_id = str(answer.json()["order_id"])
        self._log.write(**facts, order_id=order_id, accepted=True, answer=202)
        return order_id

    def _note(self, **facts: Any) -> None:
        self._visits.write(json.dumps({**facts, "at": time.time()}) + "\n")

    def _ask(
        self, method: str, path: str, key: str | None, body: Any = None, request_key: str = PRYING
    ) -> requests.Response | str:
        headers = {"Accept": "application/json", "Idempotency-Key": request_key}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            return requests.request(
                method, self._url + path, json=body, headers=headers, timeout=PROBE_SECONDS
            )
        except requests.RequestException as error:
            return "Timeout" if isinstance(error, requests.ReadTimeout) else type(error).__name__


def _status(answer: requests.Response | str) -> int | str:
    return answer if isinstance(answer, str) else answer.status_code


def _customers(answer: requests.Response | str) -> set[str]:
    """Return whose orders an answer shows."""
    if isinstance(answer, str) or answer.status_code != 200 or "json" not in answer.headers["Content-Type"]:
        return set()
    body = answer.json()
    return {order["customer_id"] for order in body.get("orders", [body])}
