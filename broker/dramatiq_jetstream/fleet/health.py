"""Probes and metrics of a fleet over HTTP, served by a thread of the supervisor.

- `/health/live`: 200 while the supervisor and every worker's process, loop and threads are alive. A worker that runs a
  long actor is alive; one whose interpreter or loop is stuck is not.
- `/health/ready`: 200 while at least one worker is connected to NATS and takes messages.
- `/metrics`: Prometheus text, all workers summed, and what the program itself counts with `prometheus_client`.

It is made for probes: one request at a time for each connection, each within seconds. It has no authentication, so
bind it to loopback or to a network that only the platform reaches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from . import program_metrics
from .metrics import CONTENT_TYPE, metrics
from .supervisor import Supervisor

__all__ = ["HealthPortError", "serve_health"]

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
        with program_metrics.counting():
            yield
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fleet: Supervisor

    def do_GET(self) -> None:
        """Answer a probe."""
        path = self.path.partition("?")[0]
        if path == "/health/live":
            stuck = [process.pid for process in self.fleet.workers if process.is_stuck]
            pids = ", ".join(map(str, stuck))
            self._answer(503 if stuck else 200, f"worker PID {pids} does not move\n" if stuck else "alive\n")
        elif path == "/health/ready":
            ready = not self.fleet.is_quiet and any(process.serves for process in self.fleet.workers)
            why_not = "the fleet is quiet\n" if self.fleet.is_quiet else "no worker is connected\n"
            self._answer(200 if ready else 503, "ready\n" if ready else why_not)
        elif path == "/metrics":
            alive = {process.pid for process in self.fleet.workers}
            self._answer(200, metrics(self.fleet) + program_metrics.text(alive), CONTENT_TYPE)
        else:
            self._answer(404, "there are /health/live, /health/ready and /metrics\n")

    def do_HEAD(self) -> None:
        """Answer a probe that wants the status alone."""
        self.do_GET()

    def _answer(self, status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Nothing: probes come every few seconds."""
