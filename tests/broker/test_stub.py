"""Tests without a server: what is ours works or is recorded on a stub, and time passes when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker as DramatiqStubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.results import Results
from dramatiq_abort import Abortable, abort

from dramatiq_jetstream import JetStreamBroker, Snooze, group
from dramatiq_jetstream.abort import JetStreamBackend as Aborts
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption, MessageNotUnique
from dramatiq_jetstream.events import Events, current_event, subscription
from dramatiq_jetstream.periodic import InvalidSchedule, Periodic
from dramatiq_jetstream.progress import Progress, progress, read_progress
from dramatiq_jetstream.rate_limits import JetStreamBackend as Limits
from dramatiq_jetstream.results import JetStreamBackend as Results_
from dramatiq_jetstream.testing import StubBroker, stub

#: An address at which no server listens: what asks it fails.
NOWHERE = "nats://127.0.0.1:9"

HOUR_MS = 3_600_000


def _equip(broker: Any) -> Any:
    """Add all middleware of the library."""
    broker.add_middleware(Results(backend=Results_(broker), store_results=True))
    broker.add_middleware(Events("PARCELS", ["PARCEL.>"]))
    broker.add_middleware(Abortable(backend=Aborts(broker)))
    for middleware in (Periodic, Progress):
        if not any(isinstance(one, middleware) for one in broker.middleware):
            broker.add_middleware(middleware())
    return broker


@pytest.fixture
def stubbed() -> Iterator[StubBroker]:
    """An empty stub with all middleware of the library, as Dramatiq's global broker."""
    before = dramatiq.broker.global_broker
    broker = _equip(StubBroker())
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.broker.global_broker = before


def test_dramatiqs_own_stub_takes_everything() -> None:
    """No option and no backend of ours raises there; results, limits and progress work in memory."""
    broker = _equip(DramatiqStubBroker())
    limiter = ConcurrentRateLimiter(Limits(broker), "one", limit=1)
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)

    @dramatiq.actor(every=60_000, hard_time_limit=5_000, log_history=True)
    def tick() -> None: ...

    @dramatiq.actor(cron="0 3 * * *", timezone="Europe/Berlin")
    def nightly() -> None: ...

    @dramatiq.actor(subscribe=subscription("PARCEL.sent"))
    def parcel(event: bytes) -> None: ...

    @dramatiq.actor
    def count(number: int) -> int:
        with limiter.acquire(raise_on_failure=False) as acquired:
            progress(number, number, "counted")
            return number + acquired

    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        message = count.send_with_options(args=(2,), unique_key="two", hard_time_limit=1_000)
        other = count.send(0)
        abort(other.message_id)
        assert message.get_result(block=True, timeout=30_000) == 3
        report = read_progress(message.message_id)
        assert report is not None
        assert (report.done, report.note) == (2, "counted")
    finally:
        worker.stop()
        dramatiq.broker.global_broker = before


def test_a_wrong_option_is_named_on_a_stub_too(stubbed: StubBroker) -> None:
    """What would be refused on the real broker is refused in tests."""
    with pytest.raises(InvalidSchedule, match="every=7"):
        dramatiq.actor(every=7)(lambda: None)
    with pytest.raises(InvalidOption, match="ORDER"):
        dramatiq.actor(subscribe=subscription("ORDER.new"), actor_name="elsewhere")(lambda event: None)


def test_a_delayed_message_waits_for_its_time(stubbed: StubBroker) -> None:
    """Time passes when the test says so, to the millisecond."""
    ran: list[str] = []

    @dramatiq.actor
    def late(name: str) -> None:
        ran.append(name)

    late.send_with_options(args=("two",), delay=2_000)
    late.send_with_options(args=("one",), delay=timedelta(seconds=1))
    late.send("now")
    assert stubbed.run() == 1
    assert stubbed.run(999) == 0
    stubbed.advance(1)
    assert ran == ["now"]
    assert [message.args for message in stubbed.enqueued(late)] == [("one",), ("two",)]
    assert stubbed.run(timedelta(seconds=1)) == 2
    assert ran == ["now", "one", "two"]


def test_periodic_actors_tick_as_time_passes(stubbed: StubBroker) -> None:
    """Intervals count from the declaration, crontabs follow the calendar."""
    ran: list[str] = []

    @dramatiq.actor(every=60_000)
    def minutely() -> None:
        ran.append("minutely")

    @dramatiq.actor(cron="30 3 * * *", timezone="Europe/Berlin")
    def nightly() -> None:
        ran.append("nightly")

    stubbed.run(24 * HOUR_MS)
    assert ran.count("minutely") == 24 * 60
    assert ran.count("nightly") in (1, 2)  # two when clocks are put back within that day
    stubbed.advance(60_000)
    stubbed.assert_enqueued(minutely)


def test_retries_run_at_their_time_and_a_dead_letter_is_raised(stubbed: StubBroker) -> None:
    """A failing actor is retried as time passes; when it is given up, `run` raises what it raised."""

    @dramatiq.actor(max_retries=2, min_backoff=10_000, max_backoff=10_000)
    def fail() -> None:
        raise ZeroDivisionError("as ever")

    message = fail.send()
    assert stubbed.run() == 1
    assert stubbed.status(message).state == "retrying"
    with pytest.raises(ZeroDivisionError, match="as ever"):
        stubbed.run(HOUR_MS)
    status = stubbed.status(message.message_id)
    assert (status.state, status.attempt, status.error) == ("dead", 3, "ZeroDivisionError: as ever")
    assert stubbed.run(HOUR_MS) == 0


def test_what_waits_can_be_asserted(stubbed: StubBroker) -> None:
    """A failed assertion says what is enqueued instead."""

    @dramatiq.actor
    def mail(to: str, *, copies: tuple[str, ...] = ()) -> None: ...

    stubbed.assert_not_enqueued(mail)
    mail.send_with_options(args=("ada",), kwargs={"copies": ("bob",)}, delay=60_000, max_retries=3)
    stubbed.assert_enqueued(mail)
    stubbed.assert_enqueued(mail.message("ada", copies=("bob",)), delay=timedelta(minutes=1))
    stubbed.assert_enqueued(
        mail.message_with_options(args=("ada",), kwargs={"copies": ["bob"]}, max_retries=3)
    )
    stubbed.assert_not_enqueued(mail.message("eve"))
    with pytest.raises(
        AssertionError, match=r"mail\('eve'\) is not enqueued\.\sEnqueued:\s+mail\('ada'.*60000 ms"
    ):
        stubbed.assert_enqueued(mail.message("eve"))
    with pytest.raises(AssertionError, match="in 5 ms"):
        stubbed.assert_enqueued(mail, delay=5)
    with pytest.raises(AssertionError, match="is enqueued"):
        stubbed.assert_not_enqueued(mail)


def test_a_unique_key_is_held_for_its_window(stubbed: StubBroker) -> None:
    """As on the real broker, also over retries, and a cancelled message frees it."""

    @dramatiq.actor
    def once() -> None: ...

    def send(**options: Any) -> Any:
        return once.send_with_options(unique_key="k", unique_window=5_000, **options)

    send()
    with pytest.raises(MessageNotUnique):
        send()
    stubbed.run(5_000)
    delayed = send(delay=HOUR_MS)
    with pytest.raises(MessageNotUnique):
        send()
    assert stubbed.cancel(delayed.message_id) == 1
    hurried = send(delay=HOUR_MS)
    assert stubbed.status(hurried).state == "delayed"
    assert stubbed.run_now(hurried.message_id) == 1
    assert stubbed.status(hurried).state == "waiting"
    stubbed.run()
    assert stubbed.status(hurried).state == "done"
    assert stubbed.status("who?").state == "unknown"


def test_events_reach_the_actors_that_subscribe(stubbed: StubBroker) -> None:
    """Each attempt gets what the type makes of the event; a body that does not decode is a dead letter."""
    got: list[Any] = []

    @dramatiq.actor(subscribe=subscription("PARCEL.*.sent", lambda event: int(event.data)), min_backoff=1_000)
    def sent(number: int) -> None:
        event = current_event()
        assert event is not None
        got.append((number, event.subject, event.id))
        if len(got) == 1:
            raise ConnectionError

    stubbed.publish("PARCEL.7.sent", b"7", event_id="seven")
    stubbed.publish("PARCEL.7.lost", b"7")
    stubbed.run(HOUR_MS)
    assert got == [(7, "PARCEL.7.sent", "seven")] * 2
    assert [event.subject for event in stubbed.published] == ["PARCEL.7.sent", "PARCEL.7.lost"]
    stubbed.publish("PARCEL.8.sent", b"eight")
    with pytest.raises(ValueError, match="eight"):
        stubbed.run()
    assert current_event() is None


def test_groups_pipelines_and_async_actors_run_inline(stubbed: StubBroker) -> None:
    """What Dramatiq composes is composed, and an actor that is a coroutine runs."""
    stubbed.add_middleware(AsyncIO())
    stubbed.add_middleware(dramatiq.middleware.GroupCallbacks(Limits(stubbed)))
    ran: list[Any] = []

    @dramatiq.actor
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    @dramatiq.actor
    def finish(*args: Any) -> None:
        ran.append(args)

    (double.message(2) | double.message() | finish.message()).run()
    together = group([double.message(1), double.message(5)])
    together.add_completion_callback(finish.message("all"))
    together.run()
    stubbed.run()
    assert sorted(ran, key=str) == [("all",), (8,)]
    assert sorted(together.get_results()) == [2, 10]


def test_a_snoozed_message_comes_again(stubbed: StubBroker) -> None:
    """It is no failure and has no result until it ends."""
    attempts: list[int] = []

    @dramatiq.actor(max_retries=0)
    def patient() -> str:
        attempts.append(stubbed.now)
        if len(attempts) < 3:
            raise Snooze(delay=60_000)
        return "done"

    message = patient.send()
    stubbed.run(HOUR_MS)
    assert [later - earlier for earlier, later in pairwise(attempts)] == [
        60_000,
        60_000,
    ]
    assert message.get_result() == "done"


def test_what_is_over_a_rate_waits_for_its_moment(stubbed: StubBroker) -> None:
    """Each value of the key by itself, in order, a retry is a start, and a waiting message is delayed."""
    started: list[tuple[int, str, int]] = []

    @dramatiq.actor(rate="2/s", concurrency=1, key="customer", max_retries=1, min_backoff=1, max_backoff=2)
    def serve(customer: str, number: int) -> None:
        started.append((stubbed.now - began, customer, number))
        if started == [(0, "a", 0)]:
            raise ValueError("once")

    began = stubbed.now
    sent = [serve.send("a", number) for number in range(5)]
    serve.send("b", 0)
    assert stubbed.run() == 6
    assert started == [(0, "a", 0), (0, "a", 1), (0, "b", 0)]
    assert stubbed.status(sent[2]).state == "delayed"
    stubbed.assert_enqueued(serve.message("a", 4), delay=2_000)
    stubbed.run(HOUR_MS)
    assert started[3:] == [(1_000, "a", 2), (1_000, "a", 3), (2_000, "a", 4), (2_000, "a", 0)]
    assert [stubbed.status(message).state for message in sent] == ["done"] * 5


def test_an_actor_that_is_limited_for_each_customer_takes_no_memory_for_old_ones(stubbed: StubBroker) -> None:
    """A flush forgets who waited."""

    @dramatiq.actor(rate="1/h", key="customer")
    def serve(customer: str) -> None: ...

    for _ in range(2):
        serve.send("a")
    stubbed.run()
    stubbed.flush_all()
    serve.send("a")
    stubbed.run()
    stubbed.assert_not_enqueued(serve)


def test_a_test_that_fails_inside_of_an_actor_fails(stubbed: StubBroker) -> None:
    """An interrupt, or a failed test, is not taken for a failed attempt."""

    @dramatiq.actor
    def checks() -> None:
        pytest.fail("not so")

    checks.send()
    with pytest.raises(BaseException, match="not so"):
        stubbed.run()


def test_an_actor_that_sends_to_itself_ends(stubbed: StubBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of messages is a clear error."""
    monkeypatch.setattr("dramatiq_jetstream.testing.stub_broker.RUN_LIMIT", 20)

    @dramatiq.actor
    def forever() -> None:
        forever.send()

    forever.send()
    with pytest.raises(RuntimeError, match="for ever"):
        stubbed.run()


def test_an_aborted_message_does_not_run(stubbed: StubBroker) -> None:
    """dramatiq-abort works in memory."""

    @dramatiq.actor
    def never() -> None:
        raise AssertionError

    message = never.send()
    abort(message.message_id)
    assert stubbed.run(fail_fast=False) == 1


def test_a_stub_stands_in_for_a_programs_broker() -> None:
    """The actors of a program with a JetStreamBroker run without a server, and are the program's again afterwards."""
    before = dramatiq.broker.global_broker
    broker = _equip(JetStreamBroker(NOWHERE, enqueue_timeout=100))
    limiter = ConcurrentRateLimiter(Limits(broker), "one", limit=1)
    dramatiq.set_broker(broker)
    try:

        @dramatiq.actor(subscribe=subscription("PARCEL.sent"), hard_time_limit=5_000)
        def parcel(event: bytes) -> None:
            with limiter.acquire():
                price.send(len(event))

        @dramatiq.actor(every=60_000)
        def price(weight: int = 1) -> int:
            return 3 * weight

        with stub() as standing_in:
            assert dramatiq.get_broker() is standing_in
            standing_in.publish("PARCEL.sent", b"1234")
            standing_in.run()
            message = price.send(5)
            assert standing_in.run(60_000) == 2
            assert message.get_result() == 15
            with stub() as inner:  # a stub of a stub
                price.send(1)
                inner.assert_enqueued(price.message(1))
            standing_in.assert_not_enqueued(price)
        assert price.broker is broker
        assert dramatiq.get_broker() is broker
        with pytest.raises(BrokerConnectionError):
            price.send(1)
        with pytest.raises(BrokerConnectionError):
            message.get_result()
    finally:
        dramatiq.broker.global_broker = before
        broker.close()
