"""The steps of the order service as many teams would write them: Flask, Celery, RabbitMQ and PostgreSQL.

An order is accepted with one commit, which also puts it into an outbox; a relay sends its first task. Three tasks
reserve, charge and confirm, with late acks and publisher confirms, so nothing that was accepted is lost. The front end
and the fleet are as large as the order service's, and the payment gateway is the same program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contenders.contender import App, Contender
from benchmarks.contenders.order_service import WEB_PROCESSES, WEB_THREADS, Client, Gunicorn, Payments
from benchmarks.processes import BenchmarkError
from benchmarks.servers import REPOSITORY, PostgresServer, RabbitServer, Server

HERE = "benchmarks.contenders.flask_celery_postgres"


class FlaskCeleryPostgres(Contender):
    name = "flask-celery-postgres"
    title = "Flask + Celery + RabbitMQ + PostgreSQL"
    durability = (
        "PostgreSQL as it is (one commit an acceptance), durable queues, publisher confirms, late acks"
    )
    note = (
        f"gunicorn with {WEB_PROCESSES} processes × {WEB_THREADS} threads, Celery with 2 × 8 threads, a relay for the "
        "outbox; the same payment gateway"
    )
    environment = "flask-celery-postgres"
    packages = (
        "celery>=5.6,<6",
        "flask>=3.1,<4",
        "gunicorn>=25.1,<28",
        "psycopg[binary,pool]>=3.2,<4",
        "requests>=2.32,<3",
    )
    distributions = ("flask", "gunicorn", "celery", "psycopg")
    only = ("orders",)

    def servers(self, store: Path, measurement: str) -> list[Server]:
        database = Database(store / "postgres", self.python)
        payments = Payments(store / "payments", sys.executable)
        web = FrontEnd(store / "web", self.python, f"{HERE}.web:create_app()", [database])
        return [Broker(store / "rabbitmq"), database, payments, web]

    def server_versions(self) -> dict[str, str]:
        return {server.name: server.version() for server in (RabbitServer, PostgresServer)}

    def unavailable(self) -> str | None:
        return RabbitServer.missing() or PostgresServer.missing()

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
        pool = ["--pool", "threads", "--concurrency", str(threads), "--queues", "orders,payments"]
        run = ["env", f"WORKER_THREADS={threads}", python, "-m"]
        worker = [*run, "celery", "-A", f"{HERE}.tasks:app", "worker", *pool, *quiet]
        named = [[*worker, "--hostname", f"worker{number}@localhost"] for number in range(processes)]
        return [*named, [*run, f"{HERE}.relay"]]

    def app(self) -> App:
        return PostgresClient()


class Broker(RabbitServer):
    """RabbitMQ with an address as Celery reads it."""

    variable = "BROKER_URL"

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"


class Database(PostgresServer):
    """PostgreSQL with the tables of the service."""

    def __init__(self, store: Path, python: str) -> None:
        super().__init__(store)
        self.python = python

    def start(self) -> None:
        super().start()
        made = subprocess.run(
            [self.python, "-m", f"{HERE}.store"],
            cwd=REPOSITORY,
            env={**os.environ, self.variable: self.url},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if made.returncode != 0:
            raise BenchmarkError(f"its tables could not be made: {made.stderr.strip()[-300:]}")


class FrontEnd(Gunicorn):
    """The front end under gunicorn's own threaded worker, which has as many processes and threads as ours."""

    def command(self) -> list[str]:
        size = ["--workers", str(WEB_PROCESSES), "--threads", str(WEB_THREADS), "--worker-class", "gthread"]
        address = ["--bind", f"127.0.0.1:{self.port}", "--keep-alive", "10", "--no-control-socket"]
        return [self.python, "-m", "gunicorn", *size, *address, "--log-level", "warning", self.application]


class PostgresClient(Client):
    """Reads in the orders' rows when each was placed and confirmed."""

    def wait_confirmed(self, orders: int, timeout: float) -> list[tuple[int, int]]:
        """Waits until all orders are confirmed; returns when each was placed and confirmed (server's nanoseconds)."""
        import psycopg

        deadline = time.monotonic() + timeout
        with psycopg.connect(os.environ[Database.variable], autocommit=True) as connection:
            counts: dict[str, int] = {}
            while sum(counts.values()) < orders:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"of {orders} orders only these were finished in time: {counts}")
                time.sleep(0.1)
                finished = "SELECT status, count(*) FROM orders WHERE finished_at IS NOT NULL GROUP BY status"
                counts = dict(connection.execute(finished).fetchall())
            if counts.get("confirmed") != orders:
                raise RuntimeError(f"not all of {orders} orders were confirmed: {counts}")
            times = connection.execute(
                "SELECT extract(epoch FROM placed_at) * 1e9, extract(epoch FROM finished_at) * 1e9 FROM orders"
            ).fetchall()
        return [(int(placed), int(confirmed)) for placed, confirmed in times]
