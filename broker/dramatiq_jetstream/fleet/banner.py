"""What a fleet shows when it has started, as people know it from Celery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .options import WorkOptions

__all__ = ["banner"]


def banner(options: WorkOptions, ready: dict[str, Any], *, pid: int, http: str | None) -> str:
    """The text: versions, server, queues with their actors, periodic tasks, where health is.

    Parameters:
      ready: What the first worker said of itself.
      http: Where health and metrics are served, if anywhere.
    """
    return "\n".join(_lines(options, ready, pid, http))


def _lines(options: WorkOptions, ready: dict[str, Any], pid: int, http: str | None) -> Iterator[str]:
    versions = ready["versions"]
    yield ""
    yield f" fleet of {options.broker}  (PID {pid})"
    yield ""
    yield " . versions:   " + ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f" . server:     {ready['server']}"
    yield f" . namespace:  {ready['namespace']}"
    threads = _count(options.threads, "thread", "threads")
    yield f" . workers:    {_count(options.processes, 'process', 'processes')} with {threads}"
    health = (
        "off (--http HOST:PORT)" if http is None else f"http://{http}/health/live, /health/ready, /metrics"
    )
    yield f" . health:     {health}"
    yield ""
    yield " [queues]"
    for queue, actors in ready["queues"].items():
        yield f" . {queue}"
        for actor in actors:
            yield f"     . {actor}"
    if ready["periodic"]:
        yield ""
        yield " [periodic tasks]"
        for actor in ready["periodic"]:
            yield f" . {actor}"
    yield ""


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
