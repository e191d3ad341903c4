"""Fixtures of the walks: an environment from the wheels, and a server of its own, as a stranger has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_jetstream.testing import NatsServer
from tests.walk.environment import Environment


@pytest.fixture(scope="package")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The library from its wheel."""
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server for the documents of one module, whose namespaces and streams have the names that they show."""
    with NatsServer(store_dir=tmp_path_factory.mktemp("nats"), sync="2m") as server:
        yield server
