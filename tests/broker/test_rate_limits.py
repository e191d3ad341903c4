"""Limiters and barriers that many processes contend for: exact, and free again when a holder is killed."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dramatiq.middleware import Interrupt, raise_thread_exception
from dramatiq.rate_limits import Barrier, ConcurrentRateLimiter, WindowRateLimiter

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.jetstream.names import bucket_subject
from dramatiq_jetstream.rate_limits import JetStreamBackend, _Turns, limits_in_use
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire.connection import Publication
from tests.broker.cables import DeafCable
from tests.support.polling import eventually
from tests.support.processes import python

PROCESSES, THREADS = 4, 8

MakeBackend = Callable[..., JetStreamBackend]


@pytest.fixture
def make_backend(nats_url: str, namespace: str) -> Iterator[MakeBackend]:
    """Makes backends, each on a connection of its own, as in different processes."""
    brokers: list[JetStreamBroker] = []

    def make(url: str = nats_url, *, timeout: int = 10_000) -> JetStreamBackend:
        broker = JetStreamBroker(url, namespace=namespace, middleware=[], enqueue_timeout=timeout)
        brokers.append(broker)
        return JetStreamBackend(broker)

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def backend(make_backend: MakeBackend) -> JetStreamBackend:
    return make_backend()


PREAMBLE = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dramatiq.rate_limits import Barrier, BucketRateLimiter, ConcurrentRateLimiter, WindowRateLimiter
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.rate_limits import JetStreamBackend

url, namespace, threads, place = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
backend = JetStreamBackend(JetStreamBroker(url, namespace=namespace, middleware=[]))
backend.bucket.get("connect")
print("ready", flush=True)
while not (place / "go").exists():
    time.sleep(0.005)

def run(work):
    with ThreadPoolExecutor(threads) as pool:
        print("outcome", json.dumps(list(pool.map(work, range(threads)))), flush=True)
"""


def contend(program: str, nats_url: str, namespace: str, tmp_path: Path) -> list[Any]:
    """Run a program's `work(thread)` in all threads of all processes at once; return what each returned."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                python(
                    "-c",
                    f"{PREAMBLE}\n{program}\nrun(work)",
                    nats_url,
                    namespace,
                    str(THREADS),
                    tmp_path,
                    log=tmp_path / f"{number}.log",
                )
            )
            for number in range(PROCESSES)
        ]
        for process in processes:
            process.wait_for_output("ready")
        (tmp_path / "go").touch()
        outcomes: list[Any] = []
        for process in processes:
            assert process.wait(60) == 0, process.output
            outcomes += json.loads(process.output.partition("outcome ")[2].splitlines()[0])
        return outcomes


def test_no_increment_is_lost(
    backend: JetStreamBackend, nats_url: str, namespace: str, tmp_path: Path
) -> None:
    """32 threads in 4 processes count up and down; the sum is what they did."""
    outcomes = contend(
        """
def work(thread):
    done = 0
    for _ in range(6):
        done += backend.incr("n", 2, 10_000, 60_000)
        done += backend.decr("n", 1, 0, 60_000)
    return done
""",
        nats_url,
        namespace,
        tmp_path,
    )
    assert outcomes == [12] * PROCESSES * THREADS
    entry = backend.bucket.get("n")
    assert entry is not None
    assert int(entry.value) == PROCESSES * THREADS * 6


def test_no_more_than_the_limit_get_through(nats_url: str, namespace: str, tmp_path: Path) -> None:
    """32 threads want 5 slots of a bucket limiter, 7 of a window limiter, and 6 of a sum over a counter for
    each, as in a window that moves on: 5, 7 and 6 get one, no more and no fewer."""
    outcomes = contend(
        """
bucket = BucketRateLimiter(backend, "bucket", limit=5, bucket=86_400_000)
window = WindowRateLimiter(backend, "window", limit=7, window=120)
def work(thread):
    got = []
    for limiter in (bucket, window):
        with limiter.acquire(raise_on_failure=False) as acquired:
            got.append(acquired)
    keys = [f"sum@{number}" for number in range(threads)]
    got.append(backend.incr_and_sum(keys[thread], lambda: keys, 1, maximum=6, ttl=120_000))
    return got
""",
        nats_url,
        namespace,
        tmp_path,
    )
    assert [sum(got) for got in zip(*outcomes, strict=True)] == [5, 7, 6]


def test_a_sum_depends_on_all_its_counters(make_backend: MakeBackend) -> None:
    """A counter of the sum that another process changes between the look and the change is not overlooked."""
    mine, theirs = make_backend(), make_backend()
    keys = ["s@1", "s@2"]
    snapshot = mine.bucket.snapshot

    def overtaken(prefix: str) -> Any:
        seen = snapshot(prefix)
        mine.bucket.snapshot = snapshot  # type: ignore[method-assign]
        assert theirs.incr_and_sum("s@2", lambda: keys, 1, maximum=1, ttl=60_000)
        return seen

    mine.bucket.snapshot = overtaken  # type: ignore[method-assign]
    assert not mine.incr_and_sum("s@1", lambda: keys, 1, maximum=1, ttl=60_000)


def test_a_concurrent_limiter_is_never_held_too_often(nats_url: str, namespace: str, tmp_path: Path) -> None:
    """32 threads fight for 3 slots; each holder sees at most 3 holders, and all slots are used."""
    outcomes = contend(
        """
limiter = ConcurrentRateLimiter(backend, "slots", limit=3, ttl=60_000)
holders = place / "holders"
holders.mkdir(exist_ok=True)
def work(thread):
    most = turns = 0
    deadline = time.monotonic() + 30
    while turns < 2 and time.monotonic() < deadline:
        with limiter.acquire(raise_on_failure=False) as acquired:
            if acquired:
                mine = holders / f"{os.getpid()}-{thread}"
                mine.touch()
                time.sleep(0.02)
                most = max(most, len(list(holders.iterdir())))
                mine.unlink()
                turns += 1
        time.sleep(0.01)
    return [most, turns]
""",
        nats_url,
        namespace,
        tmp_path,
    )
    assert {turns for _, turns in outcomes} == {2}
    assert max(most for most, _ in outcomes) == 3


def test_a_barrier_opens_once_for_all(
    backend: JetStreamBackend, nats_url: str, namespace: str, tmp_path: Path
) -> None:
    """32 parties in 4 processes reach a barrier; the last one opens it, and all that wait are woken."""
    assert Barrier(backend, "barrier", ttl=60_000).create(PROCESSES * THREADS)
    outcomes = contend(
        """
barrier = Barrier(backend, "barrier", ttl=60_000)
cleared = []
notify = backend.wait_notify
backend.wait_notify = lambda *args: (cleared.append(1), notify(*args))
def work(thread):
    opened = barrier.wait(timeout=30_000)
    return [opened, bool(cleared and cleared.pop())]
""",
        nats_url,
        namespace,
        tmp_path,
    )
    assert [opened for opened, _ in outcomes] == [True] * PROCESSES * THREADS
    assert sum(last for _, last in outcomes) == 1


HOLDER = """
mutex = ConcurrentRateLimiter(backend, "mutex", limit=1, ttl=3_000)
with mutex.acquire():
    print("held", time.time(), flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_held_comes_free(
    backend: JetStreamBackend, nats_url: str, namespace: str, tmp_path: Path
) -> None:
    """A mutex whose holder got kill -9 stays taken for its time to live, and not much longer."""
    (tmp_path / "go").touch()
    arguments = (f"{PREAMBLE}{HOLDER}", nats_url, namespace, "1", tmp_path)
    process = python("-c", *arguments, log=tmp_path / "log").start()
    held = float(process.wait_for_output(r"held [\d.]+")[0].split()[1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=1, ttl=3_000)

    def taken() -> bool:
        with mutex.acquire(raise_on_failure=False) as acquired:
            return acquired

    assert not taken()
    assert eventually(taken)
    assert 2 <= time.time() - held < 20


def test_whoever_waits_is_woken_by_the_server(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait ends within milliseconds of the notification, without looking again and again."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.wakeups.LOOK_AGAIN_SECONDS", 3600.0)
    waiting, notifying = make_backend(), make_backend()
    with ThreadPoolExecutor(1) as pool:
        for number in range(10):
            woken = pool.submit(waiting.wait, f"k{number}", 60_000)
            eventually(lambda: waiting.bucket.connection._subscriptions)
            notifying.wait_notify(f"k{number}", 60_000)
            before = time.monotonic()
            assert woken.result(timeout=90) is True
            assert time.monotonic() - before < 30  # without it, 60 s


def test_a_wait_without_a_timeout_ends_with_the_notification(make_backend: MakeBackend) -> None:
    """None waits as long as it takes, as `Barrier.wait()` does by default."""
    waiting, notifying = make_backend(), make_backend()
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(waiting.wait, "k", None)
        eventually(lambda: waiting.bucket.connection._subscriptions)
        notifying.wait_notify("k", 60_000)
        assert woken.result(timeout=30) is True


def test_an_increment_whose_answer_got_lost_counts_once(make_backend: MakeBackend, nats_url: str) -> None:
    """A counter that was changed while the connection broke is not changed twice."""
    cable = DeafCable(nats_url)
    counting, reading = make_backend(cable.url), make_backend()
    assert counting.incr("n", 1, 10, 60_000)
    get = counting.bucket.get
    read = threading.Event()

    def reading_before_the_loss(key: str) -> Any:
        entry = get(key)
        cable.deaf = True
        read.set()
        counting.bucket.get = get  # type: ignore[method-assign]
        return entry

    counting.bucket.get = reading_before_the_loss  # type: ignore[assignment, method-assign]

    def value() -> int:
        entry = reading.bucket.get("n")
        assert entry is not None
        return int(entry.value)

    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(counting.incr, "n", 1, 10, 60_000)
        read.wait(30)
        eventually(lambda: value() == 2)
        cable.cut()
        cable.deaf = False
        assert counted.result(timeout=30) is True
    assert value() == 2
    cable.close()


def test_without_a_server_limiters_fail_in_time(
    make_backend: MakeBackend, own_nats_server: NatsServer
) -> None:
    """However many threads want a slot, each has its error within about the timeout."""
    backend = make_backend(own_nats_server.url, timeout=500)
    limiter = ConcurrentRateLimiter(backend, "k", limit=1)
    with limiter.acquire():
        pass
    own_nats_server.stop()

    def fail(_: int) -> float:
        before = time.monotonic()
        with pytest.raises(BrokerConnectionError):
            limiter.acquire().__enter__()
        return time.monotonic() - before

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(fail, range(8))) < 3
    own_nats_server.start()


def test_keys_that_have_no_level_in_common_are_summed_too(backend: JetStreamBackend) -> None:
    """incr_and_sum takes any keys, not only those of the window limiter."""
    assert backend.add("one", 2, 60_000)
    assert backend.add("two@x.y", 3, 60_000)
    keys = ["one", "two@x.y", "three"]
    assert backend.incr_and_sum("three", lambda: keys, 1, maximum=6, ttl=60_000)
    assert not backend.incr_and_sum("three", lambda: keys, 1, maximum=6, ttl=60_000)


def test_a_wide_window_works(backend: JetStreamBackend) -> None:
    """A window of an hour with a counter for each of its seconds is summed as a whole."""
    now = int(time.time())
    backend.bucket.declare()
    backend.bucket.connection.publish_many(
        Publication(bucket_subject(backend.bucket.name, f"wide.{now - second}"), b"1")
        for second in range(5, 3_000)
    )
    limiter = WindowRateLimiter(backend, "wide", limit=2_996, window=3_600)
    with limiter.acquire(raise_on_failure=False) as first:
        assert first
    with limiter.acquire(raise_on_failure=False) as second:
        assert not second


def test_no_interrupt_leaves_a_turn_taken() -> None:
    """Threads that are interrupted a thousand times while they wait, change or leave: the line moves on."""
    turns = _Turns()
    struck = 0
    over = threading.Event()

    def take_turns() -> None:
        nonlocal struck
        while True:
            try:
                while not over.is_set():
                    turns.serve("key", lambda _: over.wait(0.0001), 5)
                return
            except Interrupt:
                struck += 1

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1_000):
        assert threads[number % 4].ident is not None
        raise_thread_exception(threads[number % 4].ident, Interrupt)
        time.sleep(0.0002)
    eventually(lambda: struck > 500)
    over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert turns.serve("key", lambda _: True, 0.5)


def test_a_thread_that_is_interrupted_while_it_waits_for_its_turn_gives_it_on(
    backend: JetStreamBackend,
) -> None:
    """A time limit strikes a thread whose turn it has just become: the limiter goes on working."""
    limiter = ConcurrentRateLimiter(backend, "partner", limit=10)
    waiting, going_on = threading.Event(), threading.Event()
    read = backend.bucket.get
    outcome: list[type[BaseException] | None] = []

    def slow(key: str) -> Any:
        waiting.set()
        going_on.wait(30)
        return read(key)

    def use() -> None:
        try:
            with limiter.acquire():
                outcome.append(None)
        except Interrupt as error:
            outcome.append(type(error))

    backend.bucket.get = slow  # type: ignore[method-assign]
    first = threading.Thread(target=use)
    first.start()
    assert waiting.wait(30)
    second = threading.Thread(target=use)
    second.start()
    eventually(lambda: any(len(line._bells) == 2 for line in backend._turns))
    assert second.ident is not None
    raise_thread_exception(second.ident, Interrupt)
    going_on.set()
    first.join(10)
    second.join(10)
    assert sorted(outcome, key=str) == [Interrupt, None]
    with limiter.acquire():
        pass


def test_what_limiters_hold_is_listed(backend: JetStreamBackend) -> None:
    """Each by its key, with what is taken: concurrent ones, those that count by time, barriers; not what is free."""
    assert limits_in_use(backend.broker) == []
    held = ConcurrentRateLimiter(backend, "eu.scanner@1", limit=2)
    free = ConcurrentRateLimiter(backend, "free", limit=2)
    window = WindowRateLimiter(backend, "calls", limit=10, window=60)
    barrier = Barrier(backend, "members", ttl=60_000)
    barrier.create(parties=3)
    barrier.wait(block=False)
    with free.acquire():
        pass
    for _ in range(3):
        with window.acquire():
            pass
    with held.acquire():
        found = {limit.key: limit.value for limit in limits_in_use(backend.broker)}
    assert found == {"eu.scanner@1": 1, "calls": 3, "members": 2}
