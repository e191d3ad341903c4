"""What is in `deploy` can be used as it is: it parses, and its commands, streams, metrics and pages exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.cli.work import work
from dramatiq_jetstream.gauges import Gauges
from dramatiq_jetstream.jetstream.inventory import consumers
from dramatiq_jetstream.testing import NatsServer
from tests.support.processes import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
UNIT = DEPLOY / "systemd" / "fleet-work@.service"


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def of_kind(kind: str) -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from (each for each in documents(path) if each.get("kind") == kind)


def containers() -> Iterator[dict[str, Any]]:
    for kind in ("Deployment", "Job"):
        for each in of_kind(kind):
            yield from each["spec"]["template"]["spec"]["containers"]


def unit_settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def unit_command() -> list[str]:
    """The unit's command, with the variables of its example."""
    command = unit_settings()["ExecStart"][0].replace("%i", "orders")
    lines = (DEPLOY / "systemd" / "orders.env").read_text().splitlines()
    for name, _, value in (line.partition("=") for line in lines if line and not line.startswith("#")):
        command = command.replace(f"${name}", value)
    assert "$" not in command
    return shlex.split(command)


def commands() -> Iterator[tuple[str, list[str]]]:
    for container in containers():
        yield container["name"], container["args"]
    yield "systemd", ["fleet", *unit_command()[1:]]
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    for name in ("worker", "worker_payments", "worker_webhooks"):
        shell = compose["services"][name]["command"][-1]
        yield (
            f"compose {name}",
            shlex.split(re.sub(r"\$\$\{\w+:-(\d+)\}", r"\1", shell).removeprefix("exec ")),
        )
    for line in (REPOSITORY / "Procfile").read_text().splitlines():
        name, _, shell = line.partition(": ")
        yield f"Procfile {name}", shlex.split(re.sub(r"\$\{\w+:-(\d+)\}", r"\1", shell).removeprefix("exec "))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_manifest_parses(path: Path) -> None:
    """Each document that is not a chart's values says what it is, and has a name."""
    for each in documents(path):
        if "values" not in path.name:
            assert each["kind"]
            assert each["kind"] == "Kustomization" or each["metadata"]["name"]


@pytest.mark.parametrize("directory", ["base", "keda", "hpa"])
def test_what_is_applied_refers_to_what_is_there(directory: str) -> None:
    """Files of a kustomization exist, and what is scaled or has a budget is a deployment."""
    (kustomization,) = documents(DEPLOY / "kubernetes" / directory / "kustomization.yaml")
    for name in kustomization["resources"]:
        assert (DEPLOY / "kubernetes" / directory / name).exists()
    deployments = {each["metadata"]["name"] for each in of_kind("Deployment")}
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for each in of_kind(kind):
            assert each["spec"]["scaleTargetRef"]["name"] in deployments
    for each in of_kind("PodDisruptionBudget"):
        assert each["spec"]["selector"]["matchLabels"]["app"] in deployments
    if shutil.which("kubectl") is not None:
        built = subprocess.run(
            ["kubectl", "kustomize", DEPLOY / "kubernetes" / directory],
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert len(list(yaml.safe_load_all(built.stdout))) > 5


def test_every_image_of_others_is_named_by_its_digest() -> None:
    """What is pulled is what was meant, whatever a registry says of a tag today; dependabot brings newer ones."""
    files = [REPOSITORY / "Dockerfile", *REPOSITORY.glob("docker-compose*.yml"), *MANIFESTS]
    named = {
        name
        for path in files
        for name in re.findall(r"^(?:FROM|\s*image:|\s*tag:) +([^\s#]+)", path.read_text(), re.MULTILINE)
    }
    assert {name for name in named if not re.search("@sha256:[0-9a-f]{64}$", name)} == {"order-service"}
    assert len(named) >= 5


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_fleet_work_is_one_that_the_command_takes(name: str, command: list[str]) -> None:
    """All options of the manifests, the unit, the containers and the Procfile exist, with these values."""
    if command[:2] == ["fleet", "work"]:
        context = work.make_context("work", list(command[2:]))
        assert context.params["modules"] == ("tasks",), name
    else:
        assert command[0] in {"fleet", "gunicorn"}, name


def test_a_stop_has_the_time_that_workers_may_take() -> None:
    """The platform's grace period is longer than the workers' own."""
    graces = {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for each in of_kind("Deployment")
    }
    for each in of_kind("Deployment"):
        (container,) = each["spec"]["template"]["spec"]["containers"]
        if container["args"][:2] == ["fleet", "work"]:
            context = work.make_context("work", list(container["args"][2:]))
            assert context.params["shutdown_timeout"] / 1000 < graces[each["metadata"]["name"]]
    context = work.make_context("work", unit_command()[2:])
    assert context.params["shutdown_timeout"] / 1000 < int(unit_settings()["TimeoutStopSec"][0])


def test_probes_go_where_they_are_answered() -> None:
    """Each port of a probe is one of its container, each path one that `fleet work` or `web` serves."""
    for container in containers():
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container:
                get = container[probe]["httpGet"]
                assert get["port"] in ports
                assert get["path"] in {"/health/live", "/health/ready"}
        if container["args"][:2] == ["fleet", "work"]:
            (_, port) = work.make_context("work", list(container["args"][2:])).params["http"]
            assert port == ports["probes"]


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """Where systemd is, it says nothing but that the program is not installed here."""
    assert Path(unit_command()[0]).name == "fleet"
    if shutil.which("systemd-analyze") is not None:
        copy = tmp_path / "fleet-work@orders.service"
        copy.write_text(
            UNIT.read_text().replace("/srv/%i/.venv/bin/fleet", shutil.which("true") or "/bin/true")
        )
        verdict = subprocess.run(
            ["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60, check=False
        )
        assert "fleet-work@" not in verdict.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JetStreamBroker]:
    """A server that `fleet setup tasks` has prepared, and a broker for it."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        env = {**os.environ, "NATS_URL": server.url, "PAYMENT_URL": "http://127.0.0.1:1"}
        command = [sys.executable, "-m", "dramatiq_jetstream.cli", "setup", "tasks"]
        subprocess.run(command, env=env, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
        broker = JetStreamBroker(server.url, middleware=[])
        yield broker
        broker.close()


def test_what_is_scaled_by_exists(prepared: JetStreamBroker) -> None:
    """KEDA takes a consumer that is not there for one behind by the whole stream; none is forgotten either."""
    named = {
        (trigger["metadata"]["stream"], trigger["metadata"]["consumer"])
        for each in of_kind("ScaledObject")
        for trigger in each["spec"]["triggers"]
    }
    streams = {stream for stream, _ in named}
    existing = {
        (stream, info["name"]) for stream in streams for info in consumers(prepared.connection, stream)
    }
    assert named == existing


def test_metrics_that_are_scaled_by_are_metrics_of_ours(prepared: JetStreamBroker) -> None:
    """In the autoscaler's metrics, and in what the adapter reads for them."""
    source = (REPOSITORY / "broker" / "dramatiq_jetstream" / "fleet" / "metrics.py").read_text()
    known = {f"fleet_{name}" for name in re.findall(r'_family\(\s*"(\w+)"', source)}
    known |= set(re.findall(r"# TYPE (\w+)", Gauges(prepared).prometheus_text()))
    wanted = set()
    for each in of_kind("HorizontalPodAutoscaler"):
        for metric in each["spec"]["metrics"]:
            wanted.add(metric[metric["type"].lower()]["metric"]["name"])
    (values,) = documents(DEPLOY / "kubernetes" / "hpa" / "adapter-values.yaml")
    served = {
        re.match(r"\w+", rule["seriesQuery"]).group()  # type: ignore[union-attr]
        for rules in values["rules"].values()
        for rule in rules
    }
    assert wanted == served
    assert wanted <= known


@pytest.mark.parametrize("path", sorted((DEPLOY / "grafana").glob("*.json")), ids=lambda path: path.name)
def test_a_board_is_whole(path: Path) -> None:
    """Its panels have ids of their own, a text, and do not lie on each other."""
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["targets"] for panel in panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
