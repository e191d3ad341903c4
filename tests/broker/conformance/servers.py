"""Starts the Redis and RabbitMQ servers that the suites compare with: own ports, own directory, own end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pika.exceptions
import redis

from tests.support.ports import free_port
from tests.support.skips import find_program

HOST = "127.0.0.1"

#: What is on the PATH in Debian is a wrapper that changes the user; this is the program behind it.
_RABBITMQ_OF_DEBIAN = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

#: The environment of a RabbitMQ that is installed beside ours must not reach into it.
_FOREIGN = ("RABBITMQ_", "ERL_", "ERLANG_")


def find_redis() -> str | None:
    return find_program("redis-server")


def find_rabbitmq() -> str | None:
    if find_program("epmd") is None:
        return None
    return str(_RABBITMQ_OF_DEBIAN) if _RABBITMQ_OF_DEBIAN.exists() else find_program("rabbitmq-server")


@contextmanager
def redis_server(program: str, directory: Path) -> Iterator[str]:
    """Run a Redis that keeps nothing on disk and yield its URL."""
    port = free_port()
    log = directory / "redis.log"
    arguments = [
        "--port",
        str(port),
        "--bind",
        HOST,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(directory),
    ]
    with _running([program, *arguments], log, dict(os.environ)) as process:
        client = redis.Redis(host=HOST, port=port)
        try:
            _wait_until_ready("Redis", process, log, client.ping, (redis.ConnectionError,), seconds=20)
        finally:
            client.close()
        yield f"redis://{HOST}:{port}/0"


@contextmanager
def rabbitmq_server(program: str, directory: Path) -> Iterator[str]:
    """Run a RabbitMQ node with its own epmd, cookie and database and yield its URL."""
    port, distribution_port, epmd_port = free_port(), free_port(), free_port()
    cookie = directory / ".erlang.cookie"
    cookie.write_text("conformance")
    cookie.chmod(0o400)  # Erlang refuses a cookie that others may read
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)} | {
        "HOME": str(directory),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": HOST,
        "RABBITMQ_NODENAME": f"conformance-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": HOST,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        # Idle schedulers of Erlang spin; on a machine with few cores that slows what is being tested.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
    }
    log = directory / "rabbitmq.log"
    url = f"amqp://guest:guest@{HOST}:{port}/%2F"

    def connect() -> None:
        pika.BlockingConnection(pika.URLParameters(url)).close()

    # The node would start epmd as a daemon that outlives it.
    epmd = ["epmd", "-port", str(epmd_port), "-address", HOST]
    with _running(epmd, directory / "epmd.log", environment), _running([program], log, environment) as node:
        _wait_until_ready("RabbitMQ", node, log, connect, (pika.exceptions.AMQPError, OSError), seconds=90)
        yield url


@contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=30)


def _wait_until_ready(
    name: str,
    process: subprocess.Popen[bytes],
    log: Path,
    connect: Callable[[], object],
    not_yet: tuple[type[BaseException], ...],
    *,
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connect()
            return
        except not_yet as e:
            gone = process.poll() is not None
            if gone or time.monotonic() > deadline:
                state = "ended at once" if gone else f"did not answer within {seconds:.0f} s"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{name} {state} ({e!r}). The end of its log:\n{tail}") from e
            time.sleep(0.05)
