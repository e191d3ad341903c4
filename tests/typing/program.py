"""A user's program, as a type checker sees it; `test_typing.py` checks it under mypy and pyright, both strict."""

from __future__ import annotations

from typing import assert_type

import dramatiq
from dramatiq.message import Message

from dramatiq_jetstream import JetStreamBroker, group
from dramatiq_jetstream.dead_letters import DeadLetter
from dramatiq_jetstream.events import Event, current_event
from dramatiq_jetstream.kv import Bucket, Entry
from dramatiq_jetstream.queues import QueueStats
from dramatiq_jetstream.streams import Range, StoredMessage, Stream

broker = JetStreamBroker("nats://localhost:4222", namespace="typed", max_in_flight={"slow": 2})
dramatiq.set_broker(broker)


@dramatiq.actor
def add(left: int, right: int) -> int:
    return left + right


@dramatiq.actor(queue_name="slow", max_retries=3)
def greet(name: str) -> None:
    print(name)


def send() -> None:
    assert_type(add.send(1, right=2), Message[int])
    assert_type(greet.send("you"), Message[None])
    assert_type(add(1, 2), int)
    messages = broker.enqueue_many([greet.message("a"), greet.message("b")], delay=1_000)
    print([message.message_id for message in messages])
    group([add.message(1, 2), add.message(3, 4)]).run()


def look() -> None:
    assert_type(broker.queue_stats("slow"), QueueStats)
    assert_type(broker.dead_letters.list("slow"), list[DeadLetter])
    assert_type(broker.stream("ORDERS"), Stream)
    assert_type(broker.stream("ORDERS").range(), Range)
    assert_type(broker.stream("ORDERS").last(), StoredMessage | None)
    assert_type(current_event(), Event | None)


def store(bucket: Bucket) -> int:
    entry = bucket.get("key")
    assert_type(entry, Entry | None)
    return bucket.put("key", b"value") if entry is None else entry.revision
