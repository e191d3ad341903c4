"""The compose file with accounts and TLS: its configuration on real servers, and an order through them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from dramatiq.errors import BrokerError

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer, find_executable
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, Process
from tests.web.stack import Stack

CONFIGURATION = (REPOSITORY / "deploy" / "nats" / "secure.conf").read_text()
PASSWORDS = {
    f"{name}_PASSWORD": f"{name.lower()}7" for name in ("SERVICE", "OPERATOR", "ORDERING", "SHIPPING")
}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.secure.yml").read_text())
    return loaded


@dataclass(frozen=True)
class Cluster:
    """Three nodes on this machine, with their addresses in place of those of the containers."""

    hosts: list[str]
    certificates: Path

    def url(self, service: str) -> str:
        """Return the NATS_URL of a service in the compose file, for these nodes."""
        url: str = compose()["services"][service]["environment"]["NATS_URL"]
        for number, host in enumerate(self.hosts, start=1):
            url = url.replace(f"nats-{number}:4222", host)
        return re.sub(r"\$\{(\w+)\}", lambda match: PASSWORDS[match[1]], url)

    def environment(self, service: str) -> dict[str, str]:
        """Return what a service in the compose file is told, for these nodes."""
        told: dict[str, str] = dict(compose()["services"][service]["environment"])
        authority = str(self.certificates / "ca.pem")
        return {**told, "NATS_URL": self.url(service), "SSL_CERT_FILE": authority, "REPLICAS": "3"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("secure")
    certificates = directory / "certificates"
    for _ in range(2):  # what is there is kept
        subprocess.run(
            [REPOSITORY / "deploy" / "nats" / "certificates", certificates], check=True, capture_output=True
        )
    clients, routes, monitors = ([free_port() for _ in range(3)] for _ in range(3))
    with ExitStack() as running:
        for index in range(3):
            text = CONFIGURATION.replace("/certs", str(certificates))
            text = text.replace("store_dir: /data", f"store_dir: {directory / f'data-{index}'}")
            text = text.replace("0.0.0.0:4222", f"127.0.0.1:{clients[index]}")
            text = text.replace("127.0.0.1:8222", f"127.0.0.1:{monitors[index]}")
            text = text.replace("0.0.0.0:6222", f"127.0.0.1:{routes[index]}")
            for number, port in enumerate(routes, start=1):
                text = text.replace(f"nats-{number}:6222", f"127.0.0.1:{port}")
            path = directory / f"node-{index}.conf"
            path.write_text(text)
            node = Process(
                [find_executable(), "-c", path],
                log=directory / f"node-{index}.log",
                env={**PASSWORDS, "NODE": f"nats-{index + 1}"},
            )
            running.enter_context(node).wait_for_output("Server is ready", timeout=60)
        yield Cluster([f"127.0.0.1:{port}" for port in clients], certificates)


def test_an_order_through_accounts_and_tls(cluster: Cluster, tmp_path: Path) -> None:
    """The operator's account prepares everything, the service's takes an order to its end and declares nothing."""
    prepared = subprocess.run(
        [Path(sys.executable).parent / "fleet", "setup", "tasks"],
        cwd=REPOSITORY,
        env={**os.environ, **cluster.environment("setup")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr

    @dataclass
    class Running:
        url: str

    environment = cluster.environment("worker")
    assert environment["DECLARE"] == "0"
    nats = cast(NatsServer, Running(environment.pop("NATS_URL")))
    with Stack(tmp_path, nats=nats, env=environment) as shop:
        assert shop.final(shop.order()["order_id"], timeout=60)["status"] == "confirmed"


@pytest.mark.parametrize("url", ["nats://{}", "tls://service:wrong@{}"])
def test_a_stranger_gets_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Neither without a password nor with a wrong one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(cluster.certificates / "ca.pem"))
    broker = JetStreamBroker(url.format(cluster.hosts[0]), enqueue_timeout=2_000)
    try:
        with pytest.raises(BrokerError):
            broker.connection.connect()
    finally:
        broker.close()


def test_an_authority_that_is_not_known_is_refused(cluster: Cluster) -> None:
    """Without the file of the authority a client does not trust the nodes."""
    broker = JetStreamBroker(
        f"tls://service:{PASSWORDS['SERVICE_PASSWORD']}@{cluster.hosts[0]}", enqueue_timeout=2_000
    )
    try:
        with pytest.raises(BrokerError, match=r"(?i)certificate"):
            broker.connection.connect()
    finally:
        broker.close()


def test_the_permissions_are_those_of_the_page() -> None:
    """One text says what an account may, wherever it stands."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    permissions = (REPOSITORY / "tasks" / "permissions.conf").read_text()
    for name, text in (
        ("SERVICE", page),
        ("OPERATOR", page),
        ("ORDERING", permissions),
        ("SHIPPING", permissions),
    ):
        pattern = rf"^{name}_PERMISSIONS = \{{\n.*?^\}}\n"
        (wanted,) = re.findall(pattern, text, re.MULTILINE | re.DOTALL)[:1]
        assert wanted in CONFIGURATION, name


def test_it_fits_the_compose_file() -> None:
    """It changes services that there are, and publishes nothing."""
    base = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    assert compose()["services"].keys() <= base["services"].keys()
    assert not any("ports" in service for service in compose()["services"].values())
    published = {name for name, service in base["services"].items() if "ports" in service}
    assert published == {"front", "traces"}
    assert base["services"]["traces"]["ports"] == ["127.0.0.1:16686:16686"]
