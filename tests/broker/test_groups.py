"""Groups and barriers count their members, not the runs of their members: every message may run twice."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Middleware
from dramatiq.middleware import CurrentMessage, GroupCallbacks
from dramatiq.rate_limits import Barrier

from dramatiq_jetstream import JetStreamBroker, group
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption
from dramatiq_jetstream.rate_limits import JetStreamBackend
from dramatiq_jetstream.testing import NatsCluster, NatsServer
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds
from tests.support.processes import WORKER_READY, dramatiq_worker


class RunsAgain(Middleware):
    """Lets chosen messages run again, as if something that follows them could not be stored.

    `again` says of a message and its run, counted from one, whether it is to come once more.
    """

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.again = lambda message, run: False

    def after_process_message(self, broker: Any, message: Any, **outcome: Any) -> None:
        self.runs[message.message_id] += 1
        if self.again(message, self.runs[message.message_id]):
            message.follow_up_error = BrokerConnectionError("lost on the way")


@pytest.fixture
def runs_again(broker: JetStreamBroker, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunsAgain]:
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    middleware = RunsAgain()
    broker.add_middleware(middleware)
    return middleware


@pytest.fixture
def backend(broker: JetStreamBroker) -> JetStreamBackend:
    backend = JetStreamBackend(broker)
    broker.add_middleware(GroupCallbacks(backend))
    broker.add_middleware(CurrentMessage())
    return backend


def start_group(broker: JetStreamBroker, members: list[Any], callback: Any) -> None:
    whole = group(members, broker=broker)
    whole.add_completion_callback(callback.message())
    whole.run()


def test_a_member_that_runs_twice_is_counted_once(broker, backend, runs_again):
    """The callback waits for the other member, however often the first one runs."""
    release, ended = threading.Event(), []
    runs_again.again = lambda message, run: message.actor_name == "quick" and run < 4
    quick = dramatiq.actor(lambda: None, actor_name="quick")

    @dramatiq.actor
    def slow():
        assert release.wait(30)
        ended.append("slow")

    finished = dramatiq.actor(lambda: ended.append("finished"), actor_name="finished", queue_name="after")
    with running(broker):
        start_group(broker, [quick.message(), slow.message()], finished)
        eventually(lambda: sorted(runs_again.runs.values()) == [4])
        assert broker.queue_stats("after").ready == 0
        assert ended == []
        release.set()
        eventually(lambda: "finished" in ended)
        broker.join("after", timeout=30_000)
    assert ended == ["slow", "finished"]


def test_the_callback_comes_once_however_often_members_run(broker, backend, runs_again):
    """Sixty members; each may run up to three times, the last one as well."""
    chosen = random.Random(7)
    repeats = {str(number): chosen.choice([0, 0, 1, 2]) for number in range(60)}
    runs_again.again = lambda message, run: (
        message.actor_name == "part" and run <= repeats[str(message.args[0])]
    )
    seen: list[str] = []
    part = dramatiq.actor(lambda number: seen.append(f"part {number}"), actor_name="part")
    finished = dramatiq.actor(
        lambda: seen.append(f"finished after {len({line for line in seen if line.startswith('part')})}"),
        actor_name="finished",
    )
    with running(broker, threads=8):
        start_group(broker, [part.message(number) for number in range(60)], finished)
        eventually(lambda: any(line.startswith("finished") for line in seen), timeout=60)
        broker.join("default", timeout=30_000)
    assert [line for line in seen if line.startswith("finished")] == ["finished after 60"]


def test_the_last_member_is_told_again_until_its_callback_is_stored(broker, backend, runs_again, monkeypatch):
    """Its first run counted it, and could not store the callback; its second run does."""
    ended = []
    part = dramatiq.actor(lambda: None, actor_name="part")
    finished = dramatiq.actor(lambda: ended.append("finished"), actor_name="finished", queue_name="after")
    store, failures = broker._sender._store, [BrokerConnectionError("not now")]

    def fail_once(queue_name, *publication):
        if queue_name == "after" and failures:
            raise failures.pop()
        return store(queue_name, *publication)

    monkeypatch.setattr(broker._sender, "_store", fail_once)
    with running(broker):
        start_group(broker, [part.message(), part.message()], finished)
        eventually(lambda: ended == ["finished"])
        broker.join("default", timeout=30_000)
    assert sum(runs_again.runs.values()) == 4
    assert ended == ["finished"]


def test_a_barrier_in_an_actor_is_open_again_only_until_the_message_has_succeeded(
    broker, backend, runs_again
):
    """An actor that fails after the barrier finds it open at its retry; one that succeeded does not."""
    told: list[tuple[str, bool]] = []
    Barrier(backend, "all-in").create(2)
    runs_again.again = lambda message, run: message.args == ("second",) and run == 2

    @dramatiq.actor(min_backoff=10, max_backoff=20)
    def arrive(name):
        told.append((name, Barrier(backend, "all-in").wait(block=False)))
        if told.count((name, True)) == 1 and len(told) == 2:
            raise RuntimeError("before it did what waited for the barrier")

    with running(broker):
        arrive.send("first")
        broker.join("default", timeout=30_000)
        arrive.send("second")
        eventually(lambda: len(told) == 4)
        broker.join("default", timeout=30_000)
    # Its second run succeeded, but what followed was not stored; its third is told the same.
    assert told == [("first", False), ("second", True), ("second", True), ("second", True)]


def test_a_run_after_the_work_is_done_does_not_find_the_barrier_open(broker, backend, runs_again):
    """Once all that follows the last member is stored, another run of it starts nothing again."""
    message = None
    told = []
    Barrier(backend, "gate").create(1)

    @dramatiq.actor
    def arrive():
        told.append(Barrier(backend, "gate").wait(block=False))

    with running(broker):
        message = arrive.send()
        broker.join("default", timeout=30_000)
        keys = backend.bucket.keys("gate.member.")
        eventually(lambda: [backend.bucket.get(key).value for key in keys] == [b"done"])
        broker.enqueue(message)  # as its redelivery after a crash would
        broker.join("default", timeout=30_000)
    assert told == [True, False]


def test_a_barrier_that_is_gone_is_open_to_no_one(broker, backend, caplog):
    """A member of a group whose barrier expired does not start the callback; the log says what happened."""
    told = []

    @dramatiq.actor
    def arrive():
        told.append(Barrier(backend, "gone").wait(block=False))

    with running(broker):
        arrive.send()
        broker.join("default", timeout=30_000)
    assert told == [False]
    assert "'gone' has expired or was never made" in caplog.text


def test_parties_outside_of_actors_are_counted_by_call(broker, backend):
    """A program that waits at the barrier itself is a party each time, as in Dramatiq."""
    told = []
    barrier = Barrier(backend, "mixed")
    barrier.create(3)

    @dramatiq.actor
    def arrive():
        told.append(barrier.wait(block=False))

    assert barrier.wait(block=False) is False
    with running(broker):
        arrive.send()
        broker.join("default", timeout=30_000)
        assert barrier.wait(block=True, timeout=5_000) is True
    assert told == [False]


def test_members_that_share_an_id_are_refused(broker, backend):
    """They would be counted as one, and the callback would never come."""
    work = dramatiq.actor(lambda: None, actor_name="work")
    message = work.message()
    with pytest.raises(InvalidOption, match="have the message id"):
        start_group(broker, [message, message], work)
    assert broker.queue_stats("default").ready == 0


def test_a_group_on_a_cluster_whose_leader_is_killed_is_counted_exactly(
    nats_cluster: NatsCluster, namespace: str
) -> None:
    """The leader of the counts dies in the middle of 60 members: the callback comes once, after all of them."""
    broker = JetStreamBroker(nats_cluster.urls, namespace=namespace, replicas=3, enqueue_timeout=20_000)
    backend = JetStreamBackend(broker)
    broker.add_middleware(GroupCallbacks(backend))
    ran: list[Any] = []
    halfway = threading.Event()

    def part(number: int) -> None:
        ran.append(number)
        if len(ran) == 30:
            halfway.set()

    members = dramatiq.actor(part, broker=broker, actor_name="part")
    finished = dramatiq.actor(
        lambda: ran.append(f"finished after {len(set(ran))}"), broker=broker, actor_name="finished"
    )
    with running(broker):
        start_group(broker, [members.message(number) for number in range(60)], finished)
        assert halfway.wait(60)
        victim = nats_cluster.leader_of(backend.bucket.stream)
        nats_cluster.kill(victim)
        try:
            eventually(lambda: any(isinstance(line, str) for line in ran), timeout=90)
        finally:
            nats_cluster.restart(victim)
        broker.join("default", timeout=60_000)
    broker.close()
    assert [line for line in ran if isinstance(line, str)] == ["finished after 60"]


PROGRAM = """
import os, time, dramatiq
from dramatiq import Middleware
from dramatiq.middleware import GroupCallbacks
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.rate_limits import JetStreamBackend

broker = JetStreamBroker(os.environ["NATS_URL"], namespace=os.environ["NAMESPACE"], ack_wait=1_000)
dramatiq.set_broker(broker)

class Die(Middleware):
    def before_ack(self, broker, message):
        if os.environ.get("DIE") and message.args == (0,):
            os._exit(9)

broker.add_middleware(GroupCallbacks(JetStreamBackend(broker)))
broker.add_middleware(Die())

def note(line):
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(line + chr(10))

@dramatiq.actor
def part(number):
    while number == 1 and not os.path.exists(os.environ["SEEN"] + ".open"):
        time.sleep(0.02)
    note(f"part {number}")

@dramatiq.actor(queue_name="after")
def finished():
    note("finished")
"""


def test_a_worker_that_dies_between_the_count_and_the_ack_does_not_count_twice(
    own_nats_server: NatsServer, namespace: str, tmp_path: Path
) -> None:
    """A member was counted, its process was killed, it runs again: the callback still waits for the other one."""
    (tmp_path / "grouped.py").write_text(PROGRAM)
    seen = tmp_path / "seen"
    seen.touch()
    env = {"NATS_URL": own_nats_server.url, "NAMESPACE": namespace, "SEEN": str(seen)}
    client = JetStreamBroker(own_nats_server.url, namespace=namespace)
    client.add_middleware(GroupCallbacks(JetStreamBackend(client)))
    members = [dramatiq.Message("default", "part", (number,), {}, {}) for number in range(2)]
    start_group(
        client,
        members,
        dramatiq.actor(lambda: None, broker=client, actor_name="finished", queue_name="after"),
    )

    def lines() -> Counter[str]:
        return Counter(seen.read_text().splitlines())

    def worker(name: str, **more: str) -> Any:
        return dramatiq_worker(
            "grouped",
            log=tmp_path / f"{name}.log",
            processes=1,
            threads=2,
            path=[tmp_path],
            env={**env, **more, "dramatiq_restart_delay": "3600000"},
        )

    with worker("first", DIE="1"):
        eventually(lambda: lines()["part 0"] == 1)
        with worker("second") as second:
            second.wait_for_output(WORKER_READY, timeout=30)
            eventually(lambda: lines()["part 0"] == 2)
            client.declare_queue("default")
            eventually(lambda: client.queue_stats("default").ready == 0)
            holds(lambda: lines()["finished"] == 0, 1.0)
            Path(f"{seen}.open").touch()
            eventually(lambda: lines()["finished"] == 1)
            client.join("after", timeout=30_000)
    client.close()
    assert lines()["finished"] == 1
