"""Puts the first task of each order from the outbox on RabbitMQ.

What is published leaves the outbox in the transaction that took it. If the relay dies in between, it is published
again, and the task finds its work done. Any number of relays may run.

It polls: a NOTIFY takes a lock that lets transactions commit one after the other, each with an fsync of its own.
"""

from __future__ import annotations

import os
import time

from psycopg import Connection
from psycopg.rows import dict_row

from benchmarks.contenders.flask_celery_postgres.store import take_from_outbox
from benchmarks.contenders.flask_celery_postgres.tasks import app, reserve

BATCH = 200
IDLE_SECONDS = 0.01


def main() -> None:
    with (
        Connection.connect(os.environ["DATABASE_URL"], row_factory=dict_row) as connection,
        app.producer_or_acquire() as producer,
    ):
        while True:
            with connection.transaction():
                order_ids = take_from_outbox(connection, BATCH)
                for order_id in order_ids:
                    reserve.apply_async((order_id,), producer=producer)
            if not order_ids:
                time.sleep(IDLE_SECONDS)


if __name__ == "__main__":
    main()
