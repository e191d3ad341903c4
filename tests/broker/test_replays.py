"""Looking at dead letters, replaying and dropping them: safe to repeat, and with the history of earlier failures."""

from __future__ import annotations

import threading

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.middleware import AgeLimit, Middleware

from dramatiq_jetstream.errors import InvalidOption
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


class Failing(RuntimeError):
    pass


@pytest.fixture
def broker(make_broker, monkeypatch):
    """One that makes a dead letter at once of what no actor is for."""
    broker = make_broker(unknown_actor_grace=0)
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    return broker


@pytest.fixture
def work(broker):
    """An actor that fails while `work.broken` is true; `work.ran` has the arguments of its runs."""

    @dramatiq.actor(max_retries=0)
    def work(*args):
        work.ran.append(args)
        if work.broken:
            raise Failing(f"failure {len(work.ran)}")

    work.ran = []
    work.broken = True
    return work


def bury(broker, *messages):
    """Have messages become dead letters; returns the letters, oldest first."""
    for message in messages:
        broker.enqueue(message)
    with running(broker, threads=1):
        eventually(lambda: broker.dead_letters.count() == len(messages))
        for queue in broker.get_declared_queues():
            broker.join(queue, timeout=30_000)
    return broker.dead_letters.list()


def test_letters_are_listed_by_queue_actor_and_reason(broker, work):
    """Oldest first, with filters and a limit; counts and single letters as well."""
    dramatiq.actor(lambda: 1 / 0, actor_name="divide", queue_name="other.queue", max_retries=0)
    messages = [
        work.message(1),
        broker.get_actor("divide").message(),
        Message("other.queue", "nobody", (), {}, {}),
        work.message(2),
    ]
    for message in messages:  # one after the other, so that their order is known
        broker.enqueue(message)
        with running(broker):
            eventually(lambda: message.message_id in [m.message_id for m in broker.dead_letters.list()])  # noqa: B023
    letters = broker.dead_letters

    def ids(**filters):
        return [messages.index(letter.decode()) for letter in letters.list(**filters)]

    assert ids() == [0, 1, 2, 3]
    assert ids(queue="default") == [0, 3]
    assert ids(queue="other.queue") == [1, 2]
    assert ids(actor="divide") == [1]
    assert ids(reason="unknown actor") == [2]
    assert ids(reason="retries exhausted", limit=2) == [0, 1]
    assert ids(queue="nowhere") == []
    assert (letters.count(), letters.count("default"), letters.count("nowhere")) == (4, 2, 0)
    assert broker.queue_stats("other.queue").dead == 2
    first = letters.list()[0]
    assert letters.get(first.id) == first
    assert letters.oldest() == first
    assert letters.get("4711") is None
    with pytest.raises(InvalidOption, match="dead letter id 'x'"):
        letters.get("x")


def test_before_the_first_letter_there_is_nothing(broker):
    """A namespace without dead letters, and without their stream, is simply empty."""
    letters = broker.dead_letters
    assert (letters.list(), letters.count(), letters.get("1"), letters.oldest()) == ([], 0, None, None)
    assert letters.drop("1") is False
    assert letters.replay("1") is False
    assert letters.flush("default") == 0


def test_a_replayed_message_runs_again_with_fresh_retries(broker, work):
    """It has its id and arguments, none of the marks of its failure, and no letter any more."""
    message = work.message("a", 1)
    (letter,) = bury(broker, message)
    work.broken = False
    seen = []

    class Look(Middleware):
        def before_process_message(self, broker, message):
            seen.append(message)

    broker.add_middleware(Look())
    assert broker.dead_letters.replay(letter) is True
    with running(broker):
        broker.join("default", timeout=30_000)
    assert work.ran == [("a", 1), ("a", 1)]
    assert seen[0].message_id == message.message_id
    assert set(seen[0].options) == {"dead_history"}
    assert broker.dead_letters.count() == 0


def test_history_grows_with_each_replay(broker, work):
    """Every letter lists the earlier failures of its message, oldest first; retries in between keep them."""
    message = work.message_with_options(max_retries=1, min_backoff=1, max_backoff=2)
    (letter,) = bury(broker, message)
    for replays in (1, 2):
        assert broker.dead_letters.replay(letter.id)
        with running(broker):
            (letter,) = eventually(broker.dead_letters.list)
        assert len(letter.history) == replays
    assert [entry["error"] for entry in letter.history] == ["Failing: failure 2", "Failing: failure 4"]
    assert letter.error == "Failing: failure 6"
    assert {"reason", "error", "deliveries", "time", "worker"} <= set(letter.history[0])


def test_history_has_an_end(broker, work):
    """The last ten failures are kept, so that a message does not grow without limit."""
    (letter,) = bury(broker, work.message())
    with running(broker):
        for _ in range(12):
            assert broker.dead_letters.replay(letter)
            (letter,) = eventually(broker.dead_letters.list)
    assert len(letter.history) == 10
    assert letter.history[-1]["error"] == "Failing: failure 12"


def test_replaying_twice_runs_once(broker, work):
    """The second call finds the letter gone, from any process; at the same moment, too."""
    (letter,) = bury(broker, work.message())
    work.broken = False
    both = threading.Barrier(2)
    answers = []

    def replay():
        both.wait(30)
        answers.append(broker.dead_letters.replay(letter))

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert True in answers
    assert broker.dead_letters.replay(letter) is False
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(work.ran) == 2


def test_a_replay_that_was_cut_off_can_be_repeated(broker, work, monkeypatch):
    """When the message was published and its letter not yet removed, another replay adds no second run."""
    (letter,) = bury(broker, work.message())
    work.broken = False
    with monkeypatch.context() as patch:
        patch.setattr(broker.dead_letters, "drop", lambda letter: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            broker.dead_letters.replay(letter)
    assert broker.dead_letters.count() == 1
    assert broker.dead_letters.replay(letter) is True
    assert broker.dead_letters.count() == 0
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(work.ran) == 2


def test_what_is_undecodable_is_replayed_as_it_is(broker, work):
    """A body that a newer encoder may understand goes back byte for byte, and keeps its history, too."""
    broker.declare_queue("default")
    broker.setup()
    broker.connection.publish(broker.names.task("default"), b"from the future", {"traceparent": "00-1-2-01"})
    with running(broker):
        (letter,) = eventually(broker.dead_letters.list)
        assert broker.dead_letters.replay(letter)
        (again,) = eventually(lambda: [x for x in broker.dead_letters.list() if x.id != letter.id])
    assert again.data == b"from the future"
    assert again.headers == {"traceparent": "00-1-2-01"}
    assert [entry["reason"] for entry in again.history] == ["undecodable"]


def test_a_letter_for_an_actor_that_was_missing_runs_when_it_is_there(broker, work):
    """The usual mend for an unknown actor: deploy it, replay."""
    (letter,) = bury(broker, Message("default", "late", (7,), {}, {}))
    ran = []
    dramatiq.actor(ran.append, actor_name="late")
    assert broker.dead_letters.replay(letter)
    with running(broker):
        broker.join("default", timeout=30_000)
    assert ran == [7]


def test_an_old_message_is_not_too_old_when_it_is_replayed(broker, work):
    """`max_age` counts from the replay: a replay is meant to run the message."""
    assert any(isinstance(middleware, AgeLimit) for middleware in broker.middleware)
    old = work.message_with_options(max_age=60_000).copy(message_timestamp=1)
    (letter,) = bury(broker, old)
    assert (letter.reason, work.ran) == ("rejected", [])
    work.broken = False
    assert broker.dead_letters.replay(letter)
    with running(broker):
        broker.join("default", timeout=30_000)
    assert work.ran == [()]


def test_a_replay_beside_a_message_of_the_same_id_runs_both(broker, work):
    """A message id is not unique; a replay is never taken for a duplicate of something else."""
    message = work.message()
    (letter,) = bury(broker, message)
    work.broken = False
    broker.enqueue(message)
    assert broker.dead_letters.replay(letter)
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(work.ran) == 3


def test_letters_of_a_queue_that_was_made_again_are_kept_apart(broker, work):
    """A queue's stream that is deleted and made again counts from one; its letters replace no older ones."""
    (first,) = bury(broker, work.message("before"))
    broker.connection.api(f"STREAM.DELETE.{broker.names.queue_stream('default')}")
    broker.declarations.ensure_queue("default", again=True)
    broker.enqueue(work.message("after"))
    with running(broker):
        eventually(lambda: broker.dead_letters.count() == 2)
    assert [letter.decode().args for letter in broker.dead_letters.list()] == [("before",), ("after",)]
    assert broker.dead_letters.get(first.id) == first


def test_dropping_deletes_for_good(broker, work):
    """A dropped letter is gone, and dropping it again does nothing."""
    letter, other = bury(broker, work.message(1), work.message(2))
    assert broker.dead_letters.drop(letter) is True
    assert broker.dead_letters.drop(letter) is False
    assert broker.dead_letters.drop("4711") is False
    assert broker.dead_letters.replay(letter) is False
    assert broker.dead_letters.list() == [other]
    assert broker.dead_letters.flush("default") == 1
    assert broker.dead_letters.list() == []


def test_letters_are_stored_again_after_their_stream_was_deleted(broker, work):
    """A running worker makes the stream of dead letters again when it was deleted."""
    bury(broker, work.message(1))
    broker.connection.api(f"STREAM.DELETE.{broker.names.dead_stream}")
    with running(broker):
        work.send(2)
        eventually(lambda: broker.dead_letters.count() == 1)


def test_two_replays_at_once_report_what_they_did(broker, work, make_broker):
    """Two operators replay the same letters: each message is put back once, and one of them is told that it did so."""
    bury(broker, *[work.message(number) for number in range(20)])
    letters = broker.dead_letters.list()
    replayed, began = [], threading.Barrier(2)

    def replay(other):
        began.wait(30)
        replayed.extend((letter.id, other.dead_letters.replay(letter)) for letter in letters)

    threads = [threading.Thread(target=replay, args=(other,)) for other in (broker, make_broker())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(replayed) == 40
    assert sorted(letter for letter, told in replayed if told) == sorted(letter.id for letter in letters)
    assert broker.queue_stats("default").ready == 20
    assert broker.dead_letters.count() == 0
