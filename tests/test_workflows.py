"""The workflows parse, call make targets that exist, and run on every Python that the distributions support."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _runs(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_what_exists(workflow: Path) -> None:
    """Every step runs a make target, or a script of `.ci` that does, so that CI does nothing that no hand can do."""
    assert _runs(workflow)
    for command in _runs(workflow):
        words = command.split()
        assert words[-1] in (".ci/run", ".ci/image") or (words[0] == "make" and words[1] in _targets()), (
            command
        )


def test_every_supported_python_is_checked() -> None:
    """The oldest Python of the matrix is the one that the distributions ask for."""
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    oldest = checks["jobs"]["test"]["strategy"]["matrix"]["python"][0]
    for project in ("pyproject.toml", "broker/pyproject.toml", "instrumentation/pyproject.toml"):
        assert tomllib.loads((ROOT / project).read_text())["project"]["requires-python"] == f">={oldest}"


def test_ci_runs_what_a_developer_runs() -> None:
    """`.ci/run` calls `make test`."""
    assert "\nmake test ARGS=--durations=40\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name
)
def test_an_issue_template_parses(file: Path) -> None:
    """It has a name, a description and something to fill in."""
    form = yaml.safe_load(file.read_text())
    assert form["name"]
    assert form["description"]
    assert form["body"]
