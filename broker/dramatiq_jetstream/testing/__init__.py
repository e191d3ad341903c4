"""For tests: the real nats-server as a child process, alone or as a cluster, and a stub of the broker in memory.

Installed with pytest, the library brings fixtures of these (see the guide).
"""

from __future__ import annotations

from .cluster import NatsCluster
from .server import ClusterMember, NatsServer, PortInUse, ServerError, find_executable, free_port
from .stub_broker import StubBroker, stub

__all__ = [
    "ClusterMember",
    "NatsCluster",
    "NatsServer",
    "PortInUse",
    "ServerError",
    "StubBroker",
    "find_executable",
    "free_port",
    "stub",
]
