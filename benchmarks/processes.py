"""Starts, watches and ends the processes that a benchmark owns.

Every process leads a session of its own, so that what it forks is found again (for its CPU time and memory)
and ended with it, and nothing else is ever touched. Children that make sessions of their own, as PostgreSQL's do, are
found by their parents. CPU time and peak memory are read from `/proc`; where there
is none (macOS) they are reported as unknown.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Timeout)\w*:.*", re.MULTILINE)
TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Usage:
    """What a set of processes has used since they started."""

    cpu_seconds: float | None
    rss_bytes: int | None
    peak_rss_bytes: int | None

    def cpu_since(self, earlier: Usage) -> float | None:
        if self.cpu_seconds is None or earlier.cpu_seconds is None:
            return None
        return self.cpu_seconds - earlier.cpu_seconds


def wait_until(condition: Callable[[], bool], timeout: float, what: str, interval: float = 0.02) -> None:
    """Polls `condition`, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what}: not within {timeout:.0f} s")
        time.sleep(interval)


class Process:
    """One command and everything that it forks."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def require_running(self) -> None:
        if not self.running:
            raise BenchmarkError(f"{self.command[0]} ended with {self._popen.returncode}: {self.complaint()}")

    def tail(self, size: int = 1500) -> str:
        return self.log.read_text(errors="replace")[-size:]

    def complaint(self) -> str:
        """The first line of its log that names an error, else the end of the log."""
        named = ERROR_LINE.search(self.log.read_text(errors="replace"))
        return named.group() if named else self.tail(300)

    def wait(self, timeout: float) -> int:
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{' '.join(self.command)}: still running after {timeout:.0f} s") from None

    def members(self) -> list[int]:
        """The pids of this process, of all that belong to its session, and of their children."""
        return [pid for pid, _ in _stats_of({self.pid})]

    def usage(self) -> Usage:
        return usage_of([self])

    def kill(self) -> None:
        """SIGKILL to all members; used for crashes and for what did not stop by itself."""
        for pid in self.members() or [self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._popen.wait(10)

    def stop(self, timeout: float = 15.0) -> None:
        """SIGTERM to the command, SIGKILL to its members that are left after `timeout` seconds."""
        if self.running:
            self._popen.terminate()
            try:
                self._popen.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
        self.kill()


def usage_of(processes: Sequence[Process]) -> Usage:
    """The sum over all living members of these processes.

    The time of children that have ended is counted through their parent, as the kernel does.
    """
    if not PROC.is_dir():
        return Usage(None, None, None)
    cpu = rss = peak = 0
    for pid, stat in _stats_of({process.pid for process in processes}):
        cpu += sum(int(value) for value in stat[11:15])
        try:
            status = (PROC / str(pid) / "status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                peak += int(line.split()[1]) * 1024
            elif line.startswith("VmRSS:"):
                rss += int(line.split()[1]) * 1024
    return Usage(cpu / TICKS, rss, peak)


def members(processes: Sequence[Process]) -> list[int]:
    """The living members of these processes, themselves included."""
    return [pid for pid, stat in _stats_of({process.pid for process in processes}) if stat[0] != "Z"]


def _stats_of(sessions: set[int]) -> list[tuple[int, list[str]]]:
    """The same of the processes in these sessions, and of all that they are parents of."""
    stats = _all_stats()
    found = {pid for pid, stat in stats if int(stat[3]) in sessions}
    more = found
    while more:
        more = {pid for pid, stat in stats if int(stat[1]) in more} - found
        found |= more
    return [(pid, stat) for pid, stat in stats if pid in found]


def _all_stats() -> list[tuple[int, list[str]]]:
    """(pid, the fields of /proc/pid/stat from the state on) of every process."""
    stats = []
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text()
        except OSError:
            continue
        stats.append((int(entry.name), text[text.rindex(")") + 2 :].split()))
    return stats
