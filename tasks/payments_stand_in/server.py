"""The stand-in's HTTP server."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .books import TABLES, Charges
from .knobs import Knobs
from .webhooks import Teller

DECLINES = {
    "tok_declined": ("card_declined", "the card was declined"),
    "tok_insufficient": ("insufficient_funds", "the account has insufficient funds"),
    "tok_expired": ("expired_card", "the card has expired"),
}

MAX_BODY_BYTES = 64 * 1024


class StandIn(ThreadingHTTPServer):
    """The gateway's server."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, database: str, knobs: Knobs, webhook: tuple[str, str] | None = None
    ) -> None:
        self.charges = Charges(database)
        self.knobs = knobs
        self.teller = None if webhook is None else Teller(self.charges, *webhook)
        self._lock = threading.Lock()
        super().__init__((host, port), Handler)
        if self.teller is not None:
            self.teller.start()

    def change(self, changes: dict[str, Any]) -> None:
        """Change knobs; raises ValueError that names the one that is wrong."""
        with self._lock:
            self.knobs = self.knobs.changed(changes)

    def fails_next(self) -> bool:
        """Tell whether the next answer is one of those that `fail_next` is about, and count it."""
        if not self.knobs.fail_next:
            return False
        with self._lock:
            left = self.knobs.fail_next
            self.knobs = replace(self.knobs, fail_next=max(0, left - 1))
            return left > 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away: tests and chaos do that all the time."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    server: StandIn
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; without this the second waits for the client's delayed ack.
    disable_nagle_algorithm = True
    timeout = 300

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/health":
            self._answer(200, {"status": "ok"})
        elif url.path == "/knobs":
            self._answer(200, asdict(self.server.knobs))
        elif url.path.removeprefix("/") in TABLES:
            table = url.path.removeprefix("/")
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            # Without an order it is asked by people and tests, who are to see what there is.
            knobs = self._knobs_about("lookups") if "order_id" in query else Knobs()
            if self._is_put_off(knobs):
                return
            try:
                after, limit = int(query.get("after", 0)), min(int(query.get("limit", 1_000)), 100_000)
            except ValueError:
                self._answer(400, {"message": "after and limit must be whole numbers"})
                return
            found = self.server.charges.list(table, query.get("order_id"), after, limit)
            if self._is_lost(knobs):
                return
            self._answer(200, {table: found, "next": found[-1]["row"] if len(found) == limit else None})
        else:
            self._answer(404, {"message": "there is nothing here"})

    def do_PUT(self) -> None:
        changes = self._body()
        if changes is None:
            return
        if self.path != "/knobs":
            self._answer(404, {"message": "there is nothing here"})
            return
        try:
            self.server.change(changes)
        except ValueError as error:
            self._answer(400, {"message": str(error)})
            return
        self._answer(200, asdict(self.server.knobs))

    def do_POST(self) -> None:
        what = self.path.removeprefix("/")
        knobs = self._knobs_about(what)
        if knobs.refuse:
            self.close_connection = True
            return
        request = self._body()
        if request is None:
            return
        if what not in TABLES:
            self._answer(404, {"message": "there is nothing here"})
            return
        key = self.headers.get("Idempotency-Key", "")
        problem = _problem(key, request, "token" if what == "charges" else "charge_id")
        if problem is not None:
            self._answer(400, {"code": "invalid_request", "message": problem})
        elif self._is_put_off(knobs):
            return
        elif what == "charges":
            self._charge(key, request, knobs)
        else:
            self._move_back(what, key, request, knobs)

    def _charge(self, key: str, request: dict[str, Any], knobs: Knobs) -> None:
        decline = DECLINES.get(request["token"])
        if decline is None and random.random() < knobs.decline_rate:
            decline = ("card_declined", "the card was declined")
        try:
            charge = self.server.charges.put(key, request, decline)
        except KeyError:
            self._answer(
                422, {"code": "idempotency_key_reused", "message": "the key was used for another charge"}
            )
            return
        if self._is_lost(knobs):
            return
        if charge["status"] == "declined":
            self._answer(402, {name: charge[name] for name in ("id", "status", "code", "message")})
        else:
            self._answer(201, {name: charge[name] for name in ("id", "status", "amount", "currency")})

    def _move_back(self, table: str, key: str, request: dict[str, Any], knobs: Knobs) -> None:
        moved = self.server.charges.move_back(table, key, request)
        if table == "chargebacks" and self.server.teller is not None:
            self.server.teller.wake()
        if isinstance(moved, str):
            self._answer(422, {"code": "refused", "message": moved})
        elif not self._is_lost(knobs):
            names = ("id", "status", "charge_id", "amount", "currency")
            self._answer(201, {name: moved[name] for name in names})

    def _knobs_about(self, what: str) -> Knobs:
        """Return how the gateway behaves about something; well, where the knobs are not about it."""
        knobs = self.server.knobs
        return knobs if what in knobs.about else Knobs()

    def _is_put_off(self, knobs: Knobs) -> bool:
        """Think, then answer 500 before anything is done, or hang up, as the knobs say; True when it has."""
        if knobs.refuse:
            self.close_connection = True
            return True
        time.sleep((knobs.latency_ms + random.uniform(0, knobs.latency_jitter_ms)) / 1000)
        fails = knobs.fail_next > 0 and self.server.fails_next()
        if fails or random.random() < knobs.failure_rate:
            self._answer(500, {"code": "internal", "message": "something went wrong before the charge"})
            return True
        return False

    def _is_lost(self, knobs: Knobs) -> bool:
        """Answer 500 after the work was done, or be silent for a while, as the knobs say; True when it has answered."""
        if random.random() < knobs.failure_after_charge_rate:
            self._answer(500, {"code": "internal", "message": "something went wrong"})
            return True
        if random.random() < knobs.hang_after_charge_rate:
            time.sleep(knobs.hang_ms / 1000)
        return False

    def _body(self) -> dict[str, Any] | None:
        """Return the body's JSON object, or answer 400 and return None."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(400, {"message": "a body with a Content-Length of at most 64 KiB is needed"})
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self._answer(400, {"message": "the body must be a JSON object"})
            return None
        return body

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing for each request."""


def _problem(key: str, request: dict[str, Any], what: str) -> str | None:
    if not key or len(key) > 255:
        return "an Idempotency-Key header of 1 to 255 characters is needed"
    amount = request.get("amount")
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount < 2**53:
        return "amount must be a positive whole number of minor units"
    if not isinstance(request.get("currency"), str) or len(request["currency"]) != 3:
        return "currency must be an ISO 4217 code"
    if not isinstance(request.get(what), str) or not isinstance(request.get("order_id", ""), str):
        return f"{what} and order_id must be text"
    return None
