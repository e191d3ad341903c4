"""The real nats-server as a child process, alone or as a cluster, for tests and development."""

from __future__ import annotations

from .cluster import NatsCluster
from .server import ClusterMember, NatsServer, PortInUse, ServerError, find_executable, free_port

__all__ = [
    "ClusterMember",
    "NatsCluster",
    "NatsServer",
    "PortInUse",
    "ServerError",
    "find_executable",
    "free_port",
]
