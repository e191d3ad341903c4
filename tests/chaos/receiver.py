"""A receiver of webhooks that refuses, hangs, hangs up and dies: `python -m tests.chaos.receiver`.

Each request is written down as it came, with the answer that it is about to get, before it is answered. Requests to a
path with `unheard` in it are all refused.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import signal
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: How much of each a request meets; the rest is accepted.
REFUSED, CUT, ANSWER_LOST, HUNG, DIED = 0.10, 0.03, 0.03, 0.01, 0.004

#: Longer than WEBHOOK_TIMEOUT.
_HANGS_SECONDS = 1.5


class Server(ThreadingHTTPServer):
    """Writes down what comes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], log: Path) -> None:
        super().__init__(address, Handler)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, request: Handler, body: bytes, answer: int) -> None:
        """Append a request and what it is about to be answered; 0 is no answer."""
        line = {
            "path": request.path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": base64.b64encode(body).decode(),
            "answer": answer,
            "at": time.time(),
        }
        os.write(self._log, json.dumps(line).encode() + b"\n")


class Handler(BaseHTTPRequestHandler):
    """Answers one request as chance will have it."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "unheard" in self.path:
            self._answer(body, 503)
            return
        chance = random.random()
        for share, act in (
            (REFUSED, lambda: self._answer(body, 500)),
            (CUT, lambda: self._cut(body, 0)),
            (ANSWER_LOST, lambda: self._cut(body, 200)),
            (HUNG, lambda: self._hang(body)),
            (DIED, lambda: self._die(body)),
        ):
            chance -= share
            if chance < 0:
                act()
                return
        self._answer(body, 200)

    def _answer(self, body: bytes, status: int) -> None:
        self.server.note(self, body, status)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _cut(self, body: bytes, noted: int) -> None:
        self.server.note(self, body, noted)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _hang(self, body: bytes) -> None:
        self.server.note(self, body, 0)
        time.sleep(_HANGS_SECONDS)
        self.close_connection = True

    def _die(self, body: bytes) -> None:
        self.server.note(self, body, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def log_message(self, *_: object) -> None:
        """Say nothing: what came is written down."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    Server((options.host, options.port), options.log).serve_forever()


if __name__ == "__main__":
    main()
