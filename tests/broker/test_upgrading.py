"""Every row of docs/upgrading.md: what happens when an old and a new version of a program run side by side."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.results import Results

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.cli import main
from dramatiq_jetstream.errors import InvalidOption, TopologyMismatch
from dramatiq_jetstream.events import Event, Events, subscription
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID, HEADER_TICK, HEADER_UNKNOWN_SINCE
from dramatiq_jetstream.periodic import Periodic, list_schedules
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsCluster
from tests.broker.conformance.workers import consuming, running
from tests.support.polling import eventually, holds

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
    """Start a worker, let it do what it has to do on the server, and stop it; returns the schedules."""
    with running(broker):
        eventually(lambda: broker.keeper.is_idle)
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


def test_a_periodic_actor_that_is_removed(make_broker: MakeProgram, caplog: pytest.LogCaptureFixture) -> None:
    """Its ticks become no dead letters, are left to workers that have the actor, and the log says what to do."""

    def program(ran: list[int] | None) -> JetStreamBroker:
        broker = make_broker()
        broker.add_middleware(Periodic())
        broker.declare_queue("q")
        if ran is not None:
            dramatiq.actor(
                lambda: ran.append(1), broker=broker, queue_name="q", actor_name="gone", every=1_000
            )
        return broker

    ran: list[int] = []
    old, new = program(ran), program(None)
    old.setup()
    with running(new):
        eventually(lambda: "A tick is for the actor gone, which is not declared here" in caplog.text)
        eventually(lambda: new.queue_stats("q").delayed >= 1)
        with running(old):
            eventually(lambda: len(ran) >= 3)
    assert caplog.text.count("A tick is for the actor gone") == 1
    assert list(new.dead_letters.list("q")) == []


def test_a_tick_that_no_worker_takes(make_broker: MakeProgram) -> None:
    """It is dropped after `unknown_actor_grace`; the next one comes anyway."""
    new = make_broker(unknown_actor_grace=0)
    tick = Message("q", "gone", (), {}, {}).encode()
    new.declare_queue("q")
    new.setup()
    new.connection.publish(new.names.task("q"), tick, {HEADER_TICK: "gone", HEADER_MSG_ID: "1"})
    with running(new):
        eventually(
            lambda: new.connection.api(f"STREAM.INFO.{new.names.queue_stream('q')}")["state"]["messages"] == 0
        )
    assert list(new.dead_letters.list("q")) == []


PROGRAM = """
import dramatiq
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID, HEADER_TICK, HEADER_UNKNOWN_SINCE
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
    main(["schedules", "--module", one, "--remove-orphans", "--yes"])
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
    assert {f"KV_{namespace}-{bucket}" for bucket in ("results", "ticks", "unique")} < set(streams)
    assert set(new.setup().values()) == {"unchanged"}
    old.close()
    new.close()


@pytest.fixture
def subscriber(make_service, topic: str) -> MakeProgram:
    """Makes versions of a program that subscribes to one subject with one actor, and notes what it got."""

    def make(
        got: list[Any], subject: str, decode: Any = bytes, *, actor: str = "on", **more: Any
    ) -> JetStreamBroker:
        broker = make_service()
        wanted = subscription(f"{topic}.{subject}", decode, **more)
        dramatiq.actor(got.append, broker=broker, queue_name="q", actor_name=actor, subscribe=wanted)
        return broker

    return make


def only(field: str) -> Callable[[Event], Any]:
    """Decodes events that have a field, as one version of a program writes them."""
    return lambda event: json.loads(event.data)[field]


def test_a_subscription_with_another_subject(subscriber: MakeProgram, topic: str) -> None:
    """After `setup --update`, old workers leave the events of the new subject to the new ones."""
    old_got: list[Any] = []
    new_got: list[Any] = []
    old, new = subscriber(old_got, "a", only("v1")), subscriber(new_got, "b", only("v2"))
    old.setup()
    with running(old):
        old.publish(f"{topic}.a", b'{"v1": 1}')
        eventually(lambda: old_got == [1])
        assert "updated" in new.setup(update=True).values()
        for number in range(3):
            new.publish(f"{topic}.b", b'{"v2": %d}' % number)
        eventually(lambda: new.queue_stats("q").redelivered or new.queue_stats("q").in_flight == 3)
        with running(new):
            eventually(lambda: sorted(new_got) == [0, 1, 2])
    assert old_got == [1]
    assert list(new.dead_letters.list("q")) == []


def test_a_retry_of_an_event_of_another_subject(subscriber: MakeProgram, topic: str) -> None:
    """A retry that an old worker takes is left to new ones as well."""
    attempts: list[Any] = []

    class Got(list[Any]):
        def append(self, value: Any) -> None:
            attempts.append(value)
            if len(attempts) == 1:
                raise ValueError("not yet")
            super().append(value)

    old_got, new_got = [], Got()
    old, new = subscriber(old_got, "a", only("v1")), subscriber(new_got, "b", only("v2"))
    new.actors["on"].options.update(min_backoff=500, max_backoff=500)
    new.setup()
    with running(new):
        new.publish(f"{topic}.b", b'{"v2": 1}')
        eventually(lambda: attempts == [1])
    with running(old):
        stream = old.stream(old.names.queue_stream("q"))
        eventually(
            lambda: (
                (put_off := stream.first(old.names.all_delayed("q"))) is not None
                and HEADER_UNKNOWN_SINCE in put_off.headers
            )
        )
        with running(new):
            eventually(lambda: new_got == [1], timeout=60)
    assert (old_got, list(new.dead_letters.list("q"))) == ([], [])


def test_a_subscription_with_another_subject_while_events_wait(subscriber: MakeProgram, topic: str) -> None:
    """`setup --update` refuses what would leave them undelivered for ever, and takes a wider subject."""
    got: list[Any] = []
    old, new, wider = subscriber(got, "a"), subscriber(got, "b"), subscriber(got, "*")
    old.setup()
    old.publish(f"{topic}.a", b"waits")
    with pytest.raises(TopologyMismatch, match=r"1 events waiting on .*\.a'"):
        new.setup(update=True)
    assert "updated" in wider.setup(update=True).values()
    with running(wider):
        eventually(lambda: got == [b"waits"])


def test_an_actor_with_another_name_that_subscribes(subscriber: MakeProgram, topic: str) -> None:
    """It goes on where the old name stood; the events of before are not handled again."""
    got: list[Any] = []
    old = subscriber(got, "a", actor="old_name")
    with running(old):
        for number in range(5):
            old.publish(f"{topic}.a", b"%d" % number)
        eventually(lambda: len(got) == 5)
        old.join("q", timeout=30_000)
    old.publish(f"{topic}.a", b"5")
    for name in ("new_name", "newest_name"):
        new = subscriber(got, "a", actor=name)
        with running(new):
            new.publish(f"{topic}.a", name.encode())
            eventually(lambda name=name: name.encode() in got)
            new.join("q", timeout=30_000)
        assert "differs" not in new.setup().values()
    assert got == [b"0", b"1", b"2", b"3", b"4", b"5", b"new_name", b"newest_name"]


def test_an_actor_with_another_name_that_names_its_subscription(subscriber: MakeProgram, topic: str) -> None:
    """Old and new workers share the events while both run."""
    old_got: list[Any] = []
    new_got: list[Any] = []
    old = subscriber(old_got, "a", actor="old_name")
    new = subscriber(new_got, "a", actor="new_name", name="old_name")
    with running(old), running(new):
        for number in range(50):
            old.publish(f"{topic}.a", b"%d" % number)
        eventually(lambda: len(old_got) + len(new_got) == 50)
        holds(lambda: len(old_got) + len(new_got) == 50, 0.5)


def test_a_second_actor_that_subscribes(subscriber: MakeProgram, topic: str) -> None:
    """Beside the first, a new one gets everything that the stream has."""
    got: list[Any] = []
    more: list[Any] = []
    one = subscriber(got, "a")
    with running(one):
        one.publish(f"{topic}.a", b"1")
        eventually(lambda: got == [b"1"])
    both = subscriber(got, "a")
    wanted = subscription(f"{topic}.a")
    dramatiq.actor(more.append, broker=both, queue_name="q", actor_name="second", subscribe=wanted)
    with running(both):
        eventually(lambda: more == [b"1"])
    again = subscription(f"{topic}.a", name="on")
    with pytest.raises(InvalidOption, match="both subscribe as 'on'"):
        dramatiq.actor(more.append, broker=both, queue_name="q", actor_name="third", subscribe=again)


def test_a_stream_of_events_that_keeps_more(make_broker: MakeProgram, topic: str) -> None:
    """New processes wait for `setup --update`; an old one warns and goes on beside them."""

    def program(subjects: list[str]) -> JetStreamBroker:
        broker = make_broker()
        broker.add_middleware(Events(stream=topic, subjects=[f"{topic}.{subject}" for subject in subjects]))
        return broker

    old, new = program(["a"]), program(["a", "b"])
    assert set(old.setup().values()) == {"created"}
    with pytest.raises(TopologyMismatch, match="subjects"):
        new.setup()
    assert new.setup(update=True)[f"stream {topic}"] == "updated"
    assert old.setup()[f"stream {topic}"] == "differs"
    old.publish(f"{topic}.a", b"1")
    new.publish(f"{topic}.b", b"2")


def test_a_subscription_that_is_removed(
    subscriber: MakeProgram, topic: str, nats_url: str, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its consumer stays, and `fleet doctor` names it when events wait for it."""
    old = subscriber([], "a")
    old.setup()
    old.publish(f"{topic}.a", b"1")
    with contextlib.suppress(SystemExit):
        main(["--url", nats_url, "--namespace", namespace, "doctor", "--json"])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    finding = findings[f"consumer {old.names.subscription_durable('on')} of stream {topic}"]
    assert finding["status"] == "warning"
    assert "1 events wait" in finding["detail"]


def test_an_actor_that_moves_to_another_queue(make_broker: MakeProgram) -> None:
    """Messages of before are run by old workers, and by new ones that still serve the old queue."""
    ran: list[str] = []

    def program(queue: str, version: str) -> JetStreamBroker:
        broker = make_broker()
        dramatiq.actor(
            lambda n: ran.append(f"{version} {n}"), broker=broker, queue_name=queue, actor_name="work"
        )
        return broker

    old, new = program("q", "old"), program("r", "new")
    old.actors["work"].send(1)
    new.actors["work"].send(2)
    with running(new):
        eventually(lambda: ran == ["new 2"])
        with running(old):
            eventually(lambda: ran == ["new 2", "old 1"])
    old.actors["work"].send(3)
    both = program("r", "new")
    both.declare_queue("q")
    with running(both):
        eventually(lambda: ran == ["new 2", "old 1", "new 3"])


def versions(make_broker: MakeProgram, **options: Any) -> tuple[JetStreamBroker, JetStreamBroker, list[str]]:
    """A version with the actor `one`, another that has `two` as well, and what they ran."""
    ran: list[str] = []
    small, large = make_broker(**options), make_broker(**options)
    for broker, name in ((small, "one"), (large, "one"), (large, "two")):
        dramatiq.actor(
            lambda n, name=name: ran.append(f"{name} {n}"), broker=broker, queue_name="q", actor_name=name
        )
    return small, large, ran


def test_an_actor_that_is_new(make_broker: MakeProgram) -> None:
    """Old workers leave its messages to new ones, which run all of them."""
    old, new, ran = versions(make_broker)
    with running(old), running(new):
        for number in range(10):
            new.actors["two"].send(number)
            new.actors["one"].send(number)
        eventually(lambda: len(ran) == 20, timeout=60)
    assert sorted(ran) == sorted(f"{name} {number}" for name in ("one", "two") for number in range(10))
    assert list(new.dead_letters.list("q")) == []


def test_an_actor_that_is_removed(make_broker: MakeProgram) -> None:
    """Its messages become dead letters when no worker is left that has it, and a replay runs them later."""
    new, old, ran = versions(make_broker, unknown_actor_grace=0)
    old.actors["two"].send(1)
    with running(new):
        (letter,) = eventually(lambda: list(new.dead_letters.list("q")))
    assert (letter.actor, letter.reason) == ("two", "unknown actor")
    with running(old):
        old.dead_letters.replay(letter.id)
        eventually(lambda: ran == ["two 1"])


@pytest.mark.parametrize(
    ("setting", "was", "becomes"),
    [
        ("ack_wait", 30_000, 20_000),
        ("max_in_flight", {"q": 4}, {"q": 8}),
        ("dead_message_ttl", 86_400_000, 2 * 86_400_000),
        ("duplicate_window", 120_000, 60_000),
        ("max_stream_bytes", 10_000_000, 20_000_000),
    ],
)
def test_a_changed_setting(make_broker: MakeProgram, setting: str, was: Any, becomes: Any) -> None:
    """Both versions work before and after `setup --update`, which alone changes the server."""
    ran: list[int] = []

    def program(value: Any) -> JetStreamBroker:
        broker = make_broker(**{setting: value})
        dramatiq.actor(ran.append, broker=broker, queue_name="q", actor_name="work")
        return broker

    old, new = program(was), program(becomes)
    old.setup()
    assert "differs" in new.setup().values()
    for number, broker in enumerate((new, old)):
        broker.actors["work"].send(number)
        with running(broker):
            eventually(lambda number=number: number in ran)
    assert "updated" in new.setup(update=True).values()
    assert set(new.setup().values()) == {"unchanged"}
    again = program(was)
    assert "differs" in again.setup().values()
    for number, broker in enumerate((new, again), start=2):
        broker.actors["work"].send(number)
        with running(broker):
            eventually(lambda number=number: number in ran)


def test_a_limit_for_each_stream(make_broker: MakeProgram) -> None:
    """It throws away messages, so an old version that does not declare it refuses to work with it."""
    old, new = make_broker(), make_broker(max_stream_bytes=10_000_000)
    for broker in (old, new):
        broker.declare_queue("q")
    old.setup()
    assert "differs" in new.setup().values()
    new.setup(update=True)
    with pytest.raises(TopologyMismatch, match="max_bytes"):
        old.setup()


def test_a_shorter_ack_wait(make_broker: MakeProgram) -> None:
    """Old workers signal in time for it before it counts: what they run runs once, however long it takes."""
    began: list[str] = []
    gate = threading.Event()

    def program(version: str, ack_wait: int) -> JetStreamBroker:
        broker = make_broker(ack_wait=ack_wait)

        def work() -> None:
            began.append(version)
            gate.wait(60)

        dramatiq.actor(work, broker=broker, queue_name="q", actor_name="work", max_retries=0)
        return broker

    old, other, new = program("old", 30_000), program("other", 30_000), program("new", 3_000)
    with running(old, threads=1, prefetch=1):
        old.actors["work"].send()
        eventually(lambda: began == ["old"])
        with running(other, threads=1, prefetch=1):
            holds(lambda: began == ["old"], 4.0)  # longer than the new ack_wait without a signal
            new.setup(update=True)
            holds(lambda: began == ["old"], 4.5)
            # and for what is delivered to an old worker since
            other.actors["work"].send()
            eventually(lambda: began == ["old", "other"])
            holds(lambda: began == ["old", "other"], 4.5)
            gate.set()
    config = new.connection.api(f"CONSUMER.INFO.{new.names.queue_stream('q')}.worker")["config"]
    assert config["ack_wait"] == 3_000_000_000
    assert not any(name.startswith("dramatiq") for name in config.get("metadata") or {})
    assert set(new.setup().values()) == {"unchanged"}


@pytest.fixture
def levelled(make_broker: MakeProgram) -> Callable[[list[str], str, int | None], JetStreamBroker]:
    """Makes versions of a program with some levels of priority, which note what they ran."""

    def make(ran: list[str], version: str, levels: int | None) -> JetStreamBroker:
        broker = make_broker(max_priority=levels)
        dramatiq.actor(
            lambda n: ran.append(f"{version} {n}"), broker=broker, queue_name="q", actor_name="work"
        )
        return broker

    return make


def test_a_higher_max_priority(levelled: Callable[..., JetStreamBroker]) -> None:
    """New workers serve the new levels; old workers the old ones, and what they find when they start."""
    ran: list[str] = []
    old, new = levelled(ran, "old", 1), levelled(ran, "new", 3)
    old.setup()
    with running(old) as worker:
        eventually(lambda: consuming(worker, "q") and old.keeper.is_idle)
        new.actors["work"].send_with_options(args=("high",), broker_priority=3)
        new.actors["work"].send_with_options(args=("low",), broker_priority=1)
        eventually(lambda: ran == ["old low"])
        with running(new):
            eventually(lambda: ran == ["old low", "new high"])
    new.actors["work"].send_with_options(args=("later",), broker_priority=3)
    with running(levelled(ran, "restarted", 1)):
        eventually(lambda: ran[2:] == ["restarted later"])


@pytest.mark.parametrize("levels", [2, None])
def test_a_lower_max_priority(
    levelled: Callable[..., JetStreamBroker], levels: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """What old processes enqueued, and go on to, runs first as before, and the log says what is to be removed."""
    ran: list[str] = []
    old, new = levelled(ran, "old", 5), levelled(ran, "new", levels)
    for priority in range(6):
        old.actors["work"].send_with_options(args=(priority,), broker_priority=priority)
    with running(new, threads=1):
        eventually(lambda: sorted(ran) == [f"new {priority}" for priority in range(6)])
        assert new.join("q", timeout=30_000) is None
        old.actors["work"].send_with_options(args=(5,), broker_priority=5)
        eventually(lambda: len(ran) == 7)
    assert "Queue q has the priority 5, which this program does not" in caplog.text


def test_another_namespace(make_broker: MakeProgram, namespace: str) -> None:
    """The new version begins with empty queues; old workers finish the old ones."""
    ran: list[str] = []

    def program(version: str, name: str) -> JetStreamBroker:
        broker = make_broker(namespace=name)
        dramatiq.actor(
            lambda n: ran.append(f"{version} {n}"), broker=broker, queue_name="q", actor_name="work"
        )
        return broker

    old, new = program("old", namespace), program("new", f"{namespace}-2")
    old.actors["work"].send(1)
    with running(new):
        new.actors["work"].send(2)
        eventually(lambda: ran == ["new 2"])
        with running(old):
            eventually(lambda: ran == ["new 2", "old 1"])


def test_every_row_of_the_guide_has_its_test() -> None:
    """A row without a test would be a promise that only paper keeps; one change is a matter of what is decoded."""
    root = Path(__file__).resolve().parent
    written = "".join(path.read_text() for path in root.glob("test_*.py"))
    lines = (root.parents[1] / "docs" / "upgrading.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| Change", "| ---"))]
    without = [row for row in rows if not re.findall(r"`test_\w+`", row)]
    assert len(rows) >= 20
    assert [row.split("|")[1].strip() for row in without] == ["events are written in another way"]
    for row in rows:
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in written
