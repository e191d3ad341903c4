"""Fixtures of the conformance suites; which implementations a test is made for comes from the table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.rate_limits import RateLimiterBackend
from dramatiq.results import ResultBackend
from dramatiq_abort import EventBackend

from tests.broker.conformance.cable import Cable
from tests.broker.conformance.implementations import (
    ABORTS,
    BROKERS,
    LIMITS,
    RESULTS,
    AbortsKind,
    BrokerKind,
    Kind,
    LimitsKind,
    ResultsKind,
)
from tests.broker.conformance.rigs import Rig

TABLES: dict[str, list[Any]] = {
    "broker_kind": BROKERS,
    "results_kind": RESULTS,
    "limits_kind": LIMITS,
    "aborts_kind": ABORTS,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "where(**traits): make the test only for implementations with these traits."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, table in TABLES.items():
        if argument in metafunc.fixturenames:
            wanted = [mark.kwargs for mark in metafunc.definition.iter_markers("where")]
            fitting = [kind for kind in table if _fits(kind, wanted)]
            if not fitting:
                raise pytest.UsageError(f"No implementation fits {metafunc.definition.nodeid}: {wanted}")
            metafunc.parametrize(argument, fitting, ids=[kind.name for kind in fitting], scope="session")


def _fits(kind: Kind, wanted: Iterable[dict[str, Any]]) -> bool:
    conditions = itertools.chain.from_iterable(traits.items() for traits in wanted)
    return all(
        getattr(kind, trait) in (value if isinstance(value, set) else {value}) for trait, value in conditions
    )


@pytest.fixture(autouse=True)
def _quick_consumer_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let consumers that were paused or lost their connection come back sooner than after three seconds."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)


@pytest.fixture
def space() -> str:
    """A namespace that no other test uses."""
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def queue(space: str) -> str:
    """The name of a queue that no other test uses."""
    return f"q-{space}"


def _url(kind: Kind, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(kind.server)) if kind.server else "memory:"


@pytest.fixture
def make_rig(
    broker_kind: BrokerKind, space: str, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Rig]]:
    """Makes rigs of the implementation under test, with options of the broker; all end with the test."""
    rigs: list[Rig] = []

    def make(*, url: str | None = None, **options: Any) -> Rig:
        rig = broker_kind.rig(url or _url(broker_kind, request), space, **options)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Iterator[Rig]:
    """The broker under test with what stands behind it; the broker is also Dramatiq's global one."""
    rig = make_rig()
    with _global_broker(rig.broker):
        yield rig


@pytest.fixture
def broker(rig: Rig) -> Broker:
    """The broker under test."""
    return rig.broker


@pytest.fixture
def cable(broker_kind: BrokerKind, request: pytest.FixtureRequest) -> Iterator[Cable]:
    """A cable to the server of the implementation under test."""
    cable = Cable(_url(broker_kind, request))
    yield cable
    cable.close()


@pytest.fixture
def actor(broker: Broker, queue: str) -> Callable[..., Any]:
    """`dramatiq.actor` for the broker under test and the queue of this test."""
    return partial(dramatiq.actor, broker=broker, queue_name=queue)


@contextmanager
def _global_broker(broker: Broker) -> Iterator[None]:
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    try:
        yield
    finally:
        dramatiq.broker.global_broker = before


@pytest.fixture
def stub_broker() -> Iterator[StubBroker]:
    """An in-memory broker: the suites of backends need something that runs actors, not a server for it."""
    broker = StubBroker(fail_fast_default=False)
    with _global_broker(broker):
        yield broker
    broker.close()


def _make_backend(kind: Any, request: pytest.FixtureRequest, space: str) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(namespace: str = space, **options: Any) -> Any:
        backend = kind.make(_url(kind, request), namespace, **options)
        made.append(backend)
        return backend

    yield make
    for backend in made:
        if hasattr(backend, "close"):
            backend.close()


@pytest.fixture
def make_results(
    results_kind: ResultsKind, request: pytest.FixtureRequest, space: str
) -> Iterator[Callable[..., ResultBackend]]:
    """Makes result backends of the implementation under test: `make_results(namespace=..., encoder=...)`."""
    yield from _make_backend(results_kind, request, space)


@pytest.fixture
def results(make_results: Callable[..., ResultBackend]) -> ResultBackend:
    """The result backend under test."""
    return make_results()


@pytest.fixture
def make_limits(
    limits_kind: LimitsKind, request: pytest.FixtureRequest, space: str
) -> Iterator[Callable[..., RateLimiterBackend]]:
    """Makes rate limiter backends of the implementation under test."""
    yield from _make_backend(limits_kind, request, space)


@pytest.fixture
def limits(make_limits: Callable[..., RateLimiterBackend]) -> RateLimiterBackend:
    """The rate limiter backend under test."""
    return make_limits()


@pytest.fixture
def make_aborts(
    aborts_kind: AbortsKind, request: pytest.FixtureRequest, space: str
) -> Iterator[Callable[..., EventBackend]]:
    """Makes abort backends of the implementation under test."""
    yield from _make_backend(aborts_kind, request, space)


@pytest.fixture
def aborts(make_aborts: Callable[..., EventBackend]) -> EventBackend:
    """The abort backend under test."""
    return make_aborts()
