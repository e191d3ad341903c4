"""A payment gateway for development and tests, as a process of its own: `python -m tasks.payments_stand_in`.

It behaves as real ones do: `POST /charges` with an `Idempotency-Key` charges once and answers the same for
every repetition; a charge is on disk (SQLite, synchronous=FULL) before it is answered; test tokens are
declined (`tok_declined`, `tok_insufficient`, `tok_expired`).

    GET  /charges      every charge, captured or declined; ?order_id=, ?after= (a row), ?limit=
    POST /refunds      gives back a part of a charge, or all of it; with an Idempotency-Key for each refund
    GET  /refunds      every refund; ?order_id=, ?after=, ?limit=
    GET  /knobs        how it misbehaves now
    PUT  /knobs        change that, with the same JSON; members that are left out stay as they are
    GET  /health       200

The knobs are about refunds as they are about charges. They can also be set by environment variables,
PAYMENTS_LATENCY_MS and so on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

DECLINES = {
    "tok_declined": ("card_declined", "the card was declined"),
    "tok_insufficient": ("insufficient_funds", "the account has insufficient funds"),
    "tok_expired": ("expired_card", "the card has expired"),
}

MAX_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Knobs:
    """How the gateway misbehaves; rates are from 0 to 1.

    Attributes:
      latency_ms: How long it thinks about every charge.
      latency_jitter_ms: How much longer, at random, at most.
      fail_next: To how many of the next charges it answers 500 before it charges; it counts down by itself.
      failure_rate: How often it answers 500 before it charges.
      failure_after_charge_rate: How often it answers 500 although it has charged.
      hang_after_charge_rate: How often it charges, and then says nothing for `hang_ms`.
      decline_rate: How often it declines a token that is good.
      refuse: Hang up on every charge without reading it.
    """

    latency_ms: int = 0
    latency_jitter_ms: int = 0
    fail_next: int = 0
    failure_rate: float = 0.0
    failure_after_charge_rate: float = 0.0
    hang_after_charge_rate: float = 0.0
    hang_ms: int = 10_000
    decline_rate: float = 0.0
    refuse: bool = False

    def changed(self, changes: dict[str, Any]) -> Knobs:
        """Return the knobs with some changed; raises ValueError that names the one that is wrong."""
        known = {name: type(value) for name, value in asdict(self).items()}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            kind = known.get(name)
            if kind is None:
                raise ValueError(f"there is no knob {name!r}; there are {', '.join(known)}")
            if kind is bool:
                good = isinstance(value, bool)
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good = number and (0 <= value <= 1 if kind is float else value >= 0)
            if not good:
                raise ValueError(f"{name} cannot be {value!r}")
            values[name] = kind(value)
        return replace(self, **values)

    @classmethod
    def from_environment(cls) -> Knobs:
        """Return the knobs that PAYMENTS_* variables set."""
        changes = {}
        for field in fields(cls):
            name = f"PAYMENTS_{field.name.upper()}"
            if value := os.environ.get(name):
                try:
                    changes[field.name] = json.loads(value)
                except ValueError:
                    raise SystemExit(f"{name} cannot be {value!r}.") from None
        try:
            return cls().changed(changes)
        except ValueError as error:
            raise SystemExit(f"PAYMENTS_*: {error}.") from None


class Charges:
    """Every charge ever asked for, in SQLite."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS charges ("
            " row INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, id TEXT NOT NULL, request TEXT NOT NULL,"
            " order_id TEXT, amount INTEGER NOT NULL, currency TEXT NOT NULL, token TEXT NOT NULL,"
            " status TEXT NOT NULL, code TEXT, message TEXT, created_at REAL NOT NULL)"
        )
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS refunds ("
            " row INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, id TEXT NOT NULL, request TEXT NOT NULL,"
            " order_id TEXT, charge_id TEXT NOT NULL, amount INTEGER NOT NULL, currency TEXT NOT NULL,"
            " status TEXT NOT NULL, created_at REAL NOT NULL)"
        )

    def put(self, key: str, request: dict[str, Any], decline: tuple[str, str] | None) -> dict[str, Any]:
        """Charge, unless the key has an outcome already; returns the outcome that holds."""
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        code, message = decline or (None, None)
        with self._lock:
            self._database.execute(
                "INSERT INTO charges (key, id, request, order_id, amount, currency, token, status, code,"
                " message, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                (
                    key,
                    f"ch_{uuid.uuid4().hex}",
                    digest,
                    request.get("order_id"),
                    request["amount"],
                    request["currency"],
                    request["token"],
                    "declined" if decline else "captured",
                    code,
                    message,
                    time.time(),
                ),
            )
            row = self._database.execute("SELECT * FROM charges WHERE key = ?", (key,)).fetchone()
        if row["request"] != digest:
            raise KeyError(key)
        return dict(row)

    def refund(self, key: str, request: dict[str, Any]) -> dict[str, Any] | str:
        """Give back a part of a charge, unless the key has an outcome already; returns that, or why it cannot be."""
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._database.execute("SELECT * FROM refunds WHERE key = ?", (key,)).fetchone()
            if known is not None:
                return dict(known) if known["request"] == digest else "the key was used for another refund"
            charge = self._database.execute(
                "SELECT * FROM charges WHERE id = ? AND status = 'captured'", (request["charge_id"],)
            ).fetchone()
            if charge is None or charge["currency"] != request["currency"]:
                return "there is no such charge in this currency"
            (before,) = self._database.execute(
                "SELECT COALESCE(SUM(amount), 0) FROM refunds WHERE charge_id = ?", (charge["id"],)
            ).fetchone()
            if before + request["amount"] > charge["amount"]:
                return f"{charge['amount'] - before} are left of the charge"
            self._database.execute(
                "INSERT INTO refunds (key, id, request, order_id, charge_id, amount, currency, status,"
                " created_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'refunded', ?)",
                (
                    key,
                    f"re_{uuid.uuid4().hex}",
                    digest,
                    charge["order_id"],
                    charge["id"],
                    request["amount"],
                    charge["currency"],
                    time.time(),
                ),
            )
            return dict(self._database.execute("SELECT * FROM refunds WHERE key = ?", (key,)).fetchone())

    def list(self, table: str, order_id: str | None, after: int, limit: int) -> list[dict[str, Any]]:
        """Return the charges or the refunds in the order in which they were made."""
        assert table in ("charges", "refunds")
        with self._lock:
            rows = self._database.execute(
                f"SELECT * FROM {table} WHERE row > ? AND (? IS NULL OR order_id = ?) ORDER BY row LIMIT ?",
                (after, order_id, order_id, limit),
            ).fetchall()
        return [dict(row) for row in rows]

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()


class StandIn(ThreadingHTTPServer):
    """The gateway's server."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, database: str, knobs: Knobs) -> None:
        self.charges = Charges(database)
        self.knobs = knobs
        self._lock = threading.Lock()
        super().__init__((host, port), Handler)

    def change(self, changes: dict[str, Any]) -> None:
        """Change knobs; raises ValueError that names the one that is wrong."""
        with self._lock:
            self.knobs = self.knobs.changed(changes)

    def fails_next(self) -> bool:
        """Tell whether the next charge is one of those that `fail_next` is about, and count it."""
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
        elif url.path in ("/charges", "/refunds"):
            table = url.path.removeprefix("/")
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            try:
                after, limit = int(query.get("after", 0)), min(int(query.get("limit", 1_000)), 100_000)
            except ValueError:
                self._answer(400, {"message": "after and limit must be whole numbers"})
                return
            found = self.server.charges.list(table, query.get("order_id"), after, limit)
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
        knobs = self.server.knobs
        if knobs.refuse:
            self.close_connection = True
            return
        request = self._body()
        if request is None:
            return
        if self.path not in ("/charges", "/refunds"):
            self._answer(404, {"message": "there is nothing here"})
            return
        key = self.headers.get("Idempotency-Key", "")
        problem = _problem(key, request, "token" if self.path == "/charges" else "charge_id")
        if problem is not None:
            self._answer(400, {"code": "invalid_request", "message": problem})
            return
        time.sleep((knobs.latency_ms + random.uniform(0, knobs.latency_jitter_ms)) / 1000)
        if self.server.fails_next() or random.random() < knobs.failure_rate:
            self._answer(500, {"code": "internal", "message": "something went wrong before the charge"})
            return
        if self.path == "/charges":
            self._charge(key, request, knobs)
        else:
            self._refund(key, request, knobs)

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

    def _refund(self, key: str, request: dict[str, Any], knobs: Knobs) -> None:
        refund = self.server.charges.refund(key, request)
        if isinstance(refund, str):
            self._answer(422, {"code": "refund_refused", "message": refund})
        elif not self._is_lost(knobs):
            names = ("id", "status", "charge_id", "amount", "currency")
            self._answer(201, {name: refund[name] for name in names})

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


def main() -> int:
    parser = argparse.ArgumentParser(description="A payment gateway for development and tests.")
    parser.add_argument("--host", default=os.environ.get("HOST") or "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT") or 8001))
    parser.add_argument("--database", default=".data/payments.sqlite", help="where the charges are kept")
    options = parser.parse_args()
    Path(options.database).parent.mkdir(parents=True, exist_ok=True)
    try:
        server = StandIn(options.host, options.port, options.database, Knobs.from_environment())
    except OSError as error:
        print(f"Cannot listen on {options.host}:{options.port} ({error.strerror}): choose another --port.")
        return 1

    def stop(*_: object) -> None:
        # From a thread of its own: shutdown waits for the loop, which this very thread is running.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(
        f"payments stand-in on http://{options.host}:{server.server_port}, charges in {options.database}",
        flush=True,
    )
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    server.charges.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
