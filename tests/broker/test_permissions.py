"""The permissions that ship with the library are enough for each role, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import ConnectionFailed, PermissionDenied
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually

PERMISSIONS = files("dramatiq_jetstream").joinpath("permissions.conf").read_text()


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server that knows the three roles."""
    config = PERMISSIONS
    for role in ("producer", "worker", "operator"):
        config = config.replace(f"${role.upper()}_PASSWORD", f'"{role}-secret"')
    with NatsServer(tmp_path_factory.mktemp("guarded"), sync="2m", config=config) as server:
        yield server


class Role:
    """A program of one role: the same declarations, other rights."""

    def __init__(self, server: NatsServer, name: str, *, declare: bool = False) -> None:
        self.done: list[object] = []
        self.broker = JetStreamBroker(
            server.url,
            user=name,
            password=f"{name}-secret",
            declare=declare,
            inbox_prefix=f"_INBOX_{name}",
            enqueue_timeout=3_000,
        )
        self.broker.add_middleware(Events("ORDERS", ["ORDER.*"]))
        done = self.done

        def work(value: object) -> None:
            if value == "fail" and "fail" not in done:
                done.append(value)
                raise RuntimeError("once")
            if value == "die":
                raise RuntimeError("always")
            done.append(value)

        def note(event: bytes) -> None:
            done.append(event)

        self.work = dramatiq.actor(work, broker=self.broker, min_backoff=10, max_backoff=20, max_retries=1)
        self.note = dramatiq.actor(note, broker=self.broker, subscribe=subscription("ORDER.created"))


@pytest.fixture(scope="module")
def operator(guarded_server: NatsServer) -> Iterator[Role]:
    """The operator, who has prepared everything."""
    role = Role(guarded_server, "operator", declare=True)
    role.broker.setup()
    role.broker.bucket("unique").declare()
    yield role
    role.broker.close()


@pytest.fixture
def producer(guarded_server: NatsServer, operator: Role) -> Iterator[Role]:
    """A program that only enqueues."""
    role = Role(guarded_server, "producer")
    yield role
    role.broker.close()


def test_a_producer_and_a_worker_do_their_work(
    guarded_server: NatsServer, operator: Role, producer: Role
) -> None:
    """Messages, delays, retries, dead letters, unique messages and events need nothing that is not allowed."""
    worker = Role(guarded_server, "worker")
    running = dramatiq.Worker(worker.broker, worker_threads=2, worker_timeout=100)
    running.start()
    try:
        producer.work.send("now")
        producer.work.send_with_options(args=("later",), delay=200)
        producer.work.send("fail")
        producer.work.send("die")
        producer.work.send_with_options(args=("once",), unique_key="k")
        producer.broker.publish("ORDER.created", b"event")
        wanted = {"now", "later", "once", b"event"}
        eventually(lambda: wanted <= set(worker.done) and worker.done.count("fail") == 2)
        eventually(lambda: len(operator.broker.dead_letters.list()) == 1)
        operator.broker.join("default", timeout=30_000)
    finally:
        running.stop()
        worker.broker.close()


def test_an_operator_replays_and_purges(operator: Role, producer: Role) -> None:
    """Looking after queues is what the role is for."""
    producer.work.send_with_options(args=("x",), delay=60_000)
    assert operator.broker.queue_stats("default").delayed >= 1
    for letter in operator.broker.dead_letters.list():
        assert operator.broker.dead_letters.replay(letter)
    operator.broker.flush("default")
    assert operator.broker.queue_stats("default").ready == 0


def test_what_a_producer_may_not_do_is_one_clear_error(producer: Role) -> None:
    """A refusal names the subject, at once and not as a timeout."""
    with pytest.raises(PermissionDenied, match="may not publish to"):
        producer.broker.queue_stats("default")
    with pytest.raises(PermissionDenied, match=r"ORDER\.paid"):
        producer.broker.publish("ORDER.paid", b"event")
    with pytest.raises(PermissionDenied, match=r"dramatiq\.dead"):
        producer.broker.connection.publish("dramatiq.dead.default.1", b"")


def test_a_wrong_password_is_one_clear_error(guarded_server: NatsServer, tmp_path: Path) -> None:
    """It says who refused, and what to check."""
    broker = JetStreamBroker(guarded_server.url, user="worker", password="wrong")
    with pytest.raises(ConnectionFailed, match=r"refused us.*check the user, password"):
        broker.connection.connect()
    broker.close()
