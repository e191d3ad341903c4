"""The order service as real processes, shared by the tests of its steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_jetstream import JetStreamBroker
from tests.tasks.producer import Producer
from tests.web.stack import Stack


@pytest.fixture(scope="package")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The running service, which gives up a step after three retries."""
    env = {"RETRY_LIMIT": "3", "PAYMENT_TIMEOUT": "500"}
    with Stack(tmp_path_factory.mktemp("shop"), env=env) as stack:
        yield stack


@pytest.fixture(scope="package")
def producer(shop: Stack) -> Iterator[Producer]:
    """Another program that publishes events to the shop's stream and knows nothing of Python's."""
    broker = JetStreamBroker(shop.nats.url)
    yield Producer(broker, shop)
    broker.close()
