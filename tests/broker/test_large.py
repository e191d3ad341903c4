"""What the library adds to a message always fits: retries, delays and replays of what the server took once."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import random

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.results import Results
from dramatiq_abort import Abortable, abort

from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.errors import MessageNotUnique, MessageTooLarge, NotSent
from dramatiq_jetstream.events import Event, event_of, subscription
from dramatiq_jetstream.progress import Progress, progress, read_progress
from dramatiq_jetstream.results import JetStreamBackend as ResultBackend
from dramatiq_jetstream.sending.envelope import to_message
from dramatiq_jetstream.sending.fitting import fit, unfolded
from dramatiq_jetstream.sending.references import References
from dramatiq_jetstream.wire.headers import encode_headers
from dramatiq_jetstream.wire.ids import new_id
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

MAX_PAYLOAD = 1_048_576


def text(size: int) -> str:
    """Text that compresses as little as JSON text can."""
    raw = random.Random(size).randbytes(size * 3 // 4 + 3)
    return base64.b64encode(raw).decode()[:size]


def digest(data: str | bytes) -> str:
    """What stands for a large text in the output of a test."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def largest(broker, actor, **options):
    """The largest message to an actor that the server takes."""
    empty = len(actor.message_with_options(args=("",), **options).encode())
    headers = len(encode_headers({"Nats-Msg-Id": f"{new_id()}0"}))  # the next one may have a digit more
    return actor.message_with_options(args=(text(MAX_PAYLOAD - empty - headers),), **options)


@pytest.fixture
def failing(broker):
    """An actor that fails twice with a long error; `failing.runs` has what it was called with."""

    @dramatiq.actor(max_retries=3, min_backoff=10, max_backoff=20)
    def failing(data):
        failing.runs.append(digest(data))
        if len(failing.runs) < 3:
            raise ValueError("long " * failing.length)

    failing.runs, failing.length = [], 10
    return failing


def run(broker):
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)


def test_the_largest_message_is_retried(broker, failing):
    """Not two bytes more could have been enqueued, and its retries carry it whole."""
    message = largest(broker, failing)
    broker.enqueue(message)
    with pytest.raises(MessageTooLarge):
        broker.enqueue(message.copy(args=(message.args[0] + "xx",)))
    run(broker)
    assert failing.runs == [digest(message.args[0])] * 3
    assert broker.queue_stats("default").dead == 0


@pytest.mark.parametrize("length", [2_000, 80_000, 300_000])
def test_a_long_error_takes_no_retry_away(broker, failing, length):
    """An error of up to 1.5 MB; each retry carries as much of it as there is room for."""
    failing.length = length
    failing.send("x")
    run(broker)
    assert failing.runs == [digest("x")] * 3


def test_the_largest_message_can_be_delayed(broker, failing):
    """The headers of a schedule are not the caller's affair."""
    failing.runs += ["", ""]  # succeed at once
    message = largest(broker, failing)
    broker.enqueue(message, delay=100)
    run(broker)
    assert failing.runs[2:] == [digest(message.args[0])]


def test_the_largest_message_can_be_replayed(broker, failing):
    """Its letter is replayed as often as it dies, with as much of its history as there is room for."""
    message = largest(broker, failing, max_retries=0)
    broker.enqueue(message)
    for _ in range(2):
        with running(broker, threads=1):
            (letter,) = eventually(broker.dead_letters.list)
        assert letter.error.startswith("ValueError: long")
        assert broker.dead_letters.replay(letter)
    run(broker)
    assert failing.runs == [digest(message.args[0])] * 3


@pytest.mark.parametrize("size", [100, 900_000, 1_030_000, "largest"])
def test_a_large_event_is_retried_and_replayed(service, topic, size):
    """A retry carries the event with it, or refers to it in its stream; and a letter of one can be put back."""
    runs = []
    if size == "largest":
        size = MAX_PAYLOAD - len(encode_headers({"Nats-Msg-Id": new_id()}))
    body = os.urandom(size)

    @dramatiq.actor(
        broker=service,
        subscribe=subscription(f"{topic}.large"),
        max_retries=1,
        min_backoff=10,
        max_backoff=20,
    )
    def handle(data):
        runs.append(digest(data))
        if len(runs) < 3:
            raise ValueError("not yet")

    service.setup()
    service.publish(f"{topic}.large", body)
    with running(service, threads=1):
        (letter,) = eventually(service.dead_letters.list)
        assert runs == [digest(body)] * 2
        assert letter.reason == "retries exhausted"
        carried = event_of(letter.decode())
        assert (carried.subject, digest(carried.data)) == (f"{topic}.large", digest(body))
        assert service.dead_letters.replay(letter)
        eventually(lambda: runs == [digest(body)] * 3)
        service.join("default", timeout=30_000)
    assert service.dead_letters.list() == []


@pytest.fixture
def referring(service, topic):
    """An actor that fails once with the largest event, whose retry waits for a minute; `referring.runs` counts."""

    @dramatiq.actor(
        broker=service, subscribe=subscription(f"{topic}.large"), min_backoff=60_000, max_backoff=60_001
    )
    def referring(data):
        referring.runs += 1
        raise ValueError("not yet")

    referring.runs = 0
    service.setup()
    return referring


def publish_largest(service, topic):
    """Publish the largest event that the server takes, and wait until the retry that refers to it is stored."""
    body = os.urandom(MAX_PAYLOAD - len(encode_headers({"Nats-Msg-Id": new_id()})))
    service.publish(f"{topic}.large", body)
    with running(service, threads=1):
        eventually(
            lambda: service.queue_stats("default").delayed == 1 or service.dead_letters.count(), timeout=30
        )


def fire(service):
    """Have the server deliver at once what it holds back."""
    stream = service.stream(service.names.queue_stream("default"))
    delayed = stream.first(service.names.all_delayed("default"))
    headers = {name: text for name, text in delayed.headers.items() if not name.startswith("Nats-")}
    service.connection.publish(service.names.task("default"), delayed.data, headers)


def test_a_retry_whose_event_is_gone_is_a_dead_letter_that_says_so(service, topic, referring):
    """The stream of events was purged between the failure and the retry."""
    publish_largest(service, topic)
    service.connection.api(f"STREAM.PURGE.{topic}")
    service.connection.publish(f"{topic}.large", b"another")
    fire(service)
    with running(service, threads=1):
        letters = eventually(
            lambda: [x for x in service.dead_letters.list() if x.reason == "undecodable"], timeout=30
        )
    assert "is gone" in letters[0].error


def test_a_retry_whose_event_cannot_be_read_now_waits(service, topic, referring, monkeypatch):
    """An outage between the failure and the retry makes no dead letter."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 50)
    publish_largest(service, topic)
    read, asked = References.resolve, []

    def resolve(self, message):
        asked.append(message)
        if len(asked) < 3:
            raise NotSent("no connection")
        return read(self, message)

    monkeypatch.setattr(References, "resolve", resolve)
    fire(service)
    with running(service, threads=1):
        eventually(lambda: referring.runs == 2, timeout=30)
    assert service.dead_letters.list() == []


def test_an_event_whose_stream_drops_what_was_read_is_not_referred_to(make_broker, topic):
    """The reference would lead nowhere once the event is acked."""
    broker = make_broker()
    stream = {"name": topic, "subjects": [f"{topic}.>"], "retention": "workqueue"}
    broker.connection.api(f"STREAM.CREATE.{topic}", stream)
    stored = broker.stream(topic).at(broker.publish(f"{topic}.large", b"body").seq)
    event = Event(stored.subject, stored.data, stream=topic, sequence=stored.sequence, time=stored.time)
    message = to_message(event, queue="default", actor="actor")
    assert References(broker.connection).refer(message) is None
    broker.connection.api(f"STREAM.DELETE.{topic}")
    broker.connection.api(f"STREAM.CREATE.{topic}", {**stream, "retention": "limits"})
    assert References(broker.connection).refer(message) is None  # another life of the stream
    stored = broker.stream(topic).at(broker.publish(f"{topic}.large", b"body").seq)
    kept = to_message(dataclasses.replace(event, time=stored.time), queue="default", actor="actor")
    referring = References(broker.connection).refer(kept)
    assert event_of(referring) is None
    assert event_of(References(broker.connection).resolve(referring)).data == b"body"


def test_a_compressed_body_that_is_none_is_a_dead_letter(broker, failing):
    """Another program may publish anything; its bytes are kept."""
    broker.declare_queue("default")
    broker.setup()
    for body in (b"not compressed", b"x\x9c\x03\x00"):
        broker.connection.publish(broker.names.task("default"), body, {"Dramatiq-Body": "deflate"})
    with running(broker):
        letters = eventually(lambda: (found := broker.dead_letters.list()) and len(found) == 2 and found)
    assert {letter.reason for letter in letters} == {"undecodable"}
    assert letters[0].data == b"not compressed"


def test_the_largest_message_has_its_callbacks(broker, failing):
    """A callback gets the whole message, and how it failed, as arguments."""
    heard = []
    dramatiq.actor(lambda message, result: heard.append(digest(message["args"][0])), actor_name="well")
    dramatiq.actor(lambda message, error: heard.append(error["type"]), actor_name="badly")
    message = largest(broker, failing, on_success="well", on_failure="badly")
    broker.enqueue(message)
    run(broker)
    assert heard == ["ValueError", "ValueError", digest(message.args[0])]
    assert broker.dead_letters.list() == []


def test_a_letter_whose_follow_up_is_too_large_names_the_error_of_the_actor(broker):
    """The real error comes first, and then that its callback has no room for it."""
    dramatiq.actor(lambda message, error: None, actor_name="gave_up")

    @dramatiq.actor(max_retries=0, on_failure="gave_up")
    def work():
        raise ValueError("the real reason " + text(2_000_000))

    with running(broker):
        work.send()
        (letter,) = eventually(broker.dead_letters.list)
    assert letter.error.startswith("ValueError: the real reason")
    assert "MessageTooLarge" in letter.error


def never(message):
    raise AssertionError("no event is carried")


def test_what_is_added_goes_in_this_order():
    """First the traceback is cut, then the body compressed, then traceback and history are left out."""
    base = Message("q", "a", (text(3_000),), {}, {})
    options = {"retries": 1, "traceback": text(9_000), "dead_history": [{"error": text(2_000)}]}
    message = base.copy(options=options)
    whole = len(message.encode())

    def fitted(room):
        headers = {}
        assert len(fit(message, room, {}, never)) <= room
        body = unfolded(fit(message, room, headers, never), headers)
        found = Message.decode(body)
        assert found.args == base.args
        return found.options, bool(headers)

    assert fitted(whole) == (options, False)
    cut, folded = fitted(whole - 5_000)
    assert (len(cut["traceback"]) < 2_100, "dead_history" in cut, folded) == (True, True, False)
    cut, folded = fitted(6_500)
    assert ("dead_history" in cut, folded) == (True, True)
    assert fitted(len(base.encode()) + 60) == ({"retries": 1}, False)


def test_progress_of_a_message_with_a_very_long_id_is_kept(broker):
    """An id of 5,000 characters, as another program may give an event, breaks no connection."""
    broker.add_middleware(Progress())
    message_id = "x" * 5_000
    dramatiq.actor(lambda: progress(1, 2, "half"), actor_name="work")
    broker.declare_queue("default")
    broker.setup()
    reconnects = broker.connection.state.reconnects
    with running(broker):
        broker.enqueue(Message("default", "work", (), {}, {}, message_id=message_id))
        broker.join("default", timeout=30_000)
        found = eventually(lambda: read_progress(message_id, broker))
    assert (found.message_id, found.note) == (message_id, "half")
    assert read_progress(message_id + "y", broker) is None
    assert broker.connection.state.reconnects == reconnects


def test_a_very_long_id_or_key_harms_nothing(broker):
    """Results, aborts and unique keys of such a message work as for any other."""
    results = ResultBackend(broker, use_namespace_prefix_keys=True)
    broker.add_middleware(Results(backend=results))
    broker.add_middleware(Abortable(backend=AbortBackend(broker)))
    ran = []
    dramatiq.actor(lambda: ran.append(1) or "done", actor_name="work", store_results=True)
    options = {"unique_key": "k" * 5_000}
    message = Message("default", "work", (), {}, options, message_id="x" * 5_000)
    broker.enqueue(message)
    with pytest.raises(MessageNotUnique):
        broker.enqueue(Message("default", "work", (), {}, options))
    reconnects = broker.connection.state.reconnects
    with running(broker):
        assert results.get_result(message, block=True) == "done"
        broker.join("default", timeout=30_000)
    aborted = broker.enqueue(Message("default", "work", (), {}, {}, message_id="y" * 5_000))
    abort(aborted.message_id)
    with running(broker):
        broker.join("default", timeout=30_000)
    assert ran == [1]
    assert broker.connection.state.reconnects == reconnects
