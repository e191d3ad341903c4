"""A broken build: every attempt at a payment has a fresh Idempotency-Key. Workers import this beside `tasks`."""

from __future__ import annotations

import uuid
from typing import Any

import requests

_post = requests.Session.post


def _forgetful(self: requests.Session, url: str, **options: Any) -> requests.Response:
    options["headers"] = {**(options.get("headers") or {}), "Idempotency-Key": uuid.uuid4().hex}
    return _post(self, url, **options)


requests.Session.post = _forgetful  # type: ignore[method-assign]
