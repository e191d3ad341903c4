"""The documents tell the truth: links lead somewhere, commands, variables and attributes that they name exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from opentelemetry import environment_variables as api_variables
from opentelemetry.instrumentation.dramatiq import conventions
from opentelemetry.sdk import environment_variables as sdk_variables

from dramatiq_jetstream.cli.app import fleet
from dramatiq_jetstream.testing import find_executable
from tasks.payments_stand_in import Knobs

ROOT = Path(__file__).resolve().parent.parent


def _documents() -> list[Path]:
    """Every document that is ours: nothing below a hidden directory, and nothing that was installed or built."""
    found: list[Path] = []
    for directory, below, files in os.walk(ROOT):
        below[:] = [
            name for name in below if name not in ("node_modules", "build", "dist") and name[0] != "."
        ]
        found += [Path(directory, name) for name in files if name.endswith(".md") and name[0] != "."]
    return sorted(found)


DOCUMENTS = _documents()
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(?<![\w./-])fleet(?= [a-z-])([^#|;`\n]*)")
_VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")
_ASSIGNMENT = re.compile(r"(?:^|\s)([A-Z][A-Z0-9_]*)=")


def _blocks(document: Path, *languages: str) -> Iterator[str]:
    for language, body in _BLOCK.findall(document.read_text()):
        if language in languages:
            yield body


def _prose(document: Path) -> str:
    return _BLOCK.sub("", document.read_text())


def _inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", _prose(document))


def _commands(document: Path) -> Iterator[str]:
    """What stands where a reader would type it: in code between words, and in blocks for a shell."""
    yield from _inline_code(document)
    for block in _blocks(document, "sh", "console"):
        for line in block.splitlines():
            yield line.replace("# in another terminal: ", "").replace("# or: ", "")
    for block in _blocks(document, "python"):
        yield from re.findall(r"# or: (.*)", block)


def _anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link is a file of this repository, and its anchor a heading there."""
    for link in _LINK.findall(_prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), link
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in _anchors(target), f"{link} names no heading"


@each_document
def test_fleet_commands_exist(document: Path) -> None:
    """Every `fleet …` that a document shows is a command, with options that it takes."""
    for text in _commands(document):
        for typed in _COMMAND.findall(text):
            _check_command(shlex.split(typed.replace("…", "")))


def _check_command(words: list[str]) -> None:
    command: click.Command = fleet
    shown = f"fleet {' '.join(words)}"
    options = {"--json"}
    for word in words:
        if isinstance(command, click.Group) and not word.startswith("-"):
            assert word in command.commands, f"{shown}: there is no {word!r}"
            command = command.commands[word]
        elif word.startswith("--"):
            options |= {option for parameter in command.params for option in parameter.opts}
            assert word.partition("=")[0] in options, f"{shown}: {word} is no option of it"


@each_document
def test_make_targets_and_modules_exist(document: Path) -> None:
    """Every `make …` is a target, and every `python -m …` of ours a module."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in _commands(document):
        for target in re.findall(r"(?:^|\$ )make ([a-z]+)\b", text):
            assert target in targets, f"there is no target {target!r}"
        for module in re.findall(r"python -m ((?:tasks|benchmarks|tests)[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.fixture(scope="module")
def known_variables() -> set[str]:
    """Every environment variable that something here reads, or that OpenTelemetry documents."""
    known = {f"PAYMENTS_{knob.name.upper()}" for knob in fields(Knobs)}
    known |= {name for name in {**vars(api_variables), **vars(sdk_variables)} if name.startswith("OTEL_")}
    for directory in (
        "tasks",
        "web",
        "broker/dramatiq_jetstream",
        "instrumentation",
        "benchmarks",
        "examples",
        "tests",
    ):
        for path in (ROOT / directory).rglob("*.py"):
            if path == Path(__file__) or any(part.startswith(".") for part in path.relative_to(ROOT).parts):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    known |= {node.value} if re.fullmatch(r"[A-Z][A-Z0-9_]+", node.value) else set()
    for name in ("Procfile", "Procfile.dev", "docker-compose.yml"):
        known |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", (ROOT / name).read_text()))
    known |= set(re.findall(r"^([A-Z]+) [:?]?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return known


@each_document
def test_environment_variables_exist(document: Path, known_variables: set[str]) -> None:
    """Every environment variable that a document names is read by a program here."""
    named: set[str] = set()
    for text in _inline_code(document):
        if not text.startswith("fleet "):
            named |= set(_VARIABLE.findall(text)) | set(_ASSIGNMENT.findall(text))
    for block in _blocks(document, "sh", "console"):
        named |= set(_ASSIGNMENT.findall(block))
    assert named <= known_variables, sorted(named - known_variables)


@each_document
def test_no_foreign_place_is_named(document: Path) -> None:
    """No document names a package registry's host, or a path of the machine it was written on."""
    text = document.read_text()
    for name in ("py" + "pi", "python" + "hosted", "npm" + "js", "docker", "ghcr", "quay"):
        host = f"{name}."
        assert host not in text
    assert not re.search(r"(?<![\w.~])/(?:home|root|tmp|Users|mnt|opt|work)/", text)


def test_every_name_of_spans_and_metrics_is_explained() -> None:
    """What the telemetry's conventions name is in the operators' document."""
    document = (ROOT / "docs" / "operations.md").read_text()
    for name, value in vars(conventions).items():
        if name.isupper() and name != "SCHEMA_URL" and isinstance(value, str):
            assert f"`{value}`" in document, f"{value} is not explained"
    for name, value in vars(conventions.Outcome).items():
        if name.isupper():
            assert f"`{value}`" in document, f"the outcome {value} is not explained"


def test_the_permissions_that_are_shown_are_a_configuration(tmp_path: Path) -> None:
    """nats-server accepts the permissions in the operators' document."""
    blocks = [b for b in _blocks(ROOT / "docs" / "operations.md", "") if "SERVICE_PERMISSIONS" in b]
    assert len(blocks) == 1
    config = tmp_path / "nats.conf"
    config.write_text(blocks[0])
    checked = subprocess.run(
        [find_executable(), "-t", "-c", config],
        env={"SERVICE_PASSWORD": "s", "OPERATOR_PASSWORD": "o"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
