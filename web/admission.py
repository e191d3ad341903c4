"""Keeps threads free while the store does not answer, so that health checks are answered in time.

A request waits for a lost connection to come back, for as long as ACCEPT_TIMEOUT says: most interruptions are
short, and the client notices nothing. But each one that waits holds a thread, and with all of them held the
process would look dead. So while there is no connection only some may wait: of the half of the threads that no
live page can hold (see `web.live`), two stay free.
"""

from __future__ import annotations

import threading

from flask import Flask, g, request

from tasks import service
from web.problems import unavailable

# What needs no store, or must be answered whatever happens.
_FREE = frozenset(
    {"static", "health.alive", "health.ready", "health.health", "openapi.description", "pages.docs"}
)


def bound(app: Flask, threads: int) -> None:
    """Have the application refuse requests that would have to wait, once the limit of waiting ones is reached."""
    limit = max(1, threads // 2 - 2)
    lock = threading.Lock()
    running = 0

    @app.before_request
    def enter() -> None:
        nonlocal running
        if request.endpoint in _FREE or request.endpoint is None:
            return
        with lock:
            running += 1
            crowded = running > limit
        g.entered = True
        if crowded and not service.nats_connected():
            raise unavailable(
                "The store for orders is not connected, and enough requests wait for it already."
            )

    @app.teardown_request
    def leave(_: BaseException | None) -> None:
        nonlocal running
        if g.pop("entered", False):
            with lock:
                running -= 1
