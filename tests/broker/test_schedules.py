"""Steering periodic tasks: run now, pause, resume, whatever programs boot meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.schedules import Schedule, list_schedules, pause, remove_schedule, resume, run_now
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

Program = Callable[..., JetStreamBroker]


@pytest.fixture
def make_program(nats_url: str, namespace: str) -> Iterator[Program]:
    """Makes programs with one periodic actor."""
    brokers = []

    def make(ran: list[Any] | None = None, **options: Any) -> JetStreamBroker:
        broker = JetStreamBroker(nats_url, namespace=namespace)
        brokers.append(broker)
        broker.add_middleware(Periodic())
        given = options or {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}
        dramatiq.actor(
            lambda: (ran if ran is not None else []).append(1),
            actor_name="tick",
            broker=broker,
            queue_name="q",
            **given,
        )
        return broker

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def operator(nats_url: str, namespace: str) -> Iterator[JetStreamBroker]:
    """A broker that declares nothing, as the command has it."""
    broker = JetStreamBroker(nats_url, namespace=namespace, declare=False, middleware=[])
    yield broker
    broker.close()


def the_schedule(broker: JetStreamBroker) -> Schedule:
    (schedule,) = list_schedules(broker)
    return schedule


def test_run_now(make_program: Program, operator: JetStreamBroker) -> None:
    """One tick, also of a paused schedule, which is not changed by it; its id finds it."""
    ran: list[int] = []
    program = make_program(ran)
    program.setup()
    first = run_now(operator, "q", "tick")
    assert first is not None
    assert operator.status(first).state == "waiting"
    pause(operator, "q", "tick")
    assert run_now(operator, "q", "tick")
    with running(program, queues={"q"}):
        eventually(lambda: len(ran) == 2, timeout=30)
    assert the_schedule(operator).paused
    assert run_now(operator, "q", "nothing") is None


def test_a_paused_schedule_stays_paused_whoever_boots(
    make_program: Program, operator: JetStreamBroker
) -> None:
    """It is listed, without a next tick; workers that boot and `fleet setup` leave it alone."""
    program = make_program()
    program.setup()
    before = the_schedule(operator)
    assert pause(operator, "q", "tick")
    assert not pause(operator, "q", "tick")
    paused = the_schedule(operator)
    assert (paused.paused, paused.next_tick, paused.schedule) == (True, None, before.schedule)
    assert paused.timezone == "Europe/Berlin"
    assert program.setup()["schedule tick"] == "paused"
    assert program.setup(update=True)["schedule tick"] == "paused"
    with running(program, queues={"q"}):
        eventually(lambda: program.keeper.is_idle, timeout=30)
        assert the_schedule(operator).paused
    assert resume(operator, "q", "tick")
    assert not resume(operator, "q", "tick")
    assert the_schedule(operator) == before
    assert program.setup()["schedule tick"] == "unchanged"


def test_a_new_declaration_takes_effect_when_it_is_resumed(
    make_program: Program, operator: JetStreamBroker
) -> None:
    """A deployment while it is paused changes what is resumed."""
    make_program().setup()
    pause(operator, "q", "tick")
    make_program(every=3_600_000).setup(update=True)
    assert the_schedule(operator).schedule == "@every 3600s"
    assert resume(operator, "q", "tick")
    found = the_schedule(operator)
    assert (found.schedule, found.timezone, found.paused) == ("@every 3600s", None, False)


def test_a_paused_schedule_can_be_removed(make_program: Program, operator: JetStreamBroker) -> None:
    """Then nothing is left to resume."""
    make_program().setup()
    pause(operator, "q", "tick")
    assert remove_schedule(operator, "q", "tick")
    assert list_schedules(operator) == []
    assert not resume(operator, "q", "tick")
    assert run_now(operator, "q", "tick") is None
