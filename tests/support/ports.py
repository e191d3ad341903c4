"""Free ports for servers that tests start: no two tests are given the same, however many runs there are at once."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import socket
import tempfile
from collections import deque
from pathlib import Path

__all__ = ["free_port"]

# Above what the system gives to outgoing connections and what `dramatiq_jetstream.testing` chooses from.
_FIRST, _END = 61_000, 65_500

#: How many ports a process keeps to itself: long enough for a server that is up seconds later, or starts again.
_KEPT = 200

_next = itertools.count(random.randrange(_END - _FIRST))
_kept: deque[int] = deque()
#: A process has the lock of the byte at the port's number. Its locks end with it.
_locks = Path(tempfile.gettempdir(), f"ports-of-tests-{os.getuid()}").open("w")  # noqa: SIM115


def free_port() -> int:
    """Return a port on which nothing listens, another one at each call until all have had their turn."""
    for _ in range(_FIRST, _END):
        port = _FIRST + next(_next) % (_END - _FIRST)
        try:
            fcntl.lockf(_locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        _kept.append(port)
        if len(_kept) > _KEPT:
            fcntl.lockf(_locks, fcntl.LOCK_UN, 1, _kept.popleft())
        return port
    raise RuntimeError(f"no port is free from {_FIRST} to {_END}")
