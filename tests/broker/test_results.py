"""What the result backend does beyond Dramatiq's contract: waking, reconnects, large results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.encoder import PickleEncoder
from dramatiq.middleware import SkipMessage
from dramatiq.results import ResultFailure, ResultMissing, Results, ResultTimeout

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer
from tests.broker.cables import DeafCable
from tests.broker.conformance.workers import running
from tests.support.polling import eventually
from tests.support.processes import python
from tests.support.proxy import Proxy

MakeBackend = Callable[..., JetStreamBackend]


@pytest.fixture
def make_backend(nats_url: str, namespace: str) -> Iterator[MakeBackend]:
    """Makes result backends, each on a connection of its own, as in different processes."""
    brokers: list[JetStreamBroker] = []

    def make(url: str = nats_url, *, timeout: int = 10_000, **options: Any) -> JetStreamBackend:
        broker = JetStreamBroker(url, namespace=namespace, middleware=[], enqueue_timeout=timeout)
        brokers.append(broker)
        return JetStreamBackend(broker, **options)

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def backend(make_backend: MakeBackend) -> JetStreamBackend:
    return make_backend()


@pytest.fixture
def cable(nats_url: str) -> Iterator[DeafCable]:
    cable = DeafCable(nats_url)
    yield cable
    cable.close()


@pytest.fixture
def never_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only announcements and reconnects wake waiting threads."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.wakeups.LOOK_AGAIN_SECONDS", 3600.0)


def a_message(number: int = 0) -> Message[Any]:
    return Message("q", "a", (), {}, {}, message_id=f"m{number}")


def count_looks(backend: JetStreamBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were looked for, each added once its answer was there."""
    looks: list[str] = []
    get = backend.bucket.get

    def counting(key: str, **options: Any) -> Any:
        entry = get(key, **options)
        looks.append(key)
        return entry

    monkeypatch.setattr(backend.bucket, "get", counting)
    return looks


def test_whoever_waits_is_woken_by_the_server(
    make_backend: MakeBackend, never_look_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocking get_result looks twice before and once after the result is stored, and returns at once."""
    waiting, storing = make_backend(), make_backend()
    looks = count_looks(waiting, monkeypatch)
    delays = []
    with ThreadPoolExecutor(1) as pool:
        for number in range(20):
            looks.clear()
            result = pool.submit(waiting.get_result, a_message(number), block=True)
            eventually(lambda: len(looks) == 2, interval=0.001)
            storing.store_result(a_message(number), number, 60_000)
            stored = time.monotonic()
            assert result.result(timeout=30) == number
            delays.append(time.monotonic() - stored)
            assert len(looks) <= 4
    assert sorted(delays)[10] < 0.05


def test_a_thousand_may_wait_on_one_connection(make_backend: MakeBackend, never_look_again: None) -> None:
    """Each waiting thread is announced its own result, and no subscription stays."""
    waiting, storing = make_backend(), make_backend()
    subscriptions = len(waiting.bucket.connection._subscriptions)
    results: dict[int, Any] = {}

    def wait(number: int) -> None:
        results[number] = waiting.get_result(a_message(number), block=True, timeout=60_000)

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(1000)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(waiting.bucket.connection._subscriptions) == subscriptions + 1000, timeout=60)
    for number in range(1000):
        storing.store_result(a_message(number), number, 60_000)
    for thread in threads:
        thread.join(timeout=30)
    assert results == {number: number for number in range(1000)}
    assert len(waiting.bucket.connection._subscriptions) == subscriptions


def test_an_announcement_that_got_lost_is_made_up_for_after_the_reconnect(
    make_backend: MakeBackend,
    cable: DeafCable,
    never_look_again: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A waiting thread looks again after each reconnect."""
    waiting, storing = make_backend(cable.url), make_backend()
    looks = count_looks(waiting, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(waiting.get_result, a_message(), block=True, timeout=30_000)
        eventually(lambda: len(looks) == 2)
        with cable.deafness():
            storing.store_result(a_message(), "there", 60_000)
            eventually(lambda: b".stored.results." in cable.lost)
        assert result.result(timeout=30) == "there"


def test_whoever_waits_looks_now_and_then_in_any_case(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any announcement, as from a bucket that was made without them, a result is found late, not never."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.wakeups.LOOK_AGAIN_SECONDS", 0.3)
    waiting, storing = make_backend(), make_backend()
    storing.store_result(a_message(1), 1, 60_000)
    config = storing.bucket.connection.api(f"STREAM.INFO.{storing.bucket.stream}")["config"]
    del config["republish"]
    storing.bucket.connection.api(f"STREAM.UPDATE.{storing.bucket.stream}", config)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(waiting.get_result, a_message(), block=True)
        eventually(lambda: waiting.bucket.connection._subscriptions)
        storing.store_result(a_message(), "late", 60_000)
        assert result.result(timeout=30) == "late"


def test_waiting_goes_on_while_the_server_is_away(
    make_backend: MakeBackend, own_nats_server: NatsServer, never_look_again: None
) -> None:
    """A server that restarts does not end a wait, and one that stays away ends it with the timeout."""
    waiting = make_backend(own_nats_server.url, timeout=1_000)
    waiting.store_result(a_message(9), 9, 60_000)
    own_nats_server.stop()
    before = time.monotonic()
    with pytest.raises(ResultTimeout):
        waiting.get_result(a_message(9), block=True, timeout=1_000)
    assert time.monotonic() - before < 20
    with pytest.raises(BrokerConnectionError):
        waiting.get_result(a_message(9))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(waiting.get_result, a_message(), block=True, timeout=30_000)
        eventually(lambda: waiting.bucket.connection._link.calls._waiting)
        own_nats_server.start()
        storing = make_backend(own_nats_server.url)
        storing.store_result(a_message(), "after", 60_000)
        assert result.result(timeout=30) == "after"


def test_a_process_is_subscribed_only_while_it_waits(backend: JetStreamBackend) -> None:
    """A result that is there costs no subscription; a wait that ends, also in vain, leaves none behind."""
    connection = backend.bucket.connection
    subscriptions = len(connection._subscriptions)
    backend.store_result(a_message(1), 1, 60_000)
    made = next(connection._sids)
    assert backend.get_result(a_message(1), block=True) == 1
    assert next(connection._sids) == made + 1
    with pytest.raises(ResultTimeout):
        backend.get_result(a_message(2), block=True, timeout=100)
    assert next(connection._sids) == made + 3
    assert len(connection._subscriptions) == subscriptions


def test_a_result_over_the_payload_limit_is_stored_in_parts(
    make_backend: MakeBackend, never_look_again: None
) -> None:
    """Five megabytes come back as they were, also to a thread that waited for them."""
    waiting, storing = make_backend(encoder=PickleEncoder()), make_backend(encoder=PickleEncoder())
    large = bytes(range(256)) * 20_000
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(waiting.get_result, a_message(), block=True)
        eventually(lambda: waiting.bucket.connection._subscriptions)
        storing.store_result(a_message(), large, 60_000)
        assert result.result(timeout=30) == large


@pytest.mark.parametrize("excess", [-1, 0, 1, 2, 100])
def test_every_size_around_the_payload_limit_fits(backend: JetStreamBackend, excess: int) -> None:
    """There is no size between one message and several that the server refuses."""
    size = backend.bucket.connection.max_payload - 1_024 + excess - len('""')
    backend.store_result(a_message(), "x" * size, 60_000)
    assert backend.get_result(a_message()) == "x" * size


def test_all_parts_of_a_result_expire(backend: JetStreamBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a large result stays on the server."""
    monkeypatch.setattr("dramatiq_jetstream.results.PARTS_OUTLIVE_MS", 1_000)
    backend.store_result(a_message(), "x" * 3_000_000, 1_000)
    assert len(backend.bucket.keys()) == 4
    eventually(lambda: not backend.bucket.keys())


def test_a_result_without_all_its_parts_is_missing(backend: JetStreamBackend) -> None:
    """Half a result is none."""
    backend.store_result(a_message(), "x" * 3_000_000, 60_000)
    backend.bucket.delete(backend.bucket.keys("parts.")[1])
    with pytest.raises(ResultMissing):
        backend.get_result(a_message())


@pytest.mark.parametrize(
    ("options", "result", "reason"),
    [
        ({"max_result_bytes": 1_000}, "x" * 1_000, "max_result_bytes=1000"),
        ({}, {1, 2}, "TypeError: Object of type set is not JSON serializable"),
        ({"encoder": PickleEncoder()}, threading.Lock(), "TypeError: cannot pickle"),
    ],
    ids=["too large", "not json", "not to be pickled"],
)
def test_a_result_that_can_never_be_stored_is_a_failure_for_those_who_wait(
    broker: JetStreamBroker, options: dict[str, Any], result: Any, reason: str
) -> None:
    """They hear at once that the actor has ended and why its result is missing; the message is done, run once."""
    backend = JetStreamBackend(broker, **options)
    broker.add_middleware(Results(backend=backend))
    runs = []

    @dramatiq.actor(store_results=True)
    def work() -> Any:
        runs.append(1)
        return result

    with running(broker):
        message = work.send()
        with pytest.raises(ResultFailure, match="the actor has ended") as failure:
            message.get_result(backend=backend, block=True)
        broker.join("default", timeout=30_000)
    assert reason in str(failure.value)
    assert failure.value.orig_exc_type == "ResultNotStored"
    assert runs == [1]
    assert broker.queue_stats("default").dead == 0


@pytest.mark.parametrize("outcome", ["returns", "fails", "is skipped"])
def test_a_result_is_stored_before_its_message_is_settled(
    make_broker: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    """The server is away for longer than storing may take: the message stays, and its result comes afterwards."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 50)
    broker = make_broker(proxy.url, enqueue_timeout=1_500)
    backend = JetStreamBackend(broker)
    broker.add_middleware(Results(backend=backend))
    runs: list[int] = []

    def lose_the_server() -> None:
        runs.append(1)
        if len(runs) == 1:
            proxy.lose()
            threading.Timer(3.0, proxy.restore).start()

    class Skip(dramatiq.Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if outcome == "is skipped":
                lose_the_server()
                raise SkipMessage

    broker.add_middleware(Skip())

    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def work() -> str:
        lose_the_server()
        if outcome == "fails":
            raise ValueError("as always")
        return "done"

    # Before the worker starts: the actor must not cut the connection that this call still uses.
    message = work.send()
    with running(broker):
        if outcome == "fails":
            with pytest.raises(ResultFailure, match="as always"):
                backend.get_result(message, block=True, timeout=20_000)
        else:
            expected = "done" if outcome == "returns" else None
            assert backend.get_result(message, block=True, timeout=20_000) == expected
        broker.join("default", timeout=30_000)
    assert len(runs) >= 2
    assert broker.queue_stats("default").dead == (outcome == "fails")


def test_namespaces_share_a_bucket_and_no_results(make_backend: MakeBackend) -> None:
    """Keys may be kept readable; backends with other namespaces do not see each other's results."""
    backends = [make_backend(namespace=name, use_namespace_prefix_keys=True) for name in ("a.b", "a")]
    message = Message("q.with.dots", "actor name", (), {}, {}, message_id="m")
    for number, backend in enumerate(backends):
        backend.store_result(message, number, 60_000)
    assert [backend.get_result(message, block=True) for backend in backends] == [0, 1]
    assert sorted(backends[0].bucket.keys()) == ["a.b:q.with.dots:actor name:m", "a:q.with.dots:actor name:m"]


def test_a_backend_without_a_broker_has_a_connection_of_its_own(nats_url: str) -> None:
    """A program that only reads results needs no broker; closing the backend closes its connection."""
    backend = JetStreamBackend(url=nats_url)
    with pytest.raises(ResultMissing):
        backend.get_result(a_message())
    backend.close()
    with pytest.raises(BrokerConnectionError):
        backend.get_result(a_message())


def test_a_backend_wants_a_broker_of_ours(broker: JetStreamBroker) -> None:
    """Another broker, or a broker and a url at once, is a mistake that is named."""
    from dramatiq.brokers.redis import RedisBroker

    with pytest.raises(InvalidOption, match="RedisBroker"):
        JetStreamBackend(RedisBroker())
    with pytest.raises(InvalidOption, match="either a broker or a url"):
        JetStreamBackend(broker, url="nats://localhost")


FORKING = """
import os, sys, threading, time
from dramatiq import Message
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.results import JetStreamBackend

backend = JetStreamBackend(JetStreamBroker(sys.argv[1], namespace=sys.argv[2], middleware=[]))
connection = backend.bucket.connection
messages = [Message("q", "a", (), {}, {}, message_id=f"m{number}") for number in range(2)]
results = []
waiting = threading.Thread(target=lambda: results.append(backend.get_result(messages[0], block=True)))
waiting.start()
while not connection._subscriptions:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    waiting_here = threading.Thread(target=lambda: results.append(backend.get_result(messages[1], block=True)))
    waiting_here.start()
    while len(connection._subscriptions) != 2:  # the parent's is known here, too
        time.sleep(0.01)
    backend.store_result(messages[0], "from the child", 60_000)
    waiting_here.join()
    os._exit(0 if results == ["from the parent"] else 1)
waiting.join()
backend.store_result(messages[1], "from the parent", 60_000)
assert os.waitpid(child, 0)[1] == 0
assert results == ["from the child"], results
"""


def test_waiting_works_on_both_sides_of_a_fork(nats_url: str, namespace: str, tmp_path: Path) -> None:
    """A child that was forked while its parent waited has waiters of its own."""
    with python("-c", FORKING, nats_url, namespace, log=tmp_path / "log") as process:
        assert process.wait() == 0, process.output
