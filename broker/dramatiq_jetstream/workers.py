"""The live workers of a namespace and what they run, as they report it themselves.

    for worker in list_workers(broker):
        print(worker.host, worker.pid, [running.actor for running in worker.running])

Every worker process keeps a record while it lives (see `worker.presence`). One that stops removes it; one that was
killed is gone within 15 seconds.

What a record shows of a message's arguments is up to the program: set `broker.describe_arguments` to a function of
the message that returns text; 200 characters of it are kept.
"""

from __future__ import annotations

from .broker import JetStreamBroker
from .jetstream.topology import WORKERS
from .worker.roster import Running, WorkerInfo, read_workers

__all__ = ["Running", "WorkerInfo", "list_workers"]


def list_workers(broker: JetStreamBroker) -> list[WorkerInfo]:
    """The live workers of the broker's namespace, by host and age.

    Raises:
      BrokerConnectionError: When the server does not answer in time.

    Examples:
      >>> from dramatiq_jetstream.workers import list_workers
      >>> [worker.pid == os.getpid() for worker in list_workers(broker)]
      [True]
    """
    return read_workers(broker.declarations.memory_bucket(WORKERS))
