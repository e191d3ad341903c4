"""Clusters of three real servers on loopback, each node a `Server`; the url of every node names all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import Process, wait_until
from benchmarks.servers import NatsServer, RabbitServer, RedisServer, Server, find, free_port

NODES = 3
READY_SECONDS = 90.0


class NatsNode(NatsServer):
    """One of three nats-servers that replicate JetStream's streams among them."""

    def __init__(self, store: Path, sync: str, number: int) -> None:
        super().__init__(store, sync)
        self.number = number
        self.route_port = free_port()
        self.nodes: Sequence[NatsNode] = ()

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{node.port}" for node in self.nodes)

    def command(self) -> list[str]:
        command = super().command()
        routes = ", ".join(f'"nats://127.0.0.1:{node.route_port}"' for node in self.nodes)
        with Path(command[-1]).open("a") as config:
            config.write(
                f"server_name: n{self.number}\n"
                f'cluster {{ name: bench, listen: "127.0.0.1:{self.route_port}", routes: [{routes}] }}\n'
            )
        return command

    def start(self) -> None:
        super().start()
        if all(node.process is not None for node in self.nodes):
            wait_until(self.has_leader, READY_SECONDS, "the cluster has a leader")

    def has_leader(self) -> bool:
        """Whether JetStream answers, which it does once its nodes have a leader."""
        question = b'CONNECT {"verbose":false}\r\nSUB bench.inbox 1\r\nPUB $JS.API.INFO bench.inbox 0\r\n\r\n'
        return self._exchange(question, b"streams")


def nats_cluster(store: Path, sync: str) -> list[Server]:
    """Three nodes; what is stored has three replicas where the program asks for them."""
    nodes = [NatsNode(store / f"nats-{number}", sync, number) for number in range(1, NODES + 1)]
    for node in nodes:
        node.nodes = nodes
    return list(nodes)


class RabbitNode(RabbitServer):
    """One of three nodes of RabbitMQ; they find each other by a list of names."""

    def __init__(self, store: Path, number: int, home: Path, epmd_port: int) -> None:
        super().__init__(store)
        self.number = number
        self.home = home
        self.epmd_port = epmd_port
        self.nodes: Sequence[RabbitNode] = ()

    @property
    def url(self) -> str:
        query = "heartbeat=60&blocked_connection_timeout=30"
        return ";".join(f"amqp://guest:guest@127.0.0.1:{node.port}/%2f?{query}" for node in self.nodes)

    def command(self) -> list[str]:
        command = super().command()
        names = [
            f"cluster_formation.classic_config.nodes.{node.number} = bench{node.number}@localhost\n"
            for node in self.nodes
        ]
        with (self.store / "rabbitmq.conf").open("a") as config:
            config.write("cluster_formation.peer_discovery_backend = classic_config\n" + "".join(names))
        return command

    def environment(self) -> dict[str, str]:
        return {
            **super().environment(),
            "HOME": str(self.home),  # the cookie that all nodes share is there
            "RABBITMQ_NODENAME": f"bench{self.number}@localhost",
        }

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        if self.number > 1:
            Server.start(self)
            return
        if self.epmd is None:
            self.store.mkdir(parents=True, exist_ok=True)
            command = [find("epmd"), "-port", str(self.epmd_port), "-address", "127.0.0.1"]
            self.epmd = Process(command, self.store / "epmd.log")
        Server.start(self)


def rabbit_cluster(store: Path) -> list[Server]:
    """Three nodes; queues are replicated where they are declared as quorum queues."""
    home, epmd_port = store / "rabbit-home", free_port()
    nodes = [
        RabbitNode(store / f"rabbitmq-{number}", number, home, epmd_port) for number in range(1, NODES + 1)
    ]
    for node in nodes:
        node.nodes = nodes
    return list(nodes)


class RedisReplica(RedisServer):
    """A redis-server that copies another one."""

    variable = "BENCH_REDIS_REPLICA"

    def __init__(self, store: Path, fsync: str, primary: RedisServer) -> None:
        super().__init__(store, fsync)
        self.primary = primary

    def command(self) -> list[str]:
        return [*super().command(), "--replicaof", "127.0.0.1", str(self.primary.port)]

    def start(self) -> None:
        super().start()
        ready = b"master_link_status:up"
        wait_until(
            lambda: self._exchange(b"INFO replication\r\n", ready), READY_SECONDS, "the replica is in step"
        )


def redis_replicas(store: Path, fsync: str) -> list[Server]:
    """A primary and two replicas."""
    primary = RedisServer(store / "redis-1", fsync)
    return [primary, *(RedisReplica(store / f"redis-{number}", fsync, primary) for number in (2, 3))]
