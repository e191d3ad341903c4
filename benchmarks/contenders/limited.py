"""The actor whose limits are measured, and its customers. BENCH_LIMITS has its options, in a trial of limits."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dramatiq import Actor, Broker

    from benchmarks.contenders.contender import Tasks


def customer_of(index: int, customers: int, backlog: int) -> int:
    """Return whose message is the one with an index: the first `backlog` are all of one customer."""
    return -1 if index < backlog else index % customers


class Limited:
    """Makes the messages of a trial of limits."""

    def __init__(self, broker: Broker, tasks: Tasks, queue: str) -> None:
        import dramatiq

        options: dict[str, Any] = json.loads(os.environ["BENCH_LIMITS"])
        self._customers = int(os.environ["BENCH_CUSTOMERS"])
        self._backlog = int(os.environ["BENCH_BACKLOG"])

        @dramatiq.actor(broker=broker, queue_name=queue, actor_name="limited", **options)
        def limited(index: int, customer: int) -> None:
            tasks.noop(index)

        self._actor: Actor[[int, int], None] = limited

    def message(self, index: int) -> Any:
        return self._actor.message(index, customer_of(index, self._customers, self._backlog))
