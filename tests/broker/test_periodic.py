"""Periodic tasks: every tick once, whichever workers boot, and no scheduler process."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import Periodic, list_schedules, remove_schedule
from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually
from tests.support.processes import WORKER_READY, dramatiq_worker

#: How long the fleet of three is watched; the full minute with PERIODIC_SECONDS=60.
SECONDS = int(os.environ.get("PERIODIC_SECONDS", "15"))


def _broker(url: str, namespace: str) -> JetStreamBroker:
    broker = JetStreamBroker(url, namespace=namespace)
    broker.add_middleware(Periodic())
    return broker


@pytest.fixture
def program(nats_url: str, namespace: str) -> Iterator[JetStreamBroker]:
    """A broker with the middleware, as a program has it."""
    broker = _broker(nats_url, namespace)
    yield broker
    broker.close()


def _actor(broker: JetStreamBroker, **options: object) -> dramatiq.Actor:
    return dramatiq.actor(lambda: None, actor_name="tick", broker=broker, queue_name="q", **options)


def test_setup_stores_changes_and_removes_a_schedule(
    program: JetStreamBroker, nats_url: str, namespace: str
) -> None:
    """Missing ones always; what differs only with `update`."""
    _actor(program, cron="0 6 * * *", timezone="Europe/Berlin")
    assert program.setup()["schedule tick"] == "created"
    assert program.setup()["schedule tick"] == "unchanged"
    (schedule,) = list_schedules(program)
    assert (schedule.actor, schedule.queue, schedule.schedule) == ("tick", "q", "0 0 6 * * *")
    assert (schedule.timezone, schedule.orphan) == ("Europe/Berlin", False)
    assert schedule.next_tick > time.time() * 1000

    changed = _broker(nats_url, namespace)
    _actor(changed, cron="0 7 * * *")
    assert changed.setup()["schedule tick"] == "differs"
    assert [schedule.schedule for schedule in list_schedules(changed)] == ["0 0 6 * * *"]
    assert changed.setup(update=True)["schedule tick"] == "updated"
    changed.close()

    without = _broker(nats_url, namespace)
    _actor(without)
    assert without.setup()["schedule tick"] == "differs"
    assert len(list_schedules(without)) == 1
    assert without.setup(update=True)["schedule tick"] == "removed"
    assert list_schedules(without) == []
    without.close()


def test_a_schedule_of_an_unknown_actor_is_an_orphan(
    program: JetStreamBroker, nats_url: str, namespace: str
) -> None:
    """It is left alone until an operator removes it."""
    _actor(program, every=60_000)
    program.setup()
    other = _broker(nats_url, namespace)
    other.declare_queue("q")
    other.setup()
    (schedule,) = list_schedules(other)
    assert schedule.orphan
    assert remove_schedule(other, "q", "tick")
    assert not remove_schedule(other, "q", "tick")
    other.close()


def test_who_lists_schedules_imports_nothing(
    program: JetStreamBroker, nats_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that exists elsewhere makes no orphan; its package is found without being run."""
    package = tmp_path / "shop_of_others"
    (package / "jobs").mkdir(parents=True)
    for folder in (package, package / "jobs"):
        (folder / "__init__.py").write_text(f"raise SystemExit({str(folder)!r})")
    (package / "jobs" / "nightly.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    modules = {"there": "shop_of_others.jobs.nightly", "gone": "shop_of_others.jobs.weekly", "odd": "a..b"}
    for name, module in modules.items():

        def tick() -> None:
            """Periodic."""

        tick.__module__ = module
        dramatiq.actor(tick, broker=program, actor_name=name, queue_name="q", every=60_000)
    program.setup()
    other = _broker(nats_url, namespace)
    orphans = {schedule.actor: schedule.orphan for schedule in list_schedules(other)}
    other.close()
    assert orphans == {"there": False, "gone": True, "odd": True}


def test_many_that_boot_at_once_store_it_once(
    program: JetStreamBroker, nats_url: str, namespace: str
) -> None:
    """A compare-and-set decides who was first; no process stores it again."""
    brokers = [_broker(nats_url, namespace) for _ in range(6)]
    outcomes: list[str] = []
    for broker in brokers:
        _actor(broker, every=60_000)

    def boot(broker: JetStreamBroker) -> None:
        outcomes.append(broker.setup()["schedule tick"])

    threads = [threading.Thread(target=boot, args=(broker,)) for broker in brokers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert Counter(outcomes) == {"created": 1, "unchanged": 5}
    for broker in brokers:
        broker.close()


def test_booting_again_does_not_disturb_the_ticks(program: JetStreamBroker) -> None:
    """A deployment every moment would otherwise put off an interval for ever."""
    seen: list[tuple[str, float]] = []

    @dramatiq.actor(broker=program, every=2_000)
    def tick() -> None:
        seen.append((dramatiq.middleware.CurrentMessage.get_current_message().message_id, time.time()))

    program.add_middleware(dramatiq.middleware.CurrentMessage())
    worker = dramatiq.Worker(program, worker_threads=1, worker_timeout=100)
    worker.start()
    try:
        deadline = time.monotonic() + 7
        while time.monotonic() < deadline:
            program.setup()
        assert len(seen) >= 2
        assert len({message_id for message_id, _ in seen}) == len(seen)
        (schedule,) = list_schedules(program)
        assert schedule.last_tick is not None
        assert schedule.next_tick is not None
        assert 0 < schedule.next_tick - schedule.last_tick <= 3_000
    finally:
        worker.stop()


def test_ticks_while_the_server_was_down_are_one(own_nats_server: NatsServer, namespace: str) -> None:
    """What was due in the meantime comes once, late, and then the ticks go on."""
    broker = _broker(own_nats_server.url, namespace)
    seen: list[float] = []

    @dramatiq.actor(broker=broker, every=1_000)
    def tick() -> None:
        seen.append(time.monotonic())

    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    try:
        eventually(lambda: len(seen) >= 2)
        own_nats_server.kill()
        down = time.monotonic()
        while time.monotonic() < down + 4:
            time.sleep(0.1)
        own_nats_server.start()
        back, before = time.monotonic(), len(seen)
        eventually(lambda: len(seen) >= before + 3)
        # Four were due while it was down. Without the rule they would all come at once.
        assert sum(1 for at in seen[before:] if at < back + 0.9) <= 2
    finally:
        worker.stop()
        broker.close()


@pytest.mark.timeout(SECONDS + 90)
def test_a_fleet_runs_every_tick_once_while_a_worker_is_killed(
    nats_url: str, namespace: str, tmp_path: Path
) -> None:
    """Three real worker processes, one killed with -9: no tick doubled, none missed."""
    (tmp_path / "clock.py").write_text(
        "import os, dramatiq\n"
        "from dramatiq.middleware import CurrentMessage\n"
        "from dramatiq_jetstream import JetStreamBroker\n"
        "from dramatiq_jetstream.periodic import Periodic\n"
        f"broker = JetStreamBroker({nats_url!r}, namespace={namespace!r}, ack_wait=2_000)\n"
        "broker.add_middleware(Periodic())\nbroker.add_middleware(CurrentMessage())\n"
        "dramatiq.set_broker(broker)\n"
        "@dramatiq.actor(every=1_000)\n"
        "def tick():\n"
        "    message = CurrentMessage.get_current_message()\n"
        "    line = f'{message.message_id} {message.message_timestamp}\\n'\n"
        f"    fd = os.open({str(tmp_path / 'ticks')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "    os.write(fd, line.encode()); os.close(fd)\n"
    )
    workers = [
        dramatiq_worker("clock", log=tmp_path / f"{n}.log", processes=1, threads=2, path=[tmp_path])
        for n in range(3)
    ]
    ticks = tmp_path / "ticks"
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_for_output(WORKER_READY, timeout=40)
        eventually(ticks.exists)
        started = time.monotonic()
        while time.monotonic() < started + SECONDS / 2:
            time.sleep(0.1)
        workers[0].kill()
        while time.monotonic() < started + SECONDS:
            time.sleep(0.1)
        time.sleep(2.5)  # what the killed worker held comes again after its ack_wait
    finally:
        for worker in workers:
            worker.stop()
    seen = re.findall(r"^(\S+) (\d+)$", ticks.read_text(), re.MULTILINE)
    assert len({message_id for message_id, _ in seen}) == len(seen), "a tick was run twice"
    times = sorted(int(at) for _, at in seen)
    assert len(times) >= SECONDS
    assert max(b - a for a, b in itertools.pairwise(times)) < 1_900, "a tick is missing"
