"""A user's mistakes; each line that ends in `# wrong` is an error for both type checkers."""

from __future__ import annotations

import dramatiq

from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(ack_wait="30s")  # wrong


@dramatiq.actor
def add(left: int, right: int) -> int:
    return left + right


add.send(1)  # wrong
add.send("1", 2)  # wrong
broker.enqueue("message")  # wrong
broker.pause(7)  # wrong
