"""What is on the server and no program uses any more, as findings of `fleet doctor`.

A program that `--broker` names knows its queues and actors. Without one, living workers do: what none of them serves,
while others are served, is said to be left over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dramatiq_jetstream.events import Subscription
from dramatiq_jetstream.jetstream import inventory, topology
from dramatiq_jetstream.jetstream.names import METADATA_SUBSCRIBER
from dramatiq_jetstream.periodic import list_schedules

from .context import Fleet

__all__ = ["find_orphans"]


def find_orphans(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """What is left over: for each a name, why, and what to do."""
    yield from _queues(fleet)
    yield from _schedules(fleet)
    yield from _levels(fleet)
    yield from _subscriptions(fleet)


def _queues(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """Retired queues."""
    served = {queue for worker in fleet.workers() for queue in worker.queues}
    if fleet.program is not None:
        used, why = served | fleet.broker.queues, f"no actor of {fleet.program} uses it"
    else:
        used, why = served, "no living worker serves it, and others are served"
    unused = [queue for queue in fleet.queue_names() if queue not in used]
    if fleet.program is None and not served:
        return
    for stats in fleet.broker.queue_stats_of(unused):
        holds = stats.ready + stats.in_flight + stats.delayed
        yield (
            f"queue {stats.queue}",
            f"{why}; it holds {holds} messages",
            f"`fleet remove queue {stats.queue}`, if no other program uses it.",
        )


def _schedules(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """Schedules of actors that are gone; only a program can tell."""
    if fleet.program is None:
        return
    for schedule in list_schedules(fleet.broker):
        if schedule.orphan:
            yield (
                f"schedule {schedule.actor}",
                f"ticks on queue {schedule.queue}, and no actor of {fleet.program} is periodic under that name there",
                f"`fleet schedules --module {fleet.program} --remove-orphans`.",
            )


def _levels(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """Priorities at which no worker asks, with nothing waiting; the others are failures."""
    for queue in fleet.queue_names():
        stream = fleet.broker.names.queue_stream(queue)
        consumers = {info["name"]: info for info in inventory.consumers(fleet.broker.connection, stream)}
        lowest = consumers.get(fleet.broker.names.worker_durable())
        for name, info in consumers.items():
            level = fleet.broker.names.priority_of_durable(name)
            asked = lowest is None or not lowest["num_waiting"] or info["num_waiting"]
            if level is not None and not asked and not info["num_pending"] and not info["num_ack_pending"]:
                yield (
                    f"consumer {name} of stream {stream}",
                    f"workers of queue {queue} are there, and none asks for priority {level}; nothing waits there",
                    f"`fleet remove consumer {stream} {name}`, if no program has that max_priority.",
                )


def _subscriptions(fleet: Fleet) -> Iterator[tuple[str, str, str]]:
    """Subscriptions of actors that are gone, and those at which no worker asks although its queue is served."""
    broker = fleet.broker
    served = {queue for worker in fleet.workers() for queue in worker.queues}
    wanted = {
        broker.names.subscription_durable(actor.actor_name)
        for actor in broker.actors.values()
        if isinstance(actor.options.get("subscribe"), Subscription)
    }
    for info in inventory.streams(broker.connection):
        if topology.recognise_stream(broker.names, info["config"]) is not None:
            continue
        stream = info["config"]["name"]
        for entry in inventory.consumers(broker.connection, stream):
            queue = _queue_of(fleet, stream, entry)
            if queue is None or entry["num_waiting"] or entry["name"] in wanted:
                continue
            if fleet.program is not None:
                why = f"no actor of {fleet.program} subscribes under that name"
            elif queue in served:
                why = f"workers of queue {queue} are there, and none asks at it"
            else:
                continue
            yield (
                f"consumer {entry['name']} of stream {stream}",
                f"{why}; {entry['num_pending']} events wait",
                f"`fleet remove consumer {stream} {entry['name']}`, if its actor is gone.",
            )


def _queue_of(fleet: Fleet, stream: str, entry: dict[str, Any]) -> str | None:
    """The queue of a subscription of this namespace; None for another consumer."""
    names, config = fleet.broker.names, entry["config"]
    mine = topology.recognise_consumer(names, stream, {**config, "name": entry["name"]})
    if mine is None or mine.kind != "subscription":
        return None
    return str(config["metadata"][METADATA_SUBSCRIBER])[len(names.subscriber("")) :]
