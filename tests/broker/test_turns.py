"""A turn at a limiter is given back however its actor ends: no interrupt and no outage leaves it taken."""

from __future__ import annotations

import threading

import dramatiq
import pytest
from dramatiq.middleware import Middleware, Retries, SkipMessage, TimeLimitExceeded
from dramatiq.rate_limits import ConcurrentRateLimiter

from dramatiq_jetstream import rate_limits
from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.rate_limits import JetStreamBackend
from dramatiq_jetstream.worker import interrupts
from dramatiq_jetstream.worker.interrupts import Gate, interrupt, uninterrupted
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

#: Milliseconds; longer than any test, so that no turn comes free by itself.
TTL = 900_000


class Program:
    """An actor that takes the only turn of a limiter, over a link that can be lost."""

    def __init__(self, make_broker, proxy):
        self.broker = make_broker(proxy.url, middleware=[Retries(max_retries=0)])
        self.limiter = ConcurrentRateLimiter(JetStreamBackend(self.broker), "only", limit=1, ttl=TTL)
        self.witness = make_broker()
        self.before = self.inside = lambda: None
        self.ran = []

        @dramatiq.actor(broker=self.broker, actor_name="work")
        def work():
            self.ran.append("began")
            self.before()
            with self.limiter.acquire():
                self.inside()
            self.ran.append("ended")

        self.work = work
        self.broker.setup()
        with self.limiter.acquire():
            pass

    def run(self):
        """Run one message, which fails, and return the error of its dead letter."""
        with running(self.broker, threads=1):
            self.work.send()
            (letter,) = eventually(self.witness.dead_letters.list, timeout=60)
        return letter.error

    def is_free(self):
        with self.limiter.acquire(raise_on_failure=False) as acquired:
            return acquired


@pytest.fixture
def program(make_broker, proxy):
    return Program(make_broker, proxy)


def interrupt_the_next_change(program):
    """Interrupt the actor when the server has changed the counter, and the thread does not know yet."""
    bucket = program.limiter.backend.bucket
    update = bucket.update

    def interrupted(*arguments, **options):
        bucket.update = update
        revision = update(*arguments, **options)
        interrupt(threading.get_ident(), TimeLimitExceeded)
        return revision

    bucket.update = interrupted


@pytest.mark.parametrize("moment", ["before", "inside"])
def test_an_interrupt_that_comes_as_a_turn_changes_strikes_afterwards(program, moment):
    """As it is taken, or given back: it is free in the end, and the actor was interrupted all the same."""
    setattr(program, moment, lambda: interrupt_the_next_change(program))
    assert program.run().startswith("TimeLimitExceeded")
    assert program.ran == ["began"]
    assert program.is_free()


def test_a_turn_that_an_interrupted_actor_did_not_give_back_is_given_back(program):
    """The interrupt strikes between the end of the block and the release."""
    release, calls = program.limiter._release, []

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise TimeLimitExceeded
        return release()

    program.limiter._release = interrupted
    assert program.run().startswith("TimeLimitExceeded")
    assert program.is_free()
    assert len(calls) == 3


def test_a_turn_that_could_not_be_given_back_in_an_outage_is_given_back_after_it(make_broker, proxy):
    """The actor fails, because it could not give its turn back; the turn is not lost with it."""
    program = Program(make_broker, proxy)
    connection, release = program.broker.connection, program.limiter._release

    def lose():
        connection.timeout = 500
        proxy.lose()

    def restore_after_the_first():
        try:
            return release()
        except BrokerConnectionError:
            connection.timeout = 30_000
            proxy.restore()
            raise

    program.inside, program.limiter._release = lose, restore_after_the_first
    program.run()
    assert program.ran == ["began"]
    assert program.is_free()


def test_a_turn_is_given_back_once(program):
    """What the actor gave back itself is not taken from another one."""
    given = []
    decr = rate_limits.JetStreamBackend.decr
    program.limiter.backend.decr = lambda *arguments, **options: (
        given.append(1),
        decr(program.limiter.backend, *arguments, **options),
    )[1]
    with running(program.broker, threads=1):
        program.work.send()
        program.broker.join("default", timeout=30_000)
    assert program.ran == ["began", "ended"]
    assert given == [1]


def test_an_interrupt_waits_for_what_must_be_whole():
    """It strikes right after it, once, and what is whole inside of that is part of it."""
    gate, ended = Gate(), []

    def do(what):
        for _ in range(1_000):
            uninterrupted(lambda: ended.append(what))

    def whole():
        gate.interrupt(TimeLimitExceeded, None)
        do("outer")

    def actor():
        uninterrupted(whole)
        do("after")

    gate.expect()
    with pytest.raises(TimeLimitExceeded):
        gate.call(actor, (), {})
    assert ended.count("outer") == 1_000
    assert ended.count("after") < 1_000
    assert uninterrupted(lambda: "outside") == "outside"


def test_a_middleware_takes_a_turn_before_and_after_the_actor(make_broker):
    """Nothing strikes in a hook, so nothing is waited for there; not after a message that was skipped either."""
    broker = make_broker(middleware=[])
    limiter = ConcurrentRateLimiter(JetStreamBackend(broker), "only", limit=1, ttl=TTL)
    seen = []

    class Turns(Middleware):
        def take(self, what):
            with limiter.acquire(raise_on_failure=False) as taken:
                seen.append((what, taken))

        def before_process_message(self, broker, message):
            self.take("before")
            if message.args == ("skipped",):
                raise SkipMessage

        def after_process_message(self, broker, message, *, result=None, exception=None):
            self.take("after")

        def after_skip_message(self, broker, message):
            self.take("skipped")

    broker.add_middleware(Turns())
    work = dramatiq.actor(lambda what: seen.append(what), actor_name="work", broker=broker)
    with running(broker, threads=1):
        work.send("runs")
        work.send("skipped")
        broker.join("default", timeout=60_000)
    assert seen == [("before", True), "runs", ("after", True), ("before", True), ("skipped", True)]


def test_a_thread_is_not_kept_by_the_gate_of_one_that_is_gone(monkeypatch):
    """A thread may have the number of a worker's thread whose last message was skipped."""
    gates = []

    def last_message():
        gates.append(Gate())
        gates[0].expect()

    earlier = threading.Thread(target=last_message)
    earlier.start()
    earlier.join()
    monkeypatch.setitem(interrupts._gates, threading.get_ident(), gates[0])
    assert uninterrupted(lambda: "done") == "done"
