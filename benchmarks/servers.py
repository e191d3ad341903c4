"""The real servers that contenders need: on free loopback ports, with stores of their own.

`start()` waits until the server answers; `kill()` and `start()` again crash it and bring it back on the same
store, which the recovery measurement uses.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks.processes import BenchmarkError, Process, wait_until

REPOSITORY = Path(__file__).parent.parent
START_TIMEOUT = 180.0  # a cluster of RabbitMQ on a busy machine


def free_port() -> int:
    """A port of this machine that nothing else is given."""
    # Contenders import this module in environments of their own, which have no library.
    from dramatiq_jetstream.testing import free_port as free

    return free()


class Server:
    """One server process. Subclasses say how it is started and how it answers."""

    name: str
    variable: str  # the environment variable that carries the url to drivers and workers

    def __init__(self, store: Path) -> None:
        self.store = store
        self.port = free_port()
        self.process: Process | None = None

    @property
    def url(self) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        raise NotImplementedError

    @classmethod
    def program(cls) -> str:
        """The path of its program; raises BenchmarkError if it is not installed."""
        return find(cls.name)

    @classmethod
    def missing(cls) -> str | None:
        """Why this server cannot be started here, or None."""
        try:
            cls.program()
        except BenchmarkError as error:
            return str(error)
        return None

    def start(self) -> None:
        self.store.mkdir(parents=True, exist_ok=True)
        self.process = Process(self.command(), self.store / "server.log", self.environment())
        process = self.process

        def ready() -> bool:
            process.require_running()
            return self.answers()

        wait_until(ready, START_TIMEOUT, f"{self.name} answers on port {self.port}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
        shutil.rmtree(self.store, ignore_errors=True)

    def _exchange(self, question: bytes, answer: bytes) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.settimeout(1.0)
                connection.sendall(question)
                received = b""
                while answer not in received and (chunk := connection.recv(4096)):
                    received += chunk
                return answer in received
        except OSError:
            return False


def find(program: str, *elsewhere: Path) -> str:
    """The path of a server's program, or an error that says how to get it."""
    for candidate in elsewhere:
        if candidate.exists():
            return str(candidate)
    found = shutil.which(program)
    if found is None:
        raise BenchmarkError(f"{program} is not installed; install it (Debian: apt-get install {program})")
    return found


class NatsServer(Server):
    """nats-server with JetStream; `sync` is JetStream's sync_interval."""

    name = "nats-server"
    variable = "BENCH_NATS_URL"

    def __init__(self, store: Path, sync: str = "always") -> None:
        super().__init__(store)
        self.sync = sync

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @classmethod
    def program(cls) -> str:
        return find("nats-server", Path(sysconfig.get_path("scripts")) / "nats-server")

    def command(self) -> list[str]:
        config = self.store / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{self.store / "js"}", sync_interval: "{self.sync}", max_file: 20G }}\n'
        )
        return [self.program(), "-c", str(config)]

    def answers(self) -> bool:
        return self._exchange(b'CONNECT {"verbose":false}\r\nPING\r\n', b"PONG")

    @classmethod
    def version(cls) -> str:
        return _output([cls.program(), "--version"]).split("v")[-1]


class Sink(Server):
    """An OTLP/HTTP endpoint that keeps nothing; see `benchmarks.sink`."""

    name = "sink"
    variable = "OTEL_EXPORTER_OTLP_ENDPOINT"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.sink", str(self.port)]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(REPOSITORY)}

    def answers(self) -> bool:
        return self._exchange(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b" 200 ")


class RedisServer(Server):
    """redis-server with an append only file; `fsync` is its appendfsync."""

    name = "redis-server"
    variable = "BENCH_REDIS_URL"

    def __init__(self, store: Path, fsync: str = "everysec") -> None:
        super().__init__(store)
        self.fsync = fsync

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.store),
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "save": "",
        }
        return [self.program(), *(part for key, value in options.items() for part in (f"--{key}", value))]

    def answers(self) -> bool:
        return self._exchange(b"PING\r\n", b"+PONG")

    @classmethod
    def version(cls) -> str:
        return _output([cls.program(), "--version"]).split("v=")[1].split()[0]


class RabbitServer(Server):
    """rabbitmq-server, one node with a name, a cookie and an epmd of its own."""

    name = "rabbitmq-server"
    variable = "BENCH_RABBITMQ_URL"
    installed = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's /usr/sbin wrapper changes the user

    def __init__(self, store: Path) -> None:
        super().__init__(store)
        self.epmd_port = free_port()
        self.dist_port = free_port()
        self.epmd: Process | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2f?heartbeat=60&blocked_connection_timeout=30"

    @classmethod
    def program(cls) -> str:
        return find("rabbitmq-server", cls.installed)

    def command(self) -> list[str]:
        (self.store / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.file.level = warning\nloopback_users = none\n"
        )
        (self.store / "enabled_plugins").write_text("[].\n")
        return [self.program()]

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.store),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "bench@localhost",
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.store / "rabbitmq.conf"),
            "RABBITMQ_MNESIA_BASE": str(self.store / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.store / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.store / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.store / "pid"),
        }

    def start(self) -> None:
        # The node would start an epmd that outlives it; one of our own, in the foreground, ends with us.
        if self.epmd is None:
            self.store.mkdir(parents=True, exist_ok=True)
            command = [find("epmd"), "-port", str(self.epmd_port), "-address", "127.0.0.1"]
            self.epmd = Process(command, self.store / "epmd.log")
        super().start()

    def stop(self) -> None:
        if self.epmd is not None:
            self.epmd.stop()
        super().stop()

    def answers(self) -> bool:
        return self._exchange(b"AMQP\x00\x00\x09\x01", b"PLAIN")

    @classmethod
    def version(cls) -> str:
        for line in _output(["dpkg-query", "-W", "-f", "${Version}\n", "rabbitmq-server"]).splitlines():
            return line.split("-")[0]
        return "unknown"


class PostgresServer(Server):
    """A PostgreSQL with a database cluster of its own, as it is: fsync and synchronous_commit are on.

    It refuses to run as root; then it runs as the user that Debian makes for it.
    """

    name = "postgres"
    variable = "DATABASE_URL"
    user = "postgres"

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/postgres"

    @classmethod
    def program(cls) -> str:
        """The path of its program: Debian has a folder for each version, out of the PATH."""
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
        program = find("postgres", *installed)
        if os.getuid() == 0:
            try:
                pwd.getpwnam(cls.user)
            except KeyError:
                raise BenchmarkError(
                    f"postgres does not run as root, and there is no user {cls.user}"
                ) from None
        return program

    def command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.store / "socket"),
            "max_connections": "100",
            "shared_buffers": "256MB",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [*self._as_user(), self.program(), "-D", str(self.store / "data"), *options]

    def start(self) -> None:
        if not (self.store / "data").exists():
            (self.store / "socket").mkdir(parents=True)
            if os.getuid() == 0:
                owner = pwd.getpwnam(self.user)
                # Its user has to reach the store through the trial's folder.
                self.store.parent.chmod(0o711)
                for folder in (self.store, self.store / "socket"):
                    os.chown(folder, owner.pw_uid, owner.pw_gid)
            initdb = Path(self.program()).resolve().parent / "initdb"
            made = subprocess.run(
                [
                    *self._as_user(),
                    str(initdb),
                    "-D",
                    str(self.store / "data"),
                    "-U",
                    self.user,
                    "-A",
                    "trust",
                ],
                capture_output=True,
                text=True,
                timeout=START_TIMEOUT,
                cwd=self.store,
            )
            if made.returncode != 0:
                raise BenchmarkError(f"initdb failed: {made.stderr.strip()[-300:]}")
        super().start()

    def stop(self) -> None:
        if self.process is not None and self.process.running:
            # SIGTERM would wait for its clients.
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(BenchmarkError):
                self.process.wait(15)
        super().stop()

    def answers(self) -> bool:
        """Whether it lets a client in, which it does once it is done with its start."""
        hello = b"\x00\x03\x00\x00user\x00%s\x00database\x00postgres\x00\x00" % self.user.encode()
        return self._exchange(
            (len(hello) + 4).to_bytes(4, "big") + hello, b"R\x00\x00\x00\x08\x00\x00\x00\x00"
        )

    def _as_user(self) -> list[str]:
        change = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        return change if os.getuid() == 0 else []

    @classmethod
    def version(cls) -> str:
        return _output([cls.program(), "--version"]).split()[-1]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return ""


def settle(seconds: float = 0.3) -> None:
    """A breath between starting a server and measuring it, for what it still does after its first answer."""
    time.sleep(seconds)
