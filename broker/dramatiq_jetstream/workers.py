"""Who is alive and what is running: the workers of a namespace, as they say so themselves.

    for worker in list_workers(broker):
        print(worker.host, worker.pid, [running.actor for running in worker.running])

Every worker process keeps a record while it lives (see `worker.presence`). One that stops removes it; one that was
killed is gone within 15 seconds.

What a record shows of a message's arguments is up to the program: set `broker.describe_arguments` to a function of
the message that returns text; 200 characters of it are kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .broker import JetStreamBroker
from .jetstream.topology import WORKERS

__all__ = ["Running", "WorkerInfo", "list_workers"]


@dataclass(frozen=True)
class Running:
    """A message that a worker runs.

    Attributes:
      attempt: 1 for the first.
      since: When this attempt began, in milliseconds since 1970.
      arguments: The beginning of its arguments, as the program shows them.
    """

    message_id: str
    actor: str
    queue: str
    attempt: int
    since: int
    arguments: str


@dataclass(frozen=True)
class WorkerInfo:
    """A worker process.

    Attributes:
      id: Tells it from every other process, also from one that had its pid before.
      version: Of the library.
      since, at: When it began, and when it said all this, in milliseconds since 1970.
      done, failed: Attempts that ended here, and those of them that ended with an error.
      rss: Resident memory in bytes.
      cpu: Seconds of processor time.
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


def list_workers(broker: JetStreamBroker) -> list[WorkerInfo]:
    """The live workers of the broker's namespace, by host and age.

    Raises:
      BrokerConnectionError: When the server does not answer in time.
    """
    found = []
    for entry in broker.declarations.memory_bucket(WORKERS).items():
        fields = json.loads(entry.value)
        fields["running"] = [Running(**running) for running in fields["running"]]
        found.append(WorkerInfo(id=entry.key, **fields))
    return sorted(found, key=lambda worker: (worker.host, worker.since, worker.pid))
