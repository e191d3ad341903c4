"""The metrics that a program counts with `prometheus_client`, of all worker processes together.

`prometheus_client` keeps the numbers of several processes in files of the directory PROMETHEUS_MULTIPROC_DIR. The
supervisor names one for its workers before they start, and removes it at the end; one that the environment names is
used and left. A worker that died leaves what it has counted. Without `prometheus_client` there is nothing to add.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["counting", "text"]

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Have the processes that are started in the block count where this one can read it."""
    if importlib.util.find_spec("prometheus_client") is None:
        yield
    elif named := os.environ.get(_VARIABLE):
        Path(named).mkdir(parents=True, exist_ok=True)
        yield
    else:
        with tempfile.TemporaryDirectory(prefix="fleet-metrics-", ignore_cleanup_errors=True) as directory:
            os.environ[_VARIABLE] = directory
            try:
                yield
            finally:
                del os.environ[_VARIABLE]


def text(alive: set[int]) -> str:
    """Return what the workers have counted, in Prometheus' text format.

    Parameters:
      alive: The process ids of the workers; what others say of how they are is dropped.
    """
    directory = os.environ.get(_VARIABLE)
    if directory is None or importlib.util.find_spec("prometheus_client") is None:
        return ""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

    for gauge in Path(directory).glob("gauge_live*_*.db"):
        pid = int(gauge.stem.rpartition("_")[2])
        if pid not in alive:
            mark_process_dead(pid, directory)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()
