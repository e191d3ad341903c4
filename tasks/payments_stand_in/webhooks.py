"""Tells the service of chargebacks, signed, until it answers with 2xx."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

from standardwebhooks import Webhook

from .books import Charges

#: How long the service has to answer, and how long it is left alone when it did not take something, in seconds.
_TIMEOUT_SECONDS = 5.0
_PAUSE_SECONDS = 0.5


class Teller(threading.Thread):
    """Tells of what was not told yet, one after the other, on a thread of its own."""

    def __init__(self, charges: Charges, url: str, secret: str) -> None:
        super().__init__(name="webhooks", daemon=True)
        self._charges = charges
        self._url = url
        self._webhook = Webhook(secret)
        self._wake = threading.Event()

    def wake(self) -> None:
        """Say that there is something to tell."""
        self._wake.set()

    def run(self) -> None:
        while True:
            untold = self._charges.untold()
            for chargeback in untold:
                if self._tell(chargeback):
                    self._charges.told(chargeback["id"])
            self._wake.wait(_PAUSE_SECONDS if untold else None)
            self._wake.clear()

    def _tell(self, chargeback: dict[str, Any]) -> bool:
        now = datetime.now(UTC)
        names = ("id", "charge_id", "order_id", "amount", "currency", "reason")
        event = {
            "type": "chargeback.created",
            "timestamp": now.isoformat(),
            "data": {name: chargeback[name] for name in names},
        }
        body = json.dumps(event)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": chargeback["id"],
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._webhook.sign(chargeback["id"], now, body),
        }
        request = urllib.request.Request(self._url, body.encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                return bool(200 <= answer.status < 300)
        except (urllib.error.URLError, OSError):
            return False
