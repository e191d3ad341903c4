"""The order service, whole, and what bounds its front end: Flask endpoints that do nothing, and only publish."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import orders_client
from benchmarks.contenders.contender import App, Contender, Stored
from benchmarks.servers import REPOSITORY, NatsServer, Server

# The front end and the workers share a key for Fernet.
os.environ.setdefault("TOKEN_KEY", base64.urlsafe_b64encode(os.urandom(32)).decode())

WEB_PROCESSES = 2
WEB_THREADS = 8


class Gunicorn(Server):
    """A front end under the order service's own gunicorn settings."""

    name = "gunicorn"
    variable = "BENCH_WEB_URL"

    def __init__(self, store: Path, python: str, application: str, beside: Sequence[Server] = ()) -> None:
        super().__init__(store)
        self.python = python
        self.application = application
        self.beside = beside

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        settings = str(REPOSITORY / "web" / "gunicorn.conf.py")
        return [self.python, "-m", "gunicorn", "-c", settings, "--log-level", "warning", self.application]

    def environment(self) -> dict[str, str]:
        return {
            **{server.variable: server.url for server in self.beside},
            "PYTHONPATH": ":".join(str(REPOSITORY / part) for part in (".", "broker", "proto")),
            "HOST": "127.0.0.1",
            "ACCESS": "open",
            "PORT": str(self.port),
            "WEB_CONCURRENCY": str(WEB_PROCESSES),
            "WEB_THREADS": str(WEB_THREADS),
        }

    def answers(self) -> bool:
        question = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        return self._exchange(question, b" 200 ")


class Payments(Server):
    """The payment gateway of development."""

    name = "payments"
    variable = "PAYMENT_URL"

    def __init__(self, store: Path, python: str) -> None:
        super().__init__(store)
        self.python = python

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        database = str(self.store / "payments.sqlite")
        program = [self.python, "-m", "tasks.payments_stand_in"]
        return [*program, "--port", str(self.port), "--database", database]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": ":".join(str(REPOSITORY / part) for part in (".", "broker", "proto"))}

    def answers(self) -> bool:
        question = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        return self._exchange(question, b" 200 ")


class OrderService(Contender):
    name = "order-service"
    title = "order service"
    durability = "JetStream file storage, sync_interval always"
    note = "gunicorn with 2 processes × 8 threads, payments charged in SQLite with synchronous=FULL"
    distributions = ("flask", "gunicorn", "dramatiq", "nats-py")
    only = ("orders",)
    ours = True

    def servers(self, store: Path, measurement: str) -> list[Server]:
        nats = NatsServer(store / "nats")
        nats.variable = "NATS_URL"
        payments = Payments(store / "payments", self.python)
        web = Gunicorn(store / "web", self.python, "web:create_app()", (nats, payments))
        return [nats, payments, web]

    def server_versions(self) -> dict[str, str]:
        return {NatsServer.name: NatsServer.version()}

    def unavailable(self) -> str | None:
        return NatsServer.missing()

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        scale = ["--processes", str(processes), "--threads", str(threads)]
        return [[python, "-m", "dramatiq", "tasks", *scale]]

    def stored(self, servers: list[Server]) -> list[Stored]:
        from dramatiq_jetstream import JetStreamBroker

        broker = JetStreamBroker(servers[0].url, declare=False, middleware=[])
        try:
            streams = broker.connection.api("STREAM.LIST")["streams"]
        finally:
            broker.close()
        return [
            Stored(stream["config"]["name"], stream["state"]["last_seq"], stream["state"]["bytes"])
            for stream in streams
            if stream["config"]["storage"] == "file"
        ]

    def app(self) -> App:
        return Client()


class FlaskEmpty(Contender):
    name = "flask-empty"
    title = "bound: empty Flask endpoint"
    durability = "none: stores nothing"
    note = "the same gunicorn settings"
    distributions = ("flask", "gunicorn")
    only = ("orders",)
    bound = True

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [Gunicorn(store / "web", self.python, "benchmarks.empty_flask:create_app()")]

    def app(self) -> App:
        return Client()


class FlaskPublishing(FlaskEmpty):
    name = "flask-publishing"
    title = "bound: Flask endpoint that only publishes"
    durability = "JetStream file storage, sync_interval always"
    note = "the same gunicorn settings; one message made beforehand"
    distributions = ("flask", "gunicorn", "nats-py")

    def servers(self, store: Path, measurement: str) -> list[Server]:
        nats = NatsServer(store / "nats")
        nats.variable = "NATS_URL"
        return [
            nats,
            Gunicorn(store / "web", self.python, "benchmarks.publishing_flask:create_app()", (nats,)),
        ]

    def server_versions(self) -> dict[str, str]:
        return {NatsServer.name: NatsServer.version()}

    def unavailable(self) -> str | None:
        return NatsServer.missing()


class Client(App):
    """Knows where the front end is, and where it is told what became of orders; `benchmarks.orders_client` asks."""

    broker = None

    def __init__(self) -> None:
        self.web_url = os.environ[Gunicorn.variable]

    def wait_confirmed(self, orders: int, timeout: float) -> list[tuple[int, int]]:
        """Waits until all orders are confirmed; returns when each was created and confirmed (server's nanoseconds)."""
        return orders_client.wait_confirmed(os.environ["NATS_URL"], orders, timeout)
