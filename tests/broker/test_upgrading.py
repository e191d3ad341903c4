"""Every row of docs/upgrading.md: what happens when an old and a new version of a program run side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.results import Results

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.cli import main
from dramatiq_jetstream.periodic import Periodic, list_schedules
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsCluster
from tests.broker.conformance.workers import running

MakeProgram = Callable[..., JetStreamBroker]


@pytest.fixture
def periodic(make_broker) -> MakeProgram:
    """Makes versions of a program with one actor, `tick`, and the given schedule."""

    def make(queue: str = "q", **options: Any) -> JetStreamBroker:
        broker = make_broker()
        broker.add_middleware(Periodic())
        dramatiq.actor(lambda: None, broker=broker, queue_name=queue, actor_name="tick", **options)
        return broker

    return make


def schedules(broker: JetStreamBroker) -> list[str]:
    return [schedule.schedule for schedule in list_schedules(broker)]


def boot(broker: JetStreamBroker) -> list[str]:
    with running(broker):
        return schedules(broker)


def test_a_changed_schedule(periodic: MakeProgram, caplog: pytest.LogCaptureFixture) -> None:
    """New processes change it, and an old one that is restarted last does not change it back."""
    old, new = periodic(every=3_600_000), periodic(every=60_000)
    assert boot(old) == ["@every 3600s"]
    assert boot(new) == ["@every 60s"]
    assert boot(old) == ["@every 60s"]
    assert "stays as a newer process declared it" in caplog.text
    assert boot(new) == ["@every 60s"]


def test_a_schedule_that_is_put_back_on_purpose(periodic: MakeProgram) -> None:
    """`setup --update` takes a declaration of before for the newest."""
    old, new = periodic(every=3_600_000), periodic(every=60_000)
    boot(old)
    boot(new)
    assert old.setup()["schedule tick"] == "differs"
    assert old.setup(update=True)["schedule tick"] == "updated"
    assert boot(new) == ["@every 3600s"]
    assert boot(old) == ["@every 3600s"]


def test_a_schedule_that_is_removed(periodic: MakeProgram) -> None:
    """An old process that boots later does not bring it back."""
    old, new = periodic(every=3_600_000), periodic()
    boot(old)
    assert boot(new) == []
    assert boot(old) == []


def test_a_schedule_that_is_new(periodic: MakeProgram) -> None:
    """An old process, in which the actor has none, does not remove it."""
    old, new = periodic(), periodic(every=60_000)
    assert boot(old) == []
    assert boot(new) == ["@every 60s"]
    assert boot(old) == ["@every 60s"]


def test_a_periodic_actor_that_moves_to_another_queue(periodic: MakeProgram) -> None:
    """Its schedule moves with it, and an old process neither removes the new one nor brings the old one back."""
    old, new = periodic(every=60_000), periodic("r", every=60_000)
    for broker in (old, new):
        broker.declare_queue("q")
        broker.declare_queue("r")
    boot(old)
    boot(new)
    assert [schedule.queue for schedule in list_schedules(new)] == ["r"]
    boot(old)
    assert [schedule.queue for schedule in list_schedules(new)] == ["r"]


PROGRAM = """
import dramatiq
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import Periodic
if not isinstance(dramatiq.broker.global_broker, JetStreamBroker) or \\
        dramatiq.broker.global_broker.names.namespace != {namespace!r}:
    broker = JetStreamBroker({url!r}, namespace={namespace!r})
    broker.add_middleware(Periodic())
    dramatiq.set_broker(broker)
@dramatiq.actor(every=60_000)
def {actor}(): ...
"""


def test_orphans_are_removed_with_one_of_two_modules(
    nats_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_broker: MakeProgram
) -> None:
    """A schedule whose module exists and was not given stays; one whose actor or module is gone goes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    one, two, three = (f"{name}_{namespace}" for name in ("one", "two", "three"))
    for module, actor in ((one, "first"), (two, "second")):
        (tmp_path / f"{module}.py").write_text(PROGRAM.format(url=nats_url, namespace=namespace, actor=actor))
    everything = make_broker()
    everything.add_middleware(Periodic())
    for name, module in {"first": one, "second": two, "left": one, "third": three}.items():
        actor = dramatiq.actor(lambda: None, broker=everything, actor_name=name, every=60_000)
        actor.fn.__module__ = module
    everything.setup()
    main(["schedules", "--module", one, "--remove-orphans"])
    assert {schedule.actor for schedule in list_schedules(everything)} == {"first", "second"}


@pytest.mark.timeout(240)
def test_more_replicas(nats_cluster: NatsCluster, namespace: str) -> None:
    """`setup(update=True)` scales every stream, consumer and bucket, and says so."""

    def program(replicas: int) -> JetStreamBroker:
        broker = JetStreamBroker(nats_cluster.urls, namespace=namespace, replicas=replicas)
        broker.add_middleware(Results(backend=JetStreamBackend(broker)))
        broker.add_middleware(Periodic())
        dramatiq.actor(lambda: None, broker=broker, actor_name="work", store_results=True)
        return broker

    old, new = program(1), program(3)
    old.setup()
    assert "differs" in new.setup().values()
    assert "updated" in new.setup(update=True).values()
    api = new.connection.api
    streams = [name for name in api("STREAM.NAMES")["streams"] if namespace in name]
    assert {api(f"STREAM.INFO.{name}")["config"]["num_replicas"] for name in streams} == {3}
    assert len(streams) == 5
    assert set(new.setup().values()) == {"unchanged"}
    old.close()
    new.close()
