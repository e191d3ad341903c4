"""Limits of actors, with real workers: what is over them waits, in order, uses no retry, and survives kills."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, defaultdict

import dramatiq
import pytest
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Middleware, Retries

from dramatiq_jetstream import Snooze
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.events import subscription
from dramatiq_jetstream.sending import delays
from dramatiq_jetstream.worker import limits, places, server_clock
from dramatiq_jetstream.worker.limit_state import LimitState
from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually


class Shop:
    """A program with an actor that is limited for each customer, and waits where the test wants it to.

    Several of them are several processes of one fleet, which write down what they do in one place.
    """

    def __init__(self, broker, seen=None, **options):
        self.broker = broker
        self.seen = seen or Seen()

        @dramatiq.actor(broker=broker, **options)
        def serve(customer, number):
            self.seen.serve(customer, number)

        self.serve = serve
        broker.setup()

    def send(self, customer, numbers):
        return [self.serve.send(customer, number) for number in numbers]

    def send_into_the_line(self, customer, numbers):
        """Send messages one by one, each when the one before waits on the server."""
        sent = []
        for number in numbers:
            sent.append(self.serve.send(customer, number))
            eventually(lambda: delays.due(*self.at(sent[-1])) is not None, timeout=60)
        return sent

    def at(self, message):
        return self.broker.connection, self.broker.names, "default", message.message_id

    def turns(self):
        """How many turns are taken, of all customers."""
        return sum(
            len(LimitState.decode(entry.value).turns) for entry in self.broker.bucket("limits").items()
        )


class Seen:
    """What the actors of a fleet did."""

    def __init__(self):
        self.lock = threading.Lock()
        self.order = defaultdict(list)
        self.times = []
        self.running, self.most = Counter(), Counter()
        self.gates = defaultdict(threading.Event)
        self.errors = []

    def serve(self, customer, number):
        with self.lock:
            self.times.append(time.monotonic())
            self.order[customer].append(number)
            self.running[customer] += 1
            self.most[customer] = max(self.most[customer], self.running[customer])
            error = self.errors.pop(0) if self.errors else None
        try:
            if customer.startswith("slow"):
                assert self.gates[customer].wait(60)
            if error is not None:
                raise error
        finally:
            with self.lock:
                self.running[customer] -= 1

    @property
    def count(self):
        return len(self.times)


def test_no_more_start_than_the_rate_allows(make_broker):
    """Two processes, more messages than four periods take; none used a retry, none is dead, all ran once."""
    retries = [Retries(max_retries=0)]
    one = Shop(make_broker(middleware=retries), rate="8/s", key="customer")
    two = Shop(make_broker(middleware=[Retries(max_retries=0)]), one.seen, rate="8/s", key="customer")
    began = time.monotonic()
    one.send("a", range(30))
    with running(one.broker, threads=3), running(two.broker, threads=3):
        eventually(lambda: one.seen.count == 30, timeout=60)
    # Whatever holds up a thread makes a start look later, never sooner.
    for number, moment in enumerate(sorted(one.seen.times)):
        assert moment - began >= number // 8
    assert sorted(one.seen.order["a"]) == list(range(30))
    assert one.broker.dead_letters.list() == []


def hold_up(shop):
    """Have the first message wait in a middleware, between the note of its start and its actor."""
    entered, released = threading.Event(), threading.Event()

    class HoldUp(Middleware):
        def before_process_message(self, broker, message):
            if not entered.is_set():
                entered.set()
                assert released.wait(60)

    shop.broker.add_middleware(HoldUp())
    return entered, released


def pass_an_hour(shop):
    """Forget all starts, and wait until what is noted for now is over."""
    bucket = shop.broker.bucket("limits")
    for entry in list(bucket.items()):
        bucket.put(entry.key, LimitState().encode())
    time.sleep(0.2)


def test_the_start_of_a_thread_that_was_held_up_counts_when_it_is_made(make_broker):
    """The period for which it was noted is over; in this one it is one of the four that may start."""
    shop = Shop(make_broker(), rate="4/h", key="customer")
    entered, released = hold_up(shop)
    with running(shop.broker, threads=6):
        shop.send("a", [0])
        assert entered.wait(60)
        pass_an_hour(shop)
        released.set()
        shop.send("a", range(1, 5))
        eventually(lambda: shop.broker.queue_stats("default").delayed == 1, timeout=60)
        eventually(lambda: shop.seen.count == 4, timeout=60)
        eventually(lambda: shop.broker.queue_stats("default").in_flight == 0, timeout=60)
    assert shop.seen.count == 4


def test_a_message_that_comes_too_late_for_its_start_waits_for_another(make_broker):
    """It uses no retry, and middleware hears of it as of one that is skipped."""
    shop = Shop(make_broker(middleware=[Retries(max_retries=0)]), rate="1/h", key="customer")
    heard = Recorder()
    shop.broker.add_middleware(heard)
    entered, released = hold_up(shop)
    with running(shop.broker, threads=2):
        (late,) = shop.send("a", [0])
        assert entered.wait(60)
        pass_an_hour(shop)
        shop.send("a", [1])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        released.set()
        eventually(lambda: shop.broker.status(late.message_id).state == "delayed", timeout=60)
        assert shop.seen.order["a"] == [1]
        pass_an_hour(shop)
        assert delays.run_now(*shop.at(late)) == 1
        eventually(lambda: shop.seen.order["a"] == [1, 0], timeout=60)
        heard.wait_for("after_process_message", late.message_id)
    told = [name for name in heard.of(late.message_id) if "process" in name or "skip" in name]
    assert told == [
        "before_process_message",
        "after_skip_message",
        "before_process_message",
        "after_process_message",
    ]
    assert shop.broker.dead_letters.list() == []


def test_a_message_whose_start_cannot_be_noted_again_comes_later(make_broker, proxy):
    """The server went away while its thread was held up."""
    broker = make_broker(proxy.url, middleware=[Retries(max_retries=0)])
    shop = Shop(broker, rate="4/h")
    entered, released = hold_up(shop)
    with running(broker, threads=2):
        shop.send("a", [0])
        assert entered.wait(60)
        pass_an_hour(shop)
        broker.connection.timeout = 500
        proxy.lose()
        released.set()
        eventually(lambda: not broker.connection.is_connected, timeout=60)
        broker.connection.timeout = 30_000
        proxy.restore()
        eventually(lambda: shop.seen.count == 1, timeout=60)
        eventually(lambda: broker.queue_stats("default").in_flight == 0, timeout=60)
    assert shop.seen.order["a"] == [0]
    assert broker.dead_letters.list() == []


def test_the_servers_clock_is_known_to_within_what_is_said(make_broker, monkeypatch):
    """Which is this machine's clock; each reading is of another moment, and takes another time."""
    monkeypatch.setattr(server_clock, "CLOCK_SECONDS", 0.001)
    broker = make_broker()
    bucket = broker.bucket("limits")
    bucket.put("key", b"")
    clock = server_clock.ServerClock(broker.connection, lambda: bucket)
    for _ in range(200):
        assert clock.now() <= time.time() * 1000
        now = time.time() * 1000
        assert now <= clock.latest()


def test_messages_wait_for_their_moment_in_no_thread_and_hold_up_nobody_else(make_broker):
    """The only thread is free for other keys while messages of one wait on the server for hours."""
    shop = Shop(make_broker(), rate="1/h", key="customer")
    shop.send("a", range(4))
    with running(shop.broker, threads=1):
        eventually(lambda: shop.broker.queue_stats("default").delayed == 3, timeout=60)
        shop.send("b", [1])
        eventually(lambda: shop.seen.order["b"] == [1], timeout=60)
        eventually(lambda: shop.seen.order["a"] == [0], timeout=60)


def test_messages_start_in_the_order_in_which_they_came(make_broker):
    """More than two periods of them wait for their moments, which are further apart than the server is late."""
    shop = Shop(make_broker(), rate="2/s", key="customer")
    shop.send("a", range(7))
    with running(shop.broker, threads=1):
        eventually(lambda: shop.seen.count == 7, timeout=60)
    assert shop.seen.order["a"] == list(range(7))


def test_no_more_run_at_once_than_may(make_broker):
    """Two processes with many threads, several keys, many messages: all run, and hand on their turns."""
    one = Shop(make_broker(), concurrency=2, key="customer")
    two = Shop(make_broker(), one.seen, concurrency=2, key="customer")
    for number in range(25):
        for customer in "abc":
            one.send(customer, [number])
    with running(one.broker, threads=6), running(two.broker, threads=6):
        eventually(lambda: one.seen.count == 75, timeout=60)
        eventually(lambda: one.turns() == 0, timeout=60)
    assert all(sorted(one.seen.order[customer]) == list(range(25)) for customer in "abc")
    assert max(one.seen.most.values()) <= 2


def test_the_line_is_first_come_first_served_and_holds_up_nobody_else(make_broker):
    """While one customer's line waits, another one is served; then the line goes on in its order."""
    shop = Shop(make_broker(), concurrency=1, key="customer")
    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        shop.send_into_the_line("slow", range(1, 7))
        shop.send("other", [1])
        eventually(lambda: shop.seen.order["other"] == [1], timeout=60)
        assert shop.seen.order["slow"] == [0]
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.order["slow"] == list(range(7)), timeout=60)


def test_no_turn_goes_to_a_message_that_has_run(make_broker):
    """What is called from its line runs and ends before it is taken from there; nothing waits for it after that."""
    brokers = [make_broker() for _ in range(2)]
    done = Counter()
    for broker in brokers:
        dramatiq.actor(
            lambda number, customer: done.update([number]),
            actor_name="work",
            broker=broker,
            concurrency=1,
            key="customer",
        )
    work = brokers[0].get_actor("work")
    brokers[0].setup()
    brokers[0].enqueue_many([work.message(number, number % 10) for number in range(300)])
    with running(brokers[0], threads=8), running(brokers[1], threads=8):
        eventually(lambda: len(done) == 300, timeout=90)


@pytest.fixture
def threads_as_processes(monkeypatch):
    """Threads of one process change a limit as those of several do: none waits for another."""
    monkeypatch.setattr(places.Place, "turn", lambda self, sequence: contextlib.nullcontext())


def test_a_turn_goes_to_a_message_that_comes_into_its_line_as_it_is_given_back(
    make_broker, monkeypatch, threads_as_processes
):
    """The one that ends looked at the line before the other was there, and stores its end after that is noted."""
    shop = Shop(make_broker(), concurrency=1)
    waits, looked, stands = (threading.Event() for _ in range(3))
    stand, store = limits.Limits._stand_in_line, limits.Limits._store

    def stand_late(self, *arguments):
        waits.set()
        assert looked.wait(60)
        stand(self, *arguments)
        stands.set()

    def store_late(self, bucket, name, state, *arguments):
        if not state.turns and not looked.is_set():
            looked.set()
            assert stands.wait(60)
        return store(self, bucket, name, state, *arguments)

    monkeypatch.setattr(limits.Limits, "_stand_in_line", stand_late)
    monkeypatch.setattr(limits.Limits, "_store", store_late)
    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        shop.send("slow", [1])
        assert waits.wait(60)
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.order["slow"] == [0, 1], timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)


def test_no_message_in_line_is_passed_over(make_broker, monkeypatch, threads_as_processes):
    """One that is stored and not noted yet is called before the one behind it, which is."""
    shop = Shop(make_broker(), concurrency=1)
    noted = threading.Event()
    note = limits.Limits._note_in_line

    def note_late(self, message, *arguments):
        if message.args[1] == 1:
            assert noted.wait(60)
        note(self, message, *arguments)

    monkeypatch.setattr(limits.Limits, "_note_in_line", note_late)
    with running(shop.broker, threads=4):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        shop.send_into_the_line("slow", [1])
        shop.send_into_the_line("slow", [2])
        eventually(lambda: shop.broker.queue_stats("default").in_flight == 2, timeout=60)
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.order["slow"] == [0, 1, 2], timeout=60)
        noted.set()
        eventually(lambda: shop.broker.queue_stats("default").in_flight == 0, timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)


@pytest.mark.parametrize(
    "error", [ValueError("failed"), Snooze(1), SystemExit()], ids=["failed", "snoozed", "exited"]
)
def test_a_turn_is_given_back_however_the_actor_ends(make_broker, error):
    """The next in line gets it; a retry and a snoozed message take a new one."""
    shop = Shop(make_broker(), concurrency=1, key="customer", min_backoff=1, max_backoff=2)
    shop.seen.errors.append(error)
    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        shop.send_into_the_line("slow", [1])
        shop.seen.gates["slow"].set()
        eventually(lambda: Counter(shop.seen.order["slow"]) == {0: 2, 1: 1}, timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)


def test_both_limits_hold_together(make_broker):
    """A message has its turn while it waits for its moment, and all of them run."""
    shop = Shop(make_broker(), rate="6/s", concurrency=1, key="customer")
    began = time.monotonic()
    shop.send("a", range(15))
    with running(shop.broker, threads=4):
        eventually(lambda: shop.seen.count == 15, timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)
    assert shop.seen.most["a"] == 1
    for number, moment in enumerate(sorted(shop.seen.times)):
        assert moment - began >= number // 6


def test_the_same_message_waits_as_often_as_it_was_enqueued(make_broker):
    """One does not take the place of the other in the line."""
    shop = Shop(make_broker(), concurrency=1)
    with running(shop.broker, threads=3):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        message = shop.serve.message("slow", 1)
        for _ in range(3):
            shop.broker.enqueue(message)
        eventually(lambda: shop.broker.queue_stats("default").delayed == 3, timeout=60)
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.order["slow"] == [0, 1, 1, 1], timeout=60)


def test_a_message_that_was_cancelled_in_its_line_is_passed_over(make_broker):
    """The turn goes to the one behind it."""
    shop = Shop(make_broker(), concurrency=1)
    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        first, _ = shop.send_into_the_line("slow", [1, 2])
        assert shop.broker.cancel(first.message_id) == 1
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.order["slow"] == [0, 2], timeout=60)


def test_events_wait_as_messages_do(service, topic):
    """An event over the limit of its actor waits on the actor's queue, and the next ones are not held up."""
    seen = Seen()

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.a", bytes), concurrency=1)
    def listen(event):
        seen.serve("slow", event.decode())

    service.setup()
    with running(service, threads=3):
        for number in "123":
            service.publish(f"{topic}.a", number.encode())
        eventually(lambda: service.queue_stats("default").delayed == 2, timeout=60)
        eventually(lambda: seen.count == 1, timeout=60)
        seen.gates["slow"].set()
        eventually(lambda: sorted(seen.order["slow"]) == ["1", "2", "3"], timeout=60)
    assert seen.most["slow"] == 1


def test_a_killed_worker_takes_no_turn_along(make_fleet):
    """Its message comes again and has its turn still; those in line wait for it, and then all run, in order."""
    fleet = make_fleet(ack_wait=2_000)
    victim = fleet.start(threads=3)
    fleet.send("serve", "a", "first")
    fleet.wait_for("began first", timeout=60)
    for name in ("second", "third"):
        message = fleet.send("serve", "a", name)
        at = fleet.broker.connection, fleet.broker.names, "default", message.message_id
        eventually(lambda at=at: delays.due(*at) is not None, timeout=60)
    victim.kill()
    fleet.start(threads=3)
    fleet.wait_for("began first", count=2, timeout=60)
    assert fleet.counts()["began second"] == 0
    for name in ("third", "second", "first"):
        fleet.open(name)
    fleet.broker.join("default", timeout=60_000)
    assert (
        fleet.lines()
        == ["began first"] * 2
        + [f"{what} {name}" for name in ("first", "second", "third") for what in ("began", "ended")][1:]
    )


def test_a_killed_worker_loses_no_message_that_waits_for_its_moment(make_fleet):
    """They are on the server, and the next worker starts them at the rate."""
    fleet = make_fleet(ack_wait=2_000)
    victim = fleet.start(threads=2)
    began = time.monotonic()
    for number in range(16):
        fleet.send("rated", str(number))
    eventually(lambda: fleet.lines(), timeout=60)
    victim.kill()
    fleet.start(threads=2)
    fleet.broker.join("default", timeout=60_000)
    counts = fleet.counts()
    assert set(counts) == {f"ran {number}" for number in range(16)}
    assert time.monotonic() - began >= 3
    assert fleet.broker.dead_letters.list() == []


def test_a_turn_that_was_not_handed_on_is_by_the_next_that_comes(make_broker, monkeypatch):
    """As when its process dies before the first in line is on its queue."""
    monkeypatch.setattr(limits, "CALL_AGAIN_MS", 1)
    shop = Shop(make_broker(), concurrency=1)
    called = []
    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        shop.send_into_the_line("slow", [1])
        with monkeypatch.context() as context:
            context.setattr(limits.Limits, "_call", lambda self, stored: called.append(stored))
            shop.seen.gates["slow"].set()
            eventually(lambda: called, timeout=60)
        assert shop.seen.order["slow"] == [0]
        shop.send("slow", [2])
        eventually(lambda: shop.seen.order["slow"] == [0, 1, 2], timeout=60)


def test_a_turn_that_was_not_handed_on_is_when_the_message_comes_again_that_ended(make_broker, monkeypatch):
    """Also where another turn is free: its process died before the first in line was on its queue."""
    shop = Shop(make_broker(), concurrency=2)
    died = threading.Event()

    def die(self, stored):
        died.set()
        raise SystemExit

    with running(shop.broker, threads=3):
        shop.send("slow one", [0])
        shop.send("slow two", [0])
        eventually(lambda: shop.seen.count == 2, timeout=60)
        shop.send_into_the_line("quick", [1])
        with monkeypatch.context() as context:
            context.setattr(limits.Limits, "_call", die)
            shop.seen.gates["slow one"].set()
            assert died.wait(60)
        shop.seen.gates["slow two"].set()
        eventually(lambda: shop.seen.order["quick"] == [1], timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)
        eventually(lambda: shop.broker.queue_stats("default").delayed == 0, timeout=60)


def test_a_message_whose_place_in_line_was_not_noted_notes_it_when_it_comes_again(make_broker, monkeypatch):
    """Its process died when it stood in line already; it runs once, and its turn came free before."""
    shop = Shop(make_broker(), concurrency=1)
    died = threading.Event()

    def die(self, *arguments):
        died.set()
        raise BrokerConnectionError("gone")

    with running(shop.broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        with monkeypatch.context() as context:
            context.setattr(limits.Limits, "_note_in_line", die)
            shop.send("quick", [1])
            assert died.wait(60)
            shop.seen.gates["slow"].set()
            eventually(lambda: shop.turns() == 0, timeout=60)
        eventually(lambda: shop.seen.order["quick"] == [1], timeout=60)
        stats = shop.broker.queue_stats
        eventually(lambda: stats("default").delayed + stats("default").in_flight == 0, timeout=60)
    assert shop.seen.order["quick"] == [1]


def test_a_turn_whose_message_is_gone_is_found(make_broker, monkeypatch):
    """An operator dropped the message while its worker was dead."""
    monkeypatch.setattr(limits, "DOUBT_MS", 1)
    shop = Shop(make_broker(), concurrency=1)
    bucket = shop.broker.bucket("limits")
    with running(shop.broker, threads=1):
        shop.send("quick", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        eventually(lambda: shop.turns() == 0, timeout=60)
    (entry,) = bucket.items()
    state = LimitState.decode(entry.value)
    state.turns.append(limits.Turn("gone", 1, 0))
    bucket.put(entry.key, state.encode())
    with running(shop.broker, threads=1):
        shop.send("quick", [1])
        eventually(lambda: shop.seen.count == 2, timeout=60)


def test_a_turn_is_given_back_after_an_outage(make_broker, proxy):
    """The actor ended while the server was away; its message is not run again for that."""
    broker = make_broker(proxy.url)
    shop = Shop(broker, concurrency=1)
    witness = make_broker()
    with running(broker, threads=2):
        shop.send("slow", [0])
        eventually(lambda: shop.seen.count == 1, timeout=60)
        broker.connection.timeout = 500
        proxy.lose()
        shop.seen.gates["slow"].set()
        eventually(lambda: shop.seen.running["slow"] == 0, timeout=60)
        broker.connection.timeout = 30_000
        proxy.restore()
        bucket = witness.bucket("limits")
        eventually(lambda: not any(LimitState.decode(e.value).turns for e in bucket.items()), timeout=90)
        shop.send("slow", [1])
        eventually(lambda: shop.seen.order["slow"] == [0, 1], timeout=60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": "5"}, '"5/s"'),
        ({"rate": "0/s"}, '"5/s"'),
        ({"rate": 5}, '"5/s"'),
        ({"rate": "5/w"}, '"5/s"'),
        ({"concurrency": 0}, "from 1 up"),
        ({"concurrency": True}, "from 1 up"),
        ({"rate": "5/s", "key": "client"}, "its arguments (customer, number)"),
        ({"key": "customer"}, "give a rate or a concurrency"),
    ],
)
def test_a_limit_that_can_never_work_is_an_error(make_broker, options, said):
    """When the actor is declared, in one sentence that says what to give."""
    with pytest.raises(InvalidOption) as raised:
        Shop(make_broker(), **options)
    assert said in str(raised.value)
    assert "'serve'" in str(raised.value)


def test_ten_thousand_keys_are_limited_each_by_itself(make_broker):
    """One of each customer starts, a second one waits for hours, and the process keeps nothing of a customer."""
    customers = [f"c{number}" for number in range(10_000)]
    shop = Shop(make_broker(enqueue_timeout=60_000), rate="1/h", concurrency=1, key="customer")
    shop.broker.enqueue_many([shop.serve.message(customer, 1) for customer in customers])
    shop.broker.enqueue_many([shop.serve.message(customer, 2) for customer in customers[::20]])
    with running(shop.broker, threads=8):
        eventually(lambda: shop.seen.count == 10_000, timeout=150)
        eventually(lambda: shop.broker.queue_stats("default").delayed == 500, timeout=60)
        kept = vars(shop.broker.attachment.limits)
        sizes = {name: len(value) for name, value in kept.items() if isinstance(value, (dict, list, set))}
    assert set(shop.seen.order) == set(customers)
    assert {len(numbers) for numbers in shop.seen.order.values()} == {1}
    assert max(shop.seen.most.values()) == 1
    assert max(sizes.values()) <= limits.PLACES, sizes
