"""What the OTEL_* variables make a process of the service export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from tests.support.otlp import OtlpReceiver
from tests.support.processes import REPOSITORY, dramatiq_worker, python

#: Nothing of the environment of the test run may decide what is exported.
CLEAN = dict.fromkeys(
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_TRACES_EXPORTER",
        "OTEL_METRICS_EXPORTER",
        "OTEL_SDK_DISABLED",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
    ),
    "",
)

PROGRAM = """
from opentelemetry import trace
from tasks import app, telemetry
print("exports:", telemetry.configure("shop", app.broker))
with trace.get_tracer("test").start_as_current_span("work"):
    pass
"""


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """An OTLP/HTTP receiver of the test's own."""
    with OtlpReceiver() as receiver:
        yield receiver


def run(directory: Path, receiver: OtlpReceiver, variables: Mapping[str, str]) -> str:
    """Run a process of the service to its end; return its output."""
    environment = CLEAN | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        # So that only what is exported at the end of the process arrives in time.
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
        **variables,
    }
    process = python("-c", PROGRAM, log=directory / "program.log", env=environment).start()
    assert process.wait(30) == 0, process.output
    return process.output


@pytest.mark.parametrize(
    ("variables", "signals"),
    [
        ({}, {"traces", "metrics"}),
        ({"OTEL_SDK_DISABLED": "true"}, set()),
        ({"OTEL_TRACES_EXPORTER": "none"}, {"metrics"}),
        ({"OTEL_METRICS_EXPORTER": "none"}, {"traces"}),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}, set()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, set()),
    ],
)
def test_the_standard_variables_decide(
    tmp_path: Path, receiver: OtlpReceiver, variables: dict[str, str], signals: set[str]
) -> None:
    """What OTEL_* switches off is not exported; without an endpoint nothing is; the rest arrives at the end."""
    output = run(tmp_path, receiver, variables)
    assert f"exports: {bool(signals)}" in output
    got = {"traces"} if receiver.named("work") else set()
    if "dramatiq.connection.up" in receiver.metric_names():
        got.add("metrics")
    assert got == signals


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "shop"),
        ({"OTEL_SERVICE_NAME": "theirs"}, "theirs"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs"}, "theirs"),
    ],
)
def test_who_deploys_names_the_service(
    tmp_path: Path, receiver: OtlpReceiver, variables: dict[str, str], name: str
) -> None:
    """The process brings a name, and the environment has the last word."""
    run(tmp_path, receiver, variables)
    (span,) = receiver.named("work")
    assert span.service == name
    assert span.resource["service.instance.id"]


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_EXPORTER": "pigeon"},
        {"OTEL_METRICS_EXPORTER": "pigeon"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"},
    ],
)
def test_a_wrong_value_is_named(variables: dict[str, str]) -> None:
    """The front end stops with a message that says which variable, and what is wrong with it."""
    process = subprocess.run(
        [sys.executable, "-c", "from web import create_app; create_app()"],
        cwd=REPOSITORY,
        env={
            "PYTHONPATH": str(REPOSITORY / "proto"),
            "ACCESS": "open",
            "HOST": "127.0.0.1",
            "TOKEN_KEY": Fernet.generate_key().decode(),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "InvalidSetting" in last
    assert "pigeon" in last
    assert next(reversed(variables)) in last


def test_a_worker_stops_for_a_wrong_value(tmp_path: Path) -> None:
    """One line that names the variable, not a worker without telemetry."""
    environment = CLEAN | {"OTEL_TRACES_EXPORTER": "pigeon"}
    worker = dramatiq_worker("tasks", log=tmp_path / "worker.log", env=environment).start()
    assert worker.wait(30) != 0
    assert any(line.startswith("OTEL_TRACES_EXPORTER") for line in worker.output.splitlines())
    assert "Traceback" not in worker.output
