"""Delays are kept by the server: nothing of them is in a worker's memory, and nothing is lost or doubled."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from pathlib import Path

import dramatiq
from dramatiq import Message
from dramatiq.middleware import CurrentMessage

from dramatiq_jetstream.jetstream import reading as stored
from dramatiq_jetstream.sending import delays
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds


def rss(pid: int) -> int:
    """The memory of a process in bytes (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_delay_is_a_schedule_on_the_server(broker):
    """What is stored is the message without `eta`, on a subject of its own, with its time and target."""
    broker.add_middleware(CurrentMessage())
    seen = []

    @dramatiq.actor
    def work():
        seen.append(dict(CurrentMessage.get_current_message().options))

    before = time.time() * 1000
    message = work.send_with_options(delay=700, color="red")
    assert (
        before + 700 <= message.options["eta"] < time.time() * 1000 + 701
    )  # whole milliseconds, never early
    stream = broker.names.queue_stream("default")
    kept = stored.last_message(
        broker.connection, stream, broker.names.delayed_message("default", message.message_id)
    )
    assert kept.headers["Nats-Schedule"].startswith("@at ")
    assert kept.headers["Nats-Schedule-Target"] == broker.names.task("default")
    assert Message.decode(kept.data).options == {"color": "red"}
    with running(broker):
        broker.join("default", timeout=30_000)
    assert seen == [{"color": "red"}]


def test_a_delayed_message_can_be_cancelled(broker):
    """Cancelling by message id, with or without the queue, tells how many delays there were."""
    ran = []
    dramatiq.actor(ran.append, actor_name="work")
    dramatiq.actor(ran.append, actor_name="elsewhere", queue_name="other.queue")
    one, two, three = (
        broker.get_actor(name).send_with_options(args=(name,), delay=400)
        for name in ("work", "work", "elsewhere")
    )
    broker.enqueue(one.copy(options={"eta": None}), delay=500)
    assert broker.cancel(one.message_id) == 2
    assert broker.cancel(one.message_id) == 0
    assert broker.cancel(three.message_id, "default") == 0
    assert broker.cancel(three.message_id, "other.queue") == 1
    assert broker.cancel("never sent") == 0
    with running(broker):
        broker.join("default", timeout=30_000)
        broker.join("other.queue", timeout=30_000)
    assert ran == ["work"]
    assert broker.cancel(two.message_id) == 0


def test_two_delays_of_the_same_message_both_arrive(broker):
    """A retry carries the id of its message; its delay neither replaces nor is taken for another one."""
    ran = []
    dramatiq.actor(lambda: ran.append(time.time()), actor_name="work")
    message = broker.get_actor("work").message()
    for delay in (5_000, 6_000, 6_000):
        broker.enqueue(message, delay=delay)
    assert broker.queue_stats("default").delayed == 3
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(ran) == 3


def test_a_retry_waits_on_the_server(broker):
    """Between two attempts no worker holds the message: it is stored as a delay, and can be cancelled."""
    failed = []

    @dramatiq.actor(min_backoff=60_000)
    def work():
        failed.append(1)
        raise RuntimeError("try again in a minute")

    with running(broker):
        message = work.send()
        eventually(lambda: broker.queue_stats("default").delayed == 1)
        eventually(lambda: broker.queue_stats("default").in_flight == 0)
        assert broker.in_flight.held == 0
    assert broker.cancel(message.message_id) == 1
    assert failed == [1]


def test_delays_survive_a_killed_server(own_nats_server, make_broker):
    """After kill -9 every delayed message runs once and not before its time."""
    broker = make_broker(own_nats_server.url)
    ran = Counter()
    early = []

    @dramatiq.actor(broker=broker)
    def work(number, due):
        ran[number] += 1
        if time.time() * 1000 < due:
            early.append(number)

    due = time.time() * 1000 + 1_500
    broker.enqueue_many([work.message(number, due) for number in range(200)], delay=1_500)
    own_nats_server.kill()
    own_nats_server.start()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert ran == Counter(range(200))
    assert early == []


def test_a_message_that_another_program_sends_early_is_kept_by_the_server(broker):
    """A ready message with an `eta` in the future goes back to the server, not into the worker's memory."""
    ran = []
    work = dramatiq.actor(lambda: ran.append(time.time() * 1000), actor_name="work")
    broker.setup()

    def send(due: float) -> None:
        message = work.message().copy(options={"eta": due})
        broker.connection.publish(broker.names.task("default"), message.encode())

    with running(broker) as worker:
        send(time.time() * 1000 + 3_600_000)
        eventually(lambda: broker.queue_stats("default").delayed == 1)
        assert worker.consumers["default"].delay_queue.empty()
        due = time.time() * 1000 + 2_000
        send(due)
        eventually(lambda: ran)
    assert len(ran) == 1
    assert ran[0] >= due


def test_thousands_of_delays_cost_a_worker_nothing(nats_server, make_fleet):
    """Its memory stays as it was, and ready messages are not held up."""
    fleet = make_fleet(nats_server)
    worker = fleet.start(processes=1, threads=4)
    for number in range(200):
        fleet.send("mark", f"warm{number}")
    fleet.broker.join("default", timeout=30_000)
    (pid, *_) = worker.children()
    before = rss(pid)
    delayed = [Message("default", "mark", (f"late{n}",), {}, {}) for n in range(30_000)]
    stop = threading.Event()
    waits = []

    def keep_sending():
        while not stop.is_set():
            started = time.monotonic()
            fleet.send("mark", f"ready{len(waits)}")
            fleet.wait_for(f"ran ready{len(waits)}")
            waits.append(time.monotonic() - started)

    sending = threading.Thread(target=keep_sending)
    sending.start()
    fleet.broker.enqueue_many(delayed, delay=3_600_000)
    eventually(lambda: len(waits) >= 20)
    stop.set()
    sending.join(30)
    assert fleet.broker.queue_stats("default").delayed == 30_000
    holds(lambda: rss(pid) - before < 5_000_000, 0.5)
    assert sorted(waits)[len(waits) // 2] < 1
    assert not any("late" in line for line in fleet.lines())
    fleet.broker.flush("default")


def test_a_delay_ends_now(broker):
    """The message runs at once with its options, and once; one that has fired meanwhile is left alone."""
    broker.add_middleware(CurrentMessage())
    seen = []

    @dramatiq.actor
    def work():
        seen.append(CurrentMessage.get_current_message().options)

    message = work.send_with_options(delay=3_600_000, color="red")
    work.send_with_options(delay=3_600_000)
    where = (broker.connection, broker.names, "default")
    assert delays.run_now(*where, message.message_id) == 1
    assert delays.run_now(*where, "never sent") == 0
    with running(broker):
        eventually(lambda: seen)
        eventually(lambda: broker.queue_stats("default").in_flight == 0)
        assert delays.run_now(*where, message.message_id) == 0
    assert seen == [{"color": "red"}]
    assert broker.queue_stats("default").delayed == 1


def test_a_delay_that_has_ended_meanwhile_is_not_ended_again(broker, monkeypatch):
    """Between reading a schedule and replacing it the server may fire it: the message is there once."""
    dramatiq.actor(lambda: None, actor_name="work")
    message = broker.get_actor("work").send_with_options(delay=3_600_000)
    publish = broker.connection.publish

    def fire_first(subject, data, headers):
        monkeypatch.undo()
        assert delays.run_now(broker.connection, broker.names, "default", message.message_id) == 1
        eventually(lambda: broker.queue_stats("default").ready == 1)
        return publish(subject, data, headers)

    monkeypatch.setattr(broker.connection, "publish", fire_first)
    assert delays.run_now(broker.connection, broker.names, "default", message.message_id) == 0
    stats = broker.queue_stats("default")
    assert (stats.ready, stats.delayed) == (1, 0)
