"""The files that deploy the service: their syntax, and every command in them, checked without a container engine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from honcho.environ import parse_procfile

from dramatiq_jetstream.testing import NatsServer, find_executable
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, Process
from tests.support.skips import find_program, needs
from tests.web.stack import Stack, order_body

BIN = Path(sys.executable).parent


def procfile(name: str) -> dict[str, str]:
    return dict(parse_procfile((REPOSITORY / name).read_text()).processes)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    return loaded


def compose_commands() -> dict[str, str]:
    """The commands of the compose file's services, as a shell would run them."""
    found = {}
    for name, service in compose()["services"].items():
        if "nats" not in name and "command" in service:
            found[name] = shlex.join(part.replace("$$", "$") for part in service["command"])
    return found


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = text.replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


COMMANDS = {
    **{f"Procfile {name}": command for name, command in procfile("Procfile").items()},
    **{f"Procfile.dev {name}": command for name, command in procfile("Procfile.dev").items()},
    **{f"compose {name}": command for name, command in compose_commands().items()},
    "Dockerfile": next(arguments for name, arguments in dockerfile() if name == "CMD"),
}


# What the front end does not start without.
ENOUGH = {"PORT": "8000", "SECRET_KEY": "k" * 32}


def test_processes_of_the_procfiles() -> None:
    """A PaaS finds release, web and worker; development adds nats and payments."""
    assert set(procfile("Procfile")) == {"release", "web", "worker", "worker_payments", "worker_webhooks"}
    assert set(procfile("Procfile.dev")) == set(procfile("Procfile")) - {"release"} | {"nats", "payments"}
    for name in ("web", "worker", "worker_payments", "worker_webhooks"):
        assert procfile("Procfile")[name] == procfile("Procfile.dev")[name]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_each_command_is_understood(command: str) -> None:
    """Each program is there and understands its arguments; nothing is started."""
    if command.startswith("["):
        command = shlex.join(yaml.safe_load(command))
    words = shlex.split(command)
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2])
    if words[0] == "exec":
        words = words[1:]
    # As the shell fills in the defaults.
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]
    program, *arguments = words
    assert (BIN / program).exists(), f"{program} is not installed"
    if program == "gunicorn":
        check = [BIN / program, "--check-config", *arguments]
    elif program in ("fleet", "python"):
        check = [BIN / program, *arguments, "--help"]
    else:
        assert program == "dramatiq"
        # Its parser, without what comes after it.
        parse = "import sys; from dramatiq.cli import make_argument_parser as m; print(m().parse_args(sys.argv[1:]))"
        check = [BIN / "python", "-c", parse, *arguments]
    done = subprocess.run(
        check,
        cwd=REPOSITORY,
        env={**os.environ, **ENOUGH},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_release_prepares_everything(tmp_path: Path) -> None:
    """`fleet setup tasks` may run twice; after it a worker with DECLARE=0 needs nothing more."""
    (command,) = [shlex.split(command) for name, command in procfile("Procfile").items() if name == "release"]
    with NatsServer(tmp_path, sync="2m") as nats:
        for _ in range(2):
            done = subprocess.run(
                [BIN / command[0], *command[1:]],
                cwd=REPOSITORY,
                env={**os.environ, "NATS_URL": nats.url},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        for name in (
            "ORDERS",
            "stock",
            "orders",
            "requests",
            "access",
            "tokens",
            "payments",
            "projection",
            "webhooks",
            "deliveries",
            "limits",
        ):
            assert name in done.stdout
        assert "created" not in done.stdout


def test_every_queue_has_one_kind_of_worker() -> None:
    """The workers of each file serve all queues between them; payments and webhooks have one to themselves."""
    queues = set(import_tasks_queues())
    for commands in (procfile("Procfile"), procfile("Procfile.dev"), compose_commands()):
        served = {
            name: set(command.split("--queues ")[1].split(" --")[0].split(","))
            for name, command in commands.items()
            if name.startswith("worker")
        }
        assert served == {
            "worker": queues - {"payments", "webhooks"},
            "worker_payments": {"payments"},
            "worker_webhooks": {"webhooks"},
        }


def import_tasks_queues() -> list[str]:
    """The queues of all actors, asked of a process of its own: importing the actors sets Dramatiq's broker."""
    program = "import tasks; print(*{actor.queue_name for actor in tasks.broker.actors.values()})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_compose_file() -> None:
    """Three nodes with three replicas, and everything that the design asks for."""
    loaded = compose()
    services = loaded["services"]
    assert set(services) == {
        *(
            "nats-1",
            "nats-2",
            "nats-3",
            "setup",
            "web",
            "front",
            "worker",
            "worker_payments",
            "worker_webhooks",
            "payments",
            "traces",
        ),
    }
    environment = services["web"]["environment"]
    assert environment["REPLICAS"] == "3"
    for name in ("nats-1", "nats-2", "nats-3"):
        assert f"nats://{name}:4222" in environment["NATS_URL"]
        assert services[name]["volumes"] == [f"{name}:/data"]
        assert services[name]["environment"]["NODE"] == services[name]["hostname"] == name
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"].startswith("http://traces:")
    assert environment["PAYMENT_URL"] == "http://payments:8001"
    # A service that may be scaled has no fixed name or port.
    assert not {"ports", "container_name"} & set(services["worker"])
    volumes = {mount.split(":")[0] for one in services.values() for mount in one.get("volumes", [])}
    assert volumes == set(loaded["volumes"])
    for one in services.values():
        for other in one.get("depends_on", []):
            assert other in services


def test_settings_of_the_compose_file() -> None:
    """The environment in the compose file is one that the service accepts."""
    from tasks.settings import Settings

    environment = compose()["services"]["worker"]["environment"]
    chosen = Settings.from_environment({**environment, "TOKEN_KEY": os.environ["TOKEN_KEY"]})
    assert (chosen.replicas, chosen.log_format) == (3, "json")


def test_nats_configuration_of_the_compose_file(tmp_path: Path) -> None:
    """The real nats-server understands the nodes' configuration, which fsyncs every write."""
    content = compose()["configs"]["nats"]["content"].replace("$$", "$")
    assert "sync_interval: always" in content
    config = tmp_path / "nats.conf"
    config.write_text(content.replace("/data", str(tmp_path / "data")))
    done = subprocess.run(
        [find_executable(), "-t", "-c", config],
        env={**os.environ, "NODE": "nats-1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs("nginx")
def test_front_of_the_compose_file(tmp_path: Path) -> None:
    """The real nginx passes orders on through the configuration of the compose file."""
    content = compose()["configs"]["front"]["content"].replace("$$", "$")
    port = free_port()
    with Stack(tmp_path / "service", workers=False, env={"PROXIES": "1"}) as stack:
        content = content.replace("listen 8000", f"listen 127.0.0.1:{port}").replace(
            "http://web:8000", stack.url
        )
        config = tmp_path / "nginx.conf"
        config.write_text(f"daemon off; pid {tmp_path}/pid; error_log stderr;\n{content}")
        nginx = Process([find_program("nginx"), "-e", "stderr", "-c", config], log=tmp_path / "nginx.log")
        with nginx:
            url = f"http://127.0.0.1:{port}"

            def placed() -> bool:
                try:
                    return (
                        requests.post(f"{url}/api/orders", json=order_body(), timeout=10).status_code == 202
                    )
                except (requests.ConnectionError, requests.Timeout):
                    return False

            eventually(placed)
            stream = requests.get(f"{url}/orders/nothing/stream", timeout=10)
            assert (stream.status_code, stream.headers["Server"]) == (404, "nginx")


def test_dockerfile() -> None:
    """Known instructions only, what is copied exists, and the image does not run as root."""
    instructions = dockerfile()
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert {name for name, _ in instructions} <= known
    assert instructions[0][0] == "FROM"
    order = [name for name, _ in instructions]
    assert order.index("COPY") < order.index("USER")
    runs = [arguments for name, arguments in instructions if name == "RUN"]
    assert any("pip install -r requirements.txt" in one for one in runs)
    for one in runs:
        assert subprocess.run(["sh", "-n", "-c", one], check=False).returncode == 0, one
    assert (REPOSITORY / "requirements.txt").exists()


def test_health_check_of_the_dockerfile() -> None:
    """The program in HEALTHCHECK is Python that compiles."""
    (arguments,) = [arguments for name, arguments in dockerfile() if name == "HEALTHCHECK"]
    command = yaml.safe_load(arguments[arguments.index("CMD") + 4 :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
