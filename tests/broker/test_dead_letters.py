"""Dead letters: why and how messages become one, and that nothing of the message is lost with it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Middleware, SkipMessage

from dramatiq_jetstream.dead_letters import REASONS
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Failing(RuntimeError):
    pass


@pytest.fixture
def fail(broker):
    """An actor that fails for good."""

    @dramatiq.actor(max_retries=0)
    def fail(text="failed"):
        raise Failing(text)

    return fail


def put(broker, body, queue="default", **headers):
    """Publish bytes where the messages of a queue are, as any program could."""
    broker.declare_queue(queue)
    broker.setup()
    broker.connection.publish(broker.names.task(queue), body, headers or None)


def one_letter(broker, **filters):
    (letter,) = eventually(lambda: broker.dead_letters.list(**filters))
    return letter


def test_a_letter_says_all_there_is_to_say(broker, fail):
    """Queue, actor, message id, reason, error, deliveries, time, worker; and the bytes and headers as they came."""
    message = fail.message("no such customer")
    before = int(time.time() * 1000)
    put(broker, message.encode(), traceparent=TRACEPARENT)
    with running(broker):
        letter = one_letter(broker)
        broker.join("default", timeout=30_000)
    assert letter.reason == "retries exhausted"
    assert letter.error == "Failing: no such customer"
    assert (letter.queue, letter.actor, letter.message_id) == ("default", "fail", message.message_id)
    assert letter.deliveries == 1
    assert before <= letter.time <= time.time() * 1000
    assert letter.worker == f"{socket.gethostname()}:{os.getpid()}"
    assert letter.data == message.encode()
    assert letter.headers == {"traceparent": TRACEPARENT}
    assert letter.history == ()
    assert letter.decode() == message
    assert json.loads(json.dumps(letter.summary()))["error"] == "Failing: no such customer"


def test_retries_used_up(broker):
    """The letter has the message of the last attempt, with its retries counted."""

    @dramatiq.actor(max_retries=2, min_backoff=1, max_backoff=2)
    def work():
        raise Failing("again")

    with running(broker):
        message = work.send()
        letter = one_letter(broker)
    assert (letter.reason, letter.message_id) == ("retries exhausted", message.message_id)
    assert letter.decode().options["retries"] == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\x00 not JSON",
        b'["a", "list"]',
        b"{}",
        b"[" * 100_000,
        b'{"queue_name": "default"}',
    ],
    ids=["empty", "binary", "list", "nothing", "deep", "half"],
)
def test_undecodable(broker, body):
    """Bytes that are no message are kept as they are, and do not stop the queue."""
    ran = []
    dramatiq.actor(ran.append, actor_name="work")
    put(broker, body)
    broker.get_actor("work").send("next")
    with running(broker):
        letter = one_letter(broker, reason="undecodable")
        broker.join("default", timeout=30_000)
    assert letter.data == body
    assert letter.error
    assert (letter.actor, letter.message_id, letter.decode()) == (None, None, None)
    assert ran == ["next"]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("kwargs", "text", "kwargs is a str"),
        ("kwargs", None, "kwargs is a NoneType"),
        ("options", None, "options is a NoneType"),
        ("options", [], "options is a list"),
        ("options", {"throws": "ValueError"}, "not an exception class"),
        ("options", {"eta": 1e300}, "not a time"),
        ("args", 7, "not iterable"),
        ("actor_name", ["work"], "actor_name is a list"),
        ("message_id", 7, "message_id is a int"),
        ("message_timestamp", "today", "message_timestamp is a str"),
        ("surplus", 1, "unexpected keyword"),
    ],
)
def test_a_message_with_wrong_types_is_undecodable(broker, field, value, error):
    """What would trip Dramatiq's threads does not reach them; the worker goes on with all its threads."""
    ran = []
    dramatiq.actor(ran.append, actor_name="work", max_retries=0)
    good = broker.get_actor("work").message("good")
    put(broker, json.dumps({**good.asdict(), field: value}).encode())
    with running(broker, threads=1) as worker:
        letter = one_letter(broker)
        broker.enqueue(good)
        broker.join("default", timeout=30_000)
        assert all(thread.is_alive() for thread in [*worker.workers, *worker.consumers.values()])
    assert letter.reason == "undecodable"
    assert error in letter.error
    assert ran == ["good"]


def test_a_message_for_another_queue_is_run_where_it_is(broker):
    """The name in the message may be anything; retries stay on the queue where the message was found."""
    ran = []

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work():
        ran.append(1)
        raise Failing

    put(broker, work.message().copy(queue_name="somewhere.else").encode())
    with running(broker, threads=1) as worker:
        letter = one_letter(broker)
        assert all(thread.is_alive() for thread in worker.workers)
    assert len(ran) == 2
    assert letter.queue == "default"
    assert letter.decode().queue_name == "default"


def test_unknown_actor(make_broker):
    """A message for an actor that the worker does not have is kept with its name."""
    broker = make_broker(unknown_actor_grace=0)
    broker.declare_queue("default")
    message = broker.enqueue(Message("default", "nobody.here", (1,), {}, {}))
    with running(broker):
        letter = one_letter(broker)
    assert (letter.reason, letter.actor) == ("unknown actor", "nobody.here")
    assert "nobody.here" in letter.error
    assert letter.data == message.encode()


def test_rejected(broker):
    """Errors that an actor `throws`, and messages that a middleware fails, are rejections."""

    class TooLate(Middleware):
        def before_process_message(self, broker, message):
            if message.actor_name == "late":
                message.fail()
                raise SkipMessage("after closing time")

    broker.add_middleware(TooLate())
    dramatiq.actor(lambda: None, actor_name="late")

    @dramatiq.actor(throws=Failing)
    def refuse():
        raise Failing("out of stock")

    with running(broker):
        refuse.send()
        broker.get_actor("late").send()
        letters = eventually(lambda: len(broker.dead_letters.list()) == 2 and broker.dead_letters.list())
    assert {(letter.actor, letter.reason, letter.error) for letter in letters} == {
        ("refuse", "rejected", "Failing: out of stock"),
        ("late", "rejected", "SkipMessage: after closing time"),
    }


def test_delivered_too_often(make_broker):
    """What was taken and never settled becomes a letter on the delivery after the last that is allowed."""
    brokers = [make_broker(ack_wait=1_000, max_deliveries=1) for _ in range(2)]
    for broker in brokers:
        dramatiq.actor(lambda: None, broker=broker, actor_name="work")
    message = brokers[0].actors["work"].send()
    lost = brokers[0].consume("default", prefetch=1, timeout=5_000)
    assert next(lost) is not None
    brokers[0].connection.close()  # its worker is gone without a goodbye
    with running(brokers[1]):
        letter = one_letter(brokers[1])
    assert (letter.reason, letter.deliveries) == ("delivered too often", 2)
    assert (letter.actor, letter.message_id) == ("work", message.message_id)
    assert letter.data == message.encode()


def test_the_reasons_are_the_ones_that_are_documented():
    assert set(REASONS) == {
        "retries exhausted",
        "undecodable",
        "unknown actor",
        "rejected",
        "delivered too often",
        "killed after its time limit",
    }


@pytest.mark.parametrize(
    "text", ["two\nlines\r\nX: injected", "\udcff\x00 é 漢", "x" * 100_000], ids=["lines", "bytes", "long"]
)
def test_any_text_of_an_error_is_kept(broker, fail, text):
    """Whatever an exception says fits on the letter, in one line and with a limit."""
    with running(broker):
        fail.send(text.replace("\udcff", "?"))
        letter = one_letter(broker)
    assert letter.error.startswith("Failing: ")
    assert "\n" not in letter.error
    assert len(letter.error) <= 2_100
    assert "X" not in letter.headers


def test_an_error_with_undecodable_bytes_is_kept(broker, caplog):
    """Names of files may hold bytes that are no UTF-8; an error that quotes one can be stored."""
    caplog.set_level(logging.CRITICAL + 1)  # what pytest captures must be text, to be reported

    @dramatiq.actor(max_retries=0)
    def work():
        raise FileNotFoundError(os.fsdecode(b"/data/\xff"))

    with running(broker):
        work.send()
        letter = one_letter(broker)
    assert letter.error == "FileNotFoundError: /data/\\udcff"


def test_the_largest_message_still_becomes_a_letter(broker, fail):
    """A body that fills `max_payload` leaves no room for the letter's headers, and is kept beside them."""
    frame = len(fail.message("").encode())
    message = fail.message("x" * (broker.connection.max_payload - frame))
    assert len(message.encode()) == broker.connection.max_payload
    put(broker, message.encode())
    with running(broker):
        letter = one_letter(broker)
        broker.join("default", timeout=30_000)
    assert letter.data == message.encode()
    assert (letter.actor, letter.reason) == ("fail", "retries exhausted")
    assert broker.dead_letters.count("default") == 1
    assert broker.dead_letters.get(letter.id) == letter
    assert broker.dead_letters.drop(letter)
    info = broker.connection.api(f"STREAM.INFO.{broker.names.dead_stream}")
    assert info["state"]["messages"] == 0


def test_headers_too_large_for_a_letter_are_left_out(broker, fail):
    """A foreign message may have headers up to JetStream's limit; its body, reason and error are kept."""
    message = fail.message()
    put(broker, message.encode(), **{"x-huge": "h" * (64 * 1024 - 300)})
    with running(broker):
        letter = one_letter(broker)
        broker.join("default", timeout=30_000)
    assert letter.data == message.encode()
    assert letter.error == "Failing: failed"


def test_a_letter_is_stored_before_its_message_is_acked(broker, fail, monkeypatch):
    """While the letter cannot be stored the message stays, and comes again to no thread's cost; it is not run again."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 50)
    store = broker.dead_letters.store
    tried = []

    def unavailable(**letter):
        tried.append(letter)
        if len(tried) < 4:
            raise BrokerConnectionError("the server is away")
        assert broker.queue_stats("default").in_flight == 1
        store(**letter)

    monkeypatch.setattr(broker.dead_letters, "store", unavailable)
    with running(broker):
        fail.send()
        letter = one_letter(broker)
        broker.join("default", timeout=30_000)
    assert (letter.reason, letter.deliveries) == ("retries exhausted", 4)
    assert letter.error == tried[0]["error"]
    assert len(tried) == 4


def test_a_letter_that_can_never_be_stored_does_not_keep_its_message_for_ever(make_broker, monkeypatch):
    """Nothing stays with the worker: the message is delivered again after its ack_wait."""
    broker = make_broker(ack_wait=1_000)
    dramatiq.actor(lambda: 1 / 0, broker=broker, actor_name="fail", max_retries=0)
    store = broker.dead_letters.store
    tried = []

    def broken(**letter):
        tried.append(letter)
        if len(tried) == 1:
            raise ValueError("cannot be stored")
        store(**letter)

    monkeypatch.setattr(broker.dead_letters, "store", broken)
    with running(broker):
        broker.actors["fail"].send()
        letter = one_letter(broker)
    assert letter.deliveries == 2


def test_letters_are_kept_for_their_time(make_broker):
    """After `dead_message_ttl` a letter is gone."""
    broker = make_broker(dead_message_ttl=1_000)
    dramatiq.actor(lambda: 1 / 0, broker=broker, actor_name="fail", max_retries=0)
    with running(broker):
        broker.actors["fail"].send()
        letter = one_letter(broker)
    eventually(lambda: broker.dead_letters.get(letter.id) is None)
    assert broker.dead_letters.count() == 0


def test_a_letter_has_the_traceback_of_the_last_attempt_and_all_attempts(broker):
    """As text, with every attempt's error and time; a list does without the attempts."""
    tries = []

    @dramatiq.actor(max_retries=2, min_backoff=1, max_backoff=2)
    def work():
        tries.append(1)
        raise Failing(f"try {len(tries)}")

    with running(broker):
        message = work.send()
        eventually(lambda: len(broker.history.of(message.message_id)) == 3, timeout=30)
    letter = one_letter(broker)
    assert letter.traceback.startswith("Traceback (most recent call last):")
    assert letter.traceback.rstrip().endswith("Failing: try 3")
    assert 'raise Failing(f"try {len(tries)}")' in letter.traceback
    assert letter.attempts == ()
    attempts = broker.dead_letters.get(letter.id).attempts
    assert [(a["attempt"], a["outcome"], a["error"]) for a in attempts] == [
        (1, "retried", "try 1"),
        (2, "retried", "try 2"),
        (3, "failed", "try 3"),
    ]
    assert all(a["began"] <= a["ended"] <= time.time() * 1000 for a in attempts)
    assert broker.dead_letters.at(attempts[-1]["letter"]) == letter


def test_a_long_traceback_keeps_its_end(broker):
    """A letter stays within what headers may have, whatever an exception says."""

    @dramatiq.actor(max_retries=0)
    def work():
        raise Failing("漢" * 50_000)

    with running(broker):
        work.send()
        letter = one_letter(broker)
    assert letter.traceback.endswith("漢\n")
    assert len(letter.traceback) <= 12_100


def test_an_error_that_is_not_retried_is_no_exhausted_retry(broker):
    """`retry_when` refuses it at once; one that it would retry has used up its retries."""

    class Fatal(RuntimeError):
        pass

    @dramatiq.actor(
        retry_when=lambda retries, error: not isinstance(error, Fatal) and retries < 1,
        min_backoff=1,
        max_backoff=2,
    )
    def work(fatal):
        raise Fatal("never again") if fatal else Failing("again")

    with running(broker):
        work.send(True)
        work.send(False)
        letters = eventually(lambda: len(broker.dead_letters.list()) == 2 and broker.dead_letters.list())
    assert {(letter.error, letter.reason) for letter in letters} == {
        ("Fatal: never again", "rejected"),
        ("Failing: again", "retries exhausted"),
    }
