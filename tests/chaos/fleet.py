"""The whole service as real processes that a fault may hit, restarted as a platform would restart them."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import requests
from cryptography.fernet import Fernet

from dramatiq_jetstream.testing import NatsCluster, NatsServer
from tests.chaos.network import CLIENTS, NODES, IsolatedCluster, Network
from tests.chaos.visitors import PRYING, UNHEARD
from tests.support.commands import Commands
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, WORKER_READY, Process, children
from tests.web.stack import WEBHOOK_SECRET

Topology = Literal["single", "cluster"]

ACK_WAIT = 3_000
PAYMENT_TIMEOUT = 1_000

SETTINGS = {
    "TOKEN_KEY": Fernet.generate_key().decode(),
    "ACK_WAIT": str(ACK_WAIT),
    "PAYMENT_TIMEOUT": str(PAYMENT_TIMEOUT),
    "ACCEPT_TIMEOUT": "3000",
    # So few that a gateway that is away for seconds exhausts them: dead letters are part of the test.
    "RETRY_LIMIT": "5",
    "RETRY_MIN_BACKOFF": "100",
    "RETRY_MAX_BACKOFF": "1000",
    "WEBHOOK_TIMEOUT": "1000",
    # Orders leave after seconds all the same, see `tests.chaos.operating`.
    "RETENTION_DAYS": "1",
    # So often does the service look whether an order that was cancelled was charged after all.
    "STUCK_AFTER": "10000",
    "OTEL_SDK_DISABLED": "true",
}

#: How soon a process that has ended is started again, in seconds.
RESTART_DELAY = 0.5


class Fleet:
    """nats-server (one, or three with three replicas of every stream), gateway, gunicorn, two worker fleets.

    Parameters:
      directory: Where everything is kept.
      network: The namespaces to run a cluster in; None runs it on the loopback, where nothing can be cut.
      modules: Further modules that the workers import: a broken build for the test of the checker.
      web: The module of the front end's `create_app`: another broken build.
      processes: Worker processes of each of the two worker fleets.
      patient: Whether orders wait for a gateway that is away, or fail when their retries are over.
    """

    def __init__(
        self,
        directory: Path,
        topology: Topology,
        *,
        network: Network | None = None,
        modules: Sequence[str] = (),
        web: str = "web",
        processes: int = 1,
        threads: int = 4,
        patient: bool = False,
    ) -> None:
        self.directory = directory
        self.topology = topology
        self.network = network
        self.journal = directory / "runs.jsonl"
        self.journal.touch()
        self.nats: NatsServer | NatsCluster
        if topology == "single":
            self.nats = NatsServer(store_dir=directory / "nats")
        elif network is not None:
            self.nats = IsolatedCluster(directory / "nats", network)
        else:
            self.nats = NatsCluster(store_dir=directory / "nats")
        self.host = "127.0.0.1" if network is None else network.service_address
        self._ports = (8001, 8000, 8002) if network is not None else (free_port(), free_port(), free_port())
        self.gateway_url = f"http://{self.host}:{self._ports[0]}"
        self.receiver_url = f"http://{self.host}:{self._ports[2]}"
        self.archive = directory / "archive"
        self.archive.mkdir()
        self.url = f"http://{self.host}:{self._ports[1]}"
        self._modules = list(modules)
        self._app = f"{web}:create_app()"
        self._processes = processes
        self._patient = patient
        self._threads = threads
        self._exit = ExitStack()
        self._supervisor: Supervisor | None = None
        #: Held by whatever stops servers or cuts the network: two of those at once would leave no quorum.
        self.store_lock = threading.Lock()

    @property
    def nodes(self) -> list[NatsServer]:
        return self.nats.nodes if isinstance(self.nats, NatsCluster) else [self.nats]

    @property
    def nats_url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **SETTINGS,
            "PAYMENT_PATIENCE": "3600000" if self._patient else "0",
            "NATS_URL": self.nats_url,
            "REPLICAS": "1" if self.topology == "single" else "3",
            "PAYMENT_URL": self.gateway_url,
            "ARCHIVE_DIR": str(self.archive),
            "WEBHOOK_NETWORKS": f"{self.host}/32",
            "CHAOS_JOURNAL": str(self.journal),
        }

    def __enter__(self) -> Fleet:
        with ExitStack() as starting:
            starting.enter_context(self.nats)
            within = self._isolated([])
            self._commands = {
                whose: starting.enter_context(Commands(self.environment, within=within))
                for whose in ("people", "archive", "stock")
            }
            self._setup()
            self.key = self._first_key("chaos")
            self.prying_key = self._first_key("prying", "--customer", PRYING)
            self.unheard_key = self._first_key("unheard", "--customer", UNHEARD)
            self.operator_key = self._first_key("operator", scope="operate")
            self.gateway = starting.enter_context(self._gateway())
            self.receiver = starting.enter_context(self._receiver())
            self.web = starting.enter_context(self._web())
            self.workers = [starting.enter_context(self._workers(number)) for number in (1, 2)]
            for workers in self.workers:
                workers.wait_for_output(WORKER_READY, count=self._processes, timeout=60)
            eventually(self.healthy, timeout=60, interval=0.2, message="the front end did not get ready")
            self._supervisor = Supervisor([self.web, *self.workers, self.receiver])
            starting.callback(self._supervisor.close)
            self._exit = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # What a fault has stopped or cut must move again before it can be told to end.
        if self.network is not None:
            self.network.heal()
        if self._supervisor is not None:
            self._supervisor.close()
        for process in (self.web, *self.workers, self.gateway, self.receiver):
            process.kill()
        self._exit.close()

    def _setup(self) -> None:
        setup = Process(
            self._isolated([sys.executable, "-m", "dramatiq_jetstream.cli", "setup", "tasks"]),
            log=self.directory / "setup.log",
            env=self.environment,
        )
        code = setup.start().wait(timeout=60)
        assert code == 0, f"`fleet setup tasks` ended with {code}:\n{setup.output[-2000:]}"

    def _first_key(self, name: str, *more: str, scope: str = "order") -> str:
        made = self._commands["people"].run("tasks.keys", "add", name, "--scope", scope, *more)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def key_of(self, customer_id: str) -> str | None:
        """Make an API key for a customer, as an operator does; returns None when that does not work now."""
        words = ("add", "person", "--scope", "order", "--customer", customer_id)
        made = self._commands["people"].run("tasks.keys", *words)
        return made.stdout.strip() if made.returncode == 0 else None

    def operate(self, *words: str, dies: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run an operator's command of the same build, in haste; see `tests.chaos.operating`."""
        options = ["--modules", ",".join(self._modules), "--dies", dies or ""]
        whose = "people" if words[0] == "erase" else "archive"
        return self._commands[whose].run("tests.chaos.operating", *options, *words)

    def restock(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the operator's command that changes the stock."""
        return self._commands["stock"].run("tasks.restock", *arguments)

    def _gateway(self) -> Process:
        command = [
            *(sys.executable, "-m", "tasks.payments_stand_in", "--host", self.host),
            *("--port", str(self._ports[0]), "--database", str(self.directory / "payments.sqlite")),
        ]
        return Process(
            self._isolated(command),
            log=self.directory / "gateway.log",
            env={
                "PAYMENTS_WEBHOOK_URL": f"{self.url}/api/payments/events",
                "PAYMENTS_WEBHOOK_SECRET": WEBHOOK_SECRET,
            },
        )

    def _receiver(self) -> Process:
        command = [
            *(sys.executable, "-m", "tests.chaos.receiver", "--host", self.host),
            *("--port", str(self._ports[2]), "--log", str(self.directory / "received.jsonl")),
        ]
        return Process(self._isolated(command), log=self.directory / "receiver.log")

    def _web(self) -> Process:
        command = [sys.executable, "-m", "gunicorn", "-c", "web/gunicorn.conf.py", self._app]
        return Process(
            self._isolated(command),
            log=self.directory / "web.log",
            env={
                **self.environment,
                "HOST": self.host,
                "SECRET_KEY": secrets.token_urlsafe(32),
                "PAYMENT_WEBHOOK_SECRET": WEBHOOK_SECRET,
                "PORT": str(self._ports[1]),
                "WEB_CONCURRENCY": "2",
                "WEB_THREADS": "8",
            },
        )

    def _workers(self, number: int) -> Process:
        command = [
            *(
                sys.executable,
                "-m",
                "dramatiq_jetstream.cli",
                "work",
                "tasks",
                "tests.chaos.journal",
                "tests.chaos.haste",
                *self._modules,
            ),
            *("--processes", str(self._processes), "--threads", str(self._threads)),
        ]
        return Process(
            self._isolated(command),
            log=self.directory / f"workers-{number}.log",
            env=self.environment,
            path=[REPOSITORY],
        )

    def _isolated(self, command: list[str]) -> list[str]:
        return command if self.network is None else [*self.network.command(CLIENTS), *command]

    @property
    def restarts(self) -> int:
        """How many processes were started again."""
        return self._supervisor.restarts if self._supervisor else 0

    def healthy(self) -> bool:
        """Whether the front end says that it can take orders."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    def knobs(self, **changes: object) -> None:
        """Change how the payment gateway behaves."""
        answer = requests.put(f"{self.gateway_url}/knobs", json=changes, timeout=10)
        assert answer.status_code == 200, answer.text

    def worker_pids(self) -> list[int]:
        """Return the pids of all worker processes, not of their masters."""
        return [pid for master in self.workers if master.running for pid in workers_of(master.pid)]

    def leader(self) -> NatsServer:
        """Return the node that leads the stream of orders."""
        return self.nats.leader_of("ORDERS") if isinstance(self.nats, NatsCluster) else self.nats

    def kill_node(self, node: NatsServer, down: float) -> None:
        """kill -9 a nats-server and start it again after `down` seconds, on the same store."""
        node.kill()
        time.sleep(down)
        node.start()
        if isinstance(self.nats, NatsCluster):
            self.nats.wait_until_ready()

    def isolate_node(self, name: str, seconds: float) -> None:
        """Cut a node off from the other nodes; the service still reaches all of them."""
        assert self.network is not None, "only namespaces can be cut"
        for other in NODES:
            if other != name:
                self.network.cut(name, other)
        time.sleep(seconds)
        self.network.heal()

    def isolate_service(self, seconds: float) -> None:
        """Cut the service's processes off from all nodes."""
        assert self.network is not None, "only namespaces can be cut"
        for node in NODES:
            self.network.cut(CLIENTS, node)
        time.sleep(seconds)
        self.network.heal()


class Supervisor:
    """Starts what has ended again, and kills what it left behind, as a platform does that restarts a container."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.restarts = 0
        self._processes = processes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(15)

    def _watch(self) -> None:
        while not self._closed.wait(0.1):
            for process in self._processes:
                if not process.running and not self._closed.is_set():
                    process.kill()
                    if self._closed.wait(RESTART_DELAY):
                        return
                    process.start()
                    self.restarts += 1


def workers_of(master: int) -> list[int]:
    """Return the worker processes of a supervisor."""
    return children(master)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def pick(pids: Sequence[int], choice: random.Random) -> int | None:
    return choice.choice(sorted(pids)) if pids else None
