"""Fixtures of the broker's tests: further brokers of a namespace, a proxy before the server, worker processes.

The servers that ours is compared with are started when the first test asks for them, and shared by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.events import Events
from dramatiq_jetstream.testing import NatsServer
from tests.broker.fleet import Fleet, fleet
from tests.support.proxy import Proxy

MakeBroker = Callable[..., JetStreamBroker]
MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make_broker(nats_url: str, namespace: str) -> Iterator[MakeBroker]:
    """Makes brokers of the test's namespace, each with a connection of its own, as other processes have."""
    brokers: list[JetStreamBroker] = []

    def make(url: str | list[str] = nats_url, **options: Any) -> JetStreamBroker:
        broker = JetStreamBroker(url, **{"namespace": namespace, **options})
        brokers.append(broker)
        return broker

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def topic(namespace: str) -> str:
    """The first token of this test's subjects, which is also the name of its stream of events."""
    return f"EV{namespace}"


@pytest.fixture
def make_service(make_broker: MakeBroker, topic: str) -> MakeBroker:
    """Makes brokers with the test's stream of events, as different services have them."""

    def make(**options: Any) -> JetStreamBroker:
        broker = make_broker(**options)
        broker.add_middleware(Events(stream=topic, subjects=[f"{topic}.>"]))
        return broker

    return make


@pytest.fixture
def service(make_service: MakeBroker) -> JetStreamBroker:
    return make_service()


@pytest.fixture
def proxy(nats_url: str) -> Iterator[Proxy]:
    """A proxy before the shared server."""
    with Proxy(nats_url) as proxy:
        yield proxy


@pytest.fixture
def make_fleet(nats_url: str, namespace: str, tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes the test's fleet of worker processes; the options are those of its brokers."""
    fleets = []

    def make(server: NatsServer | None = None, **options: Any) -> Fleet:
        url = nats_url if server is None else server.url
        context = fleet(tmp_path, **{"url": url, "namespace": namespace, **options})
        fleets.append(context)
        return context.__enter__()

    yield make
    for context in fleets:
        context.__exit__(None, None, None)
