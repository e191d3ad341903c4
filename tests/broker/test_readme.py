"""The programs in the library's README run, and print what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.polling import eventually

README = Path(__file__).parents[2] / "broker" / "README.md"


@dataclass(frozen=True)
class Program:
    """A program of the README, and what it prints when it is run (None: it is not run, only worked)."""

    name: str
    source: str
    output: str | None


def _programs() -> list[Program]:
    blocks = re.findall(r"```(python|console)\n(.*?)```", README.read_text(), re.DOTALL)
    found: list[Program] = []
    for kind, text in blocks:
        if kind == "python":
            name = re.match(r"# (\w+)\.py\n", text)
            assert name, f"a program in the README does not name its file: {text[:60]!r}"
            found.append(Program(name[1], text, None))
        else:
            command, _, output = text.partition("\n")
            assert command == f"$ python {found[-1].name}.py"
            found[-1] = Program(found[-1].name, found[-1].source, output)
    return found


PROGRAMS = {program.name: program for program in _programs()}

#: What the workers print.
WORKERS = {
    "greetings": ["Hello, world!", "Hello, later!"],
    "periodic_example": ["alive"],
    "events_example": ["PARCEL.sent: 17 is on its way"],
    "more_example": ["user-99", "urgent"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_readme_runs(name: str, nats_url: str, namespace: str, tmp_path: Path) -> None:
    """Its worker is a real `dramatiq` process, and its output is what the README shows."""
    program = PROGRAMS[name]
    # The namespace of the test, so that programs of other tests do not answer; nothing else is changed.
    source = program.source.replace(
        "broker = JetStreamBroker(", f'broker = JetStreamBroker(namespace="{namespace}", '
    )
    source = source.replace('"PARCELS"', f'"PARCELS_{namespace}"').replace("PARCEL.", f"PARCEL{namespace}.")
    (tmp_path / f"{name}.py").write_text(source)
    environment = {**os.environ, "NATS_URL": nats_url, "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "worker.log"
    with log.open("wb") as stream:
        worker = subprocess.Popen(
            [sys.executable, "-m", "dramatiq", name, "--processes", "1", "--threads", "4"],
            cwd=tmp_path,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: "ready for action" in log.read_text())
        if program.output is not None:
            ran = subprocess.run(
                [sys.executable, f"{name}.py"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout.replace(namespace, "").replace("PARCELS_", "PARCELS") == program.output
        for line in WORKERS.get(name, []):
            eventually(lambda line=line: line in log.read_text().replace(namespace, ""))
    finally:
        worker.terminate()
        worker.wait(30)


def test_every_parameter_of_the_broker_is_in_the_readme_or_its_docstring() -> None:
    """A parameter that the documentation does not show does not exist."""
    import inspect

    from dramatiq_jetstream import JetStreamBroker

    text = README.read_text() + (JetStreamBroker.__doc__ or "")
    for parameter in inspect.signature(JetStreamBroker).parameters:
        assert parameter in text, parameter
