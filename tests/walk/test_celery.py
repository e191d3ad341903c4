"""The Celery application of the examples and its port: both run as their README says, and print the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dramatiq_jetstream.testing import NatsServer
from tests.walk.environment import Environment
from tests.walk.terminal import Command, Terminal, steps

EXAMPLE = Path(__file__).parents[2] / "examples" / "celery"


def _commands(program: str) -> list[Command]:
    """Return the commands of the README's block that runs `program`."""
    blocks: list[list[Command]] = []
    for step in steps(EXAMPLE / "README.md"):
        assert isinstance(step, Command)
        if step.line.endswith("&"):
            blocks.append([])
        blocks[-1].append(step)
    return next(block for block in blocks if any(step.line == f"python {program}.py" for step in block))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for program in EXAMPLE.glob("*.py"):
        shutil.copy(program, tmp_path)
    return tmp_path


def test_the_application_runs_on_celery(environment: Environment, redis_url: str, directory: Path) -> None:
    """What is ported is an application that works."""
    with Terminal(directory, environment.variables(REDIS_URL=redis_url)) as terminal:
        for command in _commands("shop_celery"):
            terminal.do(command)


def test_the_port_runs_from_the_wheel(
    environment: Environment, own_server: NatsServer, directory: Path
) -> None:
    """Everything that the application does is done here, without Redis, Celery or a beat process."""
    with Terminal(directory, environment.variables(NATS_URL=own_server.url)) as terminal:
        for command in _commands("shop"):
            terminal.do(command)


def test_both_print_the_same() -> None:
    """The README shows one outcome for both."""
    outputs = {
        program: next(step.output for step in _commands(program) if step.line.startswith("python "))
        for program in ("shop_celery", "shop")
    }
    assert outputs["shop_celery"] == outputs["shop"] != ""
