"""Real subprocesses for tests: started, watched through their log, killed, never left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.polling import eventually

REPOSITORY = Path(__file__).resolve().parents[2]


class Process:
    """A subprocess in a session of its own, whose output goes to a file.

    `with Process([...], log=tmp_path / "worker.log") as process:` starts it and stops it at the end with
    everything it started. `env` is added to the environment; `cwd` and `path` (further import directories)
    are for programs that the test wrote into a temporary directory.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        path: Iterable[Path] = (),
    ) -> None:
        self.command = [os.fspath(part) for part in command]
        self.log = log
        self.cwd = cwd or REPOSITORY
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        import_path = [*map(str, path), *filter(None, [self.env.get("PYTHONPATH")])]
        self.env["PYTHONPATH"] = os.pathsep.join(import_path)
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        """Start it (again, after it has ended: the log goes on)."""
        assert self._popen is None or self._popen.poll() is not None, f"{self.command} is still running"
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )
        return self

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        assert self._popen is not None, f"{self.command} was not started"
        return self._popen

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_output(self, pattern: str, *, count: int = 1, timeout: float = 60.0) -> list[str]:
        """Wait until the regular expression was found `count` times; returns what was found."""

        def found() -> list[str]:
            ended = not self.running
            matches = [m.group(0) for m in re.finditer(pattern, self.output)]
            if len(matches) < count and ended:
                raise ProcessEnded(
                    f"{self.command} ended with {self.popen.returncode}:\n{self.output[-4000:]}"
                )
            return matches if len(matches) >= count else []

        try:
            return eventually(found, timeout=timeout)
        except AssertionError:
            tail = self.output[-4000:]
            raise AssertionError(f"{pattern!r} not in the output within {timeout:g} s:\n{tail}") from None

    def children(self) -> list[int]:
        """The pids of its direct children (Linux), such as the worker processes of the dramatiq command."""
        return children(self.pid)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9 for it and everything in its session, and wait for its end."""
        self._signal_session(signal.SIGKILL)
        self.popen.wait(timeout=30)

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for its end by itself; returns the exit code."""
        try:
            return self.popen.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            tail = self.output[-4000:]
            raise AssertionError(f"{self.command} did not end within {timeout:g} s:\n{tail}") from None

    def stop(self, timeout: float = 60.0, *, signal_number: int = signal.SIGTERM) -> int:
        """Ask the process to stop, kill everything it left after `timeout`; returns the exit code."""
        if self.running:
            self.send_signal(signal_number)
        try:
            return self.popen.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            tail = self.output[-4000:]
            raise AssertionError(f"{self.command} did not stop within {timeout:g} s:\n{tail}") from None
        finally:
            self._signal_session(signal.SIGKILL)

    def _signal_session(self, number: int) -> None:
        # The group id stays reserved while a member lives, so this cannot hit a stranger, and it also
        # reaches children whose parent was killed alone.
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def __enter__(self) -> Process:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            # The test's own failure is the interesting one.
            self.kill()


class ProcessEnded(Exception):
    """The process ended while something was still expected of it; its output is in the message."""


def python(*arguments: str | os.PathLike[str], log: Path, **options: object) -> Process:
    """A Python program with this interpreter: python("-m", "web", log=...)."""
    return Process([sys.executable, *arguments], log=log, **options)  # type: ignore[arg-type]


def dramatiq_worker(
    module: str,
    *,
    log: Path,
    processes: int = 1,
    threads: int = 4,
    arguments: Sequence[str] = (),
    **options: object,
) -> Process:
    """The real `dramatiq` command for a module; up once WORKER_READY was logged `processes` times."""
    command = ["-m", "dramatiq", module, "--processes", str(processes), "--threads", str(threads), *arguments]
    return python(*command, log=log, **options)


def supervised_workers(
    module: str,
    *,
    log: Path,
    processes: int = 1,
    threads: int = 4,
    arguments: Sequence[str] = (),
    **options: object,
) -> Process:
    """The real `fleet work` command for a module; up once WORKER_READY was logged `processes` times."""
    command = [
        "-m",
        "dramatiq_jetstream.cli",
        "work",
        module,
        "-p",
        str(processes),
        "-t",
        str(threads),
        *arguments,
    ]
    return python(*command, log=log, **options)


WORKER_READY = r"Worker process is ready for action"


def children(pid: int) -> list[int]:
    """The pids of the direct children of a process (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.extend(int(child) for child in task.read_text().split())
        except FileNotFoundError:
            # The thread ended between the listing and the read.
            continue
    return found
