"""The processes of `make up`, under honcho: nats starts first and stops last, so no process is ever without it.

Only the head of each process tree is told to stop, because workers and gunicorn stop their own children.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any, Final

import honcho.manager
from honcho.manager import Manager
from honcho.printer import Printer

#: How long nats may take to start, and everything to stop, in seconds.
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 60.0

#: The processes whose workers have to be ready, by their names in Procfile.dev.
_WORKERS: Final = frozenset({"worker", "worker_payments", "worker_webhooks"})


class Output(Printer):  # type: ignore[misc]  # honcho has no types
    """Shows the output, and releases a semaphore for each worker process that is ready."""

    def __init__(self, workers: threading.Semaphore) -> None:
        super().__init__(sys.stdout)
        self._workers = workers

    def write(self, message: Any) -> None:
        text = message.data.decode(errors="replace") if isinstance(message.data, bytes) else message.data
        if message.name in _WORKERS and "Worker process is ready" in str(text):
            self._workers.release()
        super().write(message)


class Processes(Manager):  # type: ignore[misc]
    """Starts nats first and stops it last.

    Attributes:
      workers: Is released once for each worker process that is ready.
    """

    _processes: dict[str, Any]
    _terminating: bool

    def __init__(self, *, nats_port: int) -> None:
        honcho.manager.KILL_WAIT = int(_STOP_SECONDS)
        self.workers = threading.Semaphore(0)
        self._nats_port = nats_port
        super().__init__(Output(self.workers))
        self._procmgr = _Heads()

    def _start(self) -> None:
        everything = self._processes
        first = {name: process for name, process in everything.items() if name == "nats"}
        rest = {name: process for name, process in everything.items() if name != "nats"}
        try:
            self._processes = first
            super()._start()
            if first:
                _wait_for_nats(self._nats_port)
            self._processes = rest
            super()._start()
        finally:
            self._processes = everything

    def terminate(self) -> None:
        if not self._terminating:
            self._terminating = True
            threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        nats = [process for name, process in self._processes.items() if name == "nats"]
        others = [process for name, process in self._processes.items() if name != "nats"]
        for group in (others, nats):
            told: list[Any] = []
            deadline = time.monotonic() + _STOP_SECONDS / 2
            while time.monotonic() < deadline and any("returncode" not in one for one in group):
                for one in group:
                    if "pid" in one and "returncode" not in one and one not in told:
                        self._procmgr.terminate(one["pid"])
                        told.append(one)
                time.sleep(0.05)


class _Heads:
    """Tells processes to stop: to stop in good order the head of each alone, to die all of each."""

    def terminate(self, pid: int) -> None:
        self._signal(os.kill, pid, signal.SIGTERM)

    def kill(self, pid: int) -> None:
        self._signal(os.killpg, pid, signal.SIGKILL)

    @staticmethod
    def _signal(send: Any, pid: int, number: int) -> None:
        try:
            send(pid, number)
        except ProcessLookupError:
            pass  # it has ended by itself


def _wait_for_nats(port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                if probe.recv(4) == b"INFO":
                    return
        except OSError:
            pass
        time.sleep(0.05)
    print(
        f"nats-server does not answer on port {port}; its log is .data/nats/nats-server.log", file=sys.stderr
    )
