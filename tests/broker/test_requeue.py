"""Messages that cannot go on now come again later: no thread waits for them, and no queue."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter

import dramatiq
import pytest
from dramatiq import Message, pipeline
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Callbacks, Retries

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import ApiError, StoreFull
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


def test_a_full_store_drains_although_dead_letters_do_not_fit(tmp_path, make_broker):
    """Messages that fail give their threads to those that succeed, until there is room for their letters."""
    with NatsServer(tmp_path / "nats", max_file_store=200_000) as server:
        broker = make_broker(server.url, enqueue_timeout=1_000)
        ran: Counter[str] = Counter()

        def act(kind: str, _: str) -> None:
            ran[kind] += 1
            if kind == "bad":
                raise RuntimeError("bad")

        actor = dramatiq.actor(act, broker=broker, actor_name="act", max_retries=0)
        broker.setup()
        sent: Counter[str] = Counter()

        def fill() -> None:
            while True:
                kind = "bad" if sent["bad"] < 8 else "good"
                actor.send(kind, "x" * 2_000)
                sent[kind] += 1

        with pytest.raises(StoreFull):
            fill()
        with running(broker, threads=4):
            eventually(lambda: ran["good"] == sent["good"])
            eventually(lambda: broker.dead_letters.count() == 8)
            broker.join("default", timeout=30_000)
        assert {letter.error for letter in broker.dead_letters.list()} == {"RuntimeError: bad"}
        broker.close()


def test_an_undecodable_message_whose_letter_cannot_be_stored_comes_again(broker, monkeypatch):
    """It is not acked: when there is room again, its letter is stored."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 50)
    broker.declare_queue("default")
    store = broker.dead_letters.store
    tried = []

    def full(**letter: object) -> None:
        tried.append(letter)
        if len(tried) < 3:
            raise StoreFull("no room")
        store(**letter)

    monkeypatch.setattr(broker.dead_letters, "store", full)
    broker.consume("default", timeout=1).close()
    broker.connection.publish(broker.names.task("default"), b"no message")
    with running(broker):
        (letter,) = eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert (letter.reason, letter.data, letter.deliveries) == ("undecodable", b"no message", 3)


def test_what_is_put_off_comes_again_after_its_delay_and_no_sooner(broker, monkeypatch):
    """The delay is in the unit that the server takes: two seconds are two seconds."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 1_000)
    ran = []
    dramatiq.actor(lambda *_: None, actor_name="done")
    work = dramatiq.actor(lambda: ran.append(time.monotonic()), actor_name="work", on_success="done")
    store = broker._sender._store

    def fail_once(queue_name: str, publication: object) -> None:
        if b'"actor_name":"done"' in publication.payload and len(ran) == 1:
            raise BrokerConnectionError("not now")
        store(queue_name, publication)

    monkeypatch.setattr(broker._sender, "_store", fail_once)
    with running(broker):
        work.send()
        eventually(lambda: len(ran) == 2)
        broker.join("default", timeout=30_000)
    assert ran[1] - ran[0] >= 1.0


@pytest.mark.parametrize(
    "error",
    [
        StoreFull("no room"),
        ApiError(400, 10026, "maximum consumers limit reached"),
        ApiError(400, 10027, "maximum number of streams reached"),
        ApiError(503, 10008, "JetStream system temporarily unavailable"),
    ],
    ids=str,
)
def test_with_a_limit_in_flight_a_message_that_waits_leaves_its_place(make_broker, monkeypatch, error):
    """The next queue's stream is full for a while: the messages behind run, the pipeline goes on afterwards."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 500)
    broker = make_broker(max_in_flight={"scan": 1})
    ran, followed = [], []
    full = [True]
    scan = dramatiq.actor(ran.append, broker=broker, queue_name="scan", actor_name="scan")
    step = dramatiq.actor(lambda *_: followed.append(1), broker=broker, queue_name="next", actor_name="step")
    store = broker._sender._store

    def store_if_there_is_room(queue_name: str, publication: object) -> None:
        if queue_name == "next" and full[0]:
            raise error
        store(queue_name, publication)

    monkeypatch.setattr(broker._sender, "_store", store_if_there_is_room)
    pipeline([scan.message("piped"), step.message()], broker=broker).run()
    for number in range(3):
        scan.send(number)
    with running(broker, threads=2):
        eventually(lambda: {0, 1, 2} <= set(ran))
        assert not followed
        full[0] = False
        eventually(lambda: followed)
        broker.join("scan", timeout=30_000)
        broker.join("next", timeout=30_000)
    assert followed == [1]
    assert Counter(ran)[0] == Counter(ran)[1] == Counter(ran)[2] == 1
    assert broker.dead_letters.list() == []


def test_a_message_that_is_put_off_again_and_again_has_an_end(make_broker, monkeypatch):
    """What is not known to pass counts on, also over deliveries that were stored again."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    broker = make_broker(max_in_flight={"default": 1}, max_deliveries=3)
    ran = []
    dramatiq.actor(lambda *_: None, broker=broker, actor_name="done", queue_name="next")
    work = dramatiq.actor(lambda: ran.append(1), broker=broker, actor_name="work", on_success="done")
    store = broker._sender._store

    def fail(queue_name: str, publication: object) -> None:
        if queue_name == "next":
            raise RuntimeError("not now")
        store(queue_name, publication)

    monkeypatch.setattr(broker._sender, "_store", fail)
    with running(broker):
        message = work.send()
        (letter,) = eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert (letter.reason, letter.deliveries, letter.message_id) == (
        "delivered too often",
        4,
        message.message_id,
    )
    assert ran == [1, 1, 1]
    assert not {"Dramatiq-Origin", "Dramatiq-Earlier-Deliveries"} & set(letter.headers)


@pytest.mark.parametrize("from_event", [False, True], ids=["message", "event"])
def test_a_limit_of_the_account_makes_no_dead_letter_however_long_it_lasts(
    tmp_path, make_broker, monkeypatch, from_event
):
    """The account may have no further stream for the next queue: the message waits until it may."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.LONGEST_DELAY_MS", 100)

    def limited_to(streams: int) -> str:
        account = f"jetstream {{ max_streams: {streams} }}, users: [{{ user: u, password: p }}]"
        return f"accounts {{ A {{ {account} }} }}\nno_auth_user: u\n"

    with NatsServer(tmp_path / "nats", sync="2m", config=limited_to(20)) as server:
        broker = make_broker(server.url, max_deliveries=2, middleware=[Callbacks(), Retries()])
        broker.add_middleware(Events("EV", ["EV.>"]))
        ran: list[bytes] = []
        followed: list[int] = []
        options = {"subscribe": subscription("EV.a")} if from_event else {}
        dramatiq.actor(
            lambda *_: followed.append(1), broker=broker, actor_name="done", queue_name="next", max_retries=0
        )
        work = dramatiq.actor(
            ran.append, broker=broker, actor_name="work", on_success="done", max_retries=0, **options
        )
        broker.queues.discard("next")
        broker.setup()
        (server.store_dir / "nats-server.conf").write_text(
            server._configuration().replace("max_streams: 20", "max_streams: 1")
        )
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: _is_refused(broker), timeout=30)
        if from_event:
            broker.publish("EV.a", b"data")
        else:
            work.send("data")
        with running(broker, threads=2, queues={"default"}):
            eventually(lambda: len(ran) >= 6, timeout=60)
            assert broker.dead_letters.list() == []
            (server.store_dir / "nats-server.conf").write_text(server._configuration())
            os.kill(server.pid, signal.SIGHUP)
            eventually(lambda: "next" in broker.queues and broker.queue_stats("next").ready == 1, timeout=60)
            broker.join("default", timeout=30_000)
        with running(broker, queues={"next"}):
            eventually(lambda: followed, timeout=30)
        assert followed == [1]
        assert broker.dead_letters.list() == []
        broker.close()


def _is_refused(broker: JetStreamBroker) -> bool:
    """Whether the account may have no further stream by now."""
    try:
        broker.connection.api("STREAM.CREATE.probe", {"name": "probe", "subjects": ["probe"]})
    except ApiError as error:
        return error.err_code == 10027
    broker.connection.api("STREAM.DELETE.probe")
    return False


class TestUnknownActors:
    """Old and new workers side by side: what an old one does not know, a new one gets."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch):
        monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.OTHERS_DELAY_MS", 200)

    def test_messages_and_ticks_reach_the_worker_that_knows_their_actor(self, make_broker):
        """An old worker gives them back until they are taken; nothing becomes a dead letter."""
        ran: list[str] = []
        old, new = make_broker(), make_broker()
        for broker in (old, new):
            broker.add_middleware(Periodic())
            dramatiq.actor(lambda: None, broker=broker, actor_name="one")
        two = dramatiq.actor(lambda n: ran.append(f"two {n}"), broker=new, actor_name="two")
        dramatiq.actor(lambda: ran.append("tick"), broker=new, actor_name="tick", every=1_000)
        with running(old), running(new):
            for number in range(20):
                two.send(number)
            eventually(lambda: {f"two {n}" for n in range(20)} <= set(ran))
            eventually(lambda: "tick" in ran)
        assert Counter(ran)["two 0"] == 1
        assert old.dead_letters.list() == []

    def test_a_retry_of_an_event_waits_for_a_worker_with_the_subscription(
        self, make_broker, namespace, monkeypatch
    ):
        """An event of tomorrow that is on the queue is not undecodable for the worker of yesterday."""
        stream = f"EV{namespace}"
        old, new = make_broker(), make_broker()
        dramatiq.actor(lambda: None, broker=old, actor_name="one")
        new.add_middleware(Events(stream, [f"{stream}.>"]))
        got: list[bytes] = []

        def act(data: bytes) -> None:
            got.append(data)
            if len(got) == 1:
                raise RuntimeError("once")

        dramatiq.actor(
            act,
            broker=new,
            actor_name="act",
            subscribe=subscription(f"{stream}.a"),
            min_backoff=1_000,
            max_backoff=1_001,
        )
        new.setup()
        new.publish(f"{stream}.a", b"data")
        wait_for_actor, waited = old._workplace.rerouter.wait_for_actor, []
        monkeypatch.setattr(
            old._workplace.rerouter,
            "wait_for_actor",
            lambda d, name=None: waited.append(d) or wait_for_actor(d, name),
        )
        with running(new):
            eventually(lambda: len(got) == 1)
        with running(old):
            eventually(lambda: waited)
            with running(new):
                eventually(lambda: len(got) == 2)
        assert old.dead_letters.list() == []

    def test_after_the_grace_a_message_is_a_dead_letter_and_a_tick_is_dropped(self, make_broker, caplog):
        """A message keeps its bytes and its headers; of a tick there will be another."""
        broker, gone = make_broker(unknown_actor_grace=600), make_broker()
        for each in (broker, gone):
            each.add_middleware(Periodic())
        dramatiq.actor(lambda: None, broker=broker, actor_name="stays")
        dramatiq.actor(lambda: None, broker=gone, actor_name="gone", every=1_000)
        with running(gone):
            pass
        message = broker.enqueue(Message("default", "nobody", (1,), {}, {}))
        with caplog.at_level(logging.WARNING), running(broker):
            (letter,) = eventually(broker.dead_letters.list)
            eventually(lambda: "remove its schedule" in caplog.text)
        assert (letter.reason, letter.actor, letter.data) == ("unknown actor", "nobody", message.encode())
        assert "Dramatiq-Unknown-Since" not in letter.headers
        assert len(broker.dead_letters.list()) == 1
