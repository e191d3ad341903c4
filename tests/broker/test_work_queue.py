"""The worker's queue: priorities, order, waiting, and what it owes to those who join it."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import dramatiq
import pytest
from dramatiq.common import iter_queue
from dramatiq.middleware import Interrupt, raise_thread_exception
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.worker.work_queue import WorkQueue
from tests.support.polling import eventually


@dataclass(frozen=True)
class Item:
    priority: int
    number: float


@given(st.lists(st.integers(-3, 3)))
def test_lower_priorities_come_first_and_equal_ones_in_order(priorities: list[int]) -> None:
    queue = WorkQueue()
    items = [Item(priority, number) for number, priority in enumerate(priorities)]
    for item in items:
        queue.put(item)

    assert queue.qsize() == queue.unfinished_tasks == len(items)
    assert list(iter_queue(queue)) == sorted(items, key=lambda item: item.priority)
    assert queue.empty()
    assert queue.unfinished_tasks == len(items), "what was taken is not done yet"


def test_get_waits_for_an_item_and_not_for_ever() -> None:
    queue = WorkQueue()
    with pytest.raises(Empty):
        queue.get(timeout=0.01)
    threading.Timer(0.05, queue.put, [Item(0, 1)]).start()

    assert queue.get(timeout=10) == Item(0, 1)


def test_every_wait_ends_when_its_time_is_over() -> None:
    """Also when, at that very moment, another thread takes the item it was woken for."""
    queue, timeout, waits = WorkQueue(), 0.002, Counter[int]()
    end = time.monotonic() + 3

    def take(number: int) -> None:
        while time.monotonic() < end:
            with suppress(Empty):
                queue.get(timeout=timeout)
            waits[number] += 1

    takers = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(4)]
    with switching_often():
        for thread in takers:
            thread.start()
        while time.monotonic() < end:
            queue.put(Item(0, 0))
            time.sleep(timeout)
        for thread in takers:  # from here on nothing is put that would wake them
            thread.join(5)
    assert not any(thread.is_alive() for thread in takers)
    assert min(waits.values()) > 10


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_no_item_lies_there_while_a_thread_waits(at_once: int) -> None:
    """The next items come when the last have been taken: at whatever moment threads begin to wait for them.

    Only one of several is woken, so it has to wake the next.
    """
    queue, taken = WorkQueue(), SimpleQueue[None]()
    busy = threading.Barrier(at_once)

    def take() -> None:
        while queue.get(timeout=60).priority < 9:
            busy.wait(30)  # the thread that took one does not come for the other
            taken.put(None)

    takers = [threading.Thread(target=take, daemon=True) for _ in range(at_once)]
    with switching_often():
        for thread in takers:
            thread.start()
        for number in range(5_000 // at_once):
            for _ in takers:
                queue.put(Item(0, number))
            for _ in takers:
                taken.get(timeout=10)
        for _ in takers:
            queue.put(Item(9, 0))
        for thread in takers:
            thread.join(30)
    assert not any(thread.is_alive() for thread in takers)


def test_a_thread_that_is_interrupted_when_it_is_woken_does_not_stop_the_others() -> None:
    """As by a time limit that strikes too late: what was put is taken when another wait ends, at the latest."""
    queue, taken = WorkQueue(), SimpleQueue[Item]()

    def take() -> None:
        while True:
            with suppress(Empty):
                taken.put(queue.get(timeout=0.3))

    def wait() -> None:
        with suppress(Interrupt):
            queue.get(timeout=30)

    other, struck = (threading.Thread(target=target, daemon=True) for target in (take, wait))
    other.start()
    eventually(lambda: queue._waiting)
    struck.start()
    eventually(lambda: len(queue._waiting) == 2)
    assert struck.ident is not None
    raise_thread_exception(struck.ident, Interrupt)
    queue.put(Item(0, 1))
    struck.join(10)
    assert taken.get(timeout=5) == Item(0, 1)
    for number in range(2, 50):
        queue.put(Item(0, number))
        assert taken.get(timeout=0.25) == Item(0, number), "it had to wait for its time to be over"


def test_who_was_woken_for_another_item_wakes_the_next() -> None:
    """`quick` and `slow` begin to wait; `quick` finds an item itself just before it is woken for a second one."""
    steps: dict[str, threading.Event] = defaultdict(threading.Event)
    looks: Counter[str] = Counter()
    taken: dict[str, Item] = {}

    class Paced(WorkQueue):
        def _take(self) -> Item:
            look = threading.current_thread().name, looks[threading.current_thread().name]
            looks[look[0]] += 1
            if look == ("slow", 1):
                steps["slow is listed"].set()
                steps["quick has the first"].wait(10)
            try:
                item = super()._take()
            except IndexError:
                steps[f"{look[0]} found nothing {look[1]}"].set()
                if look[1] == 0:
                    steps[f"{look[0]} may wait"].wait(10)
                raise
            if look == ("quick", 1):
                steps["quick has the first"].set()
                steps["slow found nothing 1"].wait(10)
                self.put(Item(0, 2))  # this wakes `quick`, the last one that was listed
            return item

    queue = Paced()
    threads = [
        threading.Thread(target=lambda n=n: taken.update({n: queue.get(timeout=30)}), name=n, daemon=True)
        for n in ("slow", "quick")
    ]
    for thread in threads:
        thread.start()
        assert steps[f"{thread.name} found nothing 0"].wait(10)
    queue.put(Item(0, 1))
    for thread in threads:
        steps[f"{thread.name} may wait"].set()
        assert steps["slow is listed"].wait(10)
    for thread in threads:
        thread.join(5)
    assert taken == {"quick": Item(0, 1), "slow": Item(0, 2)}


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
