"""A broken build of the front end: it waits for the rest of a request before it looks at another connection."""

from __future__ import annotations

import time
from itertools import count

from flask import Flask

from tests.chaos.visitors import PROBE_SECONDS
from web.app import create_app as build
from web.worker import Channel

_received = Channel.received
_waited = count()


def _wait(self: Channel, data: bytes) -> bool:
    taken = _received(self, data)
    # Once in a process: that is found, and a client who goes on for ever would keep the run from its end.
    if self.request is not None and next(_waited) == 0:
        time.sleep(PROBE_SECONDS + 5)
    return taken


Channel.received = _wait  # type: ignore[method-assign]


def create_app() -> Flask:
    """Return the front end as it is built in this way."""
    return build()
