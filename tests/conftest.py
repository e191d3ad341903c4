"""Fixtures that every test may use: real nats-servers, a namespace of its own, a broker on them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import Phase, settings

from dramatiq_jetstream.testing import NatsCluster, NatsServer
from tests.support import fast, skips

if TYPE_CHECKING:
    from dramatiq_jetstream import JetStreamBroker


# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None)
# A change of the code is found by any example that fails; looking for the smallest one takes minutes.
settings.register_profile("mutants", deadline=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    fast.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    # Web and workers of a test share a key, as they have to anywhere.
    os.environ.setdefault("TOKEN_KEY", Fernet.generate_key().decode())
    skips.register(config)
    fast.register(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spread the tests by what they need, unless another way was asked for."""
    from tests.support.distribution import Distribution

    return Distribution(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for the whole run; a test that stops or kills its server uses `own_nats_server`."""
    # Without fsync: nothing here cuts the power, and the tests that are about durability set it themselves.
    with NatsServer(store_dir=tmp_path_factory.mktemp("nats"), sync="2m") as server:
        yield server


@pytest.fixture
def nats_url(nats_server: NatsServer) -> str:
    """The address of the shared server."""
    return nats_server.url


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A started server for this test alone, to be stopped, killed and suspended at will."""
    with NatsServer(store_dir=tmp_path / "nats") as server:
        yield server


@pytest.fixture(scope="session")
def nats_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """Three servers, started when the first test asks for them. A test restarts what it killed."""
    with NatsCluster(store_dir=tmp_path_factory.mktemp("nats-cluster"), sync="2m") as cluster:
        yield cluster


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{secrets.token_hex(5)}"


@pytest.fixture
def broker(nats_url: str, namespace: str) -> Iterator[JetStreamBroker]:
    """A JetStreamBroker on the shared server, also set as Dramatiq's global broker, closed afterwards."""
    import dramatiq

    from dramatiq_jetstream import JetStreamBroker

    broker = JetStreamBroker(url=nats_url, namespace=namespace)
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    try:
        yield broker
    finally:
        dramatiq.broker.global_broker = before
        broker.close()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis that belongs to this run."""
    from tests.broker.conformance import servers

    program = servers.find_redis()
    if program is None:
        pytest.skip("redis-server is not installed")
    with servers.redis_server(program, tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def rabbitmq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a RabbitMQ that belongs to this run."""
    from tests.broker.conformance import servers

    program = servers.find_rabbitmq()
    if program is None:
        pytest.skip("rabbitmq-server is not installed")
    with servers.rabbitmq_server(program, tmp_path_factory.mktemp("rabbitmq")) as url:
        yield url
