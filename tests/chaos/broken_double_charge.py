"""A broken build: every attempt at a payment has a fresh Idempotency-Key. Workers import this beside `tasks`."""

from __future__ import annotations

import uuid
from typing import Any

import requests

_send = requests.Session.send


def _forgetful(
    self: requests.Session, request: requests.PreparedRequest, **options: Any
) -> requests.Response:
    request.headers["Idempotency-Key"] = uuid.uuid4().hex
    return _send(self, request, **options)


requests.Session.send = _forgetful  # type: ignore[method-assign]
