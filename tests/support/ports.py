"""Free ports for servers that tests start: no two tests are given the same, however many run at once."""

from __future__ import annotations

import itertools
import os
import random
import socket

__all__ = ["free_port"]

# Above what the system gives to outgoing connections and what `dramatiq_jetstream.testing` chooses from. The
# processes of a run take turns in it, so that a port is still free when, some seconds later, its server is up.
_FIRST, _END = 61_000, 65_500
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

_mine = range(_FIRST + _PROCESS, _END, _PROCESSES)
_next = itertools.count(random.randrange(len(_mine)))


def free_port() -> int:
    """Return a port on which nothing listens, another one at each call until all have had their turn."""
    for _ in _mine:
        port = _mine[next(_next) % len(_mine)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no port is free from {_FIRST} to {_END}")
