"""The workers that are alive, read from what they say of themselves (see `presence`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from dramatiq_jetstream.errors import NotFound, TopologyMissing
from dramatiq_jetstream.kv import Bucket

__all__ = ["ProgressOf", "Running", "WorkerInfo", "read_workers"]


@dataclass(frozen=True)
class ProgressOf:
    """How far a message is: `done` of `total` (None: not known), a note, and when that was said (ms since 1970).

    Examples:
      >>> from dramatiq_jetstream.progress import ProgressOf
      >>> ProgressOf("17", done=20, total=80, note="exporting", at=1_700_000_000_000).share
      0.25
    """

    message_id: str
    done: float
    total: float | None
    note: str
    at: int

    @property
    def share(self) -> float | None:
        """Between 0 and 1; None when the total is not known."""
        return None if not self.total else min(1.0, self.done / self.total)


@dataclass(frozen=True)
class Running:
    """A message that a worker runs.

    Attributes:
      attempt: 1 for the first.
      since: When this attempt began, in milliseconds since 1970.
      arguments: The beginning of its arguments, as the program shows them.
      deliveries: How often the server has delivered it, this time included: more than 1 after a worker died of it or
        beside it.
      progress: What its actor said last (see `progress`), None if it said nothing.

    Examples:
      >>> from dramatiq_jetstream.workers import list_workers
      >>> slow = [
      ...     running.message_id
      ...     for worker in list_workers(broker)
      ...     for running in worker.running
      ...     if time.time() * 1000 - running.since > 60_000
      ... ]
      >>> slow
      []
    """

    message_id: str
    actor: str
    queue: str
    attempt: int
    since: int
    arguments: str
    deliveries: int = 1
    progress: ProgressOf | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """A worker process.

    Attributes:
      id: Tells it from every other process, also from one that had its pid before.
      version, program_version: Of the library, and what the program says of its own (`broker.program_version`).
      since, at: When it began, and when it said all this, in milliseconds since 1970.
      done, failed: Attempts that ended here, and those of them that ended with an error.
      rss: Resident memory in bytes.
      cpu: Seconds of processor time.

    Examples:
      >>> from dramatiq_jetstream.workers import list_workers
      >>> for worker in list_workers(broker):
      ...     print(worker.threads, "threads,", worker.failed, "failed")
      2 threads, ... failed
    """

    id: str
    host: str
    pid: int
    version: str
    since: int
    at: int
    queues: list[str]
    threads: int
    running: list[Running]
    done: int
    failed: int
    rss: int
    cpu: float
    program_version: str = ""


def read_workers(bucket: Bucket) -> list[WorkerInfo]:
    """The live workers of a namespace, by host and age, from the bucket of their records."""
    try:
        entries = list(bucket.items())
    except (NotFound, TopologyMissing):
        return []  # no worker was ever there
    found = [_worker(entry.key, json.loads(entry.value)) for entry in entries]
    return sorted(found, key=lambda worker: (worker.host, worker.since, worker.pid))


def _worker(key: str, record: dict[str, Any]) -> WorkerInfo:
    running = [_running(described) for described in record["running"]]
    return WorkerInfo(**{**_known(WorkerInfo, record), "id": key, "running": running})


def _running(described: dict[str, Any]) -> Running:
    known = _known(Running, described)
    if (said := known.get("progress")) is not None:
        known["progress"] = ProgressOf(message_id=described["message_id"], **_known(ProgressOf, said))
    return Running(**known)


def _known(kind: type[Any], content: dict[str, Any]) -> dict[str, Any]:
    """What this version knows of a record; a worker of a later version may say more."""
    return {field.name: content[field.name] for field in fields(kind) if field.name in content}
