"""The library alone as real processes: servers, two fleets of workers, two producers, and the links between them.

Each client process reaches each server through a proxy of its own, so that a fault may slow, hold or break one link.
Clients log in with an nkey that is read from a file, which a fault may rotate or damage.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nkeys
import requests

from dramatiq_jetstream.testing import NatsCluster, NatsServer
from tests.chaos.fleet import Supervisor, Topology
from tests.chaos.library.settings import NEW, OPTIONS
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, WORKER_READY, Process, children
from tests.support.proxy import Proxy

PROGRAM = "tests.chaos.library.program"
FLEETS = ("fleet-1", "fleet-2")
PRODUCERS = ("producer-1", "producer-2")

#: How the harness itself logs in; no fault is about it.
HARNESS = ("harness", "harness")


class Key:
    """An nkey of a client."""

    def __init__(self) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
        self.public = nkeys.from_seed(bytearray(self.seed.encode())).public_key.decode()


class QuietCluster(NatsCluster):
    """A cluster whose nodes tell clients nothing of each other's addresses, which would lead round the proxies."""

    def _make_nodes(self) -> list[NatsServer]:
        nodes = super()._make_nodes()
        for node in nodes:
            assert node.cluster is not None
            routes = json.dumps([f"nats://127.0.0.1:{port}" for port in node.cluster.routes])
            node.config = (
                f'cluster {{ name: {node.cluster.cluster}, listen: "127.0.0.1:{node.cluster.port}", '
                f"routes: {routes}, no_advertise: true }}\n"
            )
        return nodes


class LibraryFleet:
    """Servers (one, or three whose streams have three replicas), two fleets of two workers, and two producers.

    Parameters:
      broken: The names of what is broken in this build (`tests.chaos.library.broken`), for tests of the checker.
    """

    def __init__(
        self,
        directory: Path,
        topology: Topology,
        *,
        rate: float,
        seed: int,
        broken: tuple[str, ...] = (),
        processes: int = 2,
    ) -> None:
        self.directory = directory
        self.topology = topology
        self.journal = directory / "runs.jsonl"
        self.log = directory / "calls.jsonl"
        for file in (self.journal, self.log):
            file.touch()
        self.keys = [Key(), Key()]
        self.nkey = directory / "client.nk"
        self.nkey.write_text(self.keys[0].seed)
        self.nats: NatsServer | NatsCluster
        self.nats = (
            NatsServer(store_dir=directory / "nats")
            if topology == "single"
            else QuietCluster(store_dir=directory / "nats")
        )
        self._config = {node.name: node.config or "" for node in self.nodes}
        self.admit(self.keys)
        self.links: dict[str, list[Proxy]] = {}
        self._probes = [free_port(), free_port()]
        self._rate = rate
        self._seed = seed
        self._broken = broken
        self._processes = processes
        self._exit = ExitStack()
        self._supervisor: Supervisor | None = None
        #: Held by what stops servers or changes them all: two of those at once would leave no quorum.
        self.store_lock = threading.Lock()

    @property
    def nodes(self) -> list[NatsServer]:
        return self.nats.nodes if isinstance(self.nats, NatsCluster) else [self.nats]

    @property
    def nats_url(self) -> str:
        """The servers as the harness reaches them."""
        user, password = HARNESS
        return ",".join(node.url.replace("nats://", f"nats://{user}:{password}@") for node in self.nodes)

    @property
    def all_links(self) -> list[Proxy]:
        return [link for links in self.links.values() for link in links]

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts if self._supervisor else 0

    def __enter__(self) -> LibraryFleet:
        with ExitStack() as starting:
            starting.enter_context(self.nats)
            for client in (*FLEETS, *PRODUCERS):
                self.links[client] = [starting.enter_context(Proxy(node.url)) for node in self.nodes]
            self.fleets = [starting.enter_context(self._workers(number)) for number in (0, 1)]
            for fleet in self.fleets:
                fleet.wait_for_output(WORKER_READY, count=self._processes, timeout=90)
            self.producers = [starting.enter_context(self._producer(name)) for name in PRODUCERS]
            for producer in self.producers:
                producer.wait_for_output("producing", timeout=60)
            self._supervisor = Supervisor([*self.fleets, *self.producers])
            starting.callback(self._supervisor.close)
            self._exit = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_supervising()
        for process in (*self.fleets, *self.producers):
            process.kill()
        self._exit.close()

    def stop_supervising(self) -> None:
        """From now on what ends stays ended."""
        if self._supervisor is not None:
            self._supervisor.close()

    def _environment(self, client: str) -> dict[str, str]:
        replicas = 1 if self.topology == "single" else 3
        return {
            "CHAOS_URL": ",".join(link.url for link in self.links[client]),
            "CHAOS_NKEY": str(self.nkey),
            "CHAOS_OPTIONS": json.dumps({**OPTIONS, "replicas": replicas}),
            "CHAOS_JOURNAL": str(self.journal),
            "CHAOS_BROKEN": ",".join(self._broken),
            "CHAOS_VERSION": NEW,
            "CHAOS_CLOCK": str(self.clock(client)),
        }

    def _workers(self, number: int) -> Process:
        command = [
            *(sys.executable, "-m", "dramatiq_jetstream.cli", "work", PROGRAM),
            *("-p", str(self._processes), "-t", "4", "--http", f"127.0.0.1:{self._probes[number]}"),
            *("--worker-shutdown-timeout", "20000"),
        ]
        return Process(
            command,
            log=self.directory / f"fleet-{number + 1}.log",
            env=self._environment(FLEETS[number]),
            path=[REPOSITORY],
        )

    def _producer(self, name: str) -> Process:
        settings = {
            "log": str(self.log),
            "name": name,
            "seed": self._seed,
            "rate": self._rate / len(PRODUCERS),
            "threads": 4,
        }
        return Process(
            [sys.executable, "-m", "tests.chaos.library.producer"],
            log=self.directory / f"{name}.log",
            env={**self._environment(name), "CHAOS_PRODUCER": json.dumps(settings)},
        )

    def worker_pids(self) -> list[int]:
        """Return the pids of all worker processes, not of their supervisors."""
        return [pid for fleet in self.fleets if fleet.running for pid in children(fleet.pid)]

    def unhealthy(self) -> list[str]:
        """Ask both supervisors whether their workers live and take messages; returns what is not so."""
        found = []
        for number, port in enumerate(self._probes, start=1):
            for probe in ("live", "ready"):
                try:
                    answer = requests.get(f"http://127.0.0.1:{port}/health/{probe}", timeout=10)
                except requests.RequestException as error:
                    found.append(f"fleet {number} does not answer: {type(error).__name__}")
                else:
                    if answer.status_code != 200:
                        found.append(f"fleet {number} is not {probe}: {answer.text.strip()}")
        return found

    # What faults do

    def clock(self, client: str) -> Path:
        """The file that says by how many seconds the clock of a client's processes is wrong."""
        return self.directory / f"{client}.clock"

    def release(self, fleet: Process, version: str) -> None:
        """Stop a fleet as a deployment does; what starts it again starts this version of the program."""
        fleet.env["CHAOS_VERSION"] = version
        if fleet.running:
            fleet.send_signal(signal.SIGTERM)

    def admit(self, keys: list[Key]) -> None:
        """Have the servers admit these keys and no others; servers that run cut off who has another one."""
        users = "".join(f"{{ nkey: {key.public} }}, " for key in keys)
        login = f"{{ user: {HARNESS[0]}, password: {HARNESS[1]} }}"
        for node in self.nodes:
            node.config = f"{self._config[node.name]}authorization {{ users: [{users}{login}] }}\n"
            if node.running:
                (node.store_dir / "nats-server.conf").write_text(node._configuration())
                os.kill(node.pid, signal.SIGHUP)

    def kill_node(self, node: NatsServer, down: float) -> None:
        """kill -9 a server and start it again after `down` seconds, on the same store."""
        with self.down(node):
            time.sleep(down)

    @contextmanager
    def down(self, *nodes: NatsServer) -> Iterator[None]:
        """kill -9 servers, and start them again at the end of the block."""
        for node in nodes:
            node.kill()
        try:
            yield
        finally:
            if isinstance(self.nats, NatsCluster):
                self.nats.start()
            else:
                self.nats.start()

    def leader(self, stream: str) -> NatsServer:
        return self.nats.leader_of(stream) if isinstance(self.nats, NatsCluster) else self.nats

    def copy_store(self) -> Path:
        """Copy the stores of all servers, which must be down."""
        copy = self.directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        for node in self.nodes:
            shutil.copytree(node.store_dir / "jetstream", copy / node.name)
        return copy

    def restore_store(self, copy: Path | None) -> None:
        """Put a copy in the place of the stores of all servers, which must be down; None leaves them empty."""
        for node in self.nodes:
            shutil.rmtree(node.store_dir / "jetstream", ignore_errors=True)
            if copy is not None:
                shutil.copytree(copy / node.name, node.store_dir / "jetstream")

    def wait_until_served(self) -> None:
        """Wait until both fleets have a worker that takes messages."""
        eventually(
            lambda: not self.unhealthy(), timeout=60, interval=0.2, message="the fleets did not get ready"
        )


def pause(condition: Any, seconds: float) -> bool:
    """Wait until a condition holds; returns whether it did within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
