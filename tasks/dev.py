"""Runs the whole service on one machine: `python -m tasks.dev up`, which is what `make up` calls.

honcho runs the processes of Procfile.dev and shows their output (see `dev_processes`). Beyond that, this module says in
one line, before anything starts, what prevents a start.
"""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from cryptography.fernet import Fernet
from dramatiq.errors import BrokerError

from dramatiq_jetstream import JetStreamBroker

from .numbers import whole_number
from .settings import InvalidSetting, Settings, is_loopback, settings

ROOT = Path(__file__).resolve().parent.parent


class InTheWay(Exception):
    """The service cannot start; the error says why and what to do."""


def up() -> int:
    """Start everything, print the address when it is ready, and run until Ctrl-C."""
    try:
        from honcho.environ import parse_procfile
    except ImportError:
        raise InTheWay("honcho is not installed: run `make up`, which installs it.") from None
    environment = _environment()
    processes: dict[str, str] = dict(parse_procfile((ROOT / "Procfile.dev").read_text()).processes)
    if os.environ.get("NATS_URL"):
        del processes["nats"]
        _check_server(environment["NATS_URL"])
    if os.environ.get("PAYMENT_URL"):
        del processes["payments"]
    try:
        Settings.from_environment(environment).check_sign_in()
    except InvalidSetting as error:
        raise InTheWay(str(error)) from None
    _check_ports(processes, environment)
    os.chdir(ROOT)
    return _run(processes, environment, settings())


def _environment() -> dict[str, str]:
    """Return the environment of the processes: the one of this process, and where they find each other."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    environment["PYTHONUNBUFFERED"] = "1"
    host = os.environ.get("HOST") or "127.0.0.1"
    defaults = {
        "HOST": host,
        # Other machines do not reach these addresses; a developer who sets a provider up wants to see people sign in.
        "ACCESS": "open" if is_loopback(host) and not os.environ.get("OIDC_ISSUER") else "required",
        "PORT": str(settings().port),
        "NATS_URL": f"nats://127.0.0.1:{_port('NATS_PORT', 4222)}",
        "PAYMENT_URL": f"http://127.0.0.1:{_port('PAYMENTS_PORT', 8001)}",
        # They are the stand-in's, which is started when no other gateway is named.
        "TEST_CARDS": "0" if os.environ.get("PAYMENT_URL") else "1",
        # A developer's receiver runs on this machine.
        "WEBHOOK_NETWORKS": "127.0.0.0/8,::1/128" if is_loopback(host) else "",
    }
    if not os.environ.get("PAYMENT_URL") and not environment.get("PAYMENT_WEBHOOK_SECRET"):
        # The stand-in tells of chargebacks by itself, to the front end that is started with it.
        environment["PAYMENT_WEBHOOK_SECRET"] = base64.b64encode(secrets.token_bytes(24)).decode()
        environment["PAYMENTS_WEBHOOK_SECRET"] = environment["PAYMENT_WEBHOOK_SECRET"]
        environment["PAYMENTS_WEBHOOK_URL"] = f"http://{host}:{defaults['PORT']}/api/payments/events"
    if not environment.get("TOKEN_KEY"):
        environment["TOKEN_KEY"] = _token_key(ROOT / ".data" / "token.key")
    for name, value in defaults.items():
        environment[name] = environment.get(name) or value
    return environment


def _token_key(path: Path) -> str:
    """Return the key of this machine's payment tokens, which is made when there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{Fernet.generate_key().decode()}\n")
    return path.read_text().strip()


def _port(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    port = whole_number(value, 1, 65_535)
    if port is None:
        raise InTheWay(f"{name} must be a whole number from 1 to 65535, not {value!r}.")
    return port


def _check_server(url: str) -> None:
    """Make sure that the server of NATS_URL is there and can be used."""
    broker = JetStreamBroker(url, middleware=[])
    try:
        broker.connection.connect()
    except BrokerError as error:
        raise InTheWay(f"{error} (NATS_URL is set; unset it to have a server started here.)") from None
    finally:
        broker.close()


def _check_ports(processes: dict[str, str], environment: dict[str, str]) -> None:
    wanted = {"web": ("PORT", int(environment["PORT"]), "set PORT to another one")}
    if "nats" in processes:
        port = _port("NATS_PORT", 4222)
        wanted["nats"] = (
            "NATS_PORT",
            port,
            f"set NATS_URL=nats://127.0.0.1:{port} to use a server that runs there",
        )
    if "payments" in processes:
        wanted["payments"] = (
            "PAYMENTS_PORT",
            _port("PAYMENTS_PORT", 8001),
            "set PAYMENTS_PORT to another one",
        )
    for name, (variable, port, remedy) in wanted.items():
        with socket.socket() as probe:
            # As the servers do: a port that a stopped server has just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise InTheWay(
                    f"Port {port}, which {name} needs ({variable}), cannot be used: {error.strerror}. "
                    f"Stop what listens there (is the service running already?), or {remedy}."
                ) from None


def _run(processes: dict[str, str], environment: dict[str, str], chosen: Settings) -> int:
    from .dev_processes import Processes

    manager = Processes(nats_port=_port("NATS_PORT", 4222))
    for name, command in processes.items():
        manager.add_process(name, command, env=environment, cwd=str(ROOT))
    url = f"http://{environment['HOST']}:{environment['PORT']}"
    arguments = url, manager.workers, _workers_of(chosen)
    threading.Thread(target=_announce, args=arguments, daemon=True).start()
    manager.loop()
    # Ctrl-C is how it is meant to end.
    return 0 if manager.returncode in (0, 130, 143) else int(manager.returncode or 1)


def _announce(url: str, ready: threading.Semaphore, workers: int) -> None:
    """Print the address once all workers are ready and the front end answers."""
    for _ in range(workers):
        ready.acquire()
    while not _healthy(url):
        time.sleep(0.2)
    line = f"The order service is ready: {url}   (Ctrl-C stops it)"
    print(f"\n{'─' * len(line)}\n{line}\n{'─' * len(line)}\n", flush=True)


def _workers_of(chosen: Settings) -> int:
    """Return how many worker processes there are."""
    return chosen.worker_processes + chosen.payment_worker_processes + chosen.webhook_worker_processes


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the order service on this machine.")
    parser.add_argument("command", choices=["up"])
    parser.parse_args()
    if shutil.which("sh") is None:
        print("The processes are started through `sh`, which was not found on the PATH.", file=sys.stderr)
        return 1
    try:
        return up()
    except InTheWay as problem:
        print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
