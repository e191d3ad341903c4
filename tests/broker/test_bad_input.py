"""Bad input: a clear error before anything is half done, and never a worker that stops."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import (
    InvalidName,
    InvalidOption,
    MessageTooLarge,
    ServerUnsupported,
    StoreFull,
)
from dramatiq_jetstream.limits import Snooze
from dramatiq_jetstream.testing import NatsServer, find_executable
from tests.broker.conformance.workers import running
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.wire import publish_wire


def message(*args, queue="default", **options):
    return Message(queue, "work", args, {}, options)


def everything(broker):
    return broker.connection.api("STREAM.NAMES", {"subject": f"{broker.names.namespace}.>"})["streams"] or []


def test_a_message_over_max_payload_is_refused(broker):
    """The error names the limit and a way out, and the connection goes on; the largest possible one is stored."""
    limit = broker.connection.max_payload
    with pytest.raises(
        MessageTooLarge, match=rf"over the server's max_payload of {limit} bytes: store large"
    ):
        broker.enqueue(message("x" * limit))
    with pytest.raises(MessageTooLarge):
        broker.enqueue(message("x" * limit), delay=1_000)
    with pytest.raises(MessageTooLarge):
        broker.publish("anything", b"x" * (limit + 1))
    frame = len(message("").encode())
    headers = len("NATS/1.0\r\n\r\n") + len("Nats-Msg-Id: \r\n") + 32 - 1
    broker.enqueue(message("x" * (limit - frame - headers - 1)))
    eventually(lambda: broker.queue_stats("default").ready == 1)
    assert broker.connection.state.reconnects == 0


@pytest.mark.parametrize(
    "queue",
    [
        "with.dots",
        "with-dash_and.dot",
        "UPPER",
        "a" * 150,
        "..",
        "a.DQ.b",
        "ünïcode",
        "queue name",
        "a*b>c/d\\e",
    ],
)
def test_queues_of_any_name_work(make_broker, queue):
    """Whatever the name, messages, delays, dead letters and counts find their way."""
    broker = make_broker(unknown_actor_grace=0)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work", max_retries=0)
    # Dramatiq's own check of names concerns actors only; messages may name any queue.
    broker.declare_queue(queue)
    broker.enqueue(work.message("now").copy(queue_name=queue))
    broker.enqueue(work.message("later").copy(queue_name=queue), delay=20)
    broker.enqueue(Message(queue, "nobody", (), {}, {}))
    with running(broker, queues={queue}):
        broker.join(queue, timeout=30_000)
    assert sorted(ran) == ["later", "now"]
    (letter,) = broker.dead_letters.list(queue)
    assert letter.queue == queue
    stats = broker.queue_stats(queue)
    assert (stats.ready, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 1)


@pytest.mark.parametrize("queue", ["", "q" * 300, "é" * 100])
def test_a_queue_that_jetstream_cannot_carry_is_refused(broker, queue):
    """Nothing is declared, made or stored."""
    with pytest.raises(InvalidName, match="queue name"):
        broker.declare_queue(queue)
    with pytest.raises(InvalidName, match="queue name"):
        broker.enqueue(message(queue=queue))
    assert broker.get_declared_queues() == set()
    assert everything(broker) == []


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "n" * 65, None])
def test_a_namespace_that_jetstream_cannot_carry_is_refused(namespace):
    """The broker is not even made."""
    with pytest.raises(InvalidName, match="namespace"):
        JetStreamBroker(namespace=namespace)


@pytest.mark.parametrize("message_id", ["", "a b.c*>", "é\n\x00", "m" * 10_000, "\udcff"])
def test_messages_of_any_id_work(broker, message_id):
    """Ids come from anywhere; a delay can be cancelled by each of them, and a retry is stored."""
    tries = []

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work():
        tries.append(1)
        raise RuntimeError

    wanted = work.message().copy(message_id=message_id)
    broker.enqueue(wanted, delay=600_000)
    assert broker.cancel(message_id) == 1
    broker.enqueue(wanted)
    with running(broker):
        (letter,) = eventually(broker.dead_letters.list)
    assert len(tries) == 2
    if message_id != "\udcff":  # a header cannot quote it as it is
        assert letter.message_id == message_id
    assert letter.decode().message_id == message_id


@pytest.mark.parametrize("delay", [float("-inf"), float("nan"), float("inf"), 10**15, "100", True])
def test_a_delay_that_is_none_is_refused(broker, delay):
    """Delays that can only be mistakes are errors, and nothing is stored."""
    with pytest.raises(InvalidOption, match="delay="):
        broker.enqueue(message(), delay=delay)
    with pytest.raises(InvalidOption, match="delay="):
        broker.enqueue_many([message()], delay=delay)
    assert everything(broker) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("replicas", 0),
        ("ack_wait", 999),
        ("ack_wait", 1.5),
        ("max_deliveries", 0),
        ("dead_message_ttl", 0),
        ("enqueue_timeout", 0),
        ("enqueue_timeout", True),
        ("max_priority", 0),
        ("max_priority", 33),
    ],
)
def test_an_option_that_can_never_work_is_refused(option, value):
    """The error names the option and what is possible."""
    with pytest.raises(InvalidOption, match=rf"{option}={value!r} cannot be used"):
        JetStreamBroker(**{option: value})


@contextmanager
def impostor(**info: object) -> Iterator[str]:
    """A server that greets with some INFO, answers PING, and can do nothing else."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    greeting = {"server_id": "X", "server_name": "x", "version": "2.15.1", "max_payload": 1 << 20, "proto": 1}
    greeting |= {"host": "127.0.0.1", "port": port, "headers": True, "jetstream": True, **info}

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.sendall(b"INFO " + json.dumps(greeting).encode() + b"\r\n")
                try:
                    while data := client.recv(4096):
                        client.sendall(b"PONG\r\n" * data.count(b"PING\r\n"))
                except OSError:
                    continue

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        serving.join(5)


@pytest.mark.parametrize("version", ["2.9.25", "2.13.99", "1.4.1"])
def test_a_server_that_is_too_old_is_refused(version):
    """The error says what was found, what is needed and why."""
    with impostor(version=version) as url:
        broker = JetStreamBroker(url)
        with pytest.raises(
            ServerUnsupported,
            match=rf"version {version}, but 2\.14\.0 or newer is needed \(message schedules",
        ):
            broker.enqueue(message())
        broker.close()


def test_a_server_without_jetstream_is_refused(tmp_path):
    """A real server with JetStream switched off: the error says so and how to switch it on."""
    port = free_port()
    command = [find_executable(), "--addr", "127.0.0.1", "--port", str(port)]
    with Process(command, log=tmp_path / "nats.log") as server:
        server.wait_for_output("Server is ready")
        broker = JetStreamBroker(f"nats://127.0.0.1:{port}")
        with pytest.raises(ServerUnsupported, match="JetStream switched off: start it with --jetstream"):
            broker.enqueue(message())
        broker.close()


def test_a_full_store_is_refused_and_nothing_is_lost(tmp_path):
    """Enqueue raises, what was stored runs, and then there is room again."""
    with NatsServer(store_dir=tmp_path / "nats", sync="2m", max_file_store=2_000_000) as server:
        broker = JetStreamBroker(server.url, namespace="full", enqueue_timeout=5_000)
        ran = []

        @dramatiq.actor(broker=broker)
        def work(number, filling):
            ran.append(number)

        stored = []

        def fill():
            for number in range(100):
                work.send(number, "x" * 100_000)
                stored.append(number)

        with pytest.raises(StoreFull, match=r"no room .*raise its limits or let workers catch up"):
            fill()
        assert 0 < len(stored) < 30
        with pytest.raises(StoreFull):
            broker.enqueue_many([work.message(99, "x" * 100_000)] * 3)
        with running(broker):
            broker.join("default", timeout=30_000)
        assert set(ran) >= set(stored)
        eventually(lambda: _sent(work))
        broker.close()


def _sent(work):
    try:
        return work.send(100, "there is room again")
    except StoreFull:
        return None


def test_what_cannot_be_encoded_is_refused(broker):
    """Arguments that the encoder cannot carry are the encoder's error, and the message is not stored."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        broker.enqueue(message(object()))
    with pytest.raises(TypeError, match="not JSON serializable"):
        broker.enqueue_many([message(object())])
    assert broker.queue_stats("default").ready == 0


@pytest.mark.parametrize("subject", ["", "a b", "a.*", "a.>", "a..b", "a\r\nPUB x 0", "s" * 1_001])
def test_an_event_subject_that_nats_cannot_carry_is_refused(broker, subject):
    """What would break the protocol never reaches it."""
    with pytest.raises(InvalidName):
        broker.publish(subject, b"event")


#: Headers of another program, with names that no client of ours could send.
ODD_HEADERS = b"NATS/1.0\r\nx y: 1\r\n\xc3\xa9: 2\r\n(z): 3\r\nkept: yes\r\n\r\n"


@pytest.mark.parametrize("become", ["retries exhausted", "undecodable", "unknown actor"])
def test_headers_that_cannot_be_sent_again_keep_no_message(make_broker, nats_url, become):
    """A message is left to others and made a dead letter without them; it stays with no worker for ever."""
    broker = make_broker(unknown_actor_grace=400)
    dramatiq.actor(lambda: 1 / 0, broker=broker, actor_name="work", max_retries=0)
    broker.setup()
    known = "nobody" if become == "unknown actor" else "work"
    body = b"?" if become == "undecodable" else Message("default", known, (), {}, {}).encode()
    publish_wire(nats_url, broker.names.task("default"), ODD_HEADERS, body)
    with running(broker):
        (letter,) = eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert letter.reason == become
    assert letter.data == body
    assert not {"x y", "\u00e9", "(z)"} & letter.headers.keys()


def test_a_message_whose_headers_cannot_be_sent_again_is_put_off_and_run_at_once(make_broker, nats_url):
    """Where a queue has a limit in flight it is stored again, to leave its place to others."""
    broker = make_broker(max_in_flight={"default": 1})
    ran = []

    @dramatiq.actor(broker=broker, max_retries=0)
    def work() -> None:
        ran.append(1)
        if len(ran) == 1:
            raise Snooze(600)

    broker.setup()
    publish_wire(
        nats_url, broker.names.task("default"), ODD_HEADERS, Message("default", "work", (), {}, {}).encode()
    )
    with running(broker):
        eventually(lambda: len(ran) == 2)
        broker.join("default", timeout=30_000)
    assert broker.dead_letters.list() == []
