"""The worker's queue: priorities, order, waiting, and what it owes to those who join it."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty

import dramatiq
import pytest
from dramatiq.common import iter_queue
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.work_queue import WorkQueue


@dataclass(frozen=True)
class Item:
    priority: int
    number: int


@given(st.lists(st.integers(-3, 3)))
def test_lower_priorities_come_first_and_equal_ones_in_order(priorities: list[int]) -> None:
    queue = WorkQueue()
    items = [Item(priority, number) for number, priority in enumerate(priorities)]
    for item in items:
        queue.put(item)

    assert queue.qsize() == queue.unfinished_tasks == len(items)
    assert list(iter_queue(queue)) == sorted(items, key=lambda item: item.priority)
    assert queue.empty()
    assert queue.unfinished_tasks == len(items), "what was taken is not worked off yet"


def test_get_waits_for_an_item_and_not_for_ever() -> None:
    queue = WorkQueue()
    with pytest.raises(Empty):
        queue.get(timeout=0.01)
    threading.Timer(0.05, queue.put, [Item(0, 1)]).start()

    assert queue.get(timeout=10) == Item(0, 1)


def test_join_waits_until_all_is_worked_off() -> None:
    queue = WorkQueue()
    for number in range(2):
        queue.put(Item(0, number))
    joined = threading.Thread(target=queue.join, daemon=True)
    joined.start()
    queue.get_nowait()
    queue.task_done()
    joined.join(0.05)
    assert joined.is_alive()
    queue.task_done()
    joined.join(10)

    assert not joined.is_alive()
    with pytest.raises(ValueError, match="more often"):
        queue.task_done()


@contextmanager
def switching_often() -> Iterator[None]:
    """Have the interpreter change threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_with_many_threads_every_item_is_taken_once_and_join_ends() -> None:
    queue, taken, total = WorkQueue(), Counter[Item](), 4 * 2_000
    lock = threading.Lock()

    def put(producer: int) -> None:
        for number in range(2_000):
            queue.put(Item(number % 5, producer * 2_000 + number))

    def take() -> None:
        while True:
            item = queue.get(timeout=30)
            if item.priority < 0:
                return
            with lock:
                taken[item] += 1
            queue.task_done()

    with switching_often():
        takers = [threading.Thread(target=take, daemon=True) for _ in range(8)]
        makers = [threading.Thread(target=put, args=(n,), daemon=True) for n in range(4)]
        for thread in (*takers, *makers):
            thread.start()
        for thread in makers:
            thread.join(60)
        joined = threading.Thread(target=queue.join, daemon=True)
        joined.start()
        joined.join(60)
        assert not joined.is_alive()
        for _ in takers:
            queue.put(Item(-1, -1))
        for thread in takers:
            thread.join(60)

    assert len(taken) == total
    assert set(taken.values()) == {1}


def test_a_worker_of_the_broker_has_one(broker: JetStreamBroker) -> None:
    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=50)
    worker.start()
    try:
        assert isinstance(worker.work_queue, WorkQueue)
        assert all(thread.work_queue is worker.work_queue for thread in worker.workers)
        worker.join()
    finally:
        worker.stop()
