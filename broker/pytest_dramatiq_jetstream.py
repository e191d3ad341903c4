"""Fixtures for tests of programs on dramatiq-jetstream; pytest finds them where the library is installed.

They stand outside of the package, and import it when a test asks for one: a run that uses none pays nothing. A fixture
of the same name in a `conftest.py` takes the place of one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dramatiq import Worker

    from dramatiq_jetstream import JetStreamBroker
    from dramatiq_jetstream.testing import NatsServer, StubBroker


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server of this run, which writes without fsync and ends with it."""
    from dramatiq_jetstream.testing import NatsServer

    with NatsServer(store_dir=tmp_path_factory.mktemp("nats"), sync="2m") as server:
        yield server


@pytest.fixture
def jetstream_broker(nats_server: NatsServer) -> Iterator[JetStreamBroker]:
    """A broker on `nats_server` with a namespace of its own, Dramatiq's global broker during the test."""
    import secrets

    import dramatiq

    from dramatiq_jetstream import JetStreamBroker

    before = dramatiq.broker.global_broker
    broker = JetStreamBroker(nats_server.url, namespace=f"test-{secrets.token_hex(6)}")
    dramatiq.set_broker(broker)
    try:
        yield broker
    finally:
        dramatiq.broker.global_broker = before
        broker.close()


@pytest.fixture
def stub_broker() -> Iterator[StubBroker]:
    """A stub in the place of the program's broker during the test (see `dramatiq_jetstream.testing.stub`)."""
    from dramatiq_jetstream.testing import stub

    with stub() as broker:
        yield broker


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker in this process, for `jetstream_broker` if the test uses that, otherwise for `stub_broker`."""
    import dramatiq

    name = "jetstream_broker" if "jetstream_broker" in request.fixturenames else "stub_broker"
    broker: Any = request.getfixturevalue(name)
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=4)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
