"""`fleet remove`, and what `fleet doctor` says is left over."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.broker import get_broker, set_broker

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.jetstream.inventory import stream_names
from dramatiq_jetstream.periodic import Periodic
from tests.broker.conformance.workers import running
from tests.broker.test_cli import Fleet, Refused, fleet
from tests.support.polling import eventually

__all__ = ["fleet"]


def declare(broker: JetStreamBroker, name: str, **options: Any) -> dramatiq.Actor[..., Any]:
    def nothing(*_: object) -> None:
        pass

    return dramatiq.actor(nothing, actor_name=name, broker=broker, **options)


@pytest.fixture
def old(make_broker: Any, topic: str) -> JetStreamBroker:
    """What an old version of a program has left: two queues, a schedule, a subscription, priorities."""
    broker: JetStreamBroker = make_broker(max_priority=2)
    broker.add_middleware(Periodic())
    broker.add_middleware(Events(stream=topic, subjects=[f"{topic}.>"]))
    declare(broker, "work", queue_name="kept")
    declare(broker, "gone", queue_name="retired")
    declare(broker, "ticking", queue_name="kept", every=3_600_000)
    declare(broker, "listening", queue_name="kept", subscribe=subscription(f"{topic}.a", bytes))
    broker.setup()
    return broker


@pytest.fixture
def module(
    nats_url: str, namespace: str, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The new version of the program, which has one queue and one actor."""
    name = f"program_{namespace}"
    (tmp_path / f"{name}.py").write_text(
        "import dramatiq\n"
        "from dramatiq_jetstream import JetStreamBroker\n"
        "from dramatiq_jetstream.events import Events\n"
        "from dramatiq_jetstream.periodic import Periodic\n"
        f"broker = JetStreamBroker({nats_url!r}, namespace={namespace!r})\n"
        "dramatiq.set_broker(broker)\n"
        "broker.add_middleware(Periodic())\n"
        f"broker.add_middleware(Events(stream={topic!r}, subjects=['{topic}.>']))\n"
        "@dramatiq.actor(queue_name='kept', broker=broker)\n"
        "def work(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = get_broker()
    yield name
    set_broker(before)
    sys.modules.pop(name, None)


def doctor(fleet: Fleet, module: str, *options: str) -> Any:
    """Run `fleet doctor` with the program, which is imported again, as in a process of its own."""
    sys.modules.pop(module, None)
    return fleet("doctor", "--broker", module, *options)


def left_over(findings: list[dict[str, Any]]) -> dict[str, str]:
    """What is left over, with the advice."""
    return {f["check"]: f["advice"] for f in findings if f["detail"].startswith("is left over")}


def test_doctor_says_what_a_program_no_longer_has(
    fleet: Fleet, old: JetStreamBroker, module: str, topic: str, namespace: str
) -> None:
    """Queues, schedules and subscriptions, each with the command that removes it, which does."""
    findings = doctor(fleet, module, "--json")
    consumer = old.names.subscription_durable("listening")
    assert left_over(findings) == {
        "queue retired": "`fleet remove queue retired`, if no other program uses it.",
        "schedule ticking": f"`fleet schedules --module {module} --remove-orphans`.",
        f"consumer {consumer} of stream {topic}": f"`fleet remove consumer {topic} {consumer}`, if its actor is gone.",
    }
    fleet("remove", "queue", "retired", "--yes")
    sys.modules.pop(module, None)
    fleet("schedules", "--module", module, "--remove-orphans", "--yes")
    fleet("remove", "consumer", topic, consumer, "--yes")
    assert left_over(doctor(fleet, module, "--json")) == {}


def test_doctor_says_what_no_living_worker_serves(
    fleet: Fleet, old: JetStreamBroker, make_broker: Any
) -> None:
    """Without a program: a retired queue, and a priority at which none asks; nothing while no worker lives."""
    assert left_over(fleet("doctor", "--json")) == {}
    lower = make_broker(max_priority=None)
    declare(lower, "work", queue_name="kept")
    stream = old.names.queue_stream("kept")
    with running(lower, threads=1):
        eventually(lambda: "queue retired" in left_over(fleet("doctor", "--json")), timeout=60)
        eventually(lambda: lower.queue_stats("kept") is not None, timeout=60)
    assert old.connection.api(f"CONSUMER.INFO.{stream}.worker-1")["num_pending"] == 0


def test_warnings_have_a_status_for_scripts(fleet: Fleet, old: JetStreamBroker, module: str) -> None:
    """3 with --strict, none without; a failure is 1."""
    doctor(fleet, module)
    with pytest.raises(Refused, match="left over") as refused:
        doctor(fleet, module, "--strict")
    assert refused.value.status == 3


def test_a_dry_run_says_what_would_go_and_removes_nothing(fleet: Fleet, old: JetStreamBroker) -> None:
    """With the messages that would be lost."""
    old.actors["gone"].send()
    found = fleet("remove", "queue", "retired", "--dry-run", "--json")
    assert found["removed"] is False
    assert [part["stream"] for part in found["parts"]] == [old.names.queue_stream("retired")]
    assert "1 ready" in found["parts"][0]["loses"]
    assert "retired" in fleet("queues")


def test_it_asks_first(fleet: Fleet, old: JetStreamBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer nothing is removed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    with pytest.raises(Refused, match="Remove queue retired for good"):
        fleet("remove", "queue", "retired")
    assert "retired" in fleet("queues")


def test_a_queue_goes_with_its_subscriptions(fleet: Fleet, old: JetStreamBroker, topic: str) -> None:
    """The stream of events stays, and so do the other queues."""
    found = fleet("remove", "queue", "kept", "--yes", "--json")
    consumer = old.names.subscription_durable("listening")
    assert [(part["stream"], part["consumer"]) for part in found["parts"]] == [
        (old.names.queue_stream("kept"), ""),
        (topic, consumer),
    ]
    assert old.connection.api(f"CONSUMER.LIST.{topic}", {"offset": 0})["total"] == 0
    assert [queue["queue"] for queue in fleet("queues", "--json")] == ["retired"]


def test_what_living_workers_use_is_refused(fleet: Fleet, old: JetStreamBroker) -> None:
    """They would make it again."""
    with running(old, threads=1):
        eventually(lambda: fleet("workers", "--json"), timeout=60)
        for command in (["queue", "kept"], ["namespace", old.names.namespace], ["bucket", "unique"]):
            with pytest.raises(Refused, match="stop them first"):
                fleet("remove", *command, "--yes")
        stream = old.names.queue_stream("kept")
        eventually(lambda: old.connection.api(f"CONSUMER.INFO.{stream}.worker")["num_waiting"], timeout=60)
        with pytest.raises(Refused, match="stop the workers"):
            fleet("remove", "consumer", stream, "worker", "--yes")
    assert "kept" in fleet("queues")


def test_a_namespace_goes_as_a_whole_and_nothing_else(
    fleet: Fleet, old: JetStreamBroker, topic: str, make_broker: Any, namespace: str
) -> None:
    """Streams of events stay, and another namespace whose name begins with the same letters."""
    other = make_broker(namespace=f"{namespace}-eu")
    declare(other, "work", queue_name="kept")
    other.setup()
    with pytest.raises(Refused, match="the options say"):
        fleet("remove", "namespace", f"{namespace}-eu", "--yes")
    fleet("remove", "namespace", namespace, "--yes")
    left = stream_names(old.connection)
    assert topic in left
    assert other.names.queue_stream("kept") in left
    assert not [name for name in left if name.startswith((f"{namespace}_q_", f"KV_{namespace}-"))]
    with pytest.raises(Refused, match="there is nothing of a namespace"):
        fleet("remove", "namespace", namespace, "--yes")


def test_a_bucket_is_named_as_in_the_program_or_on_the_server(fleet: Fleet, old: JetStreamBroker) -> None:
    """And one that does not exist is told from those that do."""
    fleet("remove", "bucket", "unique", "--yes")
    fleet("remove", "bucket", old.names.bucket("starts"), "--yes")
    with pytest.raises(Refused, match=r"there is no bucket 'unique'.*ticks"):
        fleet("remove", "bucket", "unique", "--yes")
    with pytest.raises(Refused, match="there is no consumer 'x' of a stream"):
        fleet("remove", "consumer", old.names.queue_stream("kept"), "x", "--yes")
