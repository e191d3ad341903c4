"""Streams and consumers: made once, never changed silently, and made again when they were lost."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.errors import ApiError, BrokerError, InvalidOption, QueueNotFound, TopologyMismatch
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.jetstream import topology
from dramatiq_jetstream.jetstream.inventory import stream_names
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds


@pytest.fixture
def declare(make_broker, namespace):
    """Makes brokers of one namespace that all declare two queues, a stream of events and a subscription."""

    def declare(**options):
        broker = make_broker(**options)
        broker.add_middleware(Events(stream=f"{namespace}-events", subjects=[f"{namespace}.ev.>"]))
        dramatiq.actor(lambda: None, broker=broker, actor_name="work")
        dramatiq.actor(lambda: None, broker=broker, actor_name="other", queue_name="other.queue")
        dramatiq.actor(
            lambda event: None,
            broker=broker,
            actor_name="on event",
            subscribe=subscription(f"{namespace}.ev.created"),
        )
        return broker

    return declare


def everything(broker):
    """The configuration of every stream and consumer that belongs to the test."""
    found = {}
    for name in stream_names(broker.connection):
        if broker.names.namespace not in name:
            continue
        found[name] = broker.connection.api(f"STREAM.INFO.{name}")["config"]
        for consumer in broker.connection.api(f"CONSUMER.LIST.{name}")["consumers"] or []:
            found[f"{name}/{consumer['name']}"] = consumer["config"]
    return found


def change(broker, stream, **settings):
    config = broker.connection.api(f"STREAM.INFO.{stream}")["config"]
    broker.connection.api(f"STREAM.UPDATE.{stream}", {**config, **settings})


def test_setup_makes_everything_once(declare):
    """The second time, and for the next process, there is nothing left to do."""
    first, second = declare(), declare()
    created = first.setup()
    assert set(created.values()) == {"created"}
    assert {name for name in created if name.startswith("stream")} == {
        f"stream {first.names.dead_stream}",
        f"stream {first.names.history_stream}",
        f"stream {first.names.activity_stream}",
        f"stream {first.names.audit_stream}",
        f"stream {first.names.queue_stream('default')}",
        f"stream {first.names.queue_stream('other.queue')}",
        f"stream {first.names.namespace}-events",
    }
    before = everything(first)
    assert set(first.setup().values()) == {"unchanged"}
    assert set(second.setup(update=True).values()) == {"unchanged"}
    assert everything(first) == before


def test_setup_of_many_processes_at_once(declare):
    """A release step and twenty starting workers do not get in each other's way."""
    brokers = [declare() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda broker: broker.setup(), brokers))
    assert {outcome for outcomes in outcomes for outcome in outcomes.values()} <= {"created", "unchanged"}


def test_processes_that_disagree_race_to_one_clear_outcome(make_broker):
    """The second process, with other settings, is told the difference."""
    brokers = [make_broker(ack_wait=ack_wait) for ack_wait in (5_000, 6_000) * 4]
    for broker in brokers:
        broker.declare_queue("default")
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda broker: set(broker.setup().values()), brokers))
    assert set().union(*outcomes) <= {"created", "unchanged", "differs"}


def test_a_vital_difference_is_an_error_that_shows_it(declare):
    """What would lose or hold up messages stops setup and use, and the server is left as it is."""
    broker = declare()
    stream = broker.names.queue_stream("default")
    subjects = [broker.names.queue_subjects("default")]
    broker.connection.api(
        f"STREAM.CREATE.{stream}",
        {"name": stream, "subjects": subjects, "storage": "file", "retention": "interest"},
    )
    before = broker.connection.api(f"STREAM.INFO.{stream}")["config"]
    with pytest.raises(TopologyMismatch) as caught:
        broker.setup()
    assert caught.value.differences["retention"] == ("interest", "limits")
    for part in (
        f"Stream {stream}",
        "retention is 'interest' but 'limits' was declared",
        "fleet setup --update",
    ):
        assert part in str(caught.value)
    with pytest.raises(TopologyMismatch):
        broker.get_actor("work").send()
    assert broker.connection.api(f"STREAM.INFO.{stream}")["config"] == before


def test_a_difference_that_does_no_harm_is_a_warning_that_shows_it(declare, caplog):
    """Work goes on, and the log says once in a process what differs, in milliseconds."""
    first = declare()
    first.setup()
    stream = first.names.queue_stream("default")
    change(first, stream, duplicate_window=60_000_000_000)
    second = declare()
    assert second.setup()[f"stream {stream}"] == "differs"
    said = f"Stream {stream} differs from its declaration: duplicate_window is 60000 ms but 120000 ms was declared"
    assert caplog.text.count(said) == 1
    third = declare()
    third.setup()
    third.get_actor("work").send()
    assert caplog.text.count(said) == 1


def test_setup_does_the_rest_and_says_all_that_is_refused(declare):
    """Two broken streams are in one error, and what is in order is made nevertheless."""
    broker = declare()
    for queue in ("default", "other.queue"):
        config = topology.queue(broker.names, queue).to_json()
        broker.connection.api(f"STREAM.CREATE.{config['name']}", {**config, "max_msgs": 7})
    with pytest.raises(TopologyMismatch) as caught:
        broker.setup()
    for queue in ("default", "other.queue"):
        assert f"Stream {broker.names.queue_stream(queue)} differs" in str(caught.value)
    found = everything(broker)
    assert f"{broker.names.namespace}-events" in found
    assert broker.names.dead_stream in found
    assert f"{broker.names.queue_stream('default')}/worker" in found
    assert set(broker.setup(update=True).values()) == {"unchanged", "updated"}


def test_update_brings_the_server_in_line(declare):
    """`setup(update=True)` changes what differs and says so; a pause of a queue is not a difference."""
    first = declare(max_in_flight={"other.queue": 3})
    first.setup()
    stream = first.names.queue_stream("default")
    change(first, stream, duplicate_window=60_000_000_000)
    first.pause("default")
    second = declare(ack_wait=7_000, max_in_flight={"other.queue": 4})
    outcome = second.setup(update=True)
    assert outcome[f"stream {stream}"] == "updated"
    assert outcome[f"consumer worker of {stream}"] == "updated"
    assert set(second.setup().values()) == {"unchanged"}
    found = everything(second)
    assert found[stream]["duplicate_window"] == 120_000_000_000
    assert found[f"{stream}/worker"]["ack_wait"] == 7_000_000_000
    assert found[f"{second.names.queue_stream('other.queue')}/worker"]["max_ack_pending"] == 4
    assert second.is_paused("default")


def test_signals_keep_pace_with_an_older_consumer(make_broker, caplog):
    """A longer `ack_wait` that is declared but not set up yet makes no task run twice."""
    old = make_broker(ack_wait=3_000)
    old.declare_queue("default")
    old.setup()
    broker = make_broker(ack_wait=60_000)
    began = []
    release = threading.Event()

    @dramatiq.actor(broker=broker)
    def work():
        began.append(1)
        release.wait(30)

    with running(broker):
        work.send()
        eventually(lambda: began)
        holds(lambda: old.queue_stats("default").redelivered == 0, 4.5)
        release.set()
        broker.join("default", timeout=30_000)
    assert began == [1]
    assert "ack_wait is 3000 ms but 60000 ms was declared" in caplog.text


def test_without_declare_only_what_exists_is_used(make_broker, declare):
    """Prepared by `setup`, everything works; nothing is made, and differences are not looked at."""
    declare().setup()
    broker = declare(declare=False)
    before = everything(broker)
    ran = []
    dramatiq.actor(ran.append, broker=broker, actor_name="note")
    with running(broker):
        broker.actors["note"].send(1)
        broker.actors["note"].send_with_options(args=(2,), delay=50)
        broker.join("default", timeout=30_000)
    assert sorted(ran) == [1, 2]
    assert everything(broker) == before


def test_without_declare_what_is_missing_is_a_clear_error(make_broker, monkeypatch, caplog):
    """Producer and worker say what is missing and how to prepare it, and make nothing."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    broker = make_broker(declare=False, enqueue_timeout=1_000)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    with pytest.raises(QueueNotFound, match=r"No stream takes .*\.q\.default\.task.*fleet setup"):
        work.send(1)
    with running(broker):
        eventually(lambda: "There is no consumer worker of" in caplog.text)
        assert "prepare it with `fleet setup`" in caplog.text
        assert everything(broker) == {}
        # When it has been prepared, the waiting worker finds it by itself.
        helper = make_broker()
        helper.declare_queue("default")
        helper.setup()
        work.send(2)
        eventually(lambda: ran == [2])


def test_more_replicas_than_servers_is_a_clear_error(make_broker):
    """The server's own reason is in the error."""
    broker = make_broker(replicas=3)
    broker.declare_queue("default")
    with pytest.raises((ApiError, BrokerError), match="replicas"):
        broker.setup()


def test_a_queue_that_is_deleted_under_a_worker_is_made_again(make_broker, monkeypatch):
    """The messages of a deleted stream are lost; the fleet goes on with the next ones."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    broker, producer = make_broker(), make_broker()
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    dramatiq.actor(ran.append, broker=producer, actor_name="work")
    with running(broker):
        producer.actors["work"].send(1)
        eventually(lambda: ran == [1])
        broker.connection.api(f"STREAM.DELETE.{broker.names.queue_stream('default')}")
        eventually(lambda: broker.queue_stats("default") and _has(broker))
        producer.actors["work"].send(2)
        work.send(3)
        eventually(lambda: sorted(ran) == [1, 2, 3])


def _has(broker):
    return broker.names.queue_stream("default") in everything(broker)


def test_a_message_of_a_new_stream_is_not_taken_for_an_old_one(make_broker, monkeypatch):
    """While an actor still runs the first message of a stream that was deleted, the new first message runs, too."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    broker = make_broker()
    release = threading.Event()
    ran = []

    @dramatiq.actor(broker=broker)
    def work(name):
        ran.append(name)
        if name == "old":
            release.wait(30)

    with running(broker):
        work.send("old")
        eventually(lambda: ran == ["old"])
        broker.connection.api(f"STREAM.DELETE.{broker.names.queue_stream('default')}")
        eventually(lambda: _has(broker))
        work.send("new")
        eventually(lambda: ran == ["old", "new"])
        release.set()
        broker.join("default", timeout=30_000)


def test_a_consumer_that_is_deleted_under_a_worker_is_made_again(make_broker, monkeypatch):
    """Its messages are all still there; what runs in the meantime is not begun again."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    broker = make_broker()
    release = threading.Event()
    ran = []

    @dramatiq.actor(broker=broker)
    def work(number):
        ran.append(number)
        if number == 0:
            release.wait(30)

    with running(broker, threads=2):
        work.send(0)
        eventually(lambda: ran == [0])
        stream = broker.names.queue_stream("default")
        broker.connection.api(f"CONSUMER.DELETE.{stream}.worker")
        for number in range(1, 6):
            broker.enqueue(Message("default", "work", (number,), {}, {}))
        eventually(lambda: len(ran) == 6)
        release.set()
        broker.join("default", timeout=30_000)
    assert sorted(ran) == list(range(6))


def test_declaring_contacts_no_server():
    """Declaring queues and actors works without a server, as modules are imported everywhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker = JetStreamBroker(f"nats://127.0.0.1:{server.getsockname()[1]}")
        dramatiq.actor(lambda: None, broker=broker, actor_name="work", queue_name="a.b")
        assert broker.get_declared_queues() == {"a.b"}
        broker.close()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # it was not called
            server.accept()


LIMITED = """
accounts {{ A {{ jetstream {{ max_store: 200M, max_bytes_required: true }}, users: [ {{ user: a, password: a }} ] }} }}
no_auth_user: a
"""


def test_an_account_that_demands_limits(tmp_path, namespace):
    """Without them the error names the setting; with it everything works, events and buckets included."""
    with NatsServer(store_dir=tmp_path, config=LIMITED.format()) as server:
        broker = JetStreamBroker(server.url, namespace=namespace)
        broker.declare_queue("default")
        with pytest.raises(ApiError, match="give the broker max_stream_bytes"):
            broker.setup()
        broker.close()
        broker = JetStreamBroker(server.url, namespace=namespace, max_stream_bytes=2_000_000)
        broker.add_middleware(Events(stream=f"{namespace}-events", subjects=[f"{namespace}.ev.>"]))
        ran = []
        work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
        assert set(broker.setup().values()) == {"created"}
        with running(broker):
            work.send_with_options(args=(1,), delay=100)
            eventually(lambda: ran == [1])
        for config in everything(broker).values():
            assert config.get("max_bytes", 2_000_000) == 2_000_000
        broker.close()


def test_a_server_that_allows_no_long_duplicate_window(tmp_path, namespace, monkeypatch, caplog):
    """What it allows is used, with a warning that ends with the setting; a window that is too short is refused."""
    limits = 'limits { duplicate_window: "1m" }'
    server = NatsServer(store_dir=tmp_path)
    configuration = server._configuration
    monkeypatch.setattr(
        server, "_configuration", lambda: configuration().replace("jetstream {", f"jetstream {{ {limits}", 1)
    )
    with server:
        broker = JetStreamBroker(server.url, namespace=namespace)
        assert "differs" in broker.setup().values()
        assert "duplicate_window is 60000 ms but 120000 ms was declared" in caplog.text
        with pytest.raises(ApiError, match="give the broker a shorter duplicate_window"):
            broker.setup(update=True)
        broker.close()
        broker = JetStreamBroker(server.url, namespace=namespace, duplicate_window=60_000)
        assert set(broker.setup().values()) == {"unchanged"}
        broker.close()
        broker = JetStreamBroker(server.url, namespace=namespace, enqueue_timeout=90_000)
        with pytest.raises(ApiError, match="give the broker a shorter duplicate_window"):
            broker.bucket("new").declare()
        broker.close()
    with pytest.raises(InvalidOption, match="no shorter than enqueue_timeout"):
        JetStreamBroker(server.url, duplicate_window=5_000)


def test_a_command_finds_every_queue_of_a_large_namespace(own_nats_server, namespace):
    """The server lists streams in pages; a delayed message in the last of 1,100 queues is seen by `fleet abort`."""
    broker = JetStreamBroker(own_nats_server.url, namespace=namespace)
    configs = [topology.queue(broker.names, f"a{number:04}").to_json() for number in range(1_100)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda config: broker.connection.api(f"STREAM.CREATE.{config['name']}", config), configs)
        )
    work = dramatiq.actor(lambda: None, broker=broker, actor_name="work", queue_name="zz")
    message = work.send_with_options(delay=3_600_000)
    command = JetStreamBroker(own_nats_server.url, namespace=namespace, declare=False, middleware=[])
    assert 3_500_000 < AbortBackend(command)._delay_of(message.message_id) <= 3_600_000
    command.close()
    broker.close()
