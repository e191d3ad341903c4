# ruff: noqa: N999 - gunicorn's own name for this file
"""How gunicorn serves the front end: ``gunicorn -c web/gunicorn.conf.py "web:create_app()"``.

Threads, because a request mostly waits for JetStream's acknowledgement, and because a live page holds its
thread for as long as its stream is open (at most STREAM_DURATION, and at most half the threads). A thread gets a
request when it is there as a whole; slow clients are left to `web.worker`, which also has the limits of time and size.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

# Each process counts into files of this directory, and any of them answers `/metrics` for all. The clients' library
# decides when it is imported, which the next import does, that numbers are kept there.
_own_counts = (
    None if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else tempfile.mkdtemp(prefix="order-metrics-")
)
os.environ["PROMETHEUS_MULTIPROC_DIR"] = _own_counts or os.environ["PROMETHEUS_MULTIPROC_DIR"]
Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).mkdir(parents=True, exist_ok=True)

from tasks.settings import front_end_settings, is_loopback  # noqa: E402

_settings = front_end_settings()

bind = [f"{_settings.host}:{_settings.port}"]
worker_class = "web.worker.BufferedWorker"
workers = _settings.web_processes
threads = _settings.web_threads
# Each process makes its own connection to NATS, so nothing of the application is made before the fork.
preload_app = False
# Seconds without a sign of life after which a worker process is replaced; the application bounds its requests.
timeout = 60
# Longer than an order may take to be stored, so that a stop cuts no answer off.
graceful_timeout = max(20, 2 * _settings.accept_timeout // 1000 + 5)
# Several services on one machine would fight for the default path of the control socket.
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Refuse to be open on an address of the command line that other machines reach."""
    if _settings.access != "open":
        return
    for address in server.cfg.address:
        if isinstance(address, tuple) and not is_loopback(address[0]):
            raise SystemExit(
                f"ACCESS=open works on a loopback address alone, and gunicorn binds {address[0]}."
            )


def child_exit(_server: Any, worker: Any) -> None:
    """Drop the numbers of a process that is gone which say how it is, and keep those that say what it did."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(_server: Any) -> None:
    """Remove the files: the next start counts from zero, as Prometheus expects."""
    if _own_counts is not None:
        shutil.rmtree(_own_counts, ignore_errors=True)


def post_worker_init(_worker: Any) -> None:
    """Tell the live streams when this process is asked to stop, so that they end instead of holding it up."""
    from web import live

    stop = signal.getsignal(signal.SIGTERM)

    def stop_streams(signum: int, frame: Any) -> None:
        live.stopping.set()
        if callable(stop):
            stop(signum, frame)

    signal.signal(signal.SIGTERM, stop_streams)
