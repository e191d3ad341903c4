"""An actor whose queue is split into several streams by a key, as docs/scaling.md describes it."""

from __future__ import annotations

import threading
import zlib

import dramatiq
from dramatiq.middleware import CurrentMessage

from tests.broker.conformance.workers import running
from tests.support.polling import eventually

PARTS = 4


def test_a_queue_is_split_by_key_and_retries_stay_in_their_part(make_broker):
    """Workers run the messages of every part; one that fails is tried again on the queue that it came from."""
    broker = make_broker()
    broker.add_middleware(CurrentMessage())
    lock, ran = threading.Lock(), []

    @dramatiq.actor(broker=broker, queue_name="mail-0", max_retries=1, min_backoff=1)
    def send_mail(customer):
        message = CurrentMessage.get_current_message()
        with lock:
            ran.append((customer, message.queue_name))
            again = sum(name == customer for name, _ in ran)
        if again == 1:
            raise RuntimeError("not yet")

    for part in range(PARTS):
        broker.declare_queue(f"mail-{part}")

    def part_of(customer):
        return f"mail-{zlib.crc32(customer.encode()) % PARTS}"

    customers = [f"customer-{number}" for number in range(12)]
    for customer in customers:
        broker.enqueue(send_mail.message(customer).copy(queue_name=part_of(customer)))
    with running(broker):
        eventually(lambda: len(ran) == 2 * len(customers), timeout=60)
    assert {part_of(customer) for customer in customers} == {f"mail-{part}" for part in range(PARTS)}
    assert sorted(ran) == sorted((customer, part_of(customer)) for customer in customers for _ in range(2))
