"""Probes and metrics of a fleet over HTTP, served by a thread of the supervisor.

- `/health/live`: 200 while the supervisor and every worker's process, loop and threads are alive. A worker that runs a
  long actor is alive; one whose interpreter or loop is stuck is not.
- `/health/ready`: 200 while at least one worker is connected to NATS and takes messages.
- `/metrics`: Prometheus text, all workers summed.

It is made for probes: one request at a time for each connection, each within seconds. It has no authentication, so
bind it to loopback or to a network that only the platform reaches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .slots import WorkerProcess
from .supervisor import Supervisor

__all__ = ["HealthPortError", "serve_health"]

#: Milliseconds without a sign of life after which a worker counts as stuck.
STUCK_MS = 15_000

#: Seconds within which a client has to send its request.
REQUEST_SECONDS = 5


class HealthPortError(Exception):
    """The address for probes cannot be used."""


@contextlib.contextmanager
def serve_health(supervisor: Supervisor, address: tuple[str, int] | None) -> Iterator[None]:
    """Serve for the length of the block; nothing when `address` is None."""
    if address is None:
        yield
        return

    class Handler(_Handler):
        timeout = REQUEST_SECONDS
        fleet = supervisor

    try:
        server = ThreadingHTTPServer(address, Handler)
    except OSError as error:
        raise HealthPortError(
            f"--http {address[0]}:{address[1]} cannot be served: {error.strerror}. Choose another port."
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fleet: Supervisor

    def do_GET(self) -> None:
        """Answer a probe."""
        if self.path == "/health/live":
            stuck = [process.pid for process in self.fleet.workers if _is_stuck(process)]
            self._answer(503 if stuck else 200, f"stuck: {stuck}\n" if stuck else "alive\n")
        elif self.path == "/health/ready":
            ready = not self.fleet.is_quiet and any(map(_is_ready, self.fleet.workers))
            why_not = "the fleet is quiet\n" if self.fleet.is_quiet else "no worker is connected yet\n"
            self._answer(200 if ready else 503, "ready\n" if ready else why_not)
        elif self.path == "/metrics":
            self._answer(200, _metrics(self.fleet), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._answer(404, "there are /health/live, /health/ready and /metrics\n")

    def _answer(self, status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Nothing: probes come every few seconds."""


def _is_stuck(process: WorkerProcess) -> bool:
    if process.ready is None or process.stopping:
        return False
    if process.board.threads_lost:
        return True
    return time.monotonic() * 1000 - process.board.last_beat > STUCK_MS


def _is_ready(process: WorkerProcess) -> bool:
    return process.ready is not None and not process.stopping and process.board.connected


def _metrics(fleet: Supervisor) -> str:
    workers = fleet.workers
    finished, failed = fleet.totals()
    families: list[tuple[str, str, str, float]] = [
        ("fleet_workers", "gauge", "Worker processes that serve.", sum(map(_is_ready, workers))),
        ("fleet_workers_wanted", "gauge", "Worker processes that were asked for.", len(fleet.slots)),
        ("fleet_worker_restarts_total", "counter", "Workers replaced because they had died.", fleet.restarts),
        ("fleet_worker_recycled_total", "counter", "Workers replaced at a limit.", fleet.recycled),
        ("fleet_attempts_total", "counter", "Attempts that ended.", finished),
        ("fleet_attempts_failed_total", "counter", "Attempts that ended with an error.", failed),
        (
            "fleet_in_flight",
            "gauge",
            "Messages that workers hold.",
            sum(1 for p in workers for _ in p.board.held()),
        ),
        ("fleet_memory_bytes", "gauge", "Resident memory of all workers.", sum(p.memory() for p in workers)),
    ]
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n"
        for name, kind, text, value in families
    )
