# ruff: noqa: N999 - gunicorn's own name for this file
"""How gunicorn serves the front end: ``gunicorn -c web/gunicorn.conf.py "web:create_app()"``.

Threads, because a request mostly waits for JetStream's acknowledgement, and because a live page holds its
thread for as long as its stream is open (at most ``web.live.STREAM_SECONDS``, and at most half the threads).
"""

from __future__ import annotations

import os
import signal
from typing import Any


def _positive(name: str, default: int) -> int:
    value = os.environ.get(name, "") or str(default)
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise SystemExit(f"{name} must be a whole number of at least 1, not {value!r}: correct or unset it.")
    return int(value)


bind = [f"{os.environ.get('HOST') or '0.0.0.0'}:{_positive('PORT', 8000)}"]
worker_class = "gthread"
workers = _positive("WEB_CONCURRENCY", 2)
threads = _positive("WEB_THREADS", 16)
# Each process makes its own connection to NATS, so nothing is shared from before the fork.
preload_app = False
# A worker that answers no heartbeat for this long is replaced; requests themselves are bounded by the app.
timeout = 60
# Longer than an accepted order may take to be stored, so that a stop does not cut an answer off.
graceful_timeout = 20
keepalive = 5
limit_request_line = 4094
limit_request_field_size = 8190
limit_request_fields = 64
# Several services on one machine would fight for the default path of the control socket.
control_socket_disable = True


def post_worker_init(_worker: Any) -> None:
    """Tell the live streams when this worker is asked to stop, so that they end instead of holding it up."""
    from web import live

    stop = signal.getsignal(signal.SIGTERM)

    def stop_streams(signum: int, frame: Any) -> None:
        live.stopping.set()
        if callable(stop):
            stop(signum, frame)

    signal.signal(signal.SIGTERM, stop_streams)
