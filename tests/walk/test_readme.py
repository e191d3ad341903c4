"""A stranger walks through the library's README: every program and command as written, in order, in one directory."""

from __future__ import annotations

import inspect
from pathlib import Path

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import list_schedules
from dramatiq_jetstream.testing import NatsServer
from tests.support.otlp import OtlpReceiver, Span
from tests.walk.environment import Environment
from tests.walk.terminal import Command, File, Terminal, steps

README = Path(__file__).parents[2] / "broker" / "README.md"

#: What the workers print, by the program that they work for.
WORKERS = {
    "greetings": ["Hello, world!", "Hello, later!"],
    "periodic_example": ["alive"],
    "events_example": ["PARCEL.sent: 17 is on its way"],
    "more_example": ["user-99", "urgent"],
}


def test_the_walk(environment: Environment, own_server: NatsServer, tmp_path: Path) -> None:
    """Each example prints what the README shows, its workers end, and no example is in the way of a later one."""
    ran: list[str] = []
    program = ""
    with OtlpReceiver() as receiver:
        variables = environment.variables(
            NATS_URL=own_server.url, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_BSP_SCHEDULE_DELAY="200"
        )
        with Terminal(tmp_path, variables) as terminal:
            for step in steps(README):
                if isinstance(step, Command) and "fleet work " in step.line:
                    program = step.line.partition("fleet work ")[2].split()[0]
                if isinstance(step, Command) and step.line.startswith("kill %"):
                    for line in WORKERS.get(program, []):
                        terminal.wait_for(line, "workers.log")
                    if step.line.endswith("%opentelemetry"):
                        receiver.wait_until(_sent_and_processed)
                    ran.append(program)
                terminal.do(step)
    files = [step.name for step in steps(README) if isinstance(step, File)]
    assert [f"{name}.py" for name in ran] == [*files, "greetings.py"]  # and once more with telemetry
    broker = JetStreamBroker(own_server.url, namespace="periodic-example")
    try:
        schedules = list_schedules(broker)
        assert [schedule.paused for schedule in schedules if schedule.actor == "heartbeat"] == [True]
    finally:
        broker.close()


def _sent_and_processed(spans: list[Span]) -> bool:
    return {"send default", "process default"} <= {span.name for span in spans if span.service == "greetings"}


def test_each_program_has_a_namespace_of_its_own() -> None:
    """No example's worker is given another example's messages."""
    namespaces = [
        step.text.partition('namespace="')[2].partition('"')[0]
        for step in steps(README)
        if isinstance(step, File)
    ]
    assert all(namespaces)
    assert len(set(namespaces)) == len(namespaces)


def test_every_parameter_of_the_broker_is_in_the_readme_or_its_docstring() -> None:
    """A parameter that the documentation does not show does not exist."""
    text = README.read_text() + (JetStreamBroker.__doc__ or "")
    for parameter in inspect.signature(JetStreamBroker).parameters:
        assert parameter in text, parameter
