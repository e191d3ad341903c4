"""The history: what a worker records of attempts, what it costs a message, and how records are found."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO, Middleware, SkipMessage
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.abort import abort_message
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption
from dramatiq_jetstream.history import EXAMINED, OUTCOMES, History, Record
from dramatiq_jetstream.jetstream.topology import MAX_RECORD_BYTES
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire.connection import Publication
from dramatiq_jetstream.wire.ids import new_id
from dramatiq_jetstream.worker import recorder
from dramatiq_jetstream.worker.log_lines import LogLines
from tests.broker.conformance.workers import running
from tests.support.history import write_history
from tests.support.polling import eventually

WAIT = 30.0
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Refused(RuntimeError):
    pass


def outcomes(broker: JetStreamBroker, message_id: str) -> list[str]:
    return [record.outcome for record in broker.history.of(message_id)]


def record(number: int = 0, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "message_id": f"m{number}",
        "queue": "default",
        "actor": "work",
        "outcome": "failed",
        "began": number,
        "ended": number,
    }
    return Record(**{**fields, **changes})


def put(broker: JetStreamBroker, records: list[Record]) -> None:
    """Store records as workers do."""
    broker.declarations.ensure_history()
    subject = broker.names.history
    publications = [
        Publication(subject(r.queue, r.actor, r.message_id), r.encode(), {"Nats-Msg-Id": new_id()})
        for r in records
    ]
    broker.connection.publish_many(publications, timeout=120_000)


def test_every_attempt_of_a_message_that_fails_is_recorded(broker: JetStreamBroker) -> None:
    """With times, attempt, worker, error, traceback, arguments and trace; the last one names the dead letter."""

    @dramatiq.actor(max_retries=2, min_backoff=1, max_backoff=2)
    def charge(customer: str, *, amount: int) -> None:
        raise Refused(f"card of {customer}")

    before = int(time.time() * 1000)
    with running(broker):
        parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        message = charge.send_with_options(args=("c-1",), kwargs={"amount": 5}, trace_context=parent)
        eventually(lambda: len(broker.history.of(message.message_id)) == 3, timeout=WAIT)
    first, second, last = broker.history.of(message.message_id)
    assert [(r.outcome, r.attempt) for r in (first, second, last)] == [
        ("retried", 1),
        ("retried", 2),
        ("failed", 3),
    ]
    for each in (first, second, last):
        assert (each.queue, each.actor, each.arguments) == ("default", "charge", "'c-1', amount=5")
        assert (each.error_type, each.error, each.trace_id) == ("Refused", "card of c-1", TRACE)
        assert 'raise Refused(f"card of {customer}")' in each.traceback
        assert before <= each.began <= each.ended
        assert ":" in each.worker


def test_a_success_is_recorded_when_it_ends_a_message_that_was_retried(broker: JetStreamBroker) -> None:
    """By default other successes leave nothing."""
    failures = [Refused("once")]

    @dramatiq.actor(min_backoff=1, max_backoff=2)
    def work() -> None:
        if failures:
            raise failures.pop()

    with running(broker):
        retried = work.send()
        eventually(lambda: outcomes(broker, retried.message_id) == ["retried", "done"], timeout=WAIT)
        plain = work.send()
        broker.join("default", timeout=30_000)
    assert outcomes(broker, plain.message_id) == []


@pytest.mark.parametrize(("history", "wanted"), [("all", ["done"]), (1.0, ["done"]), (0.0, []), (None, [])])
def test_the_setting_says_which_successes_are_recorded(make_broker: Any, history: Any, wanted: Any) -> None:
    """A worker that stops has stored what it recorded."""
    broker = make_broker(history=history)
    work = dramatiq.actor(lambda: None, actor_name="work", broker=broker)
    with running(broker):
        message = work.send()
        broker.join("default", timeout=30_000)
    assert outcomes(broker, message.message_id) == wanted


def test_without_a_history_failures_leave_nothing(make_broker: Any) -> None:
    """No stream is made either."""
    broker = make_broker(history=None)

    @dramatiq.actor(max_retries=0, broker=broker)
    def work() -> None:
        raise Refused

    with running(broker):
        message = work.send()
        eventually(lambda: broker.dead_letters.list(), timeout=WAIT)
    assert broker.history.of(message.message_id) == []
    assert broker.history.search().records == []
    assert not any("history" in name for name in broker.setup())


@pytest.mark.parametrize("value", ["some", 1.5, -0.1, True, [], float("nan")])
def test_a_setting_that_cannot_be_used_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOption, match="history="):
        JetStreamBroker(history=value)


def test_a_share_records_some_successes(make_broker: Any) -> None:
    """Of 200 successes at a half: more than none, and not all."""
    broker = make_broker(history=0.5)
    work = dramatiq.actor(lambda: None, actor_name="work", broker=broker)
    with running(broker):
        broker.enqueue_many([work.message() for _ in range(200)])
        broker.join("default", timeout=30_000)
    found = broker.history.search(outcome="done", limit=1_000).records
    assert 0 < len(found) < 200


def test_aborted_before_and_while_it_runs(broker: JetStreamBroker) -> None:
    """Both are history and no dead letters."""
    broker.add_middleware(Abortable(backend=AbortBackend(broker)))
    started = []

    @dramatiq.actor
    def work(name: str) -> None:
        started.append(name)
        while True:
            time.sleep(0.01)

    waiting = work.send("waiting")
    abort_message(waiting.message_id, broker)
    with running(broker, threads=1):
        eventually(lambda: outcomes(broker, waiting.message_id) == ["aborted"], timeout=WAIT)
        running_one = work.send("running")
        eventually(lambda: started, timeout=WAIT)
        abort_message(running_one.message_id, broker)
        eventually(lambda: outcomes(broker, running_one.message_id) == ["aborted"], timeout=WAIT)
        broker.join("default", timeout=30_000)
    assert started == ["running"]
    assert broker.dead_letters.count() == 0


def test_skipped(broker: JetStreamBroker) -> None:
    """What a middleware skips is recorded as that; what it fails, as a failure."""

    class Closing(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if message.args == ("late",):
                message.fail()
            raise SkipMessage("after closing time")

    broker.add_middleware(Closing())
    work = dramatiq.actor(lambda when: None, actor_name="work")
    with running(broker):
        skipped, failed = work.send("early"), work.send("late")
        eventually(lambda: outcomes(broker, skipped.message_id) == ["skipped"], timeout=WAIT)
        eventually(lambda: outcomes(broker, failed.message_id) == ["failed"], timeout=WAIT)
    (late,) = broker.history.of(failed.message_id)
    assert late.error == "after closing time"


def test_a_message_that_was_not_begun_and_is_dead(make_broker: Any) -> None:
    """Its record says why, and names the letter, by which its state is found."""
    broker = make_broker(unknown_actor_grace=0)
    broker.declare_queue("default")
    message = broker.enqueue(dramatiq.Message("default", "removed", (), {}, {}))
    with running(broker):
        (found,) = eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
        eventually(lambda: broker.status(message.message_id).state == "dead", timeout=WAIT)
    assert (found.outcome, found.actor, found.error_type) == ("failed", "removed", "")
    assert "removed" in found.error


def test_what_a_program_hides_is_not_recorded(broker: JetStreamBroker) -> None:
    """The hook makes the text of the arguments; 200 characters of it are kept."""
    broker.describe_arguments = lambda message: "card=…" + "x" * 300

    @dramatiq.actor(max_retries=0)
    def charge(card: str) -> None:
        raise Refused

    with running(broker):
        message = charge.send("4111")
        (found,) = eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
    assert found.arguments == ("card=…" + "x" * 300)[:200]


def test_an_error_that_cannot_be_shown_harms_nothing(broker: JetStreamBroker) -> None:
    """An exception whose own text raises is recorded by its class; the message is settled as ever."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    @dramatiq.actor(max_retries=0)
    def work() -> None:
        raise Broken

    with running(broker):
        message = work.send()
        (found,) = eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
    assert (found.error_type, found.error) == ("Broken", "(ValueError)")


def test_a_record_is_bounded_in_bytes() -> None:
    """Whatever is in it, what must be there survives."""
    big = record(
        error="é" * 50_000, traceback="漢" * 50_000, logs=("x" * 500,) * 500, arguments="\udcff" * 200
    )
    data = big.encode()
    assert len(data) <= MAX_RECORD_BYTES
    found = Record.decode(data)
    assert (found.message_id, found.outcome, found.queue) == ("m0", "failed", "default")
    small = record(7, logs=("a", "b"), error="e")
    assert Record.decode(small.encode()) == small


def unavailable(connection: Any, items: Any, **options: Any) -> list[Exception]:
    return [BrokerConnectionError("the server is away") for _ in items]


def test_a_worker_that_cannot_store_records_goes_on(
    make_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages are settled; records beyond the buffer are dropped."""
    monkeypatch.setattr(recorder, "BUFFER", 3)
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", 0.1)
    broker = make_broker(history="all")
    monkeypatch.setattr(recorder, "batches", SimpleNamespace(store=unavailable))
    work = dramatiq.actor(lambda: None, actor_name="work", broker=broker)
    with running(broker):
        broker.enqueue_many([work.message() for _ in range(100)])
        broker.join("default", timeout=30_000)
    assert broker.queue_stats("default").ready == 0


def test_a_stream_that_was_deleted_is_made_again(broker: JetStreamBroker) -> None:
    """The records that find it missing are stored in the next one."""

    @dramatiq.actor(max_retries=0)
    def work() -> None:
        raise Refused

    with running(broker):
        first = work.send()
        eventually(lambda: outcomes(broker, first.message_id) == ["failed"], timeout=WAIT)
        broker.connection.api(f"STREAM.DELETE.{broker.names.history_stream}")
        second = work.send()
        eventually(lambda: outcomes(broker, second.message_id) == ["failed"], timeout=WAIT)
    assert outcomes(broker, first.message_id) == []


def test_a_program_that_may_not_make_the_stream_says_so_once(
    make_broker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With declare=False and no stream, messages run and one warning names the remedy."""
    prepared = make_broker(history=None)
    prepared.declare_queue("default")
    prepared.setup()
    broker = make_broker(declare=False)

    @dramatiq.actor(max_retries=0, broker=broker)
    def work() -> None:
        raise Refused

    with running(broker):
        for _ in range(3):
            work.send()
        eventually(lambda: broker.dead_letters.count() == 3, timeout=WAIT)
        (warning,) = eventually(lambda: lacking(caplog), timeout=WAIT)
    assert "fleet setup" in warning


def lacking(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "history lacks records" in r.getMessage()]


def test_a_search_filters_and_pages_newest_first(broker: JetStreamBroker) -> None:
    """By actor, queue, outcome, time and text, alone and together."""
    put(
        broker,
        [
            record(
                number,
                actor=("work", "other")[number % 2],
                queue=("default", "mail")[number % 3 == 0],
                outcome=OUTCOMES[number % len(OUTCOMES)],
                error_type="Refused",
                error=f"Number {number}",
            )
            for number in range(300)
        ],
    )

    def numbers(**filters: Any) -> list[int]:
        found: list[int] = []
        cursor = None
        while True:
            page = broker.history.search(cursor=cursor, **filters)
            found += [r.began for r in page.records]
            cursor = page.cursor
            if cursor is None:
                return found

    newest = list(range(299, -1, -1))
    assert numbers() == newest
    assert numbers(limit=7) == newest
    assert numbers(actor="other") == [n for n in newest if n % 2]
    assert numbers(queue="mail", actor="work") == [n for n in newest if n % 6 == 0]
    assert numbers(outcome="failed") == [n for n in newest if n % 5 == 2]
    assert numbers(outcome=("failed", "done"), limit=11) == [n for n in newest if n % 5 in (0, 2)]
    assert numbers(error="number 29") == [*range(299, 289, -1), 29]
    assert numbers(error="refused", actor="nobody") == []
    page = broker.history.search(limit=3)
    assert [r.began for r in page.records] == [299, 298, 297]
    assert page.reached is not None


def test_a_search_in_time(broker: JetStreamBroker) -> None:
    """`since` is included, `until` is not."""
    put(broker, [record(1)])
    now = int(time.time() * 1000)
    put(broker, [record(n, ended=now + n) for n in range(10)])
    assert [r.began for r in broker.history.search(since=now + 5).records] == [9, 8, 7, 6, 5]
    assert [r.began for r in broker.history.search(since=now + 2, until=now + 4).records] == [3, 2]
    assert broker.history.search(since=now + 3_600_000).records == []
    assert len(broker.history.search(until=now).records) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"outcome": "faild"}, {"limit": 0}, {"limit": 10_000}, {"cursor": "x"}, {"since": 10**30}],
)
def test_a_search_for_what_cannot_be_is_an_error(broker: JetStreamBroker, wrong: Any) -> None:
    """A typo never looks like an empty history."""
    put(broker, [record()])
    with pytest.raises(InvalidOption):
        broker.history.search(**wrong)


@pytest.fixture(scope="module")
def long_history(nats_server: NatsServer) -> Iterator[JetStreamBroker]:
    """A hundred thousand records; one in ten thousand is of a rare actor."""
    broker = JetStreamBroker(nats_server.url, namespace=f"long{new_id()[:8]}")
    records = (
        record(n, actor="rare" if n % 10_000 == 5_000 else f"a{n % 20}", queue=f"q{n % 5}", error=f"e{n}")
        for n in range(100_000)
    )
    write_history(nats_server.url, broker, records)
    yield broker
    broker.close()


def test_a_long_history_is_found_quickly(long_history: JetStreamBroker) -> None:
    """Each look reads few records: by id, by actor, newest; a text that is nowhere stops at the bound."""
    history: History = long_history.history

    def taken(look: Any) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            look()
            times.append(time.perf_counter() - began)
        return min(times)

    assert [r.error for r in history.of("m70000")] == ["e70000"]
    rare = history.search(actor="rare")
    assert [r.began for r in rare.records] == [n for n in range(99_999, 0, -1) if n % 10_000 == 5_000]
    nowhere = history.search(error="nowhere")
    assert nowhere.records == []
    assert nowhere.cursor == str(100_000 - EXAMINED + 1)
    looks = {
        "by id": lambda: history.of("m70000"),
        "newest": lambda: history.search(),
        "of an actor": lambda: history.search(actor="a7"),
        "of a rare actor": lambda: history.search(actor="rare"),
        "deep": lambda: history.search(cursor="30000"),
        "a text": lambda: history.search(error="nowhere"),
    }
    for name, look in looks.items():
        assert taken(look) < 3, name  # 0.3 s, and what a busy machine adds


def test_an_actor_keeps_what_it_logs(broker: JetStreamBroker, caplog: pytest.LogCaptureFixture) -> None:
    """With each attempt, whatever its outcome; of other actors, nothing. Coroutines log for their message too."""
    broker.add_middleware(AsyncIO())
    caplog.set_level(logging.INFO)
    log = logging.getLogger("shop.charge")

    @dramatiq.actor(log_history=True, min_backoff=1, max_backoff=2)
    def charge(first: list[int]) -> None:
        log.info("charging %s", "c-1")
        if not tries:
            tries.append(1)
            raise Refused

    @dramatiq.actor(log_history=True)
    async def talk() -> None:
        log.info("from a coroutine")

    @dramatiq.actor(max_retries=0)
    def silent() -> None:
        log.info("not kept")
        raise Refused

    tries: list[int] = []
    with running(broker):
        charged, talked, other = charge.send([]), talk.send(), silent.send()
        eventually(lambda: outcomes(broker, charged.message_id) == ["retried", "done"], timeout=WAIT)
        eventually(lambda: outcomes(broker, talked.message_id) == ["done"], timeout=WAIT)
        eventually(lambda: outcomes(broker, other.message_id) == ["failed"], timeout=WAIT)
    for attempt in broker.history.of(charged.message_id):
        (line,) = attempt.logs
        assert line.endswith("INFO shop.charge: charging c-1")
    assert broker.history.of(talked.message_id)[0].logs[0].endswith("from a coroutine")
    assert broker.history.of(other.message_id)[0].logs == ()
    assert not [h for h in logging.getLogger().handlers if isinstance(h, LogLines)]


def test_the_lines_that_are_kept_are_bounded(
    broker: JetStreamBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """The last ones are there, and what is missing is said; a line that cannot be formatted harms nothing."""
    caplog.set_level(logging.INFO)
    log = logging.getLogger("shop.talk")
    log.propagate = True

    @dramatiq.actor(log_history=True)
    def talk() -> None:
        for number in range(1_000):
            log.info("line %d", number)
        log.info("x" * 10_000)

    with running(broker):
        message = talk.send()
        (found,) = eventually(lambda: broker.history.of(message.message_id), timeout=WAIT)
    assert len(found.encode()) <= MAX_RECORD_BYTES
    assert len(found.logs[-1]) <= 500
    assert found.logs[-2].endswith("line 999")
    assert any("earlier lines" in line for line in found.logs) or len(found.logs) < 201
