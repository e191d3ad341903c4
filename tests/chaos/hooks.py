"""Asks for webhooks, and remembers what was asked for and with which secret it is signed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import requests

#: How long a webhook is asked for, in seconds.
PATIENCE_SECONDS = 60.0


class Hooks:
    """Makes webhooks through the API.

    Parameters:
      url: The front end.
      receiver_url: Where the receiver is.
      log: Where what was made is written down.
    """

    def __init__(self, url: str, receiver_url: str, log: Path) -> None:
        self._url = url
        self._receiver_url = receiver_url
        self._log = log
        self._lock = threading.Lock()

    def make(self, name: str, key: str, events: Sequence[str] = (), customer_id: str | None = None) -> bool:
        """Make a webhook; returns whether that went well.

        An answer that was lost leaves one whose secret no one knows, so each attempt has a path of its own.
        """
        deadline, attempt = time.monotonic() + PATIENCE_SECONDS, 0
        while time.monotonic() < deadline:
            attempt += 1
            path = f"/{name}/{attempt}"
            body = {"url": self._receiver_url + path, "events": list(events), "description": "chaos"}
            headers = {"Authorization": f"Bearer {key}"}
            try:
                answer = requests.post(f"{self._url}/api/webhooks", json=body, headers=headers, timeout=10)
            except requests.RequestException:
                answer = None
            if answer is not None and answer.status_code == 201:
                made = answer.json()
                self._write(path, made["id"], made["secret"], events, customer_id)
                return True
            time.sleep(0.5)
        return False

    def _write(
        self, path: str, webhook_id: str, secret: str, events: Sequence[str], customer_id: str | None
    ) -> None:
        line = {
            "path": path,
            "id": webhook_id,
            "secret": secret,
            "events": list(events),
            "customer_id": customer_id,
            "at": time.time(),
        }
        with self._lock, self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
