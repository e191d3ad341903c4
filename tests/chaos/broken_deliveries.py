"""A broken build: a delivery counts as accepted when it was sent. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.webhooks.deliveries import Attempt

Attempt.is_success = property(lambda self: True)  # type: ignore[assignment, method-assign]
