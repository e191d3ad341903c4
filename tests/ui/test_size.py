"""Pages of a large fleet: 500 workers, 10,000 dead letters and 100,000 records of the history."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from dramatiq import Message
from werkzeug.test import Client

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.history import Record
from dramatiq_jetstream.jetstream import names
from dramatiq_jetstream.jetstream.topology import WORKERS
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.ui import create_app, operator
from dramatiq_jetstream.wire.connection import Publication

#: 300 ms are wanted of a machine that does nothing else; here other tests run beside.
LIMIT_SECONDS = 0.9

#: The best of this many counts is taken: other programs of the machine take their share of a single one.
TRIES = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server of its own: the shared one holds the streams of all other tests."""
    with NatsServer(store_dir=tmp_path_factory.mktemp("large"), sync="2m") as server:
        yield server


@pytest.fixture(scope="module")
def large(server: NatsServer) -> Iterator[JetStreamBroker]:
    """A namespace with all of it, written by the test."""
    broker = JetStreamBroker(server.url, namespace="large", history="all")
    for queue in ("default", "mail", "video"):
        broker.declare_queue(queue)
    broker.setup()
    _store(broker, map(_worker(broker), range(500)))
    _store(broker, map(_letter(broker), range(10_000)))
    _store(broker, map(_record(broker), range(100_000)))
    broker.enqueue_many([Message("mail", "send", (n,), {}, {}) for n in range(1_000)], delay=3_600_000)
    yield broker
    broker.close()


def _store(broker: JetStreamBroker, publications: Iterator[Publication]) -> None:
    while batch := list(islice(publications, 5_000)):
        broker.connection.publish_many(batch, timeout=60_000)


def _worker(broker: JetStreamBroker) -> Any:
    bucket = broker.declarations.memory_bucket(WORKERS)
    bucket.declare()
    now = int(time.time() * 1000)

    def make(number: int) -> Publication:
        running = [
            {
                "message_id": f"m-{number}-{thread}",
                "actor": "transcode",
                "queue": "video",
                "attempt": 1,
                "since": now - number,
                "arguments": "'film.mov', preset='1080p'",
            }
            for thread in range(8)
        ]
        said = {"host": f"host-{number % 20}", "pid": number, "version": "0.1.0", "since": now, "at": now}
        counts = {"threads": 8, "done": number, "failed": 1, "rss": 10**8, "cpu": 1.5}
        record = {**said, **counts, "queues": ["mail", "video"], "running": running}
        key = names.bucket_subject(broker.names.bucket(WORKERS), f"w{number}")
        return Publication(key, json.dumps(record).encode())

    return make


def _letter(broker: JetStreamBroker) -> Any:
    now = int(time.time() * 1000)

    def make(number: int) -> Publication:
        message: Message[Any] = Message("mail", f"actor{number % 7}", (number,), {}, {})
        headers = {
            names.HEADER_DEAD_REASON: "retries exhausted",
            names.HEADER_DEAD_ERROR: f"ValueError: the address {number} cannot be reached",
            names.HEADER_DEAD_QUEUE: "mail",
            names.HEADER_DEAD_SUBJECT: broker.names.task("mail"),
            names.HEADER_DEAD_DELIVERIES: "1",
            names.HEADER_DEAD_AT: str(now),
            names.HEADER_DEAD_ACTOR: message.actor_name,
            names.HEADER_MESSAGE_ID: message.message_id,
        }
        return Publication(broker.names.dead("mail", f"o{number}"), message.encode(), headers)

    return make


def _record(broker: JetStreamBroker) -> Any:
    now = int(time.time() * 1000)

    def make(number: int) -> Publication:
        outcome = "done" if number % 10 else "failed"
        record = Record(
            message_id=f"m-{number}",
            queue="mail",
            actor=f"actor{number % 7}",
            outcome=outcome,
            began=now - 30,
            ended=now,
            error_type="" if number % 10 else "ValueError",
            error="" if number % 10 else f"the address {number} cannot be reached",
        )
        return Publication(broker.names.history("mail", record.actor, record.message_id), record.encode())

    return make


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/workers",
        "/workers?page=5",
        "/running",
        "/messages",
        "/messages?actor=actor3&outcome=failed",
        "/messages?error=address 99",
        "/messages/m-77",
        "/delayed",
        "/dead",
        "/dead?actor=actor3",
        "/dead?text=no such text",
        "/dead/77",
        "/schedules",
        "/limits",
        "/audit",
    ],
)
def test_a_page_answers_at_once(large: JetStreamBroker, path: str) -> None:
    """The best of several is in time, with nothing left over from the try before."""
    best = 9.9
    for _ in range(TRIES):
        client = Client(create_app(large, access=lambda _: operator("ann")))
        began = time.monotonic()
        response = client.get(path)
        best = min(best, time.monotonic() - began)
        assert response.status_code == 200
        if best < LIMIT_SECONDS:
            return
    assert best < LIMIT_SECONDS
