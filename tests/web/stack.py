"""The whole order service as real processes: nats-server, payment gateway, workers, gunicorn."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from dramatiq_jetstream.testing import NatsServer
from tests.support.commands import Commands
from tests.support.orders import check_whole
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import WORKER_READY, Process, dramatiq_worker, python

FINAL = ("confirmed", "rejected")

#: With which the gateway signs what it tells.
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"a secret of the tests, no more").decode()


class Stack:
    """The service on ports of its own. Use it as a context manager; `url` is the front end's address."""

    def __init__(
        self,
        directory: Path,
        *,
        sync: str = "2m",
        web_processes: int = 1,
        workers: bool = True,
        env: Mapping[str, str] | None = None,
        nats: NatsServer | None = None,
        front_end: str = "web:create_app()",
    ) -> None:
        self.directory = directory
        self.nats = nats or NatsServer(store_dir=directory / "nats", sync=sync)
        self._nats_runs = nats is not None
        self.gateway_port = free_port()
        self.web_port = free_port()
        self.url = f"http://127.0.0.1:{self.web_port}"
        self.gateway_url = f"http://127.0.0.1:{self.gateway_port}"
        self.web_processes = web_processes
        self._with_workers = workers
        self._front_end = front_end
        self.env = dict(env or {})
        self._exit = ExitStack()
        self.session = requests.Session()

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the service is told."""
        return {
            "NATS_URL": self.nats.url,
            "PAYMENT_URL": self.gateway_url,
            "PAYMENT_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "ACCESS": "open",
            "PAYMENT_PATIENCE": "0",
            "RETRY_MIN_BACKOFF": "50",
            "RETRY_MAX_BACKOFF": "500",
            **self.env,
        }

    def __enter__(self) -> Stack:
        with ExitStack() as starting:
            if not self._nats_runs:
                starting.enter_context(self.nats)
            self._commands = starting.enter_context(Commands(self.environment))
            gateway = starting.enter_context(self._gateway())
            if self._with_workers:
                self.workers = starting.enter_context(self._workers())
            self.web = starting.enter_context(self._web())
            starting.callback(self.session.close)
            gateway.wait_for_output("payments stand-in on", timeout=90)
            if self._with_workers:
                self.workers.wait_for_output(WORKER_READY, timeout=90)
            eventually(
                self.healthy,
                timeout=90,
                interval=0.1,
                message=f"the front end did not get ready:\n{self.web.output}",
            )
            self._exit = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _gateway(self) -> Process:
        return python(
            *("-m", "tasks.payments_stand_in", "--port", str(self.gateway_port)),
            *("--database", self.directory / "payments.sqlite"),
            log=self.directory / "gateway.log",
            env={
                "PAYMENTS_WEBHOOK_URL": f"{self.url}/api/payments/events",
                "PAYMENTS_WEBHOOK_SECRET": WEBHOOK_SECRET,
            },
        )

    def _workers(self) -> Process:
        return dramatiq_worker("tasks", log=self.directory / "workers.log", env=self.environment)

    def _web(self) -> Process:
        return Process(
            gunicorn(self._front_end),
            log=self.directory / "web.log",
            env={
                **self.environment,
                "HOST": "127.0.0.1",
                "PORT": str(self.web_port),
                "WEB_CONCURRENCY": str(self.web_processes),
            },
        )

    def knobs(self, **changes: object) -> None:
        """Change how the payment gateway behaves: latency_ms=1000, failure_rate=0.5."""
        answer = self.session.put(f"{self.gateway_url}/knobs", json=changes, timeout=10)
        assert answer.status_code == 200, answer.text

    def healthy(self) -> bool:
        """Whether the front end says that it can take orders."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=60, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.session.post(self.url + path, timeout=60, **options)

    def command(self, module: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command of the service, as `python -m MODULE ARGUMENT ...` does."""
        return self._commands.run(module, *arguments, stdin=stdin)

    def order(self, *items: tuple[str, int], customer_id: str = "c-42", **members: Any) -> dict[str, Any]:
        """Place an order through the API; returns what it answered."""
        body = order_body(*items, customer_id=customer_id, **members)
        answer = self.post("/api/orders", json=body)
        assert answer.status_code == 202, f"{answer.status_code}: {answer.text}"
        order: dict[str, Any] = answer.json()
        return order

    def final(self, order_id: str, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the order is confirmed or rejected, with its whole history; returns it."""

        def order() -> dict[str, Any] | None:
            answer = self.get(f"/api/orders/{order_id}")
            assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
            body: dict[str, Any] = answer.json()
            assert body["status"] in FINAL, f"the order is {body['status']}"
            check_whole(body)
            return body

        return eventually(order, timeout=timeout, interval=0.1)  # type: ignore[return-value]


def gunicorn(front_end: str = "web:create_app()") -> list[str]:
    """Return the command that serves the front end, as the Procfile has it."""
    return [sys.executable, "-m", "gunicorn", "-c", "web/gunicorn.conf.py", front_end]


def order_body(*items: tuple[str, int], customer_id: str = "c-42", **members: Any) -> dict[str, Any]:
    """Return the JSON of an order."""
    chosen = items or (("MUG-01", 2),)
    return {
        "customer_id": customer_id,
        "items": [{"sku": sku, "quantity": quantity} for sku, quantity in chosen],
        **members,
    }
