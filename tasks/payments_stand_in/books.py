"""What the stand-in keeps."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
import uuid
from typing import Any, Final

TABLES: Final = ("charges", "refunds", "chargebacks")

#: What the ids of a table begin with, and what is done then.
_MOVED: Final = {"refunds": ("re", "refunded"), "chargebacks": ("cb", "charged back")}


class Charges:
    """Every charge, refund and chargeback ever asked for, in SQLite."""

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
        for table in _MOVED:
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS {table} ("
                " row INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, id TEXT NOT NULL, request TEXT NOT NULL,"
                " order_id TEXT, charge_id TEXT NOT NULL, amount INTEGER NOT NULL, currency TEXT NOT NULL,"
                " status TEXT NOT NULL, created_at REAL NOT NULL)"
            )
            # Added later: what a developer's file may not have yet.
            present = {row["name"] for row in self._database.execute(f"PRAGMA table_info({table})")}
            for name, kind in (("reason", "TEXT"), ("told", "INTEGER NOT NULL DEFAULT 0")):
                if name not in present:
                    self._database.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

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

    def move_back(self, table: str, key: str, request: dict[str, Any]) -> dict[str, Any] | str:
        """Refund or charge back a part of a charge, unless the key has an outcome already; returns that, or why not."""
        prefix, status = _MOVED[table]
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._one(f"SELECT * FROM {table} WHERE key = ?", key)
            if known is not None:
                return known if known["request"] == digest else "the key was used for another one"
            charge = self._one(
                "SELECT * FROM charges WHERE id = ? AND status = 'captured'", request["charge_id"]
            )
            if charge is None or charge["currency"] != request["currency"]:
                return "there is no such charge in this currency"
            left = charge["amount"] - sum(self._moved(other, charge["id"]) for other in _MOVED)
            if request["amount"] > left:
                return f"{left} are left of the charge"
            self._database.execute(
                f"INSERT INTO {table} (key, id, request, order_id, charge_id, amount, currency, status, reason,"
                " created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    f"{prefix}_{uuid.uuid4().hex}",
                    digest,
                    charge["order_id"],
                    charge["id"],
                    request["amount"],
                    charge["currency"],
                    status,
                    request.get("reason"),
                    time.time(),
                ),
            )
            made = self._one(f"SELECT * FROM {table} WHERE key = ?", key)
            assert made is not None, "it was just made"
            return made

    def untold(self) -> list[dict[str, Any]]:
        """Return the chargebacks that the service has not been told of, oldest first."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM chargebacks WHERE told = 0 ORDER BY row LIMIT 100")
            return [dict(row) for row in rows]

    def told(self, chargeback_id: str) -> None:
        """Note that the service was told of a chargeback."""
        with self._lock:
            self._database.execute("UPDATE chargebacks SET told = 1 WHERE id = ?", (chargeback_id,))

    def _one(self, query: str, value: str) -> dict[str, Any] | None:
        row = self._database.execute(query, (value,)).fetchone()
        return None if row is None else dict(row)

    def _moved(self, table: str, charge_id: str) -> int:
        query = f"SELECT COALESCE(SUM(amount), 0) AS moved FROM {table} WHERE charge_id = ?"
        row = self._one(query, charge_id)
        return 0 if row is None else int(row["moved"])

    def list(self, table: str, order_id: str | None, after: int, limit: int) -> list[dict[str, Any]]:
        """Return what a table has in the order in which it was made."""
        assert table in TABLES
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
