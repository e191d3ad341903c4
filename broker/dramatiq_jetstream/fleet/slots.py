"""One place in a fleet: the process that serves there, the one that is to replace it, and when to start another.

A process that was ready and dies is replaced at once. One that dies before it is ready, or within a second of it, is
replaced after a pause that doubles up to half a minute.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dramatiq_jetstream.wire.intake import deliveries_in

from .board import SERIES, Board, Counts, Held
from .channel import Channel
from .child import STACKS_SIGNAL
from .options import WorkOptions

__all__ = ["Series", "Slot", "WorkerProcess"]

#: An actor and its queue.
Series = tuple[str, str]

#: The actors beyond those that are counted each by itself.
OTHERS: Series = ("(others)", "")

#: A process that lived this long after it was ready is replaced at once, in seconds.
LIVED_SECONDS = 1.0

#: The longest pause before a process is started again, in seconds.
MAX_PAUSE_SECONDS = 30.0

#: How long a process that is to stop now may take, in seconds.
STOP_NOW_SECONDS = 2.0

#: Milliseconds without a sign of life after which a process counts as stuck.
STUCK_MS = 15_000

#: How long a process gets to write the stacks of its threads, in seconds.
STACKS_SECONDS = 0.25

#: Lines of a process's output that are kept for when it dies.
LAST_WORDS = 20

#: A limit that recycles processes differs by up to this share, so that they are not replaced all at once.
JITTER = 0.1


class WorkerProcess:
    """A worker process, its output, its channel and its board.

    Attributes:
      ready: What it said of itself when its worker had started; None before.
      stopping, told_to_stop_now: Whether it was told to stop, and to do so at once.
      last_words: The end of what it printed.
      outlived: The delivery for which it is killed, because its attempt outlived its hard time limit.
      connection: A copy of its connection to NATS.
      asked: What it was asked to hand on and has not confirmed.
    """

    def __init__(self, options: WorkOptions) -> None:
        ours, theirs = socket.socketpair()
        self.board = Board.create()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.channel = Channel(ours)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "dramatiq_jetstream.fleet.child",
                    options.to_json(),
                    str(theirs.fileno()),
                    str(self.board.descriptor),
                    str(self._stacks.fileno()),
                ],
                pass_fds=(theirs.fileno(), self.board.descriptor, self._stacks.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.pid = self._process.pid
        self.started = time.monotonic()
        self.ready: dict[str, Any] | None = None
        self.ready_at = 0.0
        self.failed: str | None = None
        self.stopping = self.told_to_stop_now = False
        self.stop_by = 0.0
        self.kill_at: float | None = None
        self.killed = False
        self.outlived: Held | None = None
        self.asked: list[dict[str, Any]] = []
        self.connection: socket.socket | None = None
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._jitter = 1 - JITTER * random.random()
        self._options = options

    @property
    def exit_status(self) -> int | None:
        """Its exit status, negative for the signal that ended it; None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(number)

    @property
    def threads(self) -> int:
        """How many threads run actors in it."""
        return self._options.threads if self.serves else 0

    @property
    def serves(self) -> bool:
        """Whether it takes messages."""
        return self.ready is not None and not self.stopping and self.board.connected

    @property
    def is_stuck(self) -> bool:
        """Whether its interpreter, its loop or one of its threads does not move; a long actor is none of these."""
        if self.ready is None or self.stopping:
            return False
        silent_ms = time.monotonic() * 1000 - self.board.last_beat
        return self.board.threads_lost > 0 or silent_ms > STUCK_MS

    def stop(self) -> None:
        """Have it finish what runs, and end; it is killed when that takes longer than it may."""
        if not self.stopping:
            self.stopping = True
            self.stop_by = time.monotonic() + self._options.shutdown_timeout / 1000 + 5
            self._process.terminate()

    def stop_now(self) -> None:
        """Have it return all that it holds, also what runs, and end; it is killed when it does not."""
        if self.kill_at is None:
            self.stopping = self.told_to_stop_now = True
            self.kill_at = time.monotonic() + STOP_NOW_SECONDS
            self.channel.say(stop_now=True)

    def kill(self) -> None:
        """End it without a word."""
        self.killed = True
        self._process.kill()

    def outlive(self, held: Held) -> None:
        """Have it write the stacks of its threads, then end it: an attempt of its own has outlived its limit."""
        self.outlived = held
        self._process.send_signal(STACKS_SIGNAL)
        self.kill_at = time.monotonic() + STACKS_SECONDS

    def stack(self, thread: int) -> str:
        """Where a thread was when the stacks were written, the innermost call first; empty when that is not known."""
        self._stacks.seek(0)
        for section in self._stacks.read().decode("utf-8", "replace").split("\n\n"):
            head, _, calls = section.partition("\n")
            if f"0x{thread:016x} " in head:
                return calls.strip("\n")
        return ""

    def use_connection(self, connection: socket.socket) -> None:
        """Note that it is connected to NATS, or again."""
        if self.connection is not None:
            self.connection.close()
        self.connection = connection

    def lost_deliveries(self) -> set[str]:
        """The ack subjects of what had reached this dead process, or was on its way, and is not on its board."""
        on_board = {held.ack_subject for held in self.board.held()}
        connection, self.connection = self.connection, None
        return set(deliveries_in(self.board.intake, connection)) - on_board

    def read_output(self) -> bytes:
        """What it printed since the last call; complete lines are kept as its last words."""
        try:
            text = self.output.read() or b""
        except (BlockingIOError, ValueError):
            return b""
        self.last_words.extend(text.decode("utf-8", "replace").splitlines())
        return text

    def memory(self) -> int:
        """Its resident memory in bytes, 0 where the system does not say."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def counts(self) -> dict[Series, Counts]:
        """The attempts that ended in it, by actor and queue."""
        names = [(actor, queue) for actor, queue in (self.ready or {}).get("series", ())]
        found = {name: self.board.counts(number) for number, name in enumerate(names)}
        return {**found, OTHERS: self.board.counts(SERIES - 1)}

    def attempts(self) -> int:
        """How many attempts ended in it."""
        return sum(counts.attempts for counts in self.counts().values())

    def worn(self) -> str | None:
        """Why it is to be replaced now, None if it is not."""
        options = self._options
        if self.ready is None or self.stopping:
            return None
        if options.max_tasks is not None and (attempts := self.attempts()) >= (
            options.max_tasks * self._jitter
        ):
            return f"it has run {attempts} attempts"
        age = time.monotonic() - self.started
        if options.max_age is not None and age >= options.max_age * self._jitter:
            return f"it is {age:.0f} s old"
        if options.max_memory is not None and (memory := self.memory()) >= options.max_memory * self._jitter:
            return f"it has {memory / 1e6:.0f} MB"
        return None

    def close(self) -> None:
        """Release what belongs to a process that has ended."""
        self.channel.close()
        self.board.close()
        self.output.close()
        self._stacks.close()


@dataclass(eq=False)
class Slot:
    """One place in the fleet.

    Attributes:
      current: The process that serves, or is starting to; None while the place waits for `not_before`.
      successor: The process that takes its place as soon as it is ready.
      deaths: How many processes in a row died before they had served.
      restarts: How often a process was replaced because it had died.
    """

    number: int
    current: WorkerProcess | None = None
    successor: WorkerProcess | None = None
    retiring: list[WorkerProcess] = field(default_factory=list)
    not_before: float = 0.0
    deaths: int = 0
    restarts: int = 0

    def processes(self) -> list[WorkerProcess]:
        return [p for p in (self.current, self.successor, *self.retiring) if p is not None]

    def lost(self, process: WorkerProcess) -> None:
        """Note that a process has ended, and when the next one may start."""
        if process in self.retiring:
            self.retiring.remove(process)
            return
        if process is self.successor:
            self.successor = None
        else:
            self.current, self.successor = self.successor, None
            self.restarts += 1
        now = time.monotonic()
        if process.ready is not None and now - process.ready_at >= LIVED_SECONDS:
            self.deaths = 0
            return
        self.deaths += 1
        self.not_before = now + min(MAX_PAUSE_SECONDS, 0.5 * 2 ** (self.deaths - 1))

    def promote(self) -> None:
        """Put a successor that is ready in place, and have the process before it finish."""
        if self.successor is not None and self.successor.ready is not None:
            if self.current is not None:
                self.current.stop()
                self.retiring.append(self.current)
            self.current, self.successor = self.successor, None
