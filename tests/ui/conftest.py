"""A live fleet with everything in it that a dashboard shows, and the dashboard itself, served by `fleet ui`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.sending.delays import Delayed, delayed_messages
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.ui import Passwords
from dramatiq_jetstream.workers import list_workers
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import WORKER_READY, Process, python, supervised_workers

NAMESPACE = "shop"
PASSWORD = "correct horse battery"


class Shop:
    """A fleet of real processes with its server and its dashboard."""

    def __init__(self, directory: Path, server: NatsServer) -> None:
        self.directory = directory
        self.server = server
        self.gates = directory / "gates"
        self.gates.mkdir()
        self.broker = JetStreamBroker(server.url, namespace=NAMESPACE)
        self.users = directory / "users.txt"
        kept = Passwords.hash(PASSWORD)
        self.users.write_text(f"# who may come in\nada operator {kept}\nvic viewer {kept}\n")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def workers(self, name: str = "workers", **options: Any) -> Process:
        """Worker processes, not started yet."""
        return supervised_workers(
            "tests.ui.shop",
            log=self.directory / f"{name}.log",
            env={
                "SHOP_GATES": str(self.gates),
                "SHOP_BROKER": json.dumps({"url": self.server.url, "namespace": NAMESPACE}),
            },
            **options,
        )

    def dashboard(self, *arguments: str, port: int | None = None) -> Process:
        """`fleet ui`, not started yet."""
        return python(
            "-m",
            "dramatiq_jetstream.cli",
            "--url",
            self.server.url,
            "--namespace",
            NAMESPACE,
            "ui",
            "--listen",
            f"127.0.0.1:{port or self.port}",
            *arguments,
            log=self.directory / f"dashboard-{port or self.port}.log",
        )

    def send(
        self, queue: str, actor: str, *args: Any, delay: int | None = None, **kwargs: Any
    ) -> Message[Any]:
        """Send a message to an actor of the shop."""
        return self.broker.enqueue(Message(queue, actor, args, kwargs, {}), delay=delay)

    def running(self) -> dict[str, int]:
        """The ids of what runs, with the pid of the process."""
        workers = list_workers(self.broker)
        return {message.message_id: worker.pid for worker in workers for message in worker.running}

    def delayed(self, queue: str) -> list[Delayed]:
        """What waits on a queue for its time."""
        return delayed_messages(self.broker.connection, self.broker.names, queue, limit=1_000)

    def fill_hour(self) -> None:
        """Count an hour of work, as workers would have counted it."""
        now = int(time.time() // 60)
        self.broker.declarations.ensure_activity()
        for back in range(1, 60):
            busy = 1 + math.sin(back / 9)
            for queue, rate, bits in (
                ("mail", 900, 5),
                ("payments", 260, 8),
                ("reports", 40, 12),
                ("video", 6, 15),
            ):
                done = max(1, int(rate * busy))
                counts = {
                    ("ran", bits): done,
                    ("ran", bits + 2): done // 12,
                    ("waited", 3): done,
                    ("waited", 6 + back % 3): done // 15,
                    ("failed", 0): done // 60 if queue == "payments" or back in (20, 21, 22) else 0,
                }
                for (what, power), count in counts.items():
                    subject = self.broker.names.activity(now - back, queue, what, power)
                    self.broker.connection.tell(subject, b"", {"Nats-Incr": f"+{count}"}, lambda _: None)

    def fill(self) -> None:
        """Have one of everything: done, running, retrying, delayed and dead."""
        self.fill_hour()
        for order in range(40):
            self.send("mail", "send_receipt", 1_000 + order, f"customer{order}@example.com")
        for video in ("intro.mov", "keynote.mov", "demo.mov"):
            self.send("video", "transcode", video, preset="1080p")
        for order in range(2_001, 2_013):
            self.send("payments", "capture", order, f"{order % 90}.90 EUR")
        for customer in ("Anvil & Co", "Borealis", "Cyan Ltd"):
            self.send("reports", "monthly_report", customer)
        for minutes in (10, 45, 600):
            self.send("mail", "send_receipt", 9_000 + minutes, "later@example.com", delay=minutes * 60_000)
        eventually(lambda: self.broker.dead_letters.count("payments") == 12, timeout=60)
        eventually(lambda: len(self.running()) == 3, timeout=60)
        eventually(lambda: self.broker.queue_stats("reports").delayed == 3, timeout=60)
        eventually(lambda: self.broker.queue_stats("mail").ready == 0, timeout=60)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer) -> Iterator[Shop]:
    """The shop, started once; a test leaves to others what it did not make itself."""
    with ExitStack() as stack:
        made = Shop(tmp_path_factory.mktemp("shop"), nats_server)
        stack.callback(made.broker.close)
        workers = stack.enter_context(made.workers(processes=2, threads=4))
        workers.wait_for_output(WORKER_READY, count=2, timeout=60)
        dashboard = stack.enter_context(made.dashboard("--users", str(made.users)))
        made.fill()
        dashboard.wait_for_output("The dashboard of shop is at", timeout=60)
        yield made
        for video in ("intro.mov", "keynote.mov", "demo.mov"):
            (made.gates / video).touch()
