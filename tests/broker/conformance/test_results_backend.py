"""What every result backend does with what it is told to keep, without any actor."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.results import ResultFailure, ResultMissing, ResultTimeout

from tests.support.polling import eventually

TTL = 60_000


def a_message(**fields):
    return Message(
        **{"queue_name": "q", "actor_name": "a", "args": (), "kwargs": {}, "options": {}, **fields}
    )


def test_a_result_that_is_not_there_is_missing(results):
    """Without blocking, a result that was never stored raises at once."""
    message = a_message()
    before = time.monotonic()
    with pytest.raises(ResultMissing):
        results.get_result(message)
    assert time.monotonic() - before < 8


@pytest.mark.parametrize(
    "value",
    [
        None,
        False,
        0,
        "",
        [],
        {},
        -1.5,
        2**53,
        "東京 🐰 \u0000",
        {"a": [1, {"b": None}]},
        {"__t": "mine"},
    ],
    ids=repr,
)
def test_a_result_comes_back_as_it_was_stored(results, value):
    """Whatever the encoder can carry is returned, as often as it is asked for, waiting or not."""
    message = a_message()
    results.store_result(message, value, TTL)
    assert results.get_result(message) == value
    assert results.get_result(message, block=True, timeout=1000) == value
    assert results.get_result(message) == value


def test_an_exception_comes_back_as_a_failure(results):
    """A stored exception is raised as ResultFailure that names its type and message."""
    message = a_message()
    results.store_exception(message, ValueError("on purpose"), TTL)
    for block in (False, True):
        with pytest.raises(ResultFailure, match="actor raised ValueError: on purpose") as failure:
            results.get_result(message, block=block)
        assert failure.value.orig_exc_type == "ValueError"
        assert failure.value.orig_exc_msg == "on purpose"


def test_the_last_result_counts(results):
    """A message that runs again overwrites its result, and an exception gives way to a result."""
    message = a_message()
    results.store_exception(message, ValueError("first"), TTL)
    results.store_result(message, "second", TTL)
    results.store_result(message, "third", TTL)
    assert results.get_result(message) == "third"


def test_each_message_has_its_own_result(results):
    """Messages that differ in queue, actor or id do not share a result; arguments do not matter."""
    message = a_message()
    others = [
        message.copy(queue_name="other"),
        message.copy(actor_name="other"),
        message.copy(message_id="other"),
    ]
    results.store_result(message, 1, TTL)
    for other in others:
        with pytest.raises(ResultMissing):
            results.get_result(other)
    assert results.get_result(message.copy(args=(1,), options={"retries": 3})) == 1


def test_a_delayed_message_has_the_result_of_its_queue(results):
    """What was sent to a delay queue is found under the queue it was meant for, and the reverse."""
    message = a_message(queue_name="q")
    results.store_result(message, 1, TTL)
    assert results.get_result(message.copy(queue_name="q.DQ")) == 1


def test_waiting_ends_with_the_timeout(results, results_kind):
    """A result that does not come raises ResultTimeout, not long after the time that was given."""
    timeout = max(300, results_kind.timeout_step)
    before = time.monotonic()
    with pytest.raises(ResultTimeout):
        results.get_result(a_message(), block=True, timeout=timeout)
    waited = (time.monotonic() - before) * 1000
    # A backend that looks now and then may give up when its next look would come too late.
    assert timeout * (0.3 if results_kind.waiting == "looks" else 0.95) <= waited < timeout + 8_000


def test_waiting_no_time_at_all_is_possible(results):
    """A timeout of zero returns what is there and does not wait for what is not."""
    message = a_message()
    with pytest.raises(ResultTimeout):
        results.get_result(message, block=True, timeout=0)
    results.store_result(message, 1, TTL)
    assert results.get_result(message, block=True, timeout=0) == 1


def test_a_result_that_comes_while_waiting_is_returned(results):
    """A result or an exception that is stored by someone else ends the waiting."""
    for store, value in (("store_result", 42), ("store_exception", ValueError("late"))):
        message = a_message()
        timer = threading.Timer(0.15, getattr(results, store), (message, value, TTL))
        timer.start()
        if store == "store_result":
            assert results.get_result(message, block=True, timeout=30_000) == 42
        else:
            with pytest.raises(ResultFailure):
                results.get_result(message, block=True, timeout=30_000)
        timer.join()


@pytest.mark.where(waiting="is woken")
def test_a_waiter_is_woken_at_once(results):
    """Where the server wakes those who wait, they have the result within milliseconds, on an idle machine."""

    def lag():
        message = a_message()
        stored_at = []

        def store(message=message, stored_at=stored_at):
            stored_at.append(time.monotonic())
            results.store_result(message, 1, TTL)

        timer = threading.Timer(0.1, store)
        timer.start()
        results.get_result(message, block=True, timeout=30_000)
        lagged = time.monotonic() - stored_at[0]
        timer.join()
        return lagged

    eventually(lambda: lag() < 0.05)


def test_many_may_wait_at_once(results):
    """Waiters for different results, and several for the same, each get what they wait for."""
    messages = [a_message() for _ in range(20)]
    with ThreadPoolExecutor(max_workers=40) as pool:
        waiting = [
            (number, pool.submit(results.get_result, message, block=True, timeout=60_000))
            for number, message in enumerate(messages)
            for _ in range(2)
        ]
        for number, message in reversed(list(enumerate(messages))):
            results.store_result(message, number, TTL)
        for number, future in waiting:
            assert future.result(timeout=60) == number


def test_a_result_is_kept_for_its_time_only(results, results_kind):
    """After the ttl of its own store a result is missing, also for those who wait; others stay."""
    ttl = max(1000, results_kind.ttl_step)
    short, long = a_message(), a_message()
    results.store_result(short, 1, ttl)
    results.store_result(long, 2, TTL)
    assert results.get_result(short) == 1

    def gone():
        try:
            results.get_result(short)
        except ResultMissing:
            return True
        return False

    eventually(gone, timeout=ttl / 1000 + 3)
    with pytest.raises(ResultTimeout):
        results.get_result(short, block=True, timeout=0)
    assert results.get_result(long) == 2


def test_a_new_store_starts_the_time_anew(results, results_kind):
    """A result that is overwritten lives as long as its last store says."""
    message = a_message()
    stored_at = time.monotonic()
    results.store_result(message, 1, 1000)
    results.store_result(message, 2, TTL)
    eventually(lambda: time.monotonic() > stored_at + 1.3)
    assert results.get_result(message) == 2


def test_backends_of_one_namespace_share_results(make_results):
    """What one process stores another finds, in the same namespace only."""
    one, two, other = make_results(), make_results(), make_results(namespace="elsewhere")
    message = a_message()
    one.store_result(message, 1, TTL)
    assert two.get_result(message) == 1
    with pytest.raises(ResultMissing):
        other.get_result(message)
    other.store_result(message, 2, TTL)
    assert one.get_result(message) == 1
    assert two.get_result(message) == 1


def test_a_waiter_in_another_process_is_served(make_results):
    """A result that is stored through one backend ends the waiting at another."""
    one, two = make_results(), make_results()
    message = a_message()
    timer = threading.Timer(0.1, one.store_result, (message, 1, TTL))
    timer.start()
    assert two.get_result(message, block=True, timeout=30_000) == 1
    timer.join()


def test_keys_are_hashed_unless_asked_otherwise(make_results, space):
    """By default a key is 32 hexadecimal digits; with use_namespace_prefix_keys it can be read."""
    message = a_message(queue_name="q.DQ", actor_name="an actor")
    hashed = make_results().build_message_key(message)
    assert len(hashed) == 32
    assert set(hashed) <= set("0123456789abcdef")
    readable = make_results(use_namespace_prefix_keys=True).build_message_key(message)
    assert readable == f"{space}:q:an actor:{message.message_id}"


@pytest.mark.parametrize("use_namespace_prefix_keys", [False, True])
@pytest.mark.parametrize(
    "name", ["a b", "*", ">", "a.b..c", "@/\\=", "日本", "$KV", "x" * 150], ids=lambda name: name[:8]
)
def test_names_may_have_any_characters(make_results, use_namespace_prefix_keys, name):
    """Queue and actor names, and message ids, of any form make keys that are kept apart."""
    backend = make_results(use_namespace_prefix_keys=use_namespace_prefix_keys)
    messages = [
        a_message(queue_name=name),
        a_message(actor_name=name),
        a_message(message_id=f"{name}-1"),
        a_message(message_id=f"{name}-2"),
    ]
    for number, message in enumerate(messages):
        backend.store_result(message, number, TTL)
    assert [backend.get_result(message) for message in messages] == [0, 1, 2, 3]


def test_readable_and_hashed_keys_do_not_meet(make_results):
    """A backend with readable keys does not find what one with hashed keys stored."""
    message = a_message()
    make_results().store_result(message, 1, TTL)
    with pytest.raises(ResultMissing):
        make_results(use_namespace_prefix_keys=True).get_result(message)


def test_any_encoder_may_be_used(make_results):
    """An encoder whose bytes are no text carries what JSON cannot."""
    backend = make_results(encoder=dramatiq.PickleEncoder())
    message = a_message()
    backend.store_result(message, {(1, 2), b"\x00\xff"}, TTL)
    assert backend.get_result(message) == {(1, 2), b"\x00\xff"}
    backend.store_exception(message, ValueError("on purpose"), TTL)
    with pytest.raises(ResultFailure):
        backend.get_result(message, block=True, timeout=1000)


def test_a_result_that_the_encoder_refuses_is_refused(results):
    """The encoder's error reaches the caller, and nothing is stored."""
    message = a_message()
    with pytest.raises(TypeError):
        results.store_result(message, object(), TTL)
    with pytest.raises(ResultMissing):
        results.get_result(message)


@pytest.mark.parametrize("size", [100_000, 900_000, 5_000_000])
def test_big_results_are_kept_whole(results, size):
    """A result of some megabytes comes back, waiting or not, and can give way to a small one."""
    message = a_message()
    big = "".join(f"{number:09d}," for number in range(size // 10))
    results.store_result(message, big, TTL)
    assert results.get_result(message) == big
    assert results.get_result(message, block=True, timeout=30_000) == big
    results.store_result(message, "small", TTL)
    assert results.get_result(message) == "small"


def test_results_of_older_programs_can_be_read(results):
    """A bare value under the message's key, as old versions stored it, is a result."""
    message = a_message()
    results._store(results.build_message_key(message), 42, TTL)
    assert results.get_result(message) == 42
    assert results.get_result(message, block=True, timeout=1000) == 42
