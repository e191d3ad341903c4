"""The orders in PostgreSQL: every function is one transaction, on disk when it returns, and safe to call again.

A status is changed only from the one before it, so a task that is delivered twice finds its work done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import Connection, connect
from psycopg.errors import CheckViolation
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

FINAL = ("confirmed", "rejected")

PRODUCTS = (
    ("MUG-01", "Enamel mug", 1_290, 100_000),
    ("TEE-01", "T-shirt, organic cotton", 2_450, 100_000),
    ("NOTE-01", "Notebook, dotted", 895, 100_000),
    ("BAG-01", "Canvas bag", 1_999, 100_000),
    ("LAMP-01", "Desk lamp", 5_900, 100_000),
    ("KETTLE-01", "Kettle, 1.2 l", 7_450, 100_000),
    ("CHAIR-01", "Folding chair", 12_900, 20_000),
    ("PRINT-01", "Print, signed, limited to 50", 24_000, 50),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Placed:
    """An order as it is stored; `repeated` when its key had been used before, with this content or another one."""

    order: Row
    repeated: bool


class Store:
    """A pool of connections, one for each thread. Made after a fork."""

    def __init__(self, threads: int) -> None:
        self._pool: ConnectionPool[Connection[Row]] = ConnectionPool(
            os.environ["DATABASE_URL"],
            connection_class=Connection[Row],
            kwargs={"autocommit": True, "row_factory": dict_row},
            min_size=threads,
            max_size=threads,
            open=True,
        )

    def _connection(self) -> AbstractContextManager[Connection[Row]]:
        return self._pool.connection()

    def is_well(self) -> bool:
        with self._connection() as connection:
            return connection.execute("SELECT 1 AS one").fetchone() is not None

    def products(self) -> dict[str, Row]:
        with self._connection() as connection:
            found = connection.execute("SELECT sku, name, unit_price FROM products").fetchall()
        return {row["sku"]: row for row in found}

    def find(self, order_id: str) -> Row | None:
        with self._connection() as connection:
            return connection.execute("SELECT * FROM orders WHERE id = %s", (order_id,)).fetchone()

    def history(self, order_id: str) -> list[Row]:
        query = "SELECT status, at FROM order_history WHERE order_id = %s ORDER BY at"
        with self._connection() as connection:
            return connection.execute(query, (order_id,)).fetchall()

    # -- the steps

    def place(self, order: Mapping[str, Any]) -> Placed:
        """Store an order, its history and the place of its first task in the outbox: one statement, one commit."""
        with self._connection() as connection:
            stored = connection.execute(
                """
                WITH placed AS (
                    INSERT INTO orders (id, customer_id, idempotency_key, request_digest, lines, total, currency,
                                        payment_token, status)
                    VALUES (%(id)s, %(customer_id)s, %(idempotency_key)s, %(request_digest)s, %(lines)s, %(total)s,
                            %(currency)s, %(payment_token)s, 'accepted')
                    ON CONFLICT (customer_id, idempotency_key) DO NOTHING
                    RETURNING *
                ), noted AS (
                    INSERT INTO order_history (order_id, status) SELECT id, status FROM placed
                ), sent AS (
                    INSERT INTO outbox (order_id) SELECT id FROM placed
                )
                SELECT * FROM placed
                """,
                {**order, "lines": Jsonb(order["lines"])},
            ).fetchone()
            if stored is not None:
                return Placed(stored, repeated=False)
            earlier = connection.execute(
                "SELECT * FROM orders WHERE customer_id = %(customer_id)s"
                " AND idempotency_key = %(idempotency_key)s",
                order,
            ).fetchone()
        assert earlier is not None, "orders are never removed"
        return Placed(earlier, repeated=True)

    def reserve(self, order_id: str) -> str:
        """Take the stock of an accepted order, or reject it; returns the order's status then."""
        with self._connection() as connection:
            try:
                with connection.transaction():
                    lines = _forward(connection, order_id, "accepted", "reserved")
                    _move_stock(connection, lines, -1)
            except CheckViolation:
                _forward(connection, order_id, "accepted", "rejected", reason="out of stock")
                return "rejected"
            if lines:
                return "reserved"
            query = "SELECT status FROM orders WHERE id = %s"
            found = connection.execute(query, (order_id,)).fetchone()
            return str(found["status"]) if found else "unknown"

    def pay(self, order_id: str, charge_id: str) -> None:
        """Note the charge of a reserved order."""
        with self._connection() as connection:
            _forward(connection, order_id, "reserved", "paid", charge_id=charge_id)

    def decline(self, order_id: str, reason: str) -> None:
        """Reject a reserved order, and give its stock back."""
        with self._connection() as connection, connection.transaction():
            lines = _forward(connection, order_id, "reserved", "rejected", reason=reason)
            _move_stock(connection, lines, 1)

    def confirm(self, order_id: str) -> None:
        """Make a paid order final."""
        with self._connection() as connection:
            _forward(connection, order_id, "paid", "confirmed")


def _forward(
    connection: Connection[Row],
    order_id: str,
    before: str,
    after: str,
    *,
    charge_id: str | None = None,
    reason: str | None = None,
) -> list[Row]:
    """Change the status of an order and note that; returns its lines, none when it did not have the status before."""
    moved = connection.execute(
        """
        WITH moved AS (
            UPDATE orders SET
                status = %(after)s,
                charge_id = coalesce(%(charge_id)s, charge_id),
                reason = %(reason)s,
                finished_at = CASE WHEN %(final)s THEN clock_timestamp() END
            WHERE id = %(id)s AND status = %(before)s
            RETURNING id, status, lines
        ), noted AS (
            INSERT INTO order_history (order_id, status) SELECT id, status FROM moved
        )
        SELECT lines FROM moved
        """,
        {
            "id": order_id,
            "before": before,
            "after": after,
            "charge_id": charge_id,
            "reason": reason,
            "final": after in FINAL,
        },
    ).fetchone()
    return [] if moved is None else list(moved["lines"])


def _move_stock(connection: Connection[Row], lines: Sequence[Row], sign: int) -> None:
    """Take or give back stock, in the order of the SKUs so that no two orders wait for each other.

    Raises:
      CheckViolation: When a product runs short.
    """
    if not lines:
        return
    moves = sorted((line["sku"], sign * line["quantity"]) for line in lines)
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE products SET stock = stock + %s WHERE sku = %s",
            [(quantity, sku) for sku, quantity in moves],
        )


def take_from_outbox(connection: Connection[Row], limit: int) -> list[str]:
    """Remove the oldest orders that no other relay has; they stay if the transaction is not committed."""
    taken = connection.execute(
        """
        DELETE FROM outbox WHERE position IN (
            SELECT position FROM outbox ORDER BY position LIMIT %s FOR UPDATE SKIP LOCKED
        ) RETURNING position, order_id
        """,
        (limit,),
    ).fetchall()
    return [str(row["order_id"]) for row in sorted(taken, key=lambda row: int(row["position"]))]


def create() -> None:
    """Make the tables, with the products on sale: the release step."""
    schema = (Path(__file__).parent / "schema.sql").read_text()
    with connect(os.environ["DATABASE_URL"]) as connection, connection.cursor() as cursor:
        cursor.execute(schema)  # type: ignore[arg-type]
        cursor.executemany("INSERT INTO products VALUES (%s, %s, %s, %s)", PRODUCTS)


if __name__ == "__main__":
    create()
