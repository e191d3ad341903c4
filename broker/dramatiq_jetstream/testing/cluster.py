"""A cluster of nats-servers on this machine, for development and tests of what happens when nodes die."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from .server import ClusterMember, NatsServer, PortInUse, ServerError, free_port

__all__ = ["NatsCluster"]

T = TypeVar("T")


class NatsCluster:
    """Several nodes, three by default, so that streams may have as many replicas.

    Use it as a context manager, or call `start` and `stop`. `nodes` are ordinary `NatsServer`s, which may
    also be suspended and resumed. Times are milliseconds.

    Parameters:
      store_dir: The parent of the nodes' directories; None for a temporary one, removed at the end.
      size: The number of nodes.
      sync, max_payload, max_file_store, config: As for `NatsServer`, for every node.
      start_timeout: How long the cluster may take to elect its leader and to be ready.

    Examples:
      ```python
      with NatsCluster() as cluster:
          broker = JetStreamBroker(cluster.urls, replicas=3)
          broker.setup()
          killed = cluster.kill(cluster.leader())
          broker.enqueue(charge.message("c-42", 20))  # two of three are enough
          cluster.restart(killed)
          cluster.wait_until_ready()
          print(cluster.leader_of("ORDERS").name, cluster.node("n1").port)
          cluster.stop()
          cluster.start()
      ```
    """

    def __init__(
        self,
        store_dir: str | os.PathLike[str] | None = None,
        *,
        size: int = 3,
        sync: str = "always",
        max_payload: int | None = None,
        max_file_store: int | None = None,
        config: str | None = None,
        start_timeout: int = 60_000,
    ) -> None:
        self.start_timeout = start_timeout
        self._size = size
        self._settings: dict[str, Any] = {
            "sync": sync,
            "max_payload": max_payload,
            "max_file_store": max_file_store,
            "config": config,
        }
        self._temporary = store_dir is None
        self.store_dir = Path(tempfile.mkdtemp(prefix="nats-") if store_dir is None else store_dir).absolute()
        self.nodes = self._make_nodes()

    @property
    def urls(self) -> list[str]:
        """The client addresses of all nodes, also of those that are down."""
        return [node.url for node in self.nodes]

    def node(self, name: str) -> NatsServer:
        """The node of this name: n1, n2, n3.

        Raises:
          ServerError: When there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise ServerError(f"the cluster has no node {name!r}; it has {', '.join(n.name for n in self.nodes)}")

    def start(self) -> Self:
        """Start every node that is down and wait until the cluster is ready."""
        try:
            self._start_nodes()
        except PortInUse:
            # The route ports were chosen before the start, and another program took one. Try others, unless the nodes
            # have an identity already.
            if any(node.running for node in self.nodes) or self._has_data():
                raise
            self.nodes = self._make_nodes()
            self._start_nodes()
        self.wait_until_ready()
        return self

    def stop(self) -> None:
        """Shut down all nodes."""
        for node in self.nodes:
            node.stop()

    def kill(self, node: str | NatsServer) -> NatsServer:
        """kill -9 one node, given by itself or its name."""
        victim = self.node(node) if isinstance(node, str) else node
        victim.kill()
        return victim

    def restart(self, node: str | NatsServer) -> NatsServer:
        """Start a node (again) and wait until it has caught up with the others."""
        again = self.node(node) if isinstance(node, str) else node
        again.restart()
        self.wait_until_ready()
        return again

    def wait_until_ready(self, timeout: int | None = None) -> None:
        """Wait until the running nodes agree on a leader and have caught up with every stream."""
        self._wait(self._ready, "the cluster was not ready", timeout)

    def leader(self, timeout: int | None = None) -> NatsServer:
        """The node that leads the cluster's own (meta) group."""
        return self._wait(self._meta_leader, "the cluster has no leader", timeout)

    def leader_of(self, stream: str, timeout: int | None = None) -> NatsServer:
        """The node that leads a stream; waits while an election is on."""
        return self._wait(lambda: self._stream_leader(stream), f"stream {stream!r} has no leader", timeout)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.store_dir, ignore_errors=True)

    def _make_nodes(self) -> list[NatsServer]:
        cluster = f"cluster-{secrets.token_hex(4)}"
        ports: set[int] = set()
        while len(ports) < self._size:
            ports.add(free_port())
        routes = sorted(ports)
        return [
            NatsServer(
                self.store_dir / f"n{number}",
                name=f"n{number}",
                monitor_port=0,
                cluster=ClusterMember(cluster, port, routes),
                **self._settings,
            )
            for number, port in enumerate(routes, start=1)
        ]

    def _has_data(self) -> bool:
        return any((node.store_dir / "jetstream").exists() for node in self.nodes)

    def _start_nodes(self) -> None:
        for node in self.nodes:
            if not node.running:
                node.start()

    def _ready(self) -> bool:
        if self._meta_leader() is None:
            return False
        return all(node.monitor("/healthz").get("status") == "ok" for node in self._running())

    def _meta_leader(self) -> NatsServer | None:
        for node in self._running():
            if node.monitor("/jsz").get("meta_cluster", {}).get("leader") == node.name:
                return node
        return None

    def _stream_leader(self, stream: str) -> NatsServer | None:
        for node in self._running():
            accounts = node.monitor("/jsz?accounts=true&streams=true").get("account_details") or []
            for detail in (d for account in accounts for d in account.get("stream_detail") or []):
                # Only the leader itself is asked: a follower may still name the one that died.
                if detail["name"] == stream and (detail.get("cluster") or {}).get("leader") == node.name:
                    return node
        return None

    def _running(self) -> list[NatsServer]:
        return [node for node in self.nodes if node.running]

    def _wait(self, condition: Callable[[], T | None], failure: str, timeout: int | None) -> T:
        limit = self.start_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit / 1000
        cause: ServerError | None = None
        while True:
            try:
                result = condition()
            except ServerError as error:
                # A node may be on its way up or down; /healthz says so with an error status.
                result, cause = None, error
            if result:
                return result
            if time.monotonic() > deadline:
                running = ", ".join(node.name for node in self._running()) or "none"
                raise ServerError(f"{failure} within {limit} ms (nodes running: {running})") from cause
            time.sleep(0.05)
