"""A broken build: an outage of the gateway is an error like any other. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks import actors

actors.is_outage = lambda error: False
